"""Make the most of the first hour on a GPU: check it, time it, train, draw and evaluate.

One command, again and again: each call takes --minutes at most, does what it gets to, says what is
next, and loses nothing when it is cut off.

agreement  losses, gradients, training and sampling steps of a tiny network are a CPU's
speed      training and sampling at each of --batch_sizes, in turn with diffusers eager and through
           torch.compile where PyTorch is installed; into the table of docs/performance.md
train      the row's network, --train_minutes in all; SIGTERM saves
draw       64 samples of the newest checkpoint
evaluate   its bound, and with --inception its FID-768; records go to benchmarks/results/

--scale=small rehearses it on two cores: a reduced network on 8x8 digits, and nothing is written
outside of --runs.
"""

import argparse
from pathlib import Path

from ddpm_jax.cli import flags, values
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.first_hour import spend
from ddpm_jax.reproduction.hour import HourOptions
from ddpm_jax.reproduction.rows import ROOT, SCALES


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(__doc__, "python scripts/first_hour.py --minutes=10 --data_dir=data")
    add = command.add_argument
    add("--row", default="eps_simple", metavar="NAME", help="(default: eps_simple, CIFAR-10)")
    add("--scale", choices=SCALES, default="full", help="(default: full)")
    add(
        "--runs",
        type=Path,
        default=Path("runs/first_hour"),
        metavar="DIR",
        help="where all of it goes (default: runs/first_hour)",
    )
    flags.add_data_dir(command)
    add("--minutes", type=float, default=10.0, metavar="M", help="of this call (default: 10)")
    add(
        "--train_minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="of training, in all calls together (default: 30)",
    )
    add(
        "--batch_sizes",
        type=values.numbers,
        default=(128, 1024),
        metavar="N,N",
        help="that are timed (default: 128,1024)",
    )
    add("--rounds", type=int, default=20, metavar="N", help="timings of each (default: 20)")
    add(
        "--num_images",
        type=int,
        default=10_000,
        metavar="N",
        help="samples that the FID is of (default: 10000)",
    )
    add("--inception", type=Path, metavar="FILE", help="weights of its network; else no FID")
    command.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="override one field of the row's config; repeatable",
    )
    return command


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    paper = ledger.read_json(ROOT / "benchmarks" / "paper.json")
    hour = flags.fill(
        HourOptions,
        options,
        batch_sizes=tuple(options.batch_sizes),
        overrides=tuple(overrides),
    )
    return spend(paper, hour)
