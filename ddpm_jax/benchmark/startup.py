"""Time a training from its start to its first step, without and with compiled programs on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ddpm_jax.errors import UserError


class StartError(UserError):
    """A training that was to be timed did not start."""


def measure_starts(
    config: str, data_dir: Path = Path("data"), overrides: Sequence[str] = (), starts: int = 2
) -> list[float]:
    """Time trainings from the start of their process to their first logged step.

    Each is a fresh run. They share a compilation cache, which is empty at the first start.

    Args:
      config: a config file, as `load_config` takes it, seen from the current directory.
      data_dir: the prepared data sets.
      overrides: of the config's fields, each "section.field=value".
      starts: how many trainings.

    Returns:
      The seconds of each.

    Raises:
      StartError: a training ended without a step.
    """
    fields = [f"--config.{item}" for item in (*overrides, "train.log_every=1")]
    command = [sys.executable, "-m", "ddpm_jax.cli", "train"]
    command += [f"--config={config}", f"--data_dir={data_dir}", *fields]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache"))}
        workdirs = [Path(folder, f"run{number}") for number in range(starts)]
        return [
            _seconds_to_first_step([*command, f"--workdir={workdir}"], workdir, environment)
            for workdir in workdirs
        ]


def _seconds_to_first_step(command: list[str], workdir: Path, environment: dict[str, str]) -> float:
    with workdir.with_suffix(".log").open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not _has_logged(workdir):
                if process.poll() is not None:
                    output.seek(0)
                    lines = output.read().strip().splitlines() or ["nothing was said"]
                    raise StartError(
                        f"a training to be timed ended with code {process.returncode}: {lines[-1]}"
                    )
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def _has_logged(workdir: Path) -> bool:
    path = workdir / "metrics.jsonl"
    return path.is_file() and '"loss"' in path.read_text()
