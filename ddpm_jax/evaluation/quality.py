"""Measure how good samples are by every number that Inception features give.

A number of other than the 2048 features bears their count: FID-768 is not an FID, and is nowhere
called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation import references
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import InceptionWeights
from ddpm_jax.evaluation.metrics.frechet import LEAST, Gaussian, frechet_distance, frechet_infinity
from ddpm_jax.evaluation.metrics.inception_score import SPLITS, inception_score
from ddpm_jax.evaluation.metrics.kid import GROUPS, kernel_inception_distance
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.evaluation.metrics.prdc import DENSITY_K, precision_recall_density_coverage
from ddpm_jax.evaluation.quality_report import Number
from ddpm_jax.evaluation.references import MOST_FEATURES, Reference, choose
from ddpm_jax.parallel import hosts

METRICS = ("fid", "kid", "is", "sfid", "prdc")


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a set of images: {tap: float32 [n, width]}, and the moments of spatial ones."""

    rows: dict[str, np.ndarray]
    spatial: Moments


def full_name(metric: str, tap: str) -> str:
    """Return "FID" for the 2048 features, "FID-768" for others."""
    return metric if tap == "2048" else f"{metric}-{tap}"


def taps_of(metrics: Sequence[str], tap: str) -> tuple[str, ...]:
    """List what has to be tapped for `metrics`."""
    taps = [tap] if {"fid", "kid", "prdc"} & set(metrics) else []
    taps += [
        special for metric, special in (("sfid", "spatial"), ("is", "logits")) if metric in metrics
    ]
    return tuple(taps)


def check_weights(weights: InceptionWeights, metrics: Sequence[str], tap: str) -> None:
    """Raise EvaluationError, which says what to fetch, unless `weights` suffice for all `metrics`.

    It is for the time before anything is drawn.
    """
    names = {
        "fid": full_name("FID", tap),
        "kid": full_name("KID", tap),
        "prdc": "prdc",
        "sfid": "sFID",
        "is": "Inception Score",
    }
    for metric in metrics:
        for needed in taps_of([metric], tap):
            weights.require(needed, names[metric])


def check_count(count: int, metrics: Sequence[str], what: str = "images") -> None:
    """Raise EvaluationError if `count` samples, or real images, are too few for `metrics`.

    It is for the time before anything is drawn.
    """
    for metric, name, least in (
        ("fid", "FID", 2),
        ("sfid", "sFID", 2),
        ("kid", "KID", 2 * GROUPS),
        ("is", "Inception Score", 2 * SPLITS),
        ("prdc", "precision and recall", DENSITY_K + 1),
    ):
        if metric in metrics and count < least:
            raise EvaluationError(f"{name}: {count} {what}; at least {least} are needed")


def check_reference(
    reference: Reference, shape: tuple[int, int, int], metrics: Sequence[str]
) -> None:
    """Raise EvaluationError unless `metrics` of images [h,w,c] can be measured against `reference`.

    It is for the time before anything is drawn.
    """
    references.check_size(reference, shape)
    if "sfid" in metrics and reference.spatial is None:
        raise EvaluationError(
            "sFID: the reference has no mu_s and sigma_s; build one with build_reference"
        )
    for metric, name in (("kid", "KID"), ("prdc", "prdc")):
        if metric in metrics and reference.features is None:
            raise EvaluationError(
                f"{name}: the reference has moments only, no features; "
                "build one with build_reference"
            )
        if metric in metrics:
            check_count(len(reference.features), [metric], "images of the reference")


def measure(
    extractor: Extractor,
    images: ImageSet,
    reference: Reference | None,
    metrics: Sequence[str],
    tap: str,
) -> list[Number]:
    """Measure `metrics` of `images`, in one pass through the network on all hosts.

    Args:
      reference: not needed for "is" alone; the first host's counts, the others need none.

    Returns:
      The numbers on the first host, none on the others.

    Raises:
      EvaluationError: too few images, weights or a reference that lack something.
    """
    images.check_count("samples")
    is_main = extractor.devices.is_main
    with hosts.together():
        if is_main and reference is not None:
            check_reference(reference, images.shape, metrics)
    features = extract(extractor, images, metrics, tap)
    with hosts.together():
        return score(features, reference, metrics, tap) if is_main else []


def extract(extractor: Extractor, images: ImageSet, metrics: Sequence[str], tap: str) -> Features:
    """Compute the features that `metrics` need, on every host; logits without their bias."""
    taps = taps_of(metrics, tap)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in taps if name != "spatial"}
    spatial = Moments()  # as wide as all the rest, and only its moments are needed
    for block in extractor.blocks(images, taps, "samples"):
        if "spatial" in taps:
            spatial += Moments.of(block.features["spatial"])
        for name, blocks in rows.items():
            blocks.append(block.features[name])
    features = {name: np.concatenate(blocks) for name, blocks in rows.items()}
    if "logits" in features:  # the Inception Score's, whose code has no bias
        features["logits"] -= extractor.weights.params["softmax"]["bias"]
    return Features(features, spatial)


def score(
    features: Features, reference: Reference | None, metrics: Sequence[str], tap: str
) -> list[Number]:
    """Compute `metrics` from features; EvaluationError for too few of them."""
    numbers: list[Number] = []
    if "fid" in metrics:
        rows = features.rows[tap]
        moments = Moments.over(np.split(rows, range(1000, len(rows), 1000)))
        distance, extra = frechet_distance(Gaussian.of(moments), reference.gaussian), {}
        if len(rows) >= LEAST:
            limit = frechet_infinity(rows, reference.gaussian)
            extra = {"infinity": limit.distance, "infinity_standard_error": limit.standard_error}
        numbers.append(Number(full_name("FID", tap), distance, extra))
    if "sfid" in metrics:
        distance = frechet_distance(Gaussian.of(features.spatial), reference.spatial)
        numbers.append(Number("sFID", distance))
    if "kid" in metrics:
        kid = kernel_inception_distance(*_subsets(features.rows[tap], reference.features))
        extra = {"standard_error": kid.standard_error}
        numbers.append(Number(full_name("KID", tap), kid.mean, extra))
    if "is" in metrics:
        inception = inception_score(features.rows["logits"])
        numbers.append(Number("IS", inception.mean, {"deviation": inception.deviation}))
    if "prdc" in metrics:
        prdc = precision_recall_density_coverage(*_subsets(features.rows[tap], reference.features))
        numbers += [Number(full_name(name, tap), value) for name, value in vars(prdc).items()]
    return numbers


def _subsets(*sets: np.ndarray) -> list[np.ndarray]:
    """Take at most MOST_FEATURES rows of each, in orders of their own: all pairs are compared."""
    return [rows[choose(len(rows), MOST_FEATURES, seed)] for seed, rows in enumerate(sets)]
