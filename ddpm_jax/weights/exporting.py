"""From our parameters to the files of another code base, which then runs them as its own."""

from __future__ import annotations

import json
from pathlib import Path

from ddpm_jax import config as configs
from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.weights import diffusers, diffusers_config, files
from ddpm_jax.weights.errors import WeightsError
from ddpm_jax.weights.importing import CONFIG_KEY, WEIGHTS_KEY
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts import LAYOUTS

FORMATS = ("safetensors", "torch")


def export_weights(
    layout_name: str, config: Config, params: Params, weights: str, folder: Path, *, form: str = "safetensors"
) -> Path:
    """Writes `params` to `folder` as layout `layout_name`; the path of the file of weights.

    diffusers: a folder that DDPMPipeline.from_pretrained opens. pesser, openai: one state dict; in a safetensors header go the
    config and which weights they are, so that an import needs no flags.

    Args:
      weights: what `params` are, "raw" or "ema 0.9999".
      form: "safetensors", or "torch" for what torch.load reads.

    Raises:
      WeightsError: a network or process that the layout cannot express, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"--output={folder} is not empty: take another")
    layout = LAYOUTS[layout_name]
    metadata = {WEIGHTS_KEY: weights}
    if layout_name == "diffusers":
        (
            diffusers_config.network_config(config),
            diffusers_config.scheduler_config(config),
        )  # refuse before anything is written
        file = folder / "unet" / f"{diffusers.WEIGHTS}{'.safetensors' if form == 'safetensors' else '.bin'}"
    else:
        metadata[CONFIG_KEY] = json.dumps(configs.to_dict(config))
        stem = "ema" if weights.startswith("ema") else "raw"
        file = folder / f"{stem}_{layout_name}{'.safetensors' if form == 'safetensors' else '.pt'}"
    tensors = write_tensors(layout, config, params)
    file.parent.mkdir(parents=True, exist_ok=True)
    if layout_name == "diffusers":
        diffusers_config.write_folder(folder, config)
    files.write(file, tensors, metadata)
    return file
