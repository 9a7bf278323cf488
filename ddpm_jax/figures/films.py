"""Draw grids of samples, and films of their way down (Figure 6)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ddpm_jax import images
from ddpm_jax.build import Params
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.panels import picture
from ddpm_jax.sampling import shards
from ddpm_jax.sampling.generate import Generator
from ddpm_jax.sampling.sampler import build_sampler

FILMS = (".gif", ".webp")


def denoising(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    indices: np.ndarray,
    labels: np.ndarray | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Return what a generator records as a film of all samples together, uint8 [K, h, w, c]."""
    frames = generator.draw(params, seed=seed, indices=indices, labels=labels).swapaxes(0, 1)
    return np.stack([images.grid(images.to_uint8(frame), scale=scale) for frame in frames])


def draw_grid(job: Job) -> None:
    """Draw samples: a PNG grid, an .npz or a folder of PNGs, which a second call goes on with."""
    options, indices = job.options, job.indices(job.count(64))
    block = None if options.output.suffix == ".png" else shards.BLOCK
    generator = job.generator(len(indices), block=block)

    def draw(indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        return generator.draw(job.trained.params, seed=options.seed, indices=indices, labels=labels)

    if options.output.suffix == ".png":
        samples = images.to_uint8(draw(indices, job.labels(indices)))
        picture = images.grid(samples, scale=options.scale)
        if options.labels:
            picture = numbered(samples, indices, options.scale)
        job.write(lambda path: images.save_png(path, picture))
        return
    protocol = {
        "config": dataclasses.asdict(job.trained.config),
        "weights": job.trained.weights,
        "step": job.trained.step,
        "seed": options.seed,
        "guidance": options.guidance,
        "label": options.label,
    }
    count = shards.fill(options.output, protocol, indices, job.labels(indices), draw, job.devices)
    print(f"{count} drawn, {len(indices) - count} were there")
    job.write(lambda path: None)


def numbered(samples: np.ndarray, indices: np.ndarray, scale: int) -> np.ndarray:
    """Tile samples, uint8 [n, h, w, c], with the number of the first sample of each row."""
    columns = math.ceil(math.sqrt(len(samples)))
    rest = np.full((-len(samples) % columns, *samples.shape[1:]), 255, np.uint8)
    panel = images.from_uint8(np.concatenate([samples, rest]))
    panel = panel.reshape(-1, columns, *samples.shape[1:])
    return picture(panel, scale, rows=[str(index) for index in indices[::columns]])


def draw_film(job: Job, record: str, count: int, frames: int) -> None:
    """Draw `frames` states of each sample on its way: a film, or a PNG with a row a sample.

    Args:
      record: "x_t" or "x0".
      count, frames: how many, unless the options say.
    """
    indices = job.indices(job.count(count))
    most = build_sampler(job.trained.config).steps + (record == "x_t")
    frames = job.options.frames or min(frames, most)
    generator = job.generator(len(indices), record=record, num_frames=frames)
    inputs = {"seed": job.options.seed, "indices": indices, "labels": job.labels(indices)}
    if job.options.output.suffix not in FILMS:
        table, after = generator.sampler.table, generator.sampler.frames.after
        job.save(
            generator.draw(job.trained.params, **inputs),
            rows=[str(index) for index in indices],
            columns=[f"t={t + 1}" for t in np.asarray(table.timesteps)[after]],
        )
        return
    film = denoising(generator, job.trained.params, scale=job.options.scale, **inputs)
    rest = film[-1:].repeat(max(1, len(film) // 4), axis=0)  # the end stands still for a while
    film = np.concatenate([film, rest])
    job.write(lambda path: images.save_animation(path, film, job.options.milliseconds))
