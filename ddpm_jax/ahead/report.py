"""Write reports of compiled programs: as text, as a table and as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_jax.ahead import gpu, tpu
from ddpm_jax.ahead.programs import PROGRAMS
from ddpm_jax.errors import ConfigError
from ddpm_jax.files import read_json, replacing


def format_report(report: dict[str, Any]) -> str:
    """Write a few lines for people, of what `compile.report` gives."""
    return _machine(report).words(report)


def format_table(files: Iterable[dict[str, Any]]) -> str:
    """Write a table in Markdown, a row for each program of each file of compile_ahead.py.

    TPUs and GPUs, of which different things are known, have a table each.
    """
    rows: dict[Any, list[tuple[str, ...]]] = {tpu: [], gpu: []}
    for file in files:
        config = file["config"].split("/")[-1].replace(".py", "")
        for report in (file[what] for what in PROGRAMS if what in file):
            machine = _machine(report)
            rows[machine].append(machine.row(config, report))
    return "\n\n".join(
        _markdown([machine.HEAD, tuple("---" for _ in machine.HEAD), *own])
        for machine, own in rows.items()
        if own
    )


def _machine(report: dict[str, Any]) -> Any:
    """Return the module that knows reports of this kind."""
    return gpu if "launches" in report else tpu


def _markdown(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read_report(path: Path) -> dict[str, Any]:
    """Read a file that compile_ahead.py has written.

    Raises:
      ConfigError: it is another file.
    """
    try:
        report = read_json(path)
    except ValueError:  # not JSON, or not even text
        report = None
    try:
        right = bool(format_table([report]))
    # Anybody's JSON may come, and what makes a row of it knows what it needs.
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError):
        right = False
    if not right:
        raise ConfigError(f"table={path}: not a report of compile_ahead.py")
    return report


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write the reports of a config's programs as JSON."""
    with replacing(path) as file:  # what is there already is the programs before this one
        file.write((json.dumps(report, indent=1) + "\n").encode())
