"""Train one config here and with diffusers in PyTorch, and compare the two over seeds.

PyTorch's side is a plain loop around diffusers' UNet2DModel and DDPMScheduler, with its own data
order, noise, optimiser and averages: the same recipe, written twice. Both see the same number of
images. One evaluation judges both: the averaged weights of the other side are read as any diffusers
checkpoint is. It needs the extra torch.

For each seed: the mean squared error of eps at fixed timesteps over held-out images, with the same
noise for all; and the bound in bits/dim. Then means and standard errors over seeds, and the
difference with its standard error: do they differ by more than their seeds do?
"""

import argparse
import json
from pathlib import Path

from ddpm_jax.benchmark.quality import ComparisonOptions, compare, table
from ddpm_jax.cli import flags, values
from ddpm_jax.files import replacing


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/compare_with_diffusers.py --config=configs/digits.py "
        "--workdir=runs/compare --seeds=0,1,2 --output=compare.json",
    )
    flags.add_config(command)
    flags.add_data_dir(command)
    add = command.add_argument
    add(
        "--workdir",
        type=Path,
        required=True,
        metavar="DIR",
        help="of the runs, a folder a seed; a finished one is not repeated",
    )
    add("--seeds", type=values.numbers, default=(0,), metavar="A,B", help="(default: 0)")
    add(
        "--num_images",
        type=int,
        default=1000,
        metavar="N",
        help="held-out images that judge, at most (default: 1000)",
    )
    add(
        "--num_timesteps",
        type=int,
        default=50,
        metavar="K",
        help="terms of the bound an image (default: 50)",
    )
    add("--output", type=Path, required=True, metavar="FILE", help="the figures as JSON")
    return command


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options, config = flags.parse_with_config(parser(), argv)
    results = compare(config, flags.fill(ComparisonOptions, options))
    print(table(results["summary"], len(options.seeds)))
    with replacing(options.output) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {options.output}")
