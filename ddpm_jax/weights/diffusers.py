"""Hugging Face diffusers: a folder with the config and weights of a UNet2DModel and the config of its scheduler.

As DDPMPipeline saves it (unet/, scheduler/) or as google/ddpm-* are laid out (all in one folder). `up_blocks.0` is the lowest
resolution there, and attention has had two spellings. Unlike the other layouts this one names its settings, which
diffusers_config.py translates.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ddpm_jax.weights.errors import WeightsError
from ddpm_jax.weights.forms import CONV_1X1
from ddpm_jax.weights.layout import Layout, Tensors, WeightSets, flat_tensors
from ddpm_jax.weights.plan import Plan, places

WEIGHTS = "diffusion_pytorch_model"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(?<=\.)({'|'.join(_OLD_NAMES)})(?=\.(weight|bias)$)")


def modules(plan: Plan) -> dict[str, str]:
    where = {
        "time_embedding_0": "time_embedding.linear_1",
        "time_embedding_1": "time_embedding.linear_2",
        "label_embedding": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for name, side, kind, level, index in places(plan):
        number = level if side == "down" else plan.levels - 1 - level
        stem = "mid_block" if side == "mid" else f"{side}_blocks.{number}"
        if kind == "resample":
            where[name] = f"{stem}.{side}samplers.0{'.conv' if plan.resampling == 'conv' else ''}"
        else:
            where[name] = f"{stem}.{'resnets' if kind == 'block' else 'attentions'}.{index}"
    return where


def unpack(contents: Any) -> WeightSets:
    """The state dict under today's names: old ones for attention, and a second name of downsamplers, are of early releases."""
    tensors: Tensors = {}
    for name, array in flat_tensors(contents, "state dict").items():
        if ".Conv2d_0." in name:
            continue  # the same tensor as .conv.
        name = _OLD.sub(lambda match: _OLD_NAMES[match[1]], name)
        if re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) and array.ndim == 4:
            array = array[:, :, 0, 0]
        tensors[name] = array
    return WeightSets(unlabelled=tensors)


LAYOUT = Layout(
    name="diffusers",
    modules=modules,
    layers={
        "norm1": "norm1",
        "conv1": "conv1",
        "temb_proj": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "conv_shortcut",
        "norm": "group_norm",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
    },
    forms={"shortcut": CONV_1X1},
    unpack=unpack,
    switches={
        "attention_in_mid": (True, False),
        "attention_placement": ("block",),
        "timestep_scale": (1.0,),
        "resampling": ("conv", "residual"),
        "skip_scale": (1.0,),
    },
)


def find_folder(path: Path) -> tuple[Path, Path, Path | None]:
    """The weights, the UNet's config and the scheduler's (if there is one) of a folder, or of the folder of a file.

    Raises:
      WeightsError: there is no config.json, or no weights beside it.
    """
    if not path.exists():
        raise WeightsError(f"--input={path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet / "config.json").is_file():
        raise WeightsError(
            f"--input={path}: no config.json there, without which layout diffusers does not say what its weights mean"
        )
    files = [path] if path.is_file() else [unet / f"{WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        raise WeightsError(f"--input={path}: neither {' nor '.join(file.name for file in files)} in {unet}")
    scheduler = [folder / "scheduler", folder.parent / "scheduler", folder]
    scheduler = [place / "scheduler_config.json" for place in scheduler if (place / "scheduler_config.json").is_file()]
    return weights, unet / "config.json", scheduler[0] if scheduler else None


def read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is no config: a {type(values).__name__} in place of a JSON object")
    return values
