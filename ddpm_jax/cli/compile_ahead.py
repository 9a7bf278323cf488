"""Compile a config for a machine that is not here, and report what the compiler decided.

train     the training step of config.train.batch_size images, over all devices
sample    the whole chain of config.sampling, --samples_per_chip images at once on each device
evaluate  a call of the likelihood's evaluation, twenty terms of as many images' bounds

GPUs (h100, h100:8, 2x8xh100, a100): memory, launches, convolutions, exchanges and products of a
step; no times. It needs JAX's plugin for CUDA, and neither GPU nor driver.
TPU slices (v5e:4x4): memory, operations, exchanges and the compiler's own estimates of time. It
needs libtpu, and no TPU.

A program takes minutes of a CPU. A batch that does not fit is refused with one that does.
docs/ahead.md says what of it may be trusted. --table prints reports as the rows of a table.
"""

import argparse
import sys
from pathlib import Path

from ddpm_jax.ahead.compile import compile_programs
from ddpm_jax.ahead.programs import PROGRAMS
from ddpm_jax.ahead.report import format_report, format_table, read_report, save_report
from ddpm_jax.ahead.topology import Target, parse_target
from ddpm_jax.cli import flags
from ddpm_jax.config import load_config
from ddpm_jax.errors import ConfigError

EXAMPLE = (
    "python scripts/compile_ahead.py --config=configs/cifar10.py --target=h100:8 "
    "--what=train,sample --output=cifar10.json --config.train.batch_size=1024"
)
TARGETS = "h100, h100:2 to h100:8, 2x8xh100 (hosts x GPUs of each), a100, v5e:4x4, v4:2x2x2, ..."


def parser(
    description: str | None = __doc__,
    example: str = EXAMPLE,
    target: str = "target",
    targets: str = TARGETS,
) -> argparse.ArgumentParser:
    """Return the parser of the command's flags.

    Args:
      target: the flag that names the machine.
      targets: what it may be.
    """
    command = flags.parser(description, example)
    flags.add_config(command, required=False)
    add = command.add_argument
    add(f"--{target}", metavar="NAME", help=targets)
    add(
        "--what",
        default="train,sample",
        metavar="A,B",
        help=f"of {', '.join(PROGRAMS)} (default: train,sample)",
    )
    add(
        "--samples_per_chip",
        type=int,
        default=16,
        metavar="N",
        help="images that a chip or GPU draws, or evaluates, at once (default: 16)",
    )
    add(
        "--largest_batch",
        action="store_true",
        help="look for the largest batch that fits: some ten compilations a program",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the figures as JSON; each program is written when it is done",
    )
    add(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print these reports as a table, and compile nothing",
    )
    return command


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    if options.table:
        print_table(options)
        return
    check_names(options, "target")
    compile_all(options, overrides, parse_target(options.target))


def print_table(options: argparse.Namespace) -> None:
    """Print the reports of --table."""
    print(format_table([read_report(path) for path in options.table]))


def check_names(options: argparse.Namespace, target: str) -> None:
    """Check that the config and the machine are named.

    Args:
      target: the flag that names the machine.

    Raises:
      ConfigError: one of them is not.
    """
    for name in ("config", target):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name}: say which")


def compile_all(options: argparse.Namespace, overrides: list[str], target: Target) -> None:
    """Compile the programs of --what, print their reports and write them to --output."""
    reports = compile_programs(
        load_config(options.config, overrides),
        target,
        options.what.split(","),
        samples_per_chip=options.samples_per_chip,
        largest=options.largest_batch,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    file = {"config": str(options.config), "overrides": overrides}
    for report in reports:
        file[report["what"]] = report
        print(format_report(report), flush=True)
        if options.output is not None:
            save_report(file, options.output)
