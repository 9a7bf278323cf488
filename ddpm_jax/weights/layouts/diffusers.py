"""Declare the layout of Hugging Face diffusers, and read its folders.

A folder holds the config and weights of a UNet2DModel and the config of its scheduler, either as
DDPMPipeline saves them (unet/, scheduler/) or all in one folder, as google/ddpm-* are. The lowest
resolution is `up_blocks.0`, and attention has had two spellings. Unlike the other layouts this one
names its settings, which diffusers_config.py translates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax.errors import WeightsError
from ddpm_jax.files import read_json
from ddpm_jax.weights.files import INDEX
from ddpm_jax.weights.forms import CONV_1X1
from ddpm_jax.weights.layout import Layout, Tensors, WeightSets, flat_tensors
from ddpm_jax.weights.plan import Plan, places

WEIGHTS = "diffusion_pytorch_model"
_JSON_FILES = ("model_index.json", "scheduler_config.json")

# Pipelines that apply a UNet2DModel to pixels under DDPM's process, and the parts they have.
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
PARTS = ("unet", "scheduler")

# Schedulers of the process q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, 1 - alphas_cumprod[t])
# with betas that are written in their config. They differ in how they sample from it.
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(?<=\.)({'|'.join(_OLD_NAMES)})(?=\.(weight|bias)$)")


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there."""
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
    """Return the state dict under today's names.

    Early releases called the layers of attention otherwise and named each downsampler twice.
    """
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


@dataclass(frozen=True)
class Folder:
    """What a diffusers folder holds: the path of the weights, and two configs with their paths."""

    weights: Path
    unet_path: Path
    unet: Mapping[str, Any]
    scheduler_path: Path | None
    scheduler: Mapping[str, Any] | None


def is_folder(path: Path) -> bool:
    """Tell whether `path` is of diffusers: a folder, a JSON file in it, or weights beside one."""
    if path.name in _JSON_FILES or (path / "unet").is_dir():
        return True
    config = _folder_of(path) / "config.json"
    if path.is_dir():
        return config.is_file()
    try:
        return "_class_name" in read_config(config)
    except WeightsError:  # there is none, or it is no concern of a file beside it
        return False


def read_folder(path: Path) -> Folder:
    """Find the weights and read the configs of a folder, or of the folder that a file lies in.

    Args:
      path: the folder, its file of weights, or one of its JSON files.

    Raises:
      WeightsError: there is no config.json, or no weights beside it; the pipeline or the scheduler
        is of another process than DDPM's.
    """
    if not path.exists():
        raise WeightsError(f"input={path}: no such file or folder")
    folder = _folder_of(path)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet / "config.json").is_file():
        raise WeightsError(
            f"input={path}: no config.json there, without which layout diffusers does not say "
            "what its weights mean"
        )
    _check_pipeline(unet.parent if unet.name == "unet" else unet)
    weights = path if path.is_file() and path.suffix != ".json" else _find_weights(path, unet)
    places = [folder / "scheduler", folder.parent / "scheduler", folder]
    schedulers = [place / "scheduler_config.json" for place in places]
    scheduler_path = next((file for file in schedulers if file.is_file()), None)
    scheduler = None
    if scheduler_path is not None:
        scheduler = read_config(scheduler_path)
        _check_scheduler(scheduler_path, scheduler)
    unet_path = unet / "config.json"
    return Folder(weights, unet_path, read_config(unet_path), scheduler_path, scheduler)


def _folder_of(path: Path) -> Path:
    """Return the folder of a pipeline or of its network, by itself or by a file in it."""
    if path.is_dir():
        return path
    inside = path.name == "scheduler_config.json" and path.parent.name == "scheduler"
    return path.parent.parent if inside else path.parent


def _find_weights(path: Path, unet: Path) -> Path:
    """Return the one file of weights beside the config.json in `unet`, or the index of several.

    Raises:
      WeightsError: there is none under the usual name, and not just one of another.
    """
    endings = (".safetensors", ".bin")
    usual = [unet / f"{WEIGHTS}{ending}" for ending in endings]
    usual += [unet / f"{WEIGHTS}{ending}{INDEX}" for ending in endings]
    for file in usual:
        if file.is_file():
            return file
    others = sorted(file for file in unet.iterdir() if file.suffix in endings)
    if len(others) == 1:  # a variant such as .fp16
        return others[0]
    rest = f", but {', '.join(file.name for file in others[:5])}: name the file" if others else ""
    raise WeightsError(f"input={path}: neither {usual[0].name} nor {usual[1].name} in {unet}{rest}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      WeightsError: it is damaged, or something else than an object.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise WeightsError(
            f"{path} is no config: a {type(values).__name__} in place of a JSON object"
        )
    return values


def _check_pipeline(root: Path) -> None:
    """Refuse a pipeline whose network is not applied to pixels, or not by DDPM's process.

    Raises:
      WeightsError: model_index.json names another pipeline or another part; or, where there is no
        such file, a part lies beside the network.
    """
    path = root / "model_index.json"
    index = read_config(path) if path.is_file() else {}
    kind = index.get("_class_name", PIPELINES[0])
    parts = [
        name
        for name, value in index.items()
        if not name.startswith("_") and name not in PARTS and value not in (None, [None, None])
    ]
    parts += [name for name in ("vae", "vqvae") if (root / name).is_dir() and name not in parts]
    if kind not in PIPELINES:
        name = ".".join(map(str, kind)) if isinstance(kind, list) else kind
        raise WeightsError(f"{path}: a {name}, not one of {', '.join(PIPELINES)}")
    if parts:
        raise WeightsError(
            f"{root} is a pipeline with {', '.join(parts)} beside its network, which therefore "
            "does not work on pixels: there is no such model here"
        )


def _check_scheduler(path: Path, scheduler: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another process, by its name; the earliest configs have no name."""
    kind = scheduler.get("_class_name", SCHEDULERS[0])
    if kind not in SCHEDULERS:
        raise WeightsError(
            f"{path}: a {kind}, whose process is not known to be DDPM's, with betas and an "
            f"integer t; known are {', '.join(SCHEDULERS)}"
        )
