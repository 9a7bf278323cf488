"""Run commands in processes of their own, for a time, and have them save when it is over."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

from ddpm_jax.reproduction.rows import check

GRACE = 60.0  # seconds that a command has to save and end
PR_SET_PDEATHSIG = 1  # of Linux' prctl
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked this process to end.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP raise Stopped inside of the block."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> int | None:
    """Run Python on a command, in a process group of its own, for some seconds at most.

    Then, or when a signal comes here, it gets SIGTERM once: a second signal would not let it save.

    Returns:
      0, or None where the time was over before.

    Raises:
      LedgerError: it failed.
      Stopped: by a signal.
    """
    line = shlex.join(["python", *command])
    print(line, flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
    check(code == 0, f"this command ended with code {code}: {line}")
    return code


def _end(process: subprocess.Popen) -> None:
    """Have a process save and end; kill it where it does not, or at a second signal."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except BaseException:
            process.kill()
            process.wait()
            raise


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
