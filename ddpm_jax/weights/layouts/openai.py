"""Declare the layout of improved and guided diffusion: blocks in one running list each way.

Attention fuses q, k and v, of several heads, and variances are learned. The files are flat state
dicts and name none of their settings; `recipe` tells the published ones apart by their build:

  improved, scale-shift         4000 cosine steps, 4 heads; time is rescaled to 0..1000 unless the
                                network has classes
  improved, LSUN (no shift)     1000 linear steps, 1 head
  guided (residual resampling)  1000 linear steps, 64 channels a head; the 64x64 one has cosine
                                steps and the new order of q, k and v, the 128x128 one 4 heads

The two orders of q, k and v look alike in a file: `qkv_layout` "fused_by_head" is the old one,
"fused" the new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm_jax.weights.forms import CONV_1, CONV_1X1
from ddpm_jax.weights.layout import Layout, WeightSets, flat_tensors
from ddpm_jax.weights.plan import Plan, places
from ddpm_jax.weights.recognise import Architecture

_LISTS = {"down": "input_blocks", "up": "output_blocks"}


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there."""
    where = {
        "time_embedding_0": "time_embed.0",
        "time_embedding_1": "time_embed.2",
        "label_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid_block_1": "middle_block.0",
        "mid_attn": "middle_block.1",
        "mid_block_2": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = {"down": 0, "up": -1}
    for name, side, kind, level, _ in places(plan):
        if side == "mid":
            continue
        # On the way down a change of size is an item of the list; on the way up, the last part of
        # one.
        attention = level in plan.attention_levels
        number[side] += kind == "block" or (kind == "resample" and side == "down")
        part = {"block": 0, "attn": 1, "resample": 0 if side == "down" else 1 + attention}[kind]
        where[name] = f"{_LISTS[side]}.{number[side]}.{part}"
        if kind == "resample" and plan.resampling == "conv":
            where[name] += ".op" if side == "down" else ".conv"
    return where


def recipe(architecture: Architecture) -> Mapping[str, Any]:
    """Return the published settings, by the table at the head of this file."""
    guided = architecture.plan.resampling == "residual"
    small = guided and architecture.base_channels == 192
    cosine = small or (not guided and architecture.conditioning == "scale_shift")
    timesteps = 4000 if cosine and not guided else 1000
    rescaled = timesteps == 4000 and not architecture.num_classes
    learned = architecture.learns_variance
    if guided and architecture.channel_mult != (1, 1, 2, 3, 4):
        heads = {"model.head_channels": 64}
    else:
        heads = {"model.heads": 4 if guided or architecture.conditioning == "scale_shift" else 1}
    return {
        **heads,
        "model.qkv_layout": "fused" if small else "fused_by_head",
        "model.timestep_scale": 1000 / timesteps if rescaled else 1.0,
        "diffusion.timesteps": timesteps,
        "diffusion.schedule": "cosine" if cosine else "linear",
        "diffusion.rescale_betas": True,  # of its linear schedule: the same for 1000 steps
        "diffusion.variance": "learned_range" if learned else "fixed_large",
        "loss.kind": "hybrid" if learned else "simple",
        "loss.vlb_weight": 1 / timesteps if architecture.num_classes else 1e-3,
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup_steps": 0,
        "optimizer.gradient_clip": 0.0,
        "data.flip": False,
    }


LAYOUT = Layout(
    name="openai",
    modules=modules,
    layers={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "temb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "shortcut": "skip_connection",
        "norm": "norm",
        "qkv": "qkv",
        "proj_out": "proj_out",
    },
    forms={"shortcut": CONV_1X1, "qkv": CONV_1, "proj_out": CONV_1},
    unpack=lambda contents: WeightSets(unlabelled=flat_tensors(contents, "state dict")),
    switches={
        "attention_in_mid": (True,),
        "attention_placement": ("block",),
        "embedding_denominator": ("half",),
        "group_norm_groups": (32,),
        "group_norm_epsilon": (1e-5,),
        "resampling": ("conv", "pool", "residual"),
        "down_padding": ("symmetric",),
        "skip_scale": (1.0,),
    },
    recipe=recipe,
    # Attention at 32, 16 and 8, or at 16 and 8; LSUN of the first paper at 16 alone.
    smallest_attention=lambda levels: 16 if levels == 1 else 8,
    qkv_order=lambda model: "fused" if model.qkv_layout == "fused" else "fused_by_head",
    embedding_order="cos_sin",
)
