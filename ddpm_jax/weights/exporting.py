"""From our parameters to the files of another code base, which then runs them as its own."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp

from ddpm_jax import config as configs
from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.weights import diffusers, diffusers_config, files
from ddpm_jax.weights.errors import WeightsError
from ddpm_jax.weights.importing import CONFIG_KEY, WEIGHTS_KEY
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts import LAYOUTS

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
    """Writes `params` to `folder` as layout `layout_name`; the path of the file of weights.

    diffusers: a folder that DDPMPipeline.from_pretrained opens. pesser, openai: one state dict; in a safetensors header go the
    config and which weights they are, so that an import needs no flags.

    Args:
      weights: what `params` are, "raw" or "ema 0.9999".
      form: "safetensors", or "torch" for what torch.load reads.
      dtype: of the numbers in the file. "bfloat16", of half the size, rounds to 8 bits of mantissa; safetensors only.

    Raises:
      WeightsError: a network or process that the layout cannot express, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"--output={folder} is not empty: take another")
    if dtype != "float32" and form != "safetensors":
        raise WeightsError(f"--dtype={dtype}: only --format=safetensors holds it")
    layout = LAYOUTS[layout_name]
    metadata = {WEIGHTS_KEY: weights}
    if layout_name == "diffusers":
        # Both refuse what they cannot express, before anything is written.
        diffusers_config.network_config(config), diffusers_config.scheduler_config(config)
        file = folder / "unet" / f"{diffusers.WEIGHTS}{'.safetensors' if form == 'safetensors' else '.bin'}"
    else:
        metadata[CONFIG_KEY] = json.dumps(configs.to_dict(config))
        stem = "ema" if weights.startswith("ema") else "raw"
        file = folder / f"{stem}_{layout_name}{'.safetensors' if form == 'safetensors' else '.pt'}"
    tensors = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in write_tensors(layout, config, params).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if layout_name == "diffusers":
        diffusers_config.write_folder(folder, config)
    files.write(file, tensors, metadata)
    return file
