"""Translate the configs of diffusers, of a UNet2DModel and of its scheduler, to ours and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.build import build_process
from ddpm_jax.config import Config
from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layout import Layout, check_switches
from ddpm_jax.weights.layouts.diffusers import LAYOUT
from ddpm_jax.weights.layouts.fields import Fields
from ddpm_jax.weights.plan import Plan
from ddpm_jax.weights.recognise import recognise_process

_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
}
_VARIANCES |= {"fixed_large_log": "fixed_large", "learned_range": "learned_range"}
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "quad",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_SPACINGS = {name: name for name in ("linspace", "leading", "trailing")}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def network_facts(
    path: Path, unet: Mapping[str, Any], image_size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return what a UNet2DModel's config says, by paths of our config.

    Args:
      path: of the config, for messages.
      unet: the config.
      image_size: of the user, where sample_size is null.

    Absent fields count as the class's defaults, with one exception: an absent attention_head_dim
    is one head, as null is, since only files older than that field lack it.

    Raises:
      WeightsError: another class, or an option that this network does not have.
    """
    kind, theirs = unet.get("_class_name", "UNet2DModel"), Fields(path, unet)
    if kind not in ("UNet2DModel", "UNetUnconditionalModel"):
        raise WeightsError(f"{path}: a {kind}, not the UNet2DModel that layout diffusers is")
    like, only = theirs.like, theirs.only
    widths = theirs.all_of(int, "block_out_channels", (224, 448, 672, 896))
    groups = like("model.group_norm_groups", "norm_num_groups", 32)
    only("center_input_sample", False, default=False)
    only("time_embedding_type", "positional", default="positional")
    only("time_embedding_dim", None, 4 * widths[0])
    only("mid_block_type", "UNetMidBlock2D", default="UNetMidBlock2D")
    only("mid_block_scale_factor", 1, default=1)
    only("act_fn", "silu", "swish", default="silu")
    only("class_embed_type", None)
    only("flip_sin_to_cos", True, False, default=True)
    only("freq_shift", 0, 1, default=0)
    only("downsample_padding", 0, 1, default=1)
    only("resnet_time_scale_shift", "default", "scale_shift", default="default")
    # With scale_shift, its default of None leaves the attention in the middle without a norm.
    shifts = unet.get("resnet_time_scale_shift", "default") == "scale_shift"
    only("attn_norm_num_groups", *([] if shifts else [None]), groups)
    if min(widths) < 1 or any(width % widths[0] for width in widths):
        raise WeightsError(
            f"{path}: block_out_channels={widths}: must be multiples of the first, and positive"
        )
    size = unet.get("sample_size")
    if size is None and image_size is None:
        raise WeightsError(
            f"{path}: sample_size=None does not tell the size of the images: "
            "add config.data.image_size=N"
        )
    size = image_size if size is None else size
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise WeightsError(f"{path}: sample_size={size}: one side in pixels, or height and width")
    height, width = sides
    attention, resampling = _block_types(theirs, len(widths))
    channels, out_channels = like("data.channels", "in_channels", 3), unet.get("out_channels", 3)
    if out_channels not in (channels, 2 * channels):
        raise WeightsError(
            f"{path}: in_channels={channels}, out_channels={out_channels!r}: "
            "neither an image nor an image and its variance"
        )
    head_dim = like("model.head_channels", "attention_head_dim", None)
    denominator = "half_minus_one" if unet.get("freq_shift", 0) else "half"
    return {
        "data.image_size": height if height == width else (height, width),
        "data.channels": channels,
        "model.base_channels": widths[0],
        "model.channel_mult": tuple(width // widths[0] for width in widths),
        "model.blocks_per_level": like("model.blocks_per_level", "layers_per_block", 2),
        "model.attention_resolutions": tuple(height // 2**level for level in attention),
        "model.attention_in_mid": like("model.attention_in_mid", "add_attention", True),
        "model.heads": 1,
        "model.head_channels": head_dim or 0,
        "model.conditioning": "scale_shift" if shifts else "add",
        "model.embedding_denominator": denominator,
        "model.group_norm_groups": groups,
        "model.group_norm_epsilon": like("model.group_norm_epsilon", "norm_eps", 1e-5),
        "model.resampling": resampling,
        "model.down_padding": "symmetric" if unet.get("downsample_padding", 1) else "asymmetric",
        "model.num_classes": like("model.num_classes", "num_class_embeds", None) or 0,
    }


def dropout(path: Path, unet: Mapping[str, Any]) -> float:
    """Return the dropout of a UNet2DModel's config, which the user may train otherwise.

    Raises:
      WeightsError: it is no share.
    """
    return Fields(path, unet).like("model.dropout", "dropout", 0.0)


def embedding_order(unet: Mapping[str, Any]) -> str:
    """Return the order of the time embedding, as UNetConfig.embedding_order calls it."""
    return "cos_sin" if unet.get("flip_sin_to_cos", True) else "sin_cos"


def scheduler_settings(path: Path, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the process and the sampler of a scheduler's config, by paths of our config.

    Any of `diffusers.SCHEDULERS` has the same process. DDIM's has no variance type: its samples
    come from the sampler ddim, which over there keeps the predicted eps where it clips x0_hat. For
    the others the sampler stays ours.

    Raises:
      WeightsError: an option that the process here does not have.
    """
    theirs = Fields(path, scheduler)
    like, choose = theirs.like, theirs.choose
    ddim = scheduler.get("_class_name") in ("DDIMScheduler", "DDIMParallelScheduler")
    # Of the solvers: each but the first replaces the process by another.
    for field in ("thresholding", "use_flow_sigmas", "sigma_min", "sigma_max"):
        value = scheduler.get(field)
        if value is not None and value is not False:
            raise WeightsError(f"{path}: {field} is set, which has no counterpart here")
    if (kind := scheduler.get("timestep_type", "discrete")) != "discrete":
        raise WeightsError(f"{path}: timestep_type={kind!r}: only 'discrete', an integer t")
    clip = like("sampling.clip", "clip_sample", True)
    if clip and scheduler.get("clip_sample_range", 1.0) != 1.0:
        raise WeightsError(
            f"{path}: clip_sample_range={scheduler['clip_sample_range']}: "
            "only 1, the range of the images"
        )
    prediction = choose("prediction_type", _PREDICTIONS, "epsilon")
    to_zero = like("diffusion.zero_terminal_snr", "rescale_betas_zero_snr", None) or False
    if to_zero and prediction == "eps":
        raise WeightsError(
            f"{path}: rescale_betas_zero_snr is set: the chain ends in noise alone, from which "
            "epsilon cannot give an image: only prediction_type sample and v_prediction can"
        )
    betas = scheduler.get("trained_betas")
    process = {
        "diffusion.timesteps": like("diffusion.timesteps", "num_train_timesteps", 1000),
        "diffusion.schedule": choose("beta_schedule", _SCHEDULES, "linear"),
        "diffusion.beta_start": like("diffusion.beta_start", "beta_start", 1e-4),
        "diffusion.beta_end": like("diffusion.beta_end", "beta_end", 0.02),
    }
    if betas is not None:  # they stand for all of these, as our own exports write rescaled ones
        try:
            process = recognise_process(betas)
        except (WeightsError, ValueError, TypeError) as error:
            raise WeightsError(f"{path}: trained_betas is set: {error}") from error
    return {
        **process,
        "diffusion.zero_terminal_snr": to_zero,  # over there it is the last thing done to any betas
        "diffusion.prediction": prediction,
        # null in schedulers that draw no noise
        "diffusion.variance": choose("variance_type", _VARIANCES, "fixed_small"),
        "sampling.sampler": "ddim" if ddim else "ancestral",
        "sampling.spacing": choose("timestep_spacing", _SPACINGS, "leading"),
        "sampling.rederive_eps": not ddim,
        "sampling.clip": clip,
    }


def _block_types(theirs: Fields, levels: int) -> tuple[list[int], str]:
    """Read the levels with attention and the way of resampling off the names of block types."""
    down = theirs.all_of(str, "down_block_types", ("DownBlock2D", *("AttnDownBlock2D",) * 3))
    up = theirs.all_of(str, "up_block_types", (*("AttnUpBlock2D",) * 3, "UpBlock2D"))
    down, up = ([name.removeprefix("UNetRes") for name in names] for names in (down, up))
    types = [theirs.values.get(f"{way}sample_type", "conv") for way in ("down", "up")]
    residual = any("Resnet" in name for name in down) or types[0] == "resnet"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if residual
        else ("DownBlock2D", "UpBlock2D")
    )
    attention = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    mirrored = ["AttnDownBlock2D" if level in attention else plain[0] for level in range(levels)]
    mirrored_up = [
        "AttnUpBlock2D" if level in attention else plain[1] for level in reversed(range(levels))
    ]
    if [down, up] != [mirrored, mirrored_up]:
        raise WeightsError(
            f"{theirs.path}: block types {down} and {up}: the way up must mirror the way down, "
            "and no other types are known"
        )
    if attention and types != ["resnet" if residual else "conv"] * 2:
        raise WeightsError(
            f"{theirs.path}: downsample_type and upsample_type are {types}: "
            "they must both be conv, or both resnet"
        )
    return attention, "residual" if residual else "conv"


# ------------------------------------------------------------------------- our config to theirs


def network_config(config: Config) -> dict[str, Any]:
    """Return the config.json of the UNet2DModel that our network is.

    Raises:
      WeightsError: no UNet2DModel is this network.
    """
    check_switches(LAYOUT, config, "layout diffusers cannot express")
    model, plan = config.model, Plan.of(config)
    widths = [model.base_channels * factor for factor in model.channel_mult]
    with_attention = {widths[level] for level in plan.attention_levels} | (
        {widths[-1]} if plan.attention_in_mid else set()
    )
    head_dim = model.head_channels or None
    if not head_dim and model.heads > 1:
        if len(with_attention) > 1:
            raise WeightsError(
                f"layout diffusers cannot express config.model.heads={model.heads} at several "
                f"widths {sorted(with_attention)}: it fixes the channels of a head, "
                "not their number"
            )
        head_dim = (
            widths[-1] // model.heads if not with_attention else with_attention.pop() // model.heads
        )
    residual = model.resampling == "residual"
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if residual
        else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.data.image_size,  # of other than squares, as they have it too
        "in_channels": config.data.channels,
        "out_channels": config.output_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 1 if model.embedding_denominator == "half_minus_one" else 0,
        "flip_sin_to_cos": False,
        "down_block_types": [
            "AttnDownBlock2D" if i in plan.attention_levels else down for i in range(plan.levels)
        ],
        "up_block_types": [
            "AttnUpBlock2D" if i in plan.attention_levels else up
            for i in reversed(range(plan.levels))
        ],
        "block_out_channels": widths,
        "layers_per_block": model.blocks_per_level,
        "mid_block_scale_factor": 1,
        "downsample_padding": 1 if model.down_padding == "symmetric" else 0,
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": head_dim,
        "norm_num_groups": model.group_norm_groups,
        "attn_norm_num_groups": None if model.conditioning == "add" else model.group_norm_groups,
        "norm_eps": model.group_norm_epsilon,
        "resnet_time_scale_shift": "default" if model.conditioning == "add" else "scale_shift",
        "add_attention": model.attention_in_mid,
        "num_class_embeds": model.num_classes or None,
    }


def scheduler_config(config: Config) -> dict[str, Any]:
    """Return the scheduler_config.json of a DDPMScheduler that draws as our ancestral sampler.

    A schedule that it has no name for becomes a list of betas.

    Raises:
      WeightsError: prediction mu, or a learned log-variance, which it would take for a variance.
    """
    options = config.diffusion
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if options.prediction not in predictions:
        raise WeightsError(
            f"layout diffusers cannot express config.diffusion.prediction={options.prediction}"
        )
    if options.variance == "learned":
        raise WeightsError(
            "layout diffusers cannot express config.diffusion.variance=learned: "
            "it reads a variance, not its logarithm"
        )
    schedules = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    named = options.schedule in schedules and not options.rescale_betas
    betas = None
    if not named:
        plain = dataclasses.replace(config.diffusion, zero_terminal_snr=False)
        betas = build_process(dataclasses.replace(config, diffusion=plain)).schedule.betas.tolist()
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": options.timesteps,
        "beta_schedule": schedules[options.schedule] if named else "linear",
        "beta_start": options.beta_start,
        "beta_end": options.beta_end,
        "trained_betas": betas,
        "variance_type": options.variance,
        "prediction_type": predictions[options.prediction],
        "clip_sample": config.sampling.clip,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": config.sampling.spacing
        if config.sampling.spacing in _SPACINGS
        else "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": options.zero_terminal_snr,
    }


def layout_of(unet: Mapping[str, Any]) -> Layout:
    """Return the layout with the embedding order that this config names."""
    return dataclasses.replace(LAYOUT, embedding_order=embedding_order(unet))
