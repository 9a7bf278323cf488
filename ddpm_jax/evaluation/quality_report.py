"""Show the numbers of `quality`: each under its honest name, in a table and as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.references import Reference

CUSTOM = 50_000  # images of a published FID


@dataclass(frozen=True)
class Number:
    """A metric by its full name, its value, and what else is known about it."""

    metric: str
    value: float
    extra: dict[str, float] = field(default_factory=dict)


def over_seeds(runs: Sequence[Sequence[Number]]) -> list[Number]:
    """Average each number over several draws of samples, with their deviation and all values.

    Standard errors are left out: they are of single draws, and the deviation has what they tell.
    """
    if len(runs) == 1:
        return list(runs[0])
    merged = []
    for numbers in zip(*runs, strict=True):
        values = [number.value for number in numbers]
        extra = {
            name: float(np.mean([number.extra[name] for number in numbers]))
            for name in numbers[0].extra
            if not name.endswith("standard_error")
        }
        extra |= {"seed_deviation": float(np.std(values, ddof=1)), "seed_values": values}
        merged.append(Number(numbers[0].metric, float(np.mean(values)), extra))
    return merged


def format_numbers(numbers: Sequence[Number], count: int) -> str:
    """Format a table, and below it what to be wary of with `count` images."""
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
            line = f"{'  at infinite N':16}{extra['infinity']:12.5g}"
            if "infinity_standard_error" in extra:
                line += f"  +- {extra['infinity_standard_error']:.3g} (standard error of the fit)"
            lines.append(line)
    biased = [number.metric for number in numbers if "FID" in number.metric]
    if biased and count < CUSTOM:
        lines.append(
            f"warning: {', '.join(biased)} of {count:,} images, not {CUSTOM:,}: "
            "fewer images, larger numbers; compare at equal counts only, or at infinite N"
        )
    return "\n".join(lines)


def report(
    numbers: Sequence[Number],
    samples: ImageSet,
    reference: Reference | None,
    extractor: Extractor,
    tap: str,
    protocol: dict[str, Any],
    seeds: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """Print the table, and return a record for each number.

    Args:
      samples: those of the first seed.
      protocol: what any record says first.
      seeds: of the samples, None where they are those of others.
    """
    print(f"{samples.count:,} images: {samples.describe()}")
    if reference is not None:
        print(f"reference: {reference.describe()}")
    weights = extractor.weights
    print(
        f"Inception {weights.name} (SHA-256 of its numbers {weights.sha256[:16]}), "
        f"resize {extractor.resize}, features {tap}"
    )
    print(format_numbers(numbers, samples.count), flush=True)
    shared = protocol | {
        "num_images": samples.count,
        "samples": samples.description | ({} if seeds is None else {"seeds": list(seeds)}),
        **extractor.provenance(),
        "reference": None,
    }
    if reference is not None:
        shared["reference"] = {
            "file": reference.file,
            "whole": reference.whole,
            "provenance": reference.provenance,
        }
    return [
        {"metric": number.metric, "value": number.value, **number.extra, **shared}
        for number in numbers
    ]
