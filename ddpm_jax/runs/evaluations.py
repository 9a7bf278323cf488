"""Keep evaluations.jsonl of a run directory: one line for each number, with its whole protocol."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import naming, parse_json

NAME = "evaluations.jsonl"


def append_evaluation(workdir: Path, record: dict[str, Any]) -> None:
    """Add `record` and the time, UTC, as one line of strict JSON.

    A last line that a killed process or a full disk left unfinished stays, as a line of its own.

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
    with naming(path), open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + line.encode() + b"\n")  # at the end, wherever it has been read


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Read the records in the order written; none where there is no file.

    Raises:
      WorkdirError: a line is damaged.
    """
    path, records = workdir / NAME, []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_json(line))
        except ValueError as error:
            raise WorkdirError(
                f"{path}: its line {number} is damaged ({getattr(error, 'msg', error)}): mend or "
                "remove that line"
            ) from error
    return records
