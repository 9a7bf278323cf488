"""Draw real images whose holes are filled in (RePaint)."""

from __future__ import annotations

import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.diffusion.inpainting import Repaint
from ddpm_jax.errors import check
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.originals import hole, mask_from
from ddpm_jax.figures.panels import same_labels
from ddpm_jax.sampling.generate import Generator


def inpainting(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    originals: np.ndarray,
    mask: np.ndarray,
    variants: int,
    first: int = 0,
    label: int | None = None,
) -> np.ndarray:
    """Lay out each image with its hole in grey, `variants` ways of filling it, then the image.

    Args:
      mask: [h,w,1], 1 where an image is known.
      first: number of the first sample.
    """
    count = len(originals) * variants
    numbers, labels = first + np.arange(count), same_labels(label, count)
    known = originals.repeat(variants, axis=0), np.broadcast_to(mask, (count, *mask.shape))
    samples = generator.draw(params, seed=seed, indices=numbers, labels=labels, known=known)
    samples = samples.reshape(len(originals), variants, *originals.shape[1:])
    return np.concatenate([(originals * mask)[:, None], samples, originals[:, None]], axis=1)


def draw_inpainting(job: Job) -> None:
    """Draw a row for each image; the hole is a box or a mask's white part."""
    options, originals, sides = job.options, job.originals(1), job.trained.config.data.sides
    box = options.hole or [side // part for part in (4, 2) for side in sides]
    mask = hole(sides, box) if options.mask is None else mask_from(options.mask, sides)
    check(options.resample >= 1, f"resample={options.resample}: must be at least 1")
    check(options.jump >= 1, f"jump={options.jump}: must be at least 1")
    variants, repaint = job.count(4), Repaint(options.resample, options.jump)
    generator = job.generator(variants * len(originals), repaint=repaint)
    panel = inpainting(
        generator,
        job.trained.params,
        seed=options.seed,
        originals=originals,
        mask=mask,
        variants=variants,
        first=options.first,
        label=job.label,
    )
    samples = [str(number) for number in range(1, variants + 1)]
    job.save(panel, columns=["hole", *samples, "real"])
