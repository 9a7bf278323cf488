"""Ask whether a model remembers: how near its samples lie to the training set.

They are held against images that the model has never seen. A model that has learnt the distribution
draws images about as far from the training set as held-out ones are. Samples nearer than held-out
images are suspects; a sharp peak near zero is a memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ddpm_jax import images
from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.metrics.neighbours import Nearest
from ddpm_jax.files import replacing
from ddpm_jax.progress import Progress

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95)
PAIRS = 10  # nearest samples that are shown beside what they are nearest to


@dataclass(frozen=True, eq=False)
class AuditSets:
    """Samples, and what they are compared with: training images, and images held out of training.

    Raises:
      EvaluationError: images of different sizes.
    """

    samples: ImageSet
    train: ImageSet
    held_out: ImageSet

    def __post_init__(self) -> None:
        shapes = dict.fromkeys((self.samples.shape, self.train.shape, self.held_out.shape))
        if len(shapes) > 1:
            sizes = " and ".join("x".join(map(str, shape)) for shape in shapes)
            raise EvaluationError(f"images of {sizes} have no distance")


@dataclass(frozen=True, eq=False)
class Audit:
    """Distances to the nearest training image, root mean squares a pixel (0..255) or a feature.

    Attributes:
      samples, held_out: float64 [n], [m].
      nearest: of each sample, the number of that training image.
    """

    samples: np.ndarray
    nearest: np.ndarray
    held_out: np.ndarray

    @property
    def suspects(self) -> float:
        """Return the share of samples nearer than 99 of 100 held-out images; honest ones: 0.01."""
        return float((self.samples < np.quantile(self.held_out, 0.01)).mean())

    @property
    def nearer(self) -> float:
        """Return the probability that a sample is nearer than a held-out image; 0.5: both alike."""
        ranks = rankdata(np.concatenate([self.samples, self.held_out]))[: len(self.samples)]
        n, m = len(self.samples), len(self.held_out)
        return float(1 - (ranks.sum() - n * (n + 1) / 2) / (n * m))

    def table(self) -> str:
        """Format quantiles of both distributions."""
        lines = [f"{'quantile':>12}" + "".join(f"{q:10.0%}" for q in QUANTILES)]
        for name, distances in (("samples", self.samples), ("held out", self.held_out)):
            values = np.quantile(distances, QUANTILES)
            lines.append(f"{name:>12}" + "".join(f"{value:10.3f}" for value in values))
        lines.append(
            f"nearer than 99 % of held-out images: {self.suspects:.2%} of samples (1 % is honest)"
        )
        lines.append(
            "a sample is nearer than a held-out image "
            f"with probability {self.nearer:.3f} (0.5 is alike)"
        )
        return "\n".join(lines)


def audit_pixels(sets: AuditSets, *, progress: bool = False) -> Audit:
    """Search in pixels, levels 0..255."""
    samples, held_out = (
        Nearest(queries.read(np.arange(queries.count)), 1)
        for queries in (sets.samples, sets.held_out)
    )
    with Progress(sets.train.count, "train image", enabled=progress) as bar:
        for start, pixels in sets.train.blocks(1000):
            samples.add(pixels, start)
            held_out.add(pixels, start)
            bar.update(len(pixels))
    return _audit(samples, held_out)


def audit_features(extractor: Extractor, tap: str, sets: AuditSets) -> Audit:
    """Search in Inception features, on every host."""
    samples, held_out = (
        Nearest(
            np.concatenate([b.features[tap] for b in extractor.blocks(queries, (tap,), what)]), 1
        )
        for queries, what in ((sets.samples, "samples"), (sets.held_out, "held out"))
    )
    for block in extractor.blocks(sets.train, (tap,), "train"):
        samples.add(block.features[tap], block.start)
        held_out.add(block.features[tap], block.start)
    return _audit(samples, held_out)


def _audit(samples: Nearest, held_out: Nearest) -> Audit:
    return Audit(samples.distances[:, 0], samples.indices[:, 0], held_out.distances[:, 0])


def file_name(sets: AuditSets, space: str, origin: str, seen: dict[str, Any]) -> str:
    """Name the CSV of an audit by all that tells it from others: a later one must not replace it.

    An example is audit_pixels_step800000_ema0.9999_ddim50_seed0_5000_1a2b3c4d.csv.

    Args:
      origin: what people know the samples by.
      seen: by what the features were computed, where distances are of features.
    """
    counts = [images.count for images in (sets.samples, sets.train, sets.held_out)]
    known = [counts, sets.train.description, seen]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for _, pixels in sets.samples.blocks(1000):  # other samples may have the same name
        digest.update(np.ascontiguousarray(pixels))
    return f"audit_{space}_{origin}_{sets.samples.count}_{digest.hexdigest()[:8]}.csv"


def save_csv(path: Path, audit: Audit) -> None:
    """Write a row for each sample, the nearest first; OSError if it cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sample", "train_image", "distance"))
    for sample in np.argsort(audit.samples, kind="stable"):
        writer.writerow((sample, audit.nearest[sample], f"{audit.samples[sample]:.6g}"))
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def save_pairs(path: Path, audit: Audit, sets: AuditSets) -> None:
    """Draw the nearest samples as a PNG, each above the training image that it is nearest to."""
    closest = np.argsort(audit.samples, kind="stable")[:PAIRS]
    pairs = np.concatenate([sets.samples.read(closest), sets.train.read(audit.nearest[closest])])
    scale = max(1, 64 // sets.samples.shape[0])
    images.save_png(path, images.grid(pairs, columns=len(closest), scale=scale))


def report(
    audit: Audit, sets: AuditSets, space: str, path: Path, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Print the table, write every sample's nearest image and the nearest pairs; return the record.

    Args:
      space: what distances are of: "pixels" or "features-2048".
      path: the CSV; the PNG lies beside it.
      protocol: what any record says first.

    Raises:
      OSError: a file cannot be written.
    """
    samples, train, held_out = sets.samples, sets.train, sets.held_out
    counts = f"{samples.count:,} samples, {held_out.count:,} held-out images"
    print(f"nearest of {train.count:,} train images in {space}: {counts}")
    print(audit.table())
    save_csv(path, audit)
    save_pairs(path.with_suffix(".png"), audit, sets)
    print(
        f"wrote {path} and .png: the samples that lie nearest, above what they are nearest to",
        flush=True,
    )
    return {
        "metric": f"audit-{space}",
        "value": audit.nearer,
        "suspects": audit.suspects,
        **protocol,
        "num_images": samples.count,
        "samples": samples.description,
        "train_images": train.count,
        "held_out_images": held_out.count,
        "pairs": f"evaluations/{path.name}",
    }
