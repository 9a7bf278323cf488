"""How long a training takes to its first step, on a machine that has never seen it, and at the next start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ddpm_jax.errors import UserError


class StartError(UserError):
    """A training that was to be timed did not start."""


def measure_starts(command: list[str], starts: int = 2) -> list[float]:
    """Seconds from the start of the process to its first logged step, each run fresh, the compilation cache empty at first.

    Args:
      command: the training's, without --workdir; it must run from the directory that this process is in.

    Raises:
      StartError: it ended without a step.
    """
    return list(_starts(command, starts))


def _starts(command: list[str], starts: int) -> Iterator[float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache"))}
        for number in range(starts):
            workdir = Path(folder, f"run{number}")
            process, start = None, time.perf_counter()
            with Path(folder, "output").open("w+") as output:
                try:
                    process = subprocess.Popen(
                        [sys.executable, *command, f"--workdir={workdir}", "--config.train.log_every=1"],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                    while not _logged(workdir):
                        if process.poll() is not None:
                            output.seek(0)
                            said = output.read().strip().splitlines() or ["nothing was said"]
                            raise StartError(f"a training to be timed ended with code {process.returncode}: {said[-1]}")
                        time.sleep(0.02)
                    yield time.perf_counter() - start
                finally:
                    if process is not None:
                        process.kill()
                        process.wait()


def _logged(workdir: Path) -> bool:
    path = workdir / "metrics.jsonl"
    return path.is_file() and '"loss"' in path.read_text()
