"""Declare the layout of pytorch_diffusion, the PyTorch port of the paper's network.

A file is a flat state dict with blocks by level, `up.0` being the highest resolution. Published are
CIFAR-10 and three LSUN sets at 256x256, each as raw and as averaged weights; the names of the
latter begin with "ema_". The network is the paper's, so `recipe` is the paper's: one head,
attention at 16x16 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm_jax.weights.forms import CONV_1X1
from ddpm_jax.weights.layout import Layout, WeightSets, flat_tensors
from ddpm_jax.weights.plan import Plan, places
from ddpm_jax.weights.recognise import Architecture

# What the paper's network fixes, in every code base that kept to it.
PAPER_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "attention_in_mid": (True,),
    "attention_placement": ("block",),
    "heads": (1,),
    "head_channels": (0,),
    "conditioning": ("add",),
    "embedding_denominator": ("half_minus_one",),
    "timestep_scale": (1.0,),
    "group_norm_groups": (32,),
    "group_norm_epsilon": (1e-6,),
    "resampling": ("conv", "pool"),
    "down_padding": ("asymmetric",),
    "skip_scale": (1.0,),
    "num_classes": (0,),
}


def paper_recipe(architecture: Architecture) -> Mapping[str, Any]:
    """Return Ho et al.'s settings: of 256x256 for networks of six levels, else of CIFAR-10."""
    large = architecture.plan.levels >= 6
    return {
        "model.dropout": 0.0 if large else 0.1,
        "diffusion.variance": "learned"
        if architecture.learns_variance
        else "fixed_small"
        if large
        else "fixed_large",
        "loss.kind": "vlb" if architecture.learns_variance else "simple",
        "optimizer.learning_rate": 2e-5 if large else 2e-4,
        "train.batch_size": 64 if large else 128,
    }


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there."""
    where = {
        "time_embedding_0": "temb.dense.0",
        "time_embedding_1": "temb.dense.1",
        "conv_in": "conv_in",
        "mid_block_1": "mid.block_1",
        "mid_attn": "mid.attn_1",
        "mid_block_2": "mid.block_2",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    for name, side, kind, level, index in places(plan):
        if side != "mid":
            resample = "downsample" if side == "down" else "upsample"
            where[name] = (
                f"{side}.{level}.{resample}.conv"
                if kind == "resample"
                else f"{side}.{level}.{kind}.{index}"
            )
    return where


LAYOUT = Layout(
    name="pesser",
    modules=modules,
    layers={
        **{
            name: name
            for name in (
                "norm1",
                "conv1",
                "temb_proj",
                "norm2",
                "conv2",
                "norm",
                "q",
                "k",
                "v",
                "proj_out",
            )
        },
        "shortcut": "nin_shortcut",
    },
    forms=dict.fromkeys(("shortcut", "q", "k", "v", "proj_out"), CONV_1X1),
    unpack=lambda contents: WeightSets(unlabelled=flat_tensors(contents, "state dict")),
    switches=PAPER_SWITCHES,
    recipe=paper_recipe,
)
