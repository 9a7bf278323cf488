"""Train one config here and with diffusers in PyTorch, and compare over seeds or in lock step.

PyTorch's side is a plain loop around diffusers' UNet2DModel and DDPMScheduler, with its own data
order, noise, optimiser and averages: the same recipe, written twice. Both see the same number of
images. One evaluation judges both: the averaged weights of the other side are read as any diffusers
checkpoint is. It needs the extra torch.

For each seed: the mean squared error of eps at fixed timesteps over held-out images, with the same
noise for all; and the bound in bits/dim. Then means and standard errors over seeds, and the
difference with its standard error: do they differ by more than their seeds do?

--lockstep compares the steps themselves, in one training of config.train.steps: both sides have the
same initial weights, data order, flips, timesteps and noise, from config.seed, and each its own
gradient and Adam. --output is then the loss of both at each step and the distance of their
parameters, as JSON with a plot beside it (.png). Nothing is judged, and no weights are kept.
Dropout cannot be the same on both sides: --config.model.dropout=0. It uses one device.
"""

import argparse
import json
from argparse import SUPPRESS
from pathlib import Path

from ddpm_jax.benchmark.lockstep import LockstepOptions, train_in_lock_step
from ddpm_jax.benchmark.quality import ComparisonOptions, compare, table
from ddpm_jax.cli import flags, values
from ddpm_jax.errors import check
from ddpm_jax.files import replacing

# Flags of one kind of comparison alone. They have no default here, so that one that was given is
# told from one that was not; the defaults are those of the options.
OVER_SEEDS = ("workdir", "seeds", "num_images", "num_timesteps")
IN_LOCK_STEP = ("every", "rounding")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/compare_with_diffusers.py --config=configs/digits.py "
        "--workdir=runs/compare --seeds=0,1,2 --output=compare.json\n"
        "  python scripts/compare_with_diffusers.py --config=configs/digits.py --lockstep "
        "--output=lockstep.json",
    )
    flags.add_config(command)
    flags.add_data_dir(command)
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the figures as JSON; with --lockstep a .json, beside which a .png is drawn",
    )
    add = command.add_argument_group("over seeds").add_argument
    add(
        "--workdir",
        type=Path,
        default=SUPPRESS,
        metavar="DIR",
        help="of the runs, a folder a seed; a finished one is not repeated (required)",
    )
    add("--seeds", type=values.numbers, default=SUPPRESS, metavar="A,B", help="(default: 0)")
    add(
        "--num_images",
        type=int,
        default=SUPPRESS,
        metavar="N",
        help="held-out images that judge, at most (default: 1000)",
    )
    add(
        "--num_timesteps",
        type=int,
        default=SUPPRESS,
        metavar="K",
        help="terms of the bound an image (default: 50)",
    )
    add = command.add_argument_group("in lock step").add_argument
    add("--lockstep", action="store_true", help="compare step by step, from one start")
    add(
        "--every",
        type=int,
        default=SUPPRESS,
        metavar="N",
        help="steps between two measurements of the distance, at which --output is written "
        "(default: 50)",
    )
    add(
        "--rounding",
        action="store_true",
        default=SUPPRESS,
        help="train a third side, ours with each batch in two halves: how far rounding alone goes",
    )
    return command


def check_flags(options: argparse.Namespace) -> None:
    """Check the flags against each other.

    Raises:
      ConfigError: some do not serve.
    """
    strange = OVER_SEEDS if options.lockstep else IN_LOCK_STEP
    given = [f"--{name}" for name in strange if hasattr(options, name)]
    how = "with --lockstep" if options.lockstep else "without --lockstep"
    check(not given, f"{', '.join(given)}: of no use {how}")
    if options.lockstep:
        path = options.output
        check(path.suffix == ".json", f"--output={path}: must end in .json with --lockstep")
        picture = path.with_suffix(".png")
        check(not picture.is_dir(), f"--output={path}: {picture}, the plot, is a folder")
    else:
        check(hasattr(options, "workdir"), "--workdir: say which, or --lockstep")


def main(argv: list[str] | None = None) -> int | None:
    """Run the command."""
    options, config = flags.parse_with_config(parser(), argv)
    check_flags(options)
    if options.lockstep:
        return train_in_lock_step(config, flags.fill(LockstepOptions, options))
    comparison = flags.fill(ComparisonOptions, options)
    results = compare(config, comparison)
    print(table(results["summary"], len(comparison.seeds)))
    with replacing(options.output) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {options.output}")
