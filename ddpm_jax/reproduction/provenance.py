"""Note how long a network was trained, by which code it was measured, and on what."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from ddpm_jax.files import checkout
from ddpm_jax.reproduction.ledger import Record, check
from ddpm_jax.runs.workdir import load_workdir_config

DEVICE = """
from ddpm_jax.parallel.devices import Devices
devices = Devices().devices
print(len(devices), "x", devices[0].device_kind)
"""


def of_run(workdir: Path) -> Record:
    """Return the provenance of what this call measures in a run directory."""
    return {"trained": trained(workdir), "commit": commit(), "device": device()}


def unknown(workdir: Path) -> Record:
    """Return the provenance of what a run directory holds from elsewhere."""
    return {"trained": trained(workdir), "commit": "unknown", "device": "unknown"}


def trained(workdir: Path) -> str:
    """Return the steps of a run and the images of each, "800000 x 128"."""
    train = load_workdir_config(workdir).train
    return f"{train.steps} x {train.batch_size}"


def commit() -> str:
    """Return the commit of the code, with a + where files differ from it."""
    folder = checkout()
    if folder is None:
        return "unknown"  # a folder around the installation may be another project's
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # there is no git here
        return "unknown"
    return process.stdout.strip() or "unknown"


@functools.cache
def device() -> str:
    """Return the number and kind of the devices, "8 x TPU v5 lite".

    A process of its own looks, so that the devices stay free for the commands to come.

    Raises:
      LedgerError: it found none.
    """
    process = subprocess.run(
        [sys.executable, "-c", DEVICE], capture_output=True, text=True, check=False
    )
    last = process.stderr.strip().splitlines()[-1:]
    check(process.returncode == 0, f"no device could be asked for its kind: {' '.join(last)}")
    return process.stdout.strip()
