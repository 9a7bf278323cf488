"""Runs of two processes on this machine, as two hosts would do them."""

from __future__ import annotations

import socket
import subprocess

from tests.support.processes import finish, script


def start(
    name: str, *flags: str, own: tuple[list[str], list[str]] = ([], []), hosts=(0, 1)
) -> list[subprocess.Popen]:
    """Both processes of a script; `own` are the flags that only one of them gets."""
    common = [
        f"--coordinator_address=localhost:{free_port()}",
        "--num_processes=2",
        f"--host_timeout={HOST_TIMEOUT}",
    ]
    devices = {"JAX_NUM_CPU_DEVICES": "4"}
    return [
        script(name, *flags, *common, f"--process_id={host}", *own[host], environment=devices)
        for host in hosts
    ]


def run_both(name: str, *flags: str) -> list[str]:
    """What the two processes print, after both have ended well."""
    ended = end(start(name, *flags))
    assert [code for code, _, _ in ended] == [0, 0], [said[-2000:] for _, _, said in ended]
    return [out for _, out, _ in ended]


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
