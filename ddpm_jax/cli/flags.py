"""Read the flags that commands share.

Exit codes of a command: 0 done; 1 something the user can mend, told in one line; 2 a flag that does
not parse; 128 + n stopped by signal n with everything saved; 134 another host of the run died
(docs/running.md). A traceback means a fault of the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ddpm_jax.cli import values
from ddpm_jax.errors import HostError, UserError
from ddpm_jax.files import check_writable, default_cache
from ddpm_jax.parallel import HOST_TIMEOUT, START_TIMEOUT

if TYPE_CHECKING:  # importing JAX takes half a second, in which --help is long there
    from ddpm_jax.config import Config
    from ddpm_jax.parallel.devices import Devices

T = TypeVar("T")

NAMES: set[str] = set()  # of the flags of the command that runs, for `run.with_dashes`
_START: list[str] = []  # the words of `start_as`


def start_as(*words: str) -> None:
    """Say which words started this command, such as "ddpm" and "train": help repeats them."""
    _START[:] = words


def start() -> list[str]:
    """Return the words that started this command, a script where nothing else was named."""
    return _START or ["python", sys.argv[0]]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names --help, without the usage before it.

    Attributes:
      folder_output: whether --output may be a folder that is there already.
    """

    folder_output = False

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse the flags, and keep their names for `run.with_dashes`.

        Raises:
          UserError: --output cannot be written, which is better known before the work than after.
        """
        NAMES.clear()
        NAMES.update(
            name.removeprefix("--") for action in self._actions for name in action.option_strings
        )
        values = super().parse_args(*arguments, **options)
        output = getattr(values, "output", None)
        if isinstance(output, Path) and not getattr(values, "process_id", None):
            try:
                check_writable(output, folder=self.folder_output)
            except OSError as error:
                raise UserError(
                    f"output={output} cannot be written ({error.strerror}): name another output"
                ) from error
        return values

    def error(self, message: str) -> NoReturn:
        """Print one line and end with code 2."""
        line = f"{' '.join(message.split())} ({self.prog} --help lists the flags)"
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)


def parser(
    description: str | None, example: str, *, folder_output: bool = False
) -> argparse.ArgumentParser:
    """Return a parser for a command.

    Args:
      description: the docstring of its module.
      example: command lines that begin with "python scripts/NAME.py", which help shows as the
        command was started.
      folder_output: whether --output may be a folder that is there already.
    """
    program = " ".join(_START) or None
    if program is not None:
        example = re.sub(r"python scripts/\w+\.py", program, example)
    parser = _Parser(
        prog=program,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.folder_output = folder_output
    # Every flag of these types, in all commands.
    parser.register("type", Path, values.path)
    parser.register("type", int, values.whole)
    parser.register("type", float, values.real)
    return parser


def add_workdir(flags: argparse.ArgumentParser) -> None:
    """Add --workdir."""
    flags.add_argument(
        "--workdir", type=Path, required=True, metavar="DIR", help="the run directory"
    )


def add_run(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --workdir, and --pretrained, which `find_run` makes a run directory of."""
    group = flags.add_mutually_exclusive_group(required=required)
    group.add_argument("--workdir", type=Path, metavar="DIR", help="the run directory")
    group.add_argument(
        "--pretrained",
        metavar="NAME",
        help="or a network that ships: cifar10_small, digits, faces, fashion_mnist",
    )


def find_run(options: argparse.Namespace, devices: Devices) -> None:
    """Set `options.workdir` to the run that the flags of `add_run` name."""
    from ddpm_jax.trained import find

    options.workdir = find(options.workdir, options.pretrained, devices)


def add_data_dir(flags: argparse.ArgumentParser, *, of_run: bool = False) -> None:
    """Add --data_dir; None stands for the run's own, where `of_run`."""
    flags.add_argument(
        "--data_dir",
        type=Path,
        default=None if of_run else Path("data"),
        metavar="DIR",
        help=f"prepared data sets (default: {'where the run has them, or ' * of_run}data)",
    )


