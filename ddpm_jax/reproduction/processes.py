"""Run commands in processes of their own, and have them save when their time is over."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from ddpm_jax.reproduction.ledger import check

GRACE = 60.0  # seconds that a command has to save and end
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
    command: list[str],
    seconds: float | None,
    environment: dict[str, str] | None = None,
    typed: list[str] | None = None,
) -> int | None:
    """Run Python on a command, in a process group of its own, for some seconds at most.

    Then, or when a signal comes here, it gets SIGTERM once: a second signal would not let it save.

    Args:
      seconds: None where there is no limit.
      typed: the command as a person would type it, which is printed.

    Returns:
      0, or None where the time was over before.

    Raises:
      LedgerError: it failed.
      Stopped: by a signal.
    """
    line = shlex.join(typed or ["python", *command])
    print(line, flush=True)
    process = subprocess.Popen(
        [*_ending_with_parent(), sys.executable, *command],
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        code = process.wait(seconds if seconds is None else max(seconds, 0))
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
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            process.kill()  # nothing where it has ended
            process.wait()


def _ending_with_parent() -> list[str]:
    """Return what goes before a command that gets SIGTERM when its parent is killed.

    The kernel sends it, at the command's own wish. Popen's preexec_fn could utter it as well, but
    forks for that, which may deadlock where JAX has threads. Only Linux can, with util-linux.
    """
    return ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
