"""Draw figures between two real images: interpolation (Figure 8) and coarse to fine (Figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.diffusion.chain import forward_noise
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.randomness import sample_keys
from ddpm_jax.errors import ConfigError, check
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.panels import level_caption, same_labels, start_of
from ddpm_jax.sampling.generate import Generator


def mixes(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    pair: np.ndarray,
    levels: Sequence[int],
    weights: Sequence[float],
    indices: np.ndarray,
    shared_noise: bool = True,
    label: int | None = None,
) -> np.ndarray:
    """Diffuse two images to a level, mix them there, and denoise the mixes (section 4.3).

        mix = (1 - weight) x_t + weight x_t'

    The forward noise is one draw for all weights and levels, and a weight's noise on the way back
    the same at every level. Level 0 is the plain mix of pixels.

    Args:
      pair: [2,h,w,c] in [-1, 1].
      indices: for each weight, the number of the sample whose noise it takes on the way back.
      shared_noise: both images get the same eps, so that a mix is as noisy as its timestep says;
        otherwise each its own, as in the paper's code, which leaves mixes short of noise, by half
        its variance at weight 0.5.

    Returns:
      float32 [levels, weights, h, w, c].
    """
    sampler, shape = generator.sampler, pair.shape[1:]
    schedule = sampler.process.schedule
    key = sample_keys(jnp.array([seed], jnp.uint32), jnp.array([0], jnp.uint32))
    eps = jnp.concatenate(
        [forward_noise(key, shape, schedule.timesteps, 0 if shared_noise else i) for i in range(2)]
    )
    share = np.asarray(weights, np.float32)[:, None, None, None]
    starts, first = [], []
    for level in levels:
        row, noisy = sampler.steps, pair
        if level:
            row, timestep = start_of(generator, level)
            noisy = np.asarray(q_sample(schedule, pair, jnp.full(2, timestep), eps))
        starts.append((1 - share) * noisy[0] + share * noisy[1])
        first.append(np.full(len(weights), row))
    rows = np.concatenate(first)
    samples = generator.draw(
        params,
        seed=seed,
        indices=np.tile(indices, len(levels)),
        labels=same_labels(label, len(rows)),
        x=np.concatenate(starts),
        span=(rows, np.full_like(rows, sampler.steps)),
    )
    return samples.reshape(len(levels), len(weights), *shape)


def interpolation(
    generator: Generator,
    params: Params,
    *,
    pair: np.ndarray,
    level: int,
    weights: Sequence[float],
    **options,
) -> np.ndarray:
    """Lay out one row of Figure 8: the first image, `mixes` at `level`, the second image.

    All noise is the same for all weights.
    """
    same = np.zeros(len(weights), int)
    row = mixes(
        generator, params, pair=pair, levels=[level], weights=weights, indices=same, **options
    )[0]
    return np.concatenate([pair[:1], row, pair[1:]])[None]


def coarse_to_fine(
    generator: Generator,
    params: Params,
    *,
    pair: np.ndarray,
    rows: int,
    weights: Sequence[float],
    **options,
) -> np.ndarray:
    """Lay out Figure 9: rows of `mixes` at levels 0 to T in equal steps, between the images.

    Each weight has noise of its own on the way back, so that the row at T holds as many different
    samples.
    """
    if rows < 2:
        raise ConfigError(f"rows={rows}: must be at least 2")
    levels = equal_levels(generator.sampler.process.schedule.timesteps, rows)
    own = np.arange(len(weights))
    middle = mixes(
        generator, params, pair=pair, levels=levels, weights=weights, indices=own, **options
    )
    ends = [np.broadcast_to(image, (rows, 1, *image.shape)) for image in pair]
    return np.concatenate([ends[0], middle, ends[1]], axis=1)


def equal_levels(timesteps: int, count: int) -> list[int]:
    """Return `count` levels from 0 to T in equal steps."""
    return np.rint(np.linspace(0, timesteps, count)).astype(int).tolist()


def between_real(weights: Sequence[float]) -> list[str]:
    """Return the captions of mixes by their weights, between the two real images."""
    return ["real", *(f"{weight:.2f}" for weight in weights), "real"]


def slerp(first: np.ndarray, second: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Interpolate along the great circle between two codes, [weights, ...].

    slerp(w) = sin((1 - w) angle) / sin(angle) first + sin(w angle) / sin(angle) second
    """
    cosine = (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = np.arccos(np.clip(cosine, -1, 1))
    w = np.asarray(weights).reshape(-1, *(1,) * first.ndim)
    if np.sin(angle) < 1e-6:  # nearly parallel codes: the straight line is the limit
        return (1 - w) * first + w * second
    return (np.sin((1 - w) * angle) * first + np.sin(w * angle) * second) / np.sin(angle)


def latent_interpolation(
    encoder: Generator,
    decoder: Generator,
    params: Params,
    *,
    pair: np.ndarray,
    weights: Sequence[float],
    label: int | None = None,
) -> np.ndarray:
    """Lay out one row: DDIM decodings of `slerp` between two codes, and the images."""
    codes = encoder.draw(params, seed=0, indices=np.arange(2), labels=same_labels(label, 2), x=pair)
    between = slerp(codes[0], codes[1], weights)
    decoded = decoder.draw(
        params,
        seed=0,
        indices=np.arange(len(between)),
        labels=same_labels(label, len(between)),
        x=between,
    )
    return np.concatenate([pair[:1], decoded, pair[1:]])[None]


def draw_interpolation(job: Job) -> None:
    """Draw Figure 8: a row for each pair and level, or for each pair of codes."""
    options, pairs = job.options, job.originals(2, step=2)
    weights = np.linspace(0, 1, options.points)
    rows, captions = [], []
    if options.mix == "slerp":
        encoder, decoder = job.ddim_pair(options.points)
        for pair in pairs.reshape(-1, 2, *pairs.shape[1:]):
            inputs = {"pair": pair, "weights": weights, "label": job.label}
            rows.append(latent_interpolation(encoder, decoder, job.trained.params, **inputs))
            captions.append("slerp")
    else:
        generator = job.generator(options.points)
        for pair in pairs.reshape(-1, 2, *pairs.shape[1:]):
            for level in options.levels or [job.trained.config.diffusion.timesteps // 2]:
                rows.append(
                    interpolation(generator, job.trained.params, level=level, **mixing(job, pair))
                )
                captions.append(level_caption(generator, level))
    job.save(np.concatenate(rows), rows=captions, columns=between_real(weights))


def draw_coarse_to_fine(job: Job) -> None:
    """Draw Figure 9 between two images."""
    pair = job.originals(2)
    check(len(pair) == 2, "mode coarse_to_fine: two images")
    generator, rows = job.generator(job.options.points), job.options.rows
    inputs = mixing(job, pair)
    panel = coarse_to_fine(generator, job.trained.params, rows=rows, **inputs)
    timesteps = job.trained.config.diffusion.timesteps
    levels = equal_levels(timesteps, rows)
    captions = [level_caption(generator, level) for level in levels]
    job.save(panel, rows=captions, columns=between_real(inputs["weights"]))


def mixing(job: Job, pair: np.ndarray) -> dict[str, Any]:
    """Return what every mix of `pair` takes from the options."""
    weights, shared = np.linspace(0, 1, job.options.points), job.options.forward_noise == "shared"
    return {
        "seed": job.options.seed,
        "pair": pair,
        "weights": weights,
        "shared_noise": shared,
        "label": job.label,
    }
