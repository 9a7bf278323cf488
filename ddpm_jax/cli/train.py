"""Train a DDPM.

A run that was stopped, killed or cut off goes on by itself when the same command is given again;
`--workdir` alone is enough. `--images=FOLDER` trains on a folder of images without a config: size,
channels and network are chosen, and said (docs/your_images.md).

Writes to the run directory: config.json, data.json, checkpoints/, metrics.jsonl, TensorBoard
events, samples/, parameters.txt. SIGTERM, Ctrl-C or a closed terminal saves and ends with code 143,
130 or 129. Several hosts: start the same command on each (docs/running.md).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ddpm_jax.cli import flags, values
from ddpm_jax.errors import ConfigError, check

if TYPE_CHECKING:  # help need not wait for JAX
    from ddpm_jax.config import Config


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/train.py --config=configs/cifar10.py --workdir=runs/cifar10 "
        "--config.train.steps=1000\n"
        "  python scripts/train.py --images=photos --workdir=runs/mine",
    )
    flags.add_config(command, required=False)
    flags.add_workdir(command)
    flags.add_data_dir(command, of_run=True)
    add = command.add_argument
    add("--step", type=values.step, metavar="N", help="go on from checkpoint N, not the newest")
    add(
        "--from",
        dest="from_",
        metavar="RUN[:STEP]",
        help="start a new run from the weights, averages and optimizer of another, or of what "
        "ships, such as digits",
    )
    own = command.add_argument_group("images of your own, in place of --config")
    own.add_argument("--images", type=values.path, metavar="FOLDER", help="of images, at any depth")
    own.add_argument(
        "--image_size", type=int, metavar="N", help="pixels (default: what the images allow)"
    )
    own.add_argument(
        "--classes",
        nargs="?",
        const="true",
        choices=["true", "false"],
        help="the folders in FOLDER are classes: cats/1.png, dogs/1.png",
    )
    own.add_argument(
        "--skip_bad",
        nargs="?",
        const="true",
        choices=["true", "false"],
        help="leave out images that do not decode or fit, instead of refusing the folder",
    )
    flags.add_hosts(command)
    return command


def config_of(options: argparse.Namespace, overrides: list[str]) -> Config:
    """Return the config that was named, or that of the run, or one that suits the images.

    Raises:
      ConfigError: none of the three, or a size that is not the run's.
    """
    from ddpm_jax.config import load_config
    from ddpm_jax.parallel.devices import Devices
    from ddpm_jax.runs.workdir import CONFIG
    from ddpm_jax.training.own_images import choose_config

    if options.skip_bad is not None:
        overrides = [*overrides, f"data.skip_bad={options.skip_bad}"]
    if options.classes is not None:
        overrides = [*overrides, f"data.classes={options.classes}"]
    if options.config is not None:
        for name in ("images", "image_size"):
            check(
                getattr(options, name) is None,
                f"{name}: of no use with config, which says data.name=folder and data.path",
            )
        return load_config(options.config, overrides)
    own = options.workdir / CONFIG
    if own.is_file():
        if options.images is not None:  # which may have moved
            overrides = [*overrides, f"data.path={options.images}"]
        config = load_config(own, overrides)
        size = config.data.image_size
        check(
            options.image_size in (None, size),
            f"image_size={options.image_size}: the run in {options.workdir} has {size}: leave it "
            "out, or name another workdir",
        )
        return config
    if options.images is None:
        raise ConfigError(
            f"config: {options.workdir} holds no run that could go on: name a config, or images of "
            "your own with images=FOLDER"
        )
    config, choices = choose_config(
        options.images, Devices(), image_size=options.image_size, overrides=overrides
    )
    print("chosen, and written to config.json; say otherwise when you start, for instance:")
    flags_of = [
        f"--{'config.' * ('.' in choice.field)}{choice.field}={choice.value}" for choice in choices
    ]
    width = max(map(len, flags_of), default=0)
    for text, choice in zip(flags_of, choices):
        print(f"  {text:<{width}}  {choice.reason}")
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    from ddpm_jax.parallel import hosts
    from ddpm_jax.parallel.devices import Devices
    from ddpm_jax.trained import find_origin
    from ddpm_jax.training.loop import train

    # A config that was named is checked before anyone waits for other hosts.
    config = None if options.config is None else config_of(options, overrides)
    flags.join_hosts(options)
    with hosts.together():
        config = config or config_of(options, overrides)
    parent = None if options.from_ is None else find_origin(options.from_, Devices())
    return train(
        config, options.workdir, data_dir=options.data_dir, step=options.step, parent=parent
    )
