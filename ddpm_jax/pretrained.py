"""Small trained networks that ship with the code: `--pretrained=NAME` opens one as a run directory.

pretrained/NAME/ holds weights.safetensors, the averaged weights in bfloat16 with their config in the header, as
`export_weights.py --layout=pesser --dtype=bfloat16` writes them. Beside it lie the records of how they came about.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from ddpm_jax.checkpoints import WorkdirError
from ddpm_jax.devices import Devices
from ddpm_jax.trained import save_imported
from ddpm_jax.weights.files import fingerprint
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.workdir import RECORD

SHIPPED = Path(__file__).parents[1] / "pretrained"
RUNS = Path("runs/pretrained")


def names() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob("*/weights.safetensors"))


def unpack(name: str, devices: Devices, runs: Path = RUNS) -> Path:
    """The run directory `runs`/NAME, made at the first call, and again where it was made from other weights than those that ship.

    Raises:
      WorkdirError: nothing of this name ships, or the directory cannot be written.
    """
    if name not in names():
        raise WorkdirError(f"--pretrained={name}: one of {', '.join(names()) or 'none: this installation has no weights'}")
    file, workdir = SHIPPED / name / "weights.safetensors", runs / name
    if devices.is_main and not _made_of(workdir, file):
        shutil.rmtree(workdir, ignore_errors=True)
        save_imported(workdir, import_weights("pesser", file))
    devices.from_main(np.zeros(1))  # the other hosts wait until it is there
    return workdir


def _made_of(workdir: Path, file: Path) -> bool:
    try:
        return json.loads((workdir / RECORD).read_text())["files"] == [fingerprint(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
