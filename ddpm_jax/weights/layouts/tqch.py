"""Declare the layout of ddpm-torch: the paper's network, with q, k and v fused in one convolution.

Modules are listed by level. A level with attention keeps each block and its attention in a pair.
Checkpoints hold raw weights and, as the "shadow", averaged ones. Its recipes are the paper's but
for CelebA at 64x64: fixed_small, no dropout, a learning rate of 2e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.forms import CONV_1X1
from ddpm_jax.weights.layout import Layout, WeightSets, flat_tensors
from ddpm_jax.weights.layouts import pesser
from ddpm_jax.weights.plan import Plan, places
from ddpm_jax.weights.recognise import Architecture


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there."""
    where = {
        "time_embedding_0": "embed.0",
        "time_embedding_1": "embed.2",
        "conv_in": "in_conv",
        "mid_block_1": "middle.0",
        "mid_attn": "middle.1",
        "mid_block_2": "middle.2",
        "norm_out": "out_conv.0",
        "conv_out": "out_conv.2",
    }
    for name, side, kind, level, index in places(plan):
        if side != "mid":
            # A convolution that resamples stands behind a module without weights, which pads or
            # enlarges.
            part = {
                "block": ".0" if level in plan.attention_levels else "",
                "attn": ".1",
                "resample": ".1",
            }[kind]
            where[name] = f"{side}samples.level_{level}.{index}{part}"
    return where


def unpack(contents: Any) -> WeightSets:
    """Return the model and the shadow of a checkpoint, or a flat state dict."""
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        return WeightSets(unlabelled=flat_tensors(contents, "state dict"))
    ema = contents.get("ema")
    if ema is not None and (not isinstance(ema, dict) or "shadow" not in ema):
        raise WeightsError("has an entry ema without a shadow: not of layout tqch")
    raw = flat_tensors(contents["model"], "state dict in model")
    return WeightSets(
        raw, None if ema is None else flat_tensors(ema["shadow"], "state dict in ema/shadow")
    )


def recipe(architecture: Architecture) -> Mapping[str, Any]:
    """Return the published settings."""
    celeba = architecture.plan.attention_levels == {2}
    small = {
        "model.dropout": 0.0,
        "diffusion.variance": "fixed_small",
        "optimizer.learning_rate": 2e-5,
    }
    return {
        **pesser.paper_recipe(architecture),
        **(small if celeba and not architecture.learns_variance else {}),
    }


LAYOUT = Layout(
    name="tqch",
    modules=modules,
    layers={
        "norm1": "norm1",
        "conv1": "conv1",
        "temb_proj": "fc",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "skip",
        "norm": "norm",
        "qkv": "project_in",
        "proj_out": "project_out",
    },
    forms=dict.fromkeys(("shortcut", "qkv", "proj_out"), CONV_1X1),
    unpack=unpack,
    switches=pesser.PAPER_SWITCHES,
    recipe=recipe,
)
