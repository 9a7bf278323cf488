"""An imported run directory: written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ddpm_jax.checkpoints import Checkpoints, WorkdirError, claim_workdir
from ddpm_jax.config import Config

RECORD = "weights.json"


def check_free(workdir: Path) -> None:
    """WorkdirError unless `workdir` is absent or empty."""
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise WorkdirError(f"--workdir={workdir} is not empty: take another")


def write_workdir(workdir: Path, config: Config, state: Any, record: dict[str, Any]) -> None:
    """config.json, checkpoint 0 and weights.json, first beside `workdir` and then under its name.

    Raises:
      WorkdirError: it is not empty, or cannot be written; nothing is left behind.
    """
    check_free(workdir)
    try:
        workdir.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{workdir.name}.part-", dir=workdir.parent))
    except OSError as error:
        raise WorkdirError(f"--workdir={workdir} cannot be written: {error.strerror}") from error
    try:
        claim_workdir(part, config)
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, state)
            checkpoints.wait()
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        part.chmod(0o755)  # mkdtemp's are for their maker alone
        part.rename(workdir)  # also onto an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def imported_weights(workdir: Path, kind: str) -> str | None:
    """What an imported run directory has as its "params" or its "ema", in words; None if it was not imported.

    Raises:
      WorkdirError: weights.json is damaged.
    """
    path = workdir / RECORD
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text())[kind]
        return {"ema": "ema, imported", "raw": "raw, imported", "unknown": "imported, raw or ema is not known"}[held]
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged ({error}): import the weights again") from error
