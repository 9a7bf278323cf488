"""Small trained networks that ship with the code: `--pretrained=NAME` opens one as a run directory.

pretrained/NAME/ is what `export_weights.py --layout=diffusers --dtype=bfloat16` writes, so DDPMPipeline opens it as well: the
averaged weights. Beside them lie config.json and the records of how they came about, metrics.jsonl and evaluations.jsonl.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ddpm_jax import hosts
from ddpm_jax.checkpoints import WorkdirError
from ddpm_jax.devices import Devices
from ddpm_jax.trained import save_imported
from ddpm_jax.weights.files import fingerprint
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.workdir import RECORD

SHIPPED = Path(__file__).parents[1] / "pretrained"
RUNS = Path("runs/pretrained")
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


def names() -> list[str]:
    return sorted(folder.name for folder in SHIPPED.glob("*") if (folder / WEIGHTS).is_file())


def unpack(name: str, devices: Devices, runs: Path = RUNS) -> Path:
    """The run directory `runs`/NAME, made at the first call, and again where it was made from other weights than those that ship.

    Raises:
      WorkdirError: nothing of this name ships, or the directory cannot be written.
    """
    if name not in names():
        raise WorkdirError(f"--pretrained={name}: one of {', '.join(names()) or 'none: this installation has no weights'}")
    shipped, workdir = SHIPPED / name, runs / name
    with hosts.together():
        if devices.is_main and not _made_of(workdir, shipped / WEIGHTS):
            shutil.rmtree(workdir, ignore_errors=True)
            save_imported(workdir, import_weights("diffusers", shipped, config_file=shipped / "config.json"))
    return workdir


def _made_of(workdir: Path, file: Path) -> bool:
    try:
        return json.loads((workdir / RECORD).read_text())["files"] == [fingerprint(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
