"""Declare the layout of pytorch-ddpm: blocks in one running list each way.

Attention is inside its block, and the time embedding is a stored table of sinusoids. The graph is
the paper's, but sin and cos alternate (absorbed), frequencies divide by half, epsilon is 1e-5 and
the strided convolution pads both sides. A checkpoint holds raw and averaged weights. Its sampler
clips nothing (a slip of its code).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.forms import CONV_1X1
from ddpm_jax.weights.layout import Layout, Tensors, WeightSets, flat_tensors
from ddpm_jax.weights.layouts import pesser
from ddpm_jax.weights.plan import Plan, places

_TABLE = "time_embedding.timembedding.0.weight"
_LISTS = {"down": "downblocks", "mid": "middleblocks", "up": "upblocks"}


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there."""
    where = {
        "time_embedding_0": "time_embedding.timembedding.1",
        "time_embedding_1": "time_embedding.timembedding.3",
        "conv_in": "head",
        "norm_out": "tail.0",
        "conv_out": "tail.2",
    }
    count = dict.fromkeys(_LISTS, -1)
    for place in places(plan):
        if place.kind != "attn":
            count[place.side] += 1
        where[place.name] = f"{_LISTS[place.side]}.{count[place.side]}"
        where[place.name] += {"block": "", "attn": ".attn", "resample": ".main"}[place.kind]
    return where


def without_table(tensors: Tensors) -> Tensors:
    """Take out the table of time embeddings, which is computed here, and check it instead.

    Raises:
      WeightsError: the table is not that of angles t * 10000^(-i / half), sin and cos in turn.
    """
    tensors = dict(tensors)
    table = tensors.pop(_TABLE, None)
    if table is not None:
        half = table.shape[-1] // 2
        angles = np.arange(len(table))[:, None] * 1e4 ** (-np.arange(half) / half)[None, :]
        sinusoids = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(
            len(table), 2 * half
        )
        # Theirs is computed in float32: an angle near 1000 is known to about 1e-4.
        if (
            table.ndim != 2
            or table.shape != sinusoids.shape
            or np.abs(table - sinusoids).max() > 1e-3
        ):
            raise WeightsError(
                f"has in {_TABLE} something else than the sinusoids of layout w86763777"
            )
    return tensors


def unpack(contents: Any) -> WeightSets:
    """Return the two models of a checkpoint, or a flat state dict."""
    if isinstance(contents, dict) and "net_model" in contents:
        raw = without_table(flat_tensors(contents["net_model"], "state dict in net_model"))
        ema = contents.get("ema_model")
        return WeightSets(
            raw,
            None if ema is None else without_table(flat_tensors(ema, "state dict in ema_model")),
        )
    return WeightSets(unlabelled=without_table(flat_tensors(contents, "state dict")))


LAYOUT = Layout(
    name="w86763777",
    modules=modules,
    layers={
        "norm1": "block1.0",
        "conv1": "block1.2",
        "temb_proj": "temb_proj.1",
        "norm2": "block2.0",
        "conv2": "block2.3",
        "shortcut": "shortcut",
        "norm": "group_norm",
        "q": "proj_q",
        "k": "proj_k",
        "v": "proj_v",
        "proj_out": "proj",
    },
    forms=dict.fromkeys(("shortcut", "q", "k", "v", "proj_out"), CONV_1X1),
    unpack=unpack,
    switches={
        **pesser.PAPER_SWITCHES,
        "embedding_denominator": ("half",),
        "group_norm_epsilon": (1e-5,),
        "resampling": ("conv",),
        "down_padding": ("symmetric",),
    },
    recipe=pesser.paper_recipe,
    embedding_order="interleaved",
)
