"""What the scripts share: flags, and how a script ends.

Exit codes: 0 done; 1 something the user can mend, told in one line; 2 a flag that does not parse; 128 + n stopped by signal n
with everything saved; 134 another host of the run died (docs/running.md). A traceback means a fault of the code.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from ddpm_jax import hosts, pretrained, programs
from ddpm_jax.config import Config, load_config
from ddpm_jax.devices import Devices
from ddpm_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse without the usage before each error: one line, and --help for who wants more."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())} ({self.prog} --help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def parser(description: str | None, example: str) -> argparse.ArgumentParser:
    return _Parser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_workdir(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    flags.add_argument("--workdir", type=folder, required=required, metavar="DIR", help="the run directory")


def add_run(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--workdir, or in its place --pretrained, which `find_run` makes a run directory of."""
    group = flags.add_mutually_exclusive_group(required=required)
    group.add_argument("--workdir", type=folder, metavar="DIR", help="the run directory")
    group.add_argument("--pretrained", metavar="NAME", help="or a network that ships: cifar10_small, digits, fashion_mnist")


def find_run(options: argparse.Namespace, devices: Devices) -> None:
    """Leaves in `options.workdir` the run that the flags of `add_run` name."""
    if options.pretrained is not None:
        options.workdir = pretrained.unpack(options.pretrained, devices)


def add_data_dir(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets (default: data)")


def add_inception(flags: argparse._ArgumentGroup) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_jax"
    flags.add_argument("--inception", type=Path, metavar="FILE", help=".pth of pytorch-fid, .pb of TensorFlow, or .npz")
    flags.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="weights, features (default: ~/.cache/ddpm_jax)")


def folder(text: str) -> Path:
    """A path that was given, for `type=`: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("name a folder")
    return Path(text)


def step(text: str) -> int:
    """The number of a checkpoint, for `type=`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no step: a whole number, 0 or more")
    return int(text)


def add_hosts(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("several hosts (none of these under SLURM, Open MPI and on TPU pods)")
    add = group.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, the same for all")
    add("--num_processes", type=int, metavar="N", help="processes in all")
    add("--process_id", type=int, metavar="I", help="this one, 0..N-1; process 0 alone writes logs and pictures")
    add(
        "--host_timeout",
        type=int,
        default=hosts.HOST_TIMEOUT,
        metavar="S",
        help="seconds of silence that end all (default: 100)",
    )
    add("--start_timeout", type=int, default=hosts.START_TIMEOUT, metavar="S", help="seconds to wait for all (default: 300)")


def join_hosts(options: argparse.Namespace) -> None:
    """Makes this process one of those that the flags of `add_hosts`, or the scheduler, name; before anything asks for devices."""
    for name in ("host_timeout", "start_timeout"):
        if getattr(options, name) < 1:
            raise hosts.HostError(f"--{name}={getattr(options, name)}: at least 1 second")
    hosts.join(
        options.coordinator_address,
        options.num_processes,
        options.process_id,
        host_timeout=options.host_timeout,
        start_timeout=options.start_timeout,
    )
    # Where data lies is a matter of the machine; that it is the same data is checked when it is open.
    own = ("process_id", "data_dir")
    hosts.same("the command line", {name: value for name, value in vars(options).items() if name not in own})


def add_config(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    flags.add_argument("--config", required=required, metavar="FILE", help="of configs/, FILE:VARIANT, or a config.json")
    flags.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD", metavar="VALUE", help="override one field, e.g. --config.train.steps=1000; repeatable"
    )


def parse_with_config(flags: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The flags, and the config with its `--config.a.b=value` overrides."""
    options, overrides = parse_with_overrides(flags, argv)
    return options, load_config(options.config, overrides)


def parse_with_overrides(flags: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and apart from them the `--config.a.b=value` overrides, which argparse cannot list, as "a.b=value"."""
    argv = sys.argv[1:] if argv is None else argv
    prefix = "--config."
    overrides = [item.removeprefix(prefix) for item in argv if item.startswith(prefix)]
    return flags.parse_args([item for item in argv if not item.startswith(prefix)]), overrides


def run(main: Callable[[], int | None]) -> None:
    """Ends the process with the code of `outcome`."""
    try:
        code = outcome(main)
    except Exception:
        if jax.process_count() == 1:
            raise
        # A traceback, but not the wait for the others that leaving the interpreter would begin: they wait for us.
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 1:
        hosts.leave()
        # A failed save leaves threads of the checkpoint library that would raise, or hang, at exit.
        os._exit(code)
    hosts.barrier("end")  # the first host may have files to finish, and the others would not wait for ever
    sys.exit(code)


def outcome(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; a UserError, a failing disk or full memory is told in one line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what it raises as well
    programs.keep_programs()
    try:
        return main() or 0
    except UserError as error:
        return complain(str(error) if error.step is None else f"{error}: {_again(error.step)}")
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        return complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return complain("out of memory: a smaller batch, --config.train.accumulation or --config.model.remat=true take less")
        if jax.process_count() == 1:
            raise
        return complain(f"the hosts lost one another ({str(error).splitlines()[0]}): start all of them again, they go on")
    except MemoryError:
        return complain("out of memory: this config is too large for the machine")
    except KeyboardInterrupt:
        return 130


def _again(step: int) -> str:
    """This command with another --step."""
    rest = [item for item in sys.argv[1:] if not item.startswith("--step=")]
    if "--step" in rest:
        at = rest.index("--step")
        del rest[at : at + 2]
    return shlex.join(["python", sys.argv[0], *rest, f"--step={step}"])


def complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
