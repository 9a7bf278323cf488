"""How good samples are: every number that Inception features give, each with its honest name.

A number of other than the 2048 features bears their count: FID-768 is not an FID, and is nowhere called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ddpm_jax.evaluation import references
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.frechet import LEAST, Gaussian, frechet_distance, frechet_infinity
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception_score import inception_score
from ddpm_jax.evaluation.inception_weights import InceptionWeights
from ddpm_jax.evaluation.kid import kernel_inception_distance
from ddpm_jax.evaluation.moments import Moments
from ddpm_jax.evaluation.prdc import precision_recall_density_coverage
from ddpm_jax.evaluation.references import KEPT, Reference

METRICS = ("fid", "kid", "is", "sfid", "prdc")
FEATURES = ("64", "192", "768", "2048")
CUSTOM = 50_000  # images of a published FID


@dataclass(frozen=True)
class Number:
    """A metric by its full name, its value, and what else is known about it."""

    metric: str
    value: float
    extra: dict[str, float] = field(default_factory=dict)


def titled(metric: str, tap: str) -> str:
    """ "FID" of the 2048 features, "FID-768" of others."""
    return metric if tap == "2048" else f"{metric}-{tap}"


def taps_of(metrics: Sequence[str], tap: str) -> tuple[str, ...]:
    """What has to be tapped for `metrics`."""
    needed = [tap] if {"fid", "kid", "prdc"} & set(metrics) else []
    needed += [special for metric, special in (("sfid", "spatial"), ("is", "logits")) if metric in metrics]
    return tuple(needed)


def check_weights(weights: InceptionWeights, metrics: Sequence[str], tap: str) -> None:
    """EvaluationError, which says what to fetch, unless `weights` suffice for all of `metrics`: before anything is drawn."""
    names = {"fid": titled("FID", tap), "kid": titled("KID", tap), "prdc": "prdc", "sfid": "sFID", "is": "Inception Score"}
    for metric in metrics:
        for needed in taps_of([metric], tap):
            weights.require(needed, names[metric])


def measure(
    extractor: Extractor, images: ImageSet, reference: Reference | None, metrics: Sequence[str], tap: str
) -> list[Number]:
    """`metrics` of `images`, in one pass through the network; on the first host, which holds the reference, the others get none.

    Args:
      reference: not needed for "is" alone.

    Raises:
      EvaluationError: too few images, weights or a reference that lack something.
    """
    images.check_count("samples")
    if reference is not None:
        references.check_size(reference, images)
    collected: dict[str, list[np.ndarray]] = {name: [] for name in taps_of(metrics, tap) if name != "spatial"}
    spatial: Moments | None = None
    for block in extractor.blocks(images, taps_of(metrics, tap), "samples"):
        for name, rows in block.features.items():
            if name == "spatial":  # as wide as all the rest, and only its moments are wanted
                spatial = Moments.of(rows) if spatial is None else spatial + Moments.of(rows)
            else:
                collected[name].append(rows)
    numbers: list[Number] = []
    if not extractor.devices.is_main:
        return numbers
    features = {name: np.concatenate(blocks) for name, blocks in collected.items()}
    if "fid" in metrics:
        distance = frechet_distance(Gaussian.of(_moments(features[tap])), reference.gaussian)
        extra = {}
        if images.count >= LEAST:
            limit = frechet_infinity(features[tap], reference.gaussian)
            extra = {"infinity": limit.distance, "infinity_standard_error": limit.standard_error}
        numbers.append(Number(titled("FID", tap), distance, extra))
    if "sfid" in metrics:
        if reference.spatial is None:
            raise EvaluationError("sFID: the reference has no mu_s and sigma_s; build one with --build_reference")
        numbers.append(Number("sFID", frechet_distance(Gaussian.of(spatial), reference.spatial)))
    if "kid" in metrics:
        kid = kernel_inception_distance(_some(features[tap]), _kept(reference, "KID"))
        numbers.append(Number(titled("KID", tap), kid.mean, {"standard_error": kid.standard_error}))
    if "is" in metrics:
        score = inception_score(features["logits"])
        numbers.append(Number("IS", score.mean, {"deviation": score.deviation}))
    if "prdc" in metrics:
        found = precision_recall_density_coverage(_some(features[tap]), _kept(reference, "prdc"))
        numbers += [Number(titled(name, tap), value) for name, value in vars(found).items()]
    return numbers


def over_seeds(runs: Sequence[Sequence[Number]]) -> list[Number]:
    """Mean of each number over several draws of samples, with their deviation and the values themselves."""
    if len(runs) == 1:
        return list(runs[0])
    merged = []
    for numbers in zip(*runs, strict=True):
        values = [number.value for number in numbers]
        extra = {name: float(np.mean([number.extra[name] for number in numbers])) for name in numbers[0].extra}
        extra |= {"seed_deviation": float(np.std(values, ddof=1)), "seed_values": values}
        merged.append(Number(numbers[0].metric, float(np.mean(values)), extra))
    return merged


def format_numbers(numbers: Sequence[Number], count: int) -> str:
    """A table, and below it what to be wary of."""
    lines = []
    for number in numbers:
        extra, line = number.extra, f"{number.metric:16}{number.value:12.5g}"
        for name, title in (
            ("standard_error", "standard error"),
            ("deviation", "over 10 splits"),
            ("seed_deviation", "over seeds"),
        ):
            if name in extra:
                line += f"  +- {extra[name]:.3g} ({title})"
        lines.append(line)
        if "infinity" in extra:
            error = extra["infinity_standard_error"]
            lines.append(f"{'  at infinite N':16}{extra['infinity']:12.5g}  +- {error:.3g} (standard error of the fit)")
    biased = [number.metric for number in numbers if "FID" in number.metric]
    if biased and count < CUSTOM:
        lines.append(
            f"warning: {', '.join(biased)} of {count:,} images, not {CUSTOM:,}: fewer images, larger numbers; "
            "compare at equal counts only, or at infinite N"
        )
    return "\n".join(lines)


def _moments(features: np.ndarray) -> Moments:
    blocks = (Moments.of(features[start : start + 1000]) for start in range(0, len(features), 1000))
    total = next(blocks)
    for block in blocks:
        total = total + block
    return total


def _some(features: np.ndarray) -> np.ndarray:
    """At most KEPT rows, at equal distances: all pairs are compared."""
    count = min(len(features), KEPT)
    return features[np.arange(count) * len(features) // count]


def _kept(reference: Reference, what: str) -> np.ndarray:
    if reference.features is None:
        raise EvaluationError(
            f"{what}: the reference has moments only, no features; build one with evaluate.py --build_reference"
        )
    return reference.features
