"""Write the weights of a run as another code base reads them.

A diffusers folder opens with DDPMPipeline.from_pretrained.
"""

from pathlib import Path

from ddpm_jax.cli import flags
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import open_trained
from ddpm_jax.weights.exporting import DTYPES, FORMATS, export_weights
from ddpm_jax.weights.layouts.registry import EXPORTS


def main(argv: list[str] | None = None) -> None:
    parser = flags.parser(
        __doc__,
        "python scripts/export_weights.py --workdir=runs/cifar10 --layout=diffusers "
        "--output=exported",
        folder_output=True,
    )
    flags.add_run(parser)
    add = parser.add_argument
    add("--layout", required=True, choices=EXPORTS, help="the code base that shall read them")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    flags.add_weights(parser)
    add("--format", choices=FORMATS, default=FORMATS[0], help=f"(default: {FORMATS[0]})")
    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help=f"of the numbers in the file (default: {DTYPES[0]})",
    )
    options = parser.parse_args(argv)
    devices = Devices()
    flags.find_run(options, devices)
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    file = export_weights(
        options.layout,
        trained.config,
        trained.params,
        trained.weights,
        options.output,
        form=options.format,
        dtype=options.dtype,
    )
    print(f"wrote {file}: {trained.weights} of step {trained.step}")
