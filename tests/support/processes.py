"""Runs as users have them, in processes of their own: started, watched, ended, and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.config import Config, to_dict
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.training.state import TrainState, abstract_state

ROOT = Path(__file__).parents[2]
IN_TIME = (
    "steps_per_second",
    "images_per_second",
)  # the only metrics that two equal runs may differ in


def write_config(folder: Path, config: Config) -> Path:
    """The config as a file, the way users have it."""
    path = folder / "mine.py"
    values = to_dict(config)
    path.write_text(
        f"from ddpm_jax.config import from_dict\n\n\ndef get_config():\n    return from_dict({values!r})\n"
    )
    return path


def script(
    name: str,
    *flags: str,
    before: list[str] | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    command = [*(before or []), sys.executable, str(ROOT / "scripts" / name), *flags]
    environment = (
        os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1"}
        | (environment or {})
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    """Code, stdout and stderr of a process that ends by itself."""
    with process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler then says where it stood
            raise AssertionError(f"hung: {process.communicate()[1][-4000:]}") from None
    return process.returncode, out, errors


def wait_until(
    condition, process: subprocess.Popen, what: str, seconds: float = 240, every: float = 0.02
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{what} never came: {process.communicate()[1]}")
        time.sleep(every)


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    wait_until(lambda: metrics_seen(workdir / "metrics.jsonl") >= step, process, f"step {step}")


def metrics_seen(path: Path) -> int:
    """The last step in a metrics.jsonl that may be growing."""
    whole = path.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2] if path.exists() else b""
    return json.loads(whole)["step"] if whole else 0


def metrics(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in IN_TIME} for line in lines]


def final_state(config: Config, workdir: Path, step: int | None = None) -> TrainState:
    with Checkpoints.reading(workdir) as checkpoints:
        return checkpoints.restore(
            Devices(jax.devices()[:1]).abstract_replicated(abstract_state(config)), step
        )


def assert_bit_equal(one, other) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )
