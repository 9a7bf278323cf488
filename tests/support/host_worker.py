"""One of two processes that joined each other once, and run command after command together.

    python -m tests.support.host_worker localhost:9012 0

Each line of the standard input is a JSON object: `command`, its `flags`, the folder `at` which it
runs, and the two files `out` and `errors` that take what it prints. Its exit code is written to the
standard output, or of an unknown fault 1, as `cli.run` has it. An equal program is compiled once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import jax

from ddpm_jax.cli.run import outcome
from ddpm_jax.machine import tune_cpu
from ddpm_jax.parallel import hosts
from ddpm_jax.progress import Lenient
from tests.support.commands import command_module
from tests.support.sharing import Programs


def code_of(command: str, flags: list[str]) -> int:
    """Run a command as its script does, but for the end of the process."""
    sys.argv = [f"scripts/{command}.py", *flags]
    try:
        return outcome(lambda: command_module(command).main(flags))
    except Exception:
        traceback.print_exc()
        return 1


def into(path: str, descriptor: int) -> None:
    """Let all that is written to a descriptor, by native code as well, go to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


def main(address: str, host: int) -> None:
    """Join, then run what is asked for until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tune_cpu()
    sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)
    hosts.join(address, 2, host)
    hosts.join = lambda *triple, **timeouts: None  # the commands come too late for it
    programs = Programs()
    programs.install()
    programs.shared = True
    for line in sys.stdin:
        task = json.loads(line)
        os.chdir(task["at"])
        into(task["out"], 1)
        into(task["errors"], 2)
        code = code_of(task["command"], task["flags"])
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=answers, flush=True)
    jax.distributed.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
