"""Write our parameters as the files of another code base, which then runs them as its own."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp

from ddpm_jax.build import Params
from ddpm_jax.config import Config, to_dict
from ddpm_jax.errors import WeightsError
from ddpm_jax.weights import files
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts import diffusers, diffusers_config
from ddpm_jax.weights.layouts.registry import LAYOUTS

FORMATS = ("safetensors", "torch")
DTYPES = ("float32", "bfloat16")


def export_weights(
    layout_name: str,
    config: Config,
    params: Params,
    weights: str,
    folder: Path,
    *,
    form: str = "safetensors",
    dtype: str = "float32",
) -> Path:
    """Write `params` to `folder` as layout `layout_name`, and return the path of the weights.

    Layout diffusers writes a folder that DDPMPipeline.from_pretrained opens. Layouts pesser and
    openai write one state dict. A safetensors header holds the config and which weights they are,
    so that an import needs no further word.

    Args:
      layout_name: one of `registry.EXPORTS`.
      config: of the run, for the shapes and for what is written beside the weights.
      params: our parameters.
      weights: what `params` are, "raw" or "ema 0.9999".
      folder: a new or empty folder.
      form: "safetensors", or "torch" for what torch.load reads, which PyTorch itself must write.
      dtype: of the numbers in the file. "bfloat16" halves the file and rounds to 8 bits of
        mantissa; only safetensors holds it.

    Raises:
      WeightsError: a network or process that the layout cannot express, a folder that is not
        empty, or PyTorch is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"output={folder} is not empty: take another")
    if dtype != "float32" and form != "safetensors":
        raise WeightsError(f"dtype={dtype}: only format=safetensors holds it")
    layout = LAYOUTS[layout_name]
    metadata = {files.WEIGHTS_KEY: weights}
    if layout_name == "diffusers":
        # Both refuse what they cannot express, before anything is written.
        diffusers_config.network_config(config), diffusers_config.scheduler_config(config)
        suffix = ".safetensors" if form == "safetensors" else ".bin"
        file = folder / "unet" / f"{diffusers.WEIGHTS}{suffix}"
    else:
        metadata[files.CONFIG_KEY] = json.dumps(to_dict(config))
        stem = "ema" if weights.startswith("ema") else "raw"
        suffix = ".safetensors" if form == "safetensors" else ".pt"
        file = folder / f"{stem}_{layout_name}{suffix}"
    tensors = {
        name: tensor.astype(jnp.dtype(dtype))
        for name, tensor in write_tensors(layout, config, params).items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    if layout_name == "diffusers":
        _write_folder(folder, config)
    files.write(file, tensors, metadata)
    return file


def _write_folder(folder: Path, config: Config) -> None:
    """Write everything of a DDPMPipeline's folder but the weights."""
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    files = {
        "model_index.json": index,
        "unet/config.json": diffusers_config.network_config(config),
        "scheduler/scheduler_config.json": diffusers_config.scheduler_config(config),
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
