"""Runs of two processes on this machine, as two hosts would do them."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.processes import ROOT, finish, script

FOUR = {"JAX_NUM_CPU_DEVICES": "4"}  # of each process


def start(
    name: str, *flags: str, own: tuple[list[str], list[str]] = ([], []), hosts=(0, 1)
) -> list[subprocess.Popen]:
    """Both processes of a script; `own` are the flags that only one of them gets."""
    common = [
        f"--coordinator_address=localhost:{free_port()}",
        "--num_processes=2",
        f"--host_timeout={HOST_TIMEOUT}",
    ]
    return [
        script(name, *flags, *common, f"--process_id={host}", *own[host], environment=FOUR)
        for host in hosts
    ]


HOST_TIMEOUT = 10


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def end(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Pair:
    """Two processes of four devices that joined once, and run command after command together.

    They save the imports, and the programs, that every start of two processes pays for anew. What
    ends them, a fault or a signal, is for `start`. See `host_worker`.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self._folder: Path | None = None  # of what they print

    def run(
        self,
        name: str,
        *flags: str,
        own: tuple[list[str], list[str]] = ([], []),
        at: tuple[Path, Path] = (ROOT, ROOT),
    ) -> list[tuple[int, str, str]]:
        """Return code, stdout and stderr of both; as `end(start(...))` does.

        Args:
          at: the folder in which each of them runs.
        """
        self.begin(name, *flags, own=own, at=at)
        return self.end()

    def run_both(self, name: str, *flags: str, own=([], []), at=(ROOT, ROOT)) -> list[str]:
        """Return what the two print, after both have done well."""
        ended = self.run(name, *flags, own=own, at=at)
        assert [code for code, _, _ in ended] == [0, 0], [said[-2000:] for _, _, said in ended]
        return [out for _, out, _ in ended]

    def begin(
        self, name: str, *flags: str, own=([], []), at=(ROOT, ROOT)
    ) -> list[subprocess.Popen]:
        """Start a command on both, for `end`, and return the two processes."""
        if any(process.poll() is not None for process in self.processes):
            self.close()
        if not self.processes:
            self._start()
        for host, process in enumerate(self.processes):
            task = {
                "command": name.removesuffix(".py"),
                "flags": [*flags, *own[host]],
                "at": str(at[host]),
                "out": str(self._place(host, "out")),
                "errors": str(self._place(host, "errors")),
            }
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        return self.processes

    def end(self, seconds: float = 240) -> list[tuple[int, str, str]]:
        """Wait until both have done the command; AssertionError where one does not, or dies."""
        deadline, codes = time.monotonic() + seconds, []
        for process in self.processes:
            ready = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]
            answer = process.stdout.readline() if ready else ""
            if not answer:
                self._abort()
            codes.append(int(answer))
        return [
            (code, self._place(host, "out").read_text(), self._place(host, "errors").read_text())
            for host, code in enumerate(codes)
        ]

    def close(self) -> None:
        """End both, who leave together; a later command starts others."""
        if any(process.poll() is not None for process in self.processes):
            for process in self.processes:
                process.kill()
        for process in self.processes:
            process.stdin.close()
        try:
            for process in self.processes:
                process.wait(60)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
                process.stdout.close()
            self.processes = []
            if self._folder is not None:
                shutil.rmtree(self._folder)
                self._folder = None

    def _place(self, host: int, what: str) -> Path:
        return self._folder / f"{what}_{host}"

    def _start(self) -> None:
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="pair_"))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment |= FOUR | {"PYTHONFAULTHANDLER": "1"}
        address = f"localhost:{free_port()}"
        command = [sys.executable, "-m", "tests.support.host_worker", address]
        pipe = subprocess.PIPE
        for host in (0, 1):
            with self._place(host, "errors").open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(host)],
                        cwd=ROOT,
                        env=environment,
                        stdin=pipe,
                        stdout=pipe,
                        stderr=errors,
                        text=True,
                    )
                )

    def _abort(self) -> None:
        """Say where both stood, and end them."""
        for process in self.processes:
            process.send_signal(signal.SIGABRT)  # faulthandler then says where it stood
        for process in self.processes:
            process.communicate()
        self.processes = []
        said = [self._place(host, "errors").read_text()[-4000:] for host in (0, 1)]
        raise AssertionError(f"a host hung or died: {said[0]}\n\nthe other: {said[1]}")
