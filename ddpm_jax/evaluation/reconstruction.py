"""Measure how well DDIM's codes keep an image: from x_0 to x_T and back.

(Song et al. 2021, section 5.4 and Table 2.) Nothing is drawn, so the result is that of the network,
the images and the steps alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.data.batches import eval_batches
from ddpm_jax.data.source import Source
from ddpm_jax.evaluation.image_sets import read_on_all_hosts
from ddpm_jax.evaluation.nll import Estimate, check_labels
from ddpm_jax.images import from_uint8
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.sampling.sampler import chain_steps, codes_config
from ddpm_jax.trained import Trained


def reconstruction_errors(
    config: Config,
    params: Params,
    source: Source,
    devices: Devices,
    *,
    num_images: int | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> np.ndarray:
    """Measure the mean squared error over the pixels, of values in [0, 1], of each image.

    Args:
      config: its `sampling.steps` and `.spacing` count; a network with classes is given the
        images' own.
      params: replicated on `devices`.
      num_images: the first so many of `source`; None for all.
      batch_size: images at once, over all devices and hosts; rounded up to a multiple of the
        devices.

    Returns:
      float64 [N].

    Raises:
      EvaluationError: a network with classes, and images without.
    """
    check_labels(config, source)
    config = codes_config(config)
    encoder, decoder = (
        build_generator(config, devices, batch_size=batch_size, inverted=inverted)
        for inverted in (True, False)
    )
    count = len(source) if num_images is None else min(num_images, len(source))
    errors = []
    with Progress(count, unit="image", enabled=progress and devices.is_main) as bar:
        # Whole batches on each host: a Generator takes its own rows.
        for batch in read_on_all_hosts(eval_batches(source, count, encoder.batch_size)):
            labels = batch.get("label") if config.model.num_classes else None
            originals, valid = from_uint8(batch["image"]), batch["mask"] > 0
            inputs = {"seed": 0, "indices": np.arange(len(originals)), "labels": labels}
            codes = encoder.draw(params, x=originals, **inputs)
            decoded = decoder.draw(params, x=codes, **inputs)
            squares = np.square((decoded - originals).astype(np.float64) / 2)
            errors.append(squares.mean((1, 2, 3))[valid])
            bar.update(int(valid.sum()))
    return np.concatenate(errors)


def report(errors: np.ndarray, trained: Trained, split: str) -> dict[str, Any]:
    """Print the mean of `errors` with its standard error, and return the record."""
    config, error = trained.config, Estimate.of(errors)
    steps, spacing = chain_steps(config), config.sampling.spacing
    print(
        f"{config.data.name} {split}, {len(errors)} images, {steps} steps, spacing {spacing}, "
        f"weights {trained.weights}, step {trained.step}"
    )
    print(
        f"{'reconstruction':16}{error.mean:12.6f} +- {error.standard_error:.6f}"
        "  (squared error a pixel, values in [0, 1])"
    )
    return {
        "value": error.mean,
        "standard_error": error.standard_error if len(errors) > 1 else None,
        "split": split,
        "num_images": len(errors),
        "steps": steps,
        "spacing": spacing,
    }