def add_inception(flags: argparse._ArgumentGroup) -> None:
    """Add --inception, and --cache for what is downloaded and computed with it."""
    cache = default_cache()
    flags.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help=".pth of pytorch-fid, .pb of TensorFlow, or .npz",
    )
    flags.add_argument(
        "--cache",
        type=Path,
        default=cache,
        metavar="DIR",
        help="weights, features (default: ~/.cache/ddpm_jax)",
    )


def add_weights(flags: argparse.ArgumentParser) -> None:
    """Add --weights and --step: which weights of a run, and of which checkpoint."""
    flags.add_argument(
        "--weights",
        default="ema",
        metavar="NAME",
        help="ema, raw, or a decay such as 0.9999 (default: ema)",
    )
    flags.add_argument(
        "--step",
        type=values.step,
        metavar="N",
        help="the checkpoint, or best (default: the newest)",
    )


def fill(kind: type[T], options: argparse.Namespace, **others: Any) -> T:
    """Return an instance of the dataclass `kind` whose fields are the flags of the same names.

    Args:
      others: fields that no flag holds as it is.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(options).items() if name in names} | others)


def add_hosts(flags: argparse.ArgumentParser) -> None:
    """Add the flags that make several processes one run."""
    group = flags.add_argument_group(
        "several hosts (none of these under SLURM, Open MPI 4 and on TPU pods)"
    )
    add = group.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, the same for all")
    add("--num_processes", type=int, metavar="N", help="processes in all")
    add(
        "--process_id",
        type=int,
        metavar="I",
        help="this one, 0..N-1; process 0 alone writes logs and pictures",
    )
    add(
        "--host_timeout",
        type=int,
        default=HOST_TIMEOUT,
        metavar="S",
        help="seconds of silence that end all (default: 100)",
    )
    add(
        "--start_timeout",
        type=int,
        default=START_TIMEOUT,
        metavar="S",
        help="seconds to wait for all (default: 300)",
    )


def join_hosts(options: argparse.Namespace) -> None:
    """Join the processes that the flags of `add_hosts`, or the scheduler, name.

    This must come before anything asks for devices.

    Raises:
      HostError: the flags are incomplete, nobody answers, or the hosts were started differently.
    """
    from ddpm_jax.parallel import hosts

    for name in ("host_timeout", "start_timeout"):
        if getattr(options, name) < 1:
            raise HostError(f"{name}={getattr(options, name)}: at least 1 second")
    hosts.join(
        options.coordinator_address,
        options.num_processes,
        options.process_id,
        host_timeout=options.host_timeout,
        start_timeout=options.start_timeout,
    )
    # Where data lies is a matter of the machine. That it is the same is checked when it is open.
    own = ("process_id", "data_dir")
    shared = {name: value for name, value in vars(options).items() if name not in own}
    hosts.same("the command line", shared)


def add_config(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --config, and name the overrides of its fields in the help."""
    flags.add_argument(
        "--config",
        required=required,
        metavar="NAME",
        help="that ships, such as digits or table2:eps_simple, a .py file or a config.json",
    )
    flags.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="override one field, e.g. --config.train.steps=1000; repeatable",
    )


def parse_with_config(
    flags: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, Config]:
    """Parse the flags, and load the config with its `--config.a.b=value` overrides."""
    options, overrides = parse_with_overrides(flags, argv)
    from ddpm_jax.config import load_config

    return options, load_config(options.config, overrides)


def parse_with_overrides(
    flags: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags, and apart from them the overrides, `--config.a.b=value` or in two words.

    argparse cannot list these.

    Returns:
      The flags, and the overrides as "a.b=value".
    """
    words, others, overrides = list(sys.argv[1:] if argv is None else argv), [], []
    while words:
        word = words.pop(0)
        of_config = word.startswith("--config.")
        if of_config and "=" not in word and words and not words[0].startswith("--"):
            word += f"={words.pop(0)}"
        (overrides if of_config else others).append(word.removeprefix("--config."))
    return flags.parse_args(others), overrides
