"""Draw what classifier-free guidance does to each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.errors import check
from ddpm_jax.figures.job import Job
from ddpm_jax.sampling.generate import Generator


def classes(
    generators: Sequence[Generator],
    params: Params,
    *,
    seed: int,
    first: int,
    labels: Sequence[int],
    variants: int,
) -> np.ndarray:
    """Lay out a row for each class, and in it `variants` samples for each generator.

    Generators differ in their guidance. Column j of each has the same x_T and noise, in every row.
    """
    rows = np.repeat(np.array(labels), variants)
    indices = np.tile(first + np.arange(variants), len(labels))
    blocks = [
        generator.draw(params, seed=seed, indices=indices, labels=rows) for generator in generators
    ]
    parts = [block.reshape(len(labels), variants, *block.shape[1:]) for block in blocks]
    return np.concatenate(parts, axis=1)


def draw_classes(job: Job) -> None:
    """Draw all classes, or those asked for, at each of `guidances`."""
    options, count = job.options, job.trained.config.model.num_classes
    check(count > 0, f"mode={options.mode}: this run has no classes")
    labels, variants = options.label or list(range(count)), job.count(4)
    generators = [
        dataclasses.replace(job, options=dataclasses.replace(options, guidance=guidance)).generator(
            variants * len(labels)
        )
        for guidance in options.guidances
    ]
    inputs = {"seed": options.seed, "first": options.first, "labels": labels, "variants": variants}
    job.save(
        classes(generators, job.trained.params, **inputs),
        rows=[f"class {label}" for label in labels],
        columns=[f"S={guidance:g}" for guidance in options.guidances for _ in range(variants)],
    )
