"""Draw Figure 7: samples that share x_t."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.diffusion.chain import initial_noise
from ddpm_jax.diffusion.randomness import sample_keys
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.panels import level_caption, same_labels, start_of
from ddpm_jax.sampling.generate import Generator


def shared_latents(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    index: int,
    levels: Sequence[int],
    variants: int,
    label: int | None = None,
) -> np.ndarray:
    """Lay out Figure 7: a row for each level, with x_t there and samples that go on from it.

    All rows belong to one way down, that of sample `index`; variant j draws the same noise in each
    row.
    """
    starts = np.array([start_of(generator, level)[0] for level in levels])
    same = np.full(len(levels), index)
    keys = sample_keys(jnp.full(len(levels), seed, jnp.uint32), jnp.asarray(same, jnp.uint32))
    # Given x_T, the ways down and on are calls of one kind: one compilation.
    timesteps = generator.sampler.process.schedule.timesteps
    x = np.asarray(initial_noise(keys, generator.shape, timesteps))
    labels, span = same_labels(label, len(levels)), (np.zeros_like(starts), starts)
    latents = generator.draw(params, seed=seed, indices=same, labels=labels, x=x, span=span)
    first = starts.repeat(variants)
    samples = generator.draw(
        params,
        seed=seed,
        indices=np.tile(index + 1 + np.arange(variants), len(levels)),
        labels=same_labels(label, len(first)),
        x=latents.repeat(variants, axis=0),
        span=(first, np.full_like(first, generator.sampler.steps)),
    )
    samples = samples.reshape(len(levels), variants, *samples.shape[1:])
    return np.concatenate([latents[:, None], samples], axis=1)


def draw_shared_latents(job: Job) -> None:
    """Draw Figure 7 at quarters of T, or at the levels asked for."""
    timesteps, variants = job.trained.config.diffusion.timesteps, job.count(7)
    levels = job.options.levels or [timesteps * part // 4 for part in (4, 3, 2, 1)]
    generator = job.generator(variants * len(levels))
    inputs = {
        "seed": job.options.seed,
        "index": job.options.first,
        "levels": levels,
        "variants": variants,
    }
    panel = shared_latents(generator, job.trained.params, label=job.label, **inputs)
    captions = [level_caption(generator, level) for level in levels]
    samples = [str(number) for number in range(1, variants + 1)]
    job.save(panel, rows=captions, columns=["x_t", *samples])
