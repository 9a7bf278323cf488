"""Run a command: one line for what the user can mend, and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

from ddpm_jax.cli import flags
from ddpm_jax.errors import UserError
from ddpm_jax.machine import tune_cpu, with_huge_pages
from ddpm_jax.parallel import programs
from ddpm_jax.progress import Lenient

_TOO_LARGE = "out of memory: this config is too large for the machine"


def run_named(module: str) -> None:
    """Run the command that a module of this folder holds, as `run` does."""
    _start_anew()  # before the module is imported, and JAX with it
    run(importlib.import_module(f"ddpm_jax.cli.{module}").main)


def run(main: Callable[[], int | None]) -> None:
    """Run a command, and end the process with the code of `outcome`."""
    tune_cpu()
    sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)
    ended = []  # [True] once `main` has returned, on all hosts then

    def watched() -> int | None:
        code = main()
        ended.append(True)
        return code

    try:
        code = outcome(watched)
    except Exception:
        if not _several_hosts():
            raise
        # Leaving the interpreter would wait for the other hosts, who wait for this one.
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if not ended:  # refused or interrupted, perhaps on this host alone
        if "jax" in sys.modules:
            _hosts().leave()
        # A failed save leaves threads of the checkpoint library that would raise, or hang, at exit.
        os._exit(code)
    if _several_hosts():
        _hosts().barrier("end")  # the first host may have files to finish
    sys.exit(code)


def _start_anew() -> None:
    """Start this process again, as itself, where its memory would then come in larger pages.

    It does so once, and not where help is asked for.
    """
    computes = len(sys.argv) > 1 and not {"-h", "--help"} & set(sys.argv)
    if computes and sys.executable and (environment := with_huge_pages()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _several_hosts() -> bool:
    """Return whether this process is one of several.

    It imports no JAX, which would have joined, and asks for devices only where hosts have joined: a
    command that computes nothing runs beside one that has taken them all.
    """
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _hosts() -> ModuleType:
    from ddpm_jax.parallel import hosts

    return hosts


def outcome(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    A UserError, a failing disk and full memory are told in one line.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # TFDS and clu log what they raise as well
    programs.keep_programs()
    try:
        return main() or 0
    except UserError as error:
        return complain(str(error) if error.step is None else f"{error}: {_again(error.step)}")
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        return complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except MemoryError:
        return complain(_TOO_LARGE)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return complain(_of_jax(error))


def _of_jax(error: Exception) -> str:
    """Return the line about an error of JAX that the user can mend, and raise any other."""
    ours = type(error).__name__ == "JaxRuntimeError"
    if ours and "RESOURCE_EXHAUSTED" in str(error):
        return _less_memory()
    if "jax" in sys.modules:
        from ddpm_jax.parallel.devices import why_none

        if reason := why_none():  # asked after a failure alone, when nothing waits for devices
            return reason
    if not ours or not _several_hosts():
        raise error
    return (
        f"the hosts lost one another ({str(error).splitlines()[0]}): start all of them again, "
        "they go on"
    )


def _less_memory() -> str:
    """Return the line about a device that has no memory left, with the flags of this command."""
    if "batch_size" in flags.NAMES:
        return "out of memory: a smaller --batch_size takes less"
    if "config.SECTION.FIELD" in flags.NAMES:
        return (
            "out of memory: --config.train.accumulation=2, or more, and --config.model.remat=true "
            "take less"
        )
    return _TOO_LARGE


def _again(step: int) -> str:
    """Return this command with another --step.

    A training goes back to that step whenever it is given it, which is said behind it. A command
    without the flag goes on from the newest that is there.
    """
    if "step" not in flags.NAMES:
        return "move this one away, and the same command does"
    rest = [item for item in sys.argv[1:] if not item.startswith("--step=")]
    if "--step" in rest:
        at = rest.index("--step")
        del rest[at : at + 2]
    once = " # once: then leave --step out" if "from" in flags.NAMES else ""
    return shlex.join([*flags.start(), *rest, f"--step={step}"]) + once


def complain(message: str) -> int:
    """Print an error in one line and return exit code 1."""
    print(f"error: {' '.join(with_dashes(message).split())}", file=sys.stderr)
    return 1


def with_dashes(message: str) -> str:
    """Write `--workdir=...` where a message says `workdir=...`.

    Messages come from a library that knows no command line. Names of flags are found before "="
    anywhere, and before ":" at the start.
    """
    if not flags.NAMES:
        return message
    names = "|".join(sorted(map(re.escape, flags.NAMES)))
    return re.sub(rf"(?<![\w./-])({names})(?==)|^({names})(?=:)", r"--\1\2", message)
