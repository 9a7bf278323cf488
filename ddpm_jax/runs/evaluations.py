"""Keep evaluations.jsonl of a run directory: one line for each number, with its whole protocol."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import naming, parse_json

NAME = "evaluations.jsonl"


def append_evaluation(workdir: Path, record: dict[str, Any]) -> None:
    """Add `record` and the time, UTC, as one line of strict JSON.

    Raises:
      ValueError: a number that is not finite: it belongs into an error message, not into a table
        of results.
      OSError: the file cannot be written.
    """
    bad = [
        name
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise ValueError(f"{NAME}: {', '.join(bad)} not finite")
    line = json.dumps(
        record | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, allow_nan=False
    )
    path = workdir / NAME
    with naming(path), open(path, "a") as file:
        file.write(line + "\n")


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Read the records in the order written; none where there is no file.

    Raises:
      WorkdirError: a line is damaged.
    """
    path = workdir / NAME
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [parse_json(line) for line in lines]
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}): mend or remove that line") from error
