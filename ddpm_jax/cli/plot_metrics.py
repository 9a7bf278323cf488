"""Plot curves of metrics.jsonl, one line a run.

The curves are the training loss and the held-out loss, where a run has them, unless --metrics names
others.
"""

import argparse
from pathlib import Path

from ddpm_jax.cli import flags
from ddpm_jax.runs.curves import plot_curves


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/plot_metrics.py --workdir=runs/digits --workdir=runs/cifar10 "
        "--output=curves.png",
    )
    add = command.add_argument
    add(
        "--workdir",
        type=Path,
        required=True,
        action="append",
        metavar="DIR",
        help="a run; repeatable",
    )
    add("--output", type=Path, required=True, metavar="FILE", help="a .png")
    add(
        "--metrics",
        metavar="A,B",
        help="names in metrics.jsonl (default: loss and held_out_loss, where there are both)",
    )
    add("--log", action="store_true", help="logarithmic values")
    return command


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parser().parse_args(argv)
    names = None if options.metrics is None else options.metrics.split(",")
    plot_curves(options.workdir, names, options.output, log=options.log)
    print(f"wrote {options.output}")
