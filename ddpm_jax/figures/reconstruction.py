"""Draw real images beside what DDIM makes of their codes (Song et al. 2021, Table 2)."""

from __future__ import annotations

import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.panels import same_labels
from ddpm_jax.sampling.generate import Generator


def reconstruction(
    encoder: Generator,
    decoder: Generator,
    params: Params,
    *,
    originals: np.ndarray,
    label: int | None = None,
) -> tuple[np.ndarray, float]:
    """Encode images to x_T by DDIM and decode them again.

    Returns:
      The images above what comes back, and the mean squared error a pixel of values in [0, 1].
    """
    numbers, labels = np.arange(len(originals)), same_labels(label, len(originals))
    codes = encoder.draw(params, seed=0, indices=numbers, labels=labels, x=originals)
    decoded = decoder.draw(params, seed=0, indices=numbers, labels=labels, x=codes)
    squares = ((decoded - originals).astype(np.float64) / 2) ** 2
    return np.stack([originals, decoded]), float(np.mean(squares))


def draw_reconstruction(job: Job) -> None:
    """Draw the images above their reconstructions, and print the error."""
    originals = job.originals(1)
    encoder, decoder = job.ddim_pair(len(originals))
    params = job.trained.params
    panel, error = reconstruction(encoder, decoder, params, originals=originals, label=job.label)
    print(
        f"{decoder.sampler.steps} steps: mean squared error a pixel {error:.6f}, "
        f"values in [0, 1], {len(originals)} images"
    )
    job.save(panel, rows=["real", "DDIM"])
