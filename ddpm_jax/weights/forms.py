"""How one tensor is written elsewhere: axes in another order, several in one, rows shuffled. All go both ways, bit for bit.

Ours: kernels [h, w, in, out] and [in, out], q, k and v apart, the time embedding's inputs [sin, cos]. Whatever else a config
asks for (`qkv_layout`, `embedding_order`) is a rearrangement of that, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import UNetConfig

Flat = dict[str, np.ndarray]  # "mid_attn/q/kernel" -> array


class Form(NamedTuple):
    """read: theirs to ours; write: ours to theirs."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


AS_IS = Form(lambda x: x, lambda x: x)
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # PyTorch's [out, in, h, w]
LINEAR = Form(np.transpose, np.transpose)  # [out, in]
CONV_1X1 = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [out, in, 1, 1]
CONV_1 = Form(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])  # [out, in, 1]


def split_qkv(fused: np.ndarray, order: str, heads: int) -> list[np.ndarray]:
    """[..., 3c] to q, k and v [..., c]; `order` is "fused", [3, heads, d], or "fused_by_head", [heads, 3, d]."""
    leading, width = fused.shape[:-1], fused.shape[-1] // (3 * heads)
    if order == "fused":
        parts = fused.reshape(*leading, 3, heads * width)
        return [parts[..., i, :] for i in range(3)]
    parts = fused.reshape(*leading, heads, 3, width)
    return [parts[..., i, :].reshape(*leading, heads * width) for i in range(3)]


def join_qkv(parts: list[np.ndarray], order: str, heads: int) -> np.ndarray:
    """The inverse of `split_qkv`."""
    if order == "fused":
        return np.concatenate(parts, axis=-1)
    by_head = [part.reshape(*part.shape[:-1], heads, 1, -1) for part in parts]
    return np.concatenate(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)


def embedding_rows(width: int, order: str) -> np.ndarray:
    """Where the rows of a first time-embedding kernel of that order lie in one of order "sin_cos": theirs = ours[rows]."""
    half = width // 2
    sin, cos = np.arange(half), np.arange(half, 2 * half)
    orders = {"sin_cos": [sin, cos], "cos_sin": [cos, sin], "interleaved": [np.stack([sin, cos], axis=1).ravel()]}
    return np.concatenate([*orders[order], np.arange(2 * half, width)])


def heads_of(model: UNetConfig, width: int) -> int:
    """How many heads an attention block of `width` channels has."""
    return width // model.head_channels if model.head_channels else model.heads


def to_standard(flat: Flat, model: UNetConfig) -> Flat:
    """Our parameters under `model` as they would be with separate q, k, v and the embedding [sin, cos]."""
    flat, out = dict(flat), {}
    for name, array in flat.items():
        path = name.split("/")
        if path[-2:-1] == ["qkv"]:
            for part, piece in zip("qkv", split_qkv(array, model.qkv_layout, heads_of(model, array.shape[-1] // 3))):
                out["/".join([*path[:-2], part, path[-1]])] = piece
        else:
            out[name] = array
    kernel = out["time_embedding_0/kernel"]
    back = np.argsort(embedding_rows(len(kernel), model.embedding_order))
    return out | {"time_embedding_0/kernel": kernel[back]}


def from_standard(flat: Flat, model: UNetConfig) -> Flat:
    """The inverse of `to_standard`."""
    kernel = flat["time_embedding_0/kernel"]
    out = flat | {"time_embedding_0/kernel": kernel[embedding_rows(len(kernel), model.embedding_order)]}
    if model.qkv_layout == "separate":
        return out
    for name in [name for name in out if name.split("/")[-2:-1] == ["q"]]:
        module, _, leaf = name.rpartition("/q/")
        parts = [out.pop(f"{module}/{part}/{leaf}") for part in "qkv"]
        out[f"{module}/qkv/{leaf}"] = join_qkv(parts, model.qkv_layout, heads_of(model, parts[0].shape[-1]))
    return out
