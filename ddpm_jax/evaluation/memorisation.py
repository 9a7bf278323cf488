"""Does the model remember? How near samples lie to the training set, against how near images lie that it has never seen.

A model that has learnt the distribution draws images about as far from the training set as held-out ones are. Samples nearer than
held-out images are suspects; a sharp peak near zero is a memory.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.neighbours import Nearest
from ddpm_jax.images import replacing
from ddpm_jax.progress import Progress

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Audit:
    """Distances to the nearest training image, root mean squares a pixel (levels 0..255) or a feature, and which image that is.

    Attributes:
      samples, held_out: float64 [n], [m].
      nearest: of each sample, the number of that training image.
    """

    samples: np.ndarray
    nearest: np.ndarray
    held_out: np.ndarray

    @property
    def suspects(self) -> float:
        """Share of samples nearer than 99 of 100 held-out images are: 0.01 is what honest samples have."""
        return float((self.samples < np.quantile(self.held_out, 0.01)).mean())

    @property
    def nearer(self) -> float:
        """Probability that a sample lies nearer than a held-out image, ties half: 0.5 where both are alike."""
        ranks = rankdata(np.concatenate([self.samples, self.held_out]))[: len(self.samples)]
        n, m = len(self.samples), len(self.held_out)
        return float(1 - (ranks.sum() - n * (n + 1) / 2) / (n * m))

    def table(self) -> str:
        """Quantiles of both distributions."""
        lines = [f"{'quantile':>12}" + "".join(f"{q:10.0%}" for q in QUANTILES)]
        for name, distances in (("samples", self.samples), ("held out", self.held_out)):
            lines.append(f"{name:>12}" + "".join(f"{value:10.3f}" for value in np.quantile(distances, QUANTILES)))
        lines.append(f"nearer than 99 % of held-out images: {self.suspects:.2%} of samples (1 % is honest)")
        lines.append(f"a sample is nearer than a held-out image with probability {self.nearer:.3f} (0.5 is alike)")
        return "\n".join(lines)


def audit_pixels(samples: ImageSet, train: ImageSet, held_out: ImageSet, *, progress: bool = False) -> Audit:
    """In pixels, levels 0..255; EvaluationError for images of different sizes."""
    check_shapes(samples, train, held_out)
    blocks = 1000
    searches = [Nearest(images.read(np.arange(images.count)), 1) for images in (samples, held_out)]
    with Progress(train.count, "train image", enabled=progress) as bar:
        for start in range(0, train.count, blocks):
            rows = np.arange(start, min(start + blocks, train.count))
            pixels = train.read(rows)
            for search in searches:
                search.add(pixels, start)
            bar.update(len(rows))
    return _audit(*searches)


def audit_features(extractor: Extractor, tap: str, samples: ImageSet, train: ImageSet, held_out: ImageSet) -> Audit:
    """In Inception features."""
    queries = []
    for images, what in ((samples, "samples"), (held_out, "held out")):
        queries.append(np.concatenate([block.features[tap] for block in extractor.blocks(images, (tap,), what)]))
    searches = [Nearest(features, 1) for features in queries]
    for block in extractor.blocks(train, (tap,), "train"):
        for search in searches:
            search.add(block.features[tap], block.start)
    return _audit(*searches)


def check_shapes(*sets: ImageSet) -> None:
    """EvaluationError unless all images have one size."""
    shapes = [images.shape for images in sets]
    if len(set(shapes)) > 1:
        raise EvaluationError(
            f"images of {' and '.join('x'.join(map(str, shape)) for shape in dict.fromkeys(shapes))} have no distance"
        )


def save_csv(path: Path, audit: Audit) -> None:
    """A row for each sample, the nearest first: sample, train image, distance; OSError if it cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sample", "train_image", "distance"))
    for sample in np.argsort(audit.samples, kind="stable"):
        writer.writerow((sample, audit.nearest[sample], f"{audit.samples[sample]:.6g}"))
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _audit(samples: Nearest, held_out: Nearest) -> Audit:
    return Audit(samples.distances[:, 0], samples.indices[:, 0], held_out.distances[:, 0])
