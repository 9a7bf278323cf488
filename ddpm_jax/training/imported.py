"""Write the run directories of imported weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import read_json
from ddpm_jax.runs.workdir import RECORD, check_free, claim_workdir
from ddpm_jax.training.state import init_state
from ddpm_jax.weights.importing import Imported


def check_place(workdir: Path) -> bool:
    """Check that an import may be put at `workdir`; return whether one lies there (`check_free`).

    Raises:
      WorkdirError: there is something else, or it is the current folder, in whose place nothing
        can be put.
    """
    if workdir.resolve() == Path.cwd():
        raise WorkdirError(f"workdir={workdir} is the current folder: name one in it or beside it")
    return check_free(workdir)


def save_imported(workdir: Path, imported: Imported) -> None:
    """Write the run directory of imported weights, at step 0.

    Raises:
      WorkdirError: see `write_workdir`.
    """
    state = init_state(imported.config, imported.params)
    state = state.replace(ema={name: imported.ema for name in state.ema})
    write_workdir(workdir, imported.config, jax.device_put(state), imported.record)


def write_workdir(workdir: Path, config: Config, state: Any, record: dict[str, Any]) -> None:
    """Write config.json, checkpoint 0 and weights.json, first beside `workdir`, then to its name.

    An import that is there, and that nothing was done with (see `check_place`), makes room.

    Raises:
      WorkdirError: it is not free, or cannot be written; nothing is left behind.
    """
    from ddpm_jax.runs.checkpoints import Checkpoints

    was_there = check_place(workdir)
    try:
        workdir.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{workdir.name}.part-", dir=workdir.parent))
    except OSError as error:
        raise WorkdirError(f"workdir={workdir} cannot be written: {error.strerror}") from error
    try:
        claim_workdir(part, config)
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, state)
            checkpoints.wait()
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        part.chmod(0o755)  # mkdtemp's are for their maker alone
        if was_there:
            workdir.rename(part / "before")
        try:
            part.rename(workdir)  # also onto an empty folder
        except OSError:
            if not _holds(workdir, record):
                raise
        shutil.rmtree(workdir / "before", ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _holds(workdir: Path, record: dict[str, Any]) -> bool:
    """Return whether another process has put the same import there meanwhile."""
    try:
        return read_json(workdir / RECORD) == json.loads(json.dumps(record))
    except (OSError, ValueError):
        return False
