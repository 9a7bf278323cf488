"""Rearrange one tensor: axes in another order, several tensors in one, rows shuffled.

Everything goes both ways, bit for bit. Our standard form has kernels [h, w, in, out] and [in, out],
q, k and v apart, and a time embedding whose inputs are [sin, cos]. Whatever else a config asks for
(`qkv_layout`, `embedding_order`) is a rearrangement of that, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import UNetConfig

Flat = dict[str, np.ndarray]  # "mid_attn/q/kernel" -> array


class Form(NamedTuple):
    """Form of one tensor: `read` turns theirs into ours, `write` ours into theirs."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


AS_IS = Form(lambda x: x, lambda x: x)
CONV = Form(
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)  # PyTorch's [out, in, h, w]
LINEAR = Form(np.transpose, np.transpose)  # [out, in]
CONV_1X1 = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [out, in, 1, 1]
CONV_1 = Form(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])  # [out, in, 1]


def split_qkv(fused: np.ndarray, order: str, heads: int) -> list[np.ndarray]:
    """Split [..., 3c] into q, k and v [..., c].

    Args:
      fused: the three in one.
      order: "fused", 3c = [3, heads, d], or "fused_by_head", 3c = [heads, 3, d].
      heads: how many.
    """
    leading, width = fused.shape[:-1], fused.shape[-1] // (3 * heads)
    if order == "fused":
        parts = fused.reshape(*leading, 3, heads * width)
        return [parts[..., i, :] for i in range(3)]
    parts = fused.reshape(*leading, heads, 3, width)
    return [parts[..., i, :].reshape(*leading, heads * width) for i in range(3)]


def join_qkv(parts: list[np.ndarray], order: str, heads: int) -> np.ndarray:
    """Join q, k and v: the inverse of `split_qkv`."""
    if order == "fused":
        return np.concatenate(parts, axis=-1)
    by_head = [part.reshape(*part.shape[:-1], heads, 1, -1) for part in parts]
    return np.concatenate(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)


def embedding_rows(width: int, order: str) -> np.ndarray:
    """Return where the rows of the first time-embedding kernel lie in ours: theirs = ours[rows].

    Args:
      width: of the embedding.
      order: of theirs, as in UNetConfig.embedding_order; ours is "sin_cos".
    """
    half = width // 2
    sin, cos = np.arange(half), np.arange(half, 2 * half)
    orders = {
        "sin_cos": [sin, cos],
        "cos_sin": [cos, sin],
        "interleaved": [np.stack([sin, cos], axis=1).ravel()],
    }
    return np.concatenate([*orders[order], np.arange(2 * half, width)])


def heads_of(model: UNetConfig, width: int) -> int:
    """Return how many heads an attention block of `width` channels has."""
    return width // model.head_channels if model.head_channels else model.heads


def to_standard(flat: Flat, model: UNetConfig) -> Flat:
    """Rearrange parameters of `model` into the standard form: q, k, v apart, [sin, cos]."""
    flat, out = dict(flat), {}
    for name, array in flat.items():
        path = name.split("/")
        if path[-2:-1] == ["qkv"]:
            for part, piece in zip(
                "qkv", split_qkv(array, model.qkv_layout, heads_of(model, array.shape[-1] // 3))
            ):
                out["/".join([*path[:-2], part, path[-1]])] = piece
        else:
            out[name] = array
    kernel = out["time_embedding_0/kernel"]
    back = np.argsort(embedding_rows(len(kernel), model.embedding_order))
    return out | {"time_embedding_0/kernel": kernel[back]}


def from_standard(flat: Flat, model: UNetConfig) -> Flat:
    """Rearrange parameters in the standard form as `model` has them: inverts `to_standard`."""
    kernel = flat["time_embedding_0/kernel"]
    out = flat | {
        "time_embedding_0/kernel": kernel[embedding_rows(len(kernel), model.embedding_order)]
    }
    if model.qkv_layout == "separate":
        return out
    for name in [name for name in out if name.split("/")[-2:-1] == ["q"]]:
        module, _, leaf = name.rpartition("/q/")
        parts = [out.pop(f"{module}/{part}/{leaf}") for part in "qkv"]
        out[f"{module}/qkv/{leaf}"] = join_qkv(
            parts, model.qkv_layout, heads_of(model, parts[0].shape[-1])
        )
    return out
