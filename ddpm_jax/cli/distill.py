"""Halve the steps of a trained network: progressive distillation (Salimans & Ho 2022).

A student learns to do in one step what its teacher does in two steps of DDIM. It starts from the
teacher's weights, and is a run directory like any other, which samples in its own steps. With
--steps=16,8,4 three students are trained in turn, the last one in --workdir, the others beside it.

A run that was stopped goes on when the same command is given again.
"""

from ddpm_jax.cli import flags, values
from ddpm_jax.distillation.stages import distill
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import find_origin


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = flags.parser(
        __doc__,
        "python scripts/distill.py --teacher=runs/cifar10 --workdir=runs/cifar10_4 --steps=16,8,4 "
        "--config.train.steps=10000",
    )
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="RUN[:STEP]",
        help="the run directory of the teacher, or a network that ships, such as digits",
    )
    flags.add_workdir(parser)
    flags.add_data_dir(parser, of_run=True)
    parser.add_argument(
        "--steps",
        type=values.numbers,
        metavar="N[,N..]",
        help="of the students, each half of the one before (default: half of the teacher's)",
    )
    parser.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="change one field of the teacher's config, e.g. --config.train.steps=1000; repeatable",
    )
    flags.add_hosts(parser)
    options, overrides = flags.parse_with_overrides(parser, argv)
    flags.join_hosts(options)
    devices = Devices()
    return distill(
        find_origin(options.teacher, devices),
        options.workdir,
        data_dir=options.data_dir,
        steps=options.steps,
        overrides=overrides,
        devices=devices,
    )
