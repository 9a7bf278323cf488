"""Draw samples beside the training images nearest to them."""

from __future__ import annotations

import numpy as np

from ddpm_jax import images
from ddpm_jax.data.source import Source
from ddpm_jax.errors import ConfigError, check
from ddpm_jax.evaluation.image_sets import ImageSet, of_array, of_split
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import load_inception
from ddpm_jax.evaluation.metrics.neighbours import Nearest
from ddpm_jax.figures.job import Job
from ddpm_jax.progress import Progress

SPACES = ("pixel", "inception", "both")


def nearest(
    samples: np.ndarray,
    source: Source,
    count: int,
    *,
    within: int | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` images of `source` nearest to each sample in pixel space, nearest first.

    Args:
      samples: uint8 [n,h,w,c].
      within: look among the first so many only.

    Returns:
      Root mean squared difference a pixel in levels 0..255, float64 [n, count], and the indices
      [n, count].
    """
    total = len(source) if within is None else min(within, len(source))
    if not 1 <= count <= total:
        raise ConfigError(f"columns={count}: must be in 1..{total}, the images of the split")
    search = Nearest(samples, count)
    with Progress(total, "image", enabled=progress and total > 10_000) as bar:
        for start in range(0, total, 1000):
            rows = np.arange(start, min(start + 1000, total))
            search.add(source.read(rows)["image"], start)
            bar.update(len(rows))
    return search.distances, search.indices


def nearest_in_features(
    extractor: Extractor, tap: str, samples: ImageSet, train: ImageSet, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest images in Inception features.

    Returns:
      Root mean squared differences a feature, and the indices, as `nearest` does.
    """
    blocks = extractor.blocks(samples, (tap,), "samples")
    search = Nearest(np.concatenate([block.features[tap] for block in blocks]), count)
    for block in extractor.blocks(train, (tap,), "train"):
        search.add(block.features[tap], block.start)
    return search.distances, search.indices


def neighbours(samples: np.ndarray, source: Source, indices: np.ndarray) -> np.ndarray:
    """Lay out samples (uint8) before their images of `source`: does the model only remember?"""
    near = source.read(indices.ravel())["image"].reshape(*indices.shape, *samples.shape[1:])
    return images.from_uint8(np.concatenate([samples[:, None], near], axis=1))


def draw_neighbours(job: Job) -> None:
    """Draw samples beside their nearest training images, in one space or both, and print them."""
    options, indices, data = job.options, job.indices(job.count(8)), job.trained.config.data
    source = job.source("train")
    train = of_split(source, data, "train").first(options.search or len(source))
    columns = options.columns
    check(1 <= columns <= train.count, f"columns={columns}: must be in 1..{train.count}")
    extractor = None
    if options.space != "pixel":
        extractor = Extractor(
            load_inception(options.inception, options.cache / "inception"),
            job.devices,
            cache=options.cache / "features",
            batch_size=options.batch_size,
            progress=True,
        )
    generator = job.generator(len(indices))
    inputs = {"seed": options.seed, "indices": indices, "labels": job.labels(indices)}
    samples = images.to_uint8(generator.draw(job.trained.params, **inputs))
    results = {}
    if options.space != "inception":
        near = nearest(samples, source, columns, within=train.count, progress=True)
        results["levels 0..255"] = near
    if extractor is not None:
        tap = extractor.weights.deepest()
        queries = of_array(samples, {"file": "samples"})
        near = nearest_in_features(extractor, tap, queries, train, columns)
        results[f"{tap} Inception features"] = near
    for space, (distances, numbers) in results.items():
        for index, row in enumerate(zip(numbers, distances)):
            near = ", ".join(f"{number} ({distance:.3g})" for number, distance in zip(*row))
            print(f"sample {indices[index]}: train images (RMSE in {space}) {near}")
    panels = [neighbours(samples, source, numbers) for _, numbers in results.values()]
    spaces = [space.split()[-1].replace("0..255", "pixels") for space in results]
    rows = [f"{i} {space}" if len(spaces) > 1 else str(i) for i in indices for space in spaces]
    ranks = [f"real {rank}" for rank in range(1, columns + 1)]
    panel = np.stack(panels, axis=1).reshape(-1, *panels[0].shape[1:])
    job.save(panel, rows=rows, columns=["sample", *ranks])
