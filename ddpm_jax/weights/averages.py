"""Tell raw from averaged weights, for the record of an import."""

from __future__ import annotations

import re

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layout import WeightSets

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")


def which_weights(
    sets: WeightSets, header: str | None, names: str, choice: str | None, file: str
) -> tuple[dict[str, str], str]:
    """Decide what params and ema will hold, for the record, and write the sentence to print.

    One unlabelled set is what its header says. Without a header it is what the user says. Without
    either it counts as averaged if "ema" is a word of its file's name, and else as unknown.

    Args:
      sets: what the layout unpacked.
      header: the entry of a safetensors header, such as "ema 0.9999"; None if there is none.
      names: the names in which the word "ema" is looked for.
      choice: "raw" or "ema", if the user says so.
      file: how messages call the file.

    Returns:
      {"params": kind, "ema": kind} with the kinds "raw", "ema" and "unknown"; and the sentence.

    Raises:
      WeightsError: the user says otherwise than the file.
    """
    kinds = {kind for kind in ("raw", "ema") if getattr(sets, kind) is not None}
    if header is not None:
        kinds = {kind for kind in ("raw", "ema") if header.startswith(kind)}
    if choice is not None:
        if kinds not in (set(), {choice}):
            raise WeightsError(
                f"weights={choice}: {file} says itself what it holds, "
                f"{' and '.join(sorted(kinds))} weights"
            )
        kinds = {choice}
    if not kinds and header is None and _EMA.search(names.lower()):
        kinds = {"ema"}
    if kinds == {"raw", "ema"}:
        sentence = "weights: raw and averaged (EMA) ones, each in its place"
        return {"params": "raw", "ema": "ema"}, sentence
    if kinds == {"ema"}:
        sentence = "weights: averaged (EMA) ones only, taken for the raw ones as well"
        return {"params": "ema", "ema": "ema"}, sentence
    if kinds == {"raw"}:
        sentence = (
            "weights: WARNING, raw ones only, taken for the averages (EMA) as well: "
            "expect a several times larger FID"
        )
        return {"params": "raw", "ema": "raw"}, sentence
    sentence = (
        "weights: WARNING, the file does not say whether they are raw or averaged (EMA), and FID "
        "depends on it: google/ddpm-cifar10-32 holds raw ones, ddpm-ema-* averages; "
        "weights=raw or weights=ema settles the record"
    )
    return {"params": "unknown", "ema": "unknown"}, sentence
