"""Code images into bytes with a trained run, and back, bit for bit.

--method=lossless     bits-back along the chain: the length of the bound that evaluate.py reports,
                      plus initial bits that the decoder gets back. A file of many images
                      amortises them.
--method=progressive  x_T, ..., x_0 one after the other (Algorithms 3 and 4 of the paper): no
                      initial bits, some percent longer, and decoding may stop early (--rate) for
                      a lossy picture.

--mode=encode writes a file, --mode=decode reads one, --mode=measure does both on the first test
images and compares with the bound, with PNG and, for progressive files, with the rate-distortion
curve; it appends to workdir/evaluations.jsonl. Decode on the kind of machine and with the versions
that encoded: both sides must compute the network alike to the last bit. A file that does not
decode to what was encoded is refused, not returned.
"""

import argparse
from pathlib import Path

from ddpm_jax.cli import flags
from ddpm_jax.coding.container import METHODS
from ddpm_jax.coding.jobs import MODES, CodingOptions, code
from ddpm_jax.data.source import SPLITS
from ddpm_jax.diffusion.gaussians import CDFS
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.data_origin import data_dir_of
from ddpm_jax.trained import open_trained


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(
        __doc__,
        "python scripts/code_images.py --workdir=runs/digits --mode=measure --num_images=100",
    )
    flags.add_run(command)
    flags.add_data_dir(command, of_run=True)
    add = command.add_argument
    add("--mode", choices=MODES, required=True)
    add("--method", choices=METHODS, default="lossless", help="(default: lossless)")
    add(
        "--images",
        type=Path,
        metavar="FILE",
        help="encode: .npz (arr_0 uint8 [n,h,w,c]) or .png (default: a data split)",
    )
    add(
        "--split",
        choices=SPLITS,
        default="test",
        help="encode, measure: without --images (default: test)",
    )
    add(
        "--num_images",
        type=int,
        default=100,
        metavar="N",
        help="encode, measure: the first N (default: 100)",
    )
    add("--input", type=Path, metavar="FILE", help="decode: the coded file")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="encode: the coded file; decode: .npz, or .png for a grid",
    )
    add(
        "--rate",
        type=float,
        metavar="R",
        help="decode: stop after R bits/dim of a progressive file, for a lossy picture",
    )
    add(
        "--group",
        type=int,
        metavar="N",
        help="images side by side (default: lossless 20, progressive 200)",
    )
    add(
        "--step_rate",
        type=float,
        default=0.02,
        metavar="R",
        help="bits/dim of a progressive step (default: 0.02)",
    )
    add(
        "--lanes",
        type=int,
        default=64,
        metavar="N",
        help="of the lossless stack, 64 bits each (default: 64)",
    )
    add(
        "--clip",
        choices=["true", "false"],
        default="true",
        help="clip x0_hat to [-1, 1] (default: true)",
    )
    add(
        "--cdf",
        choices=sorted(CDFS),
        default="tanh",
        help="of the decoder p(x_0 | x_1) (default: tanh)",
    )
    add("--seed", type=int, default=0, help="of initial bits, or of the shared noise (default: 0)")
    flags.add_weights(command)
    return command


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parser().parse_args(argv)
    data_dir = data_dir_of(options.workdir, options.data_dir)
    coding = flags.fill(CodingOptions, options, clip=options.clip == "true", data_dir=data_dir)
    devices = Devices(Devices().local[:1])
    flags.find_run(options, devices)
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    code(trained, options.workdir, devices, coding)
