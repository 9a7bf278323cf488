"""Measure how fast it is, alone or in turn with the same network in PyTorch.

train       the training step: time, images/s, compile time, memory, share of the measured peak of
            matrix products
sample      one step of the sampler
chain       what a step of the sampler's loop costs beyond the forward pass that it makes
components  convolutions, GroupNorm, attention and dropout by themselves, at every size that the
            network has
host        what Python costs: time until a step's call returns, and the gap that it leaves between
            steps on the device
data        the data pipeline by itself, and how many times over it feeds the training step
start       two starts of scripts/train.py: seconds to the first step without and with compiled
            programs on disk

It prints a table and, with --output, writes everything as JSON. --against=diffusers runs diffusers'
UNet2DModel with the same sizes in a process of its own, in turn with ours (channels_last; eager,
and with --variants=eager,compiled through torch.compile; autocast to bfloat16 where the config says
so). ratio is our time by theirs, pair by pair: below 1 we are faster. On a CPU give
--config.model.dtype=float32, and leave the machine alone.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from ddpm_jax.benchmark.report import PARTS, BenchmarkOptions, measure, save, table
from ddpm_jax.benchmark.rivals import VARIANTS
from ddpm_jax.cli import flags


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/benchmark.py --config=configs/cifar10.py --config.model.dtype=float32 "
        "--config.train.batch_size=16 --what=train,sample --against=diffusers "
        "--output=benchmark.json",
    )
    flags.add_config(command)
    flags.add_data_dir(command)
    add = command.add_argument
    add(
        "--what",
        type=some_of(PARTS),
        default=("train", "sample"),
        metavar="A,B",
        help=f"of {','.join(PARTS)} (default: train,sample)",
    )
    add("--against", choices=["diffusers"], help="run PyTorch in turn (the extra torch)")
    add(
        "--variants",
        type=some_of(VARIANTS),
        default=("eager",),
        metavar="A,B",
        help=f"of PyTorch: {','.join(VARIANTS)} (default: eager)",
    )
    add("--rounds", type=int, default=20, metavar="N", help="timings of each (default: 20)")
    add(
        "--least_seconds",
        type=float,
        default=0.1,
        metavar="S",
        help="of one timing (default: 0.1)",
    )
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return command


def some_of(choices: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a `type=` for a comma-separated list of some of `choices`."""

    def parse(text: str) -> tuple[str, ...]:
        for item in text.split(","):
            if item not in choices:
                raise argparse.ArgumentTypeError(f"{item!r}: choose from {', '.join(choices)}")
        return tuple(text.split(","))

    return parse


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    results = measure(flags.fill(BenchmarkOptions, options, overrides=tuple(overrides)))
    print("\n".join(table(results)))
    if options.output:
        save(results, options.output)
