"""Measure a trained run, or any images, and append a line for each metric to evaluations.jsonl.

nll    the variational bound of a data split in bits/dim (eq. 5 of the paper), its terms, and the
       rate-distortion curve (Table 4, Figure 5): CSV and plot in workdir/evaluations/. All T terms
       take T forward passes an image; --num_timesteps=K estimates from K of them, drawn by strata
       anew for each image
reconstruction
       mean squared error of DDIM's codes: images of the split to x_T and back in --steps steps
       (Song et al. 2021, Table 2)
fid    Frechet Inception distance, and what it would be at infinite N
kid    kernel Inception distance, unbiased, with its standard error
is     Inception Score over 10 splits
sfid   FID of spatial features
prdc   precision, recall, density and coverage
pixels Frechet distance of the pixels themselves, for images too small for Inception; comparable
       with nothing but itself
audit  does the model remember? Distances of samples to the training set, against those of held-out
       images: in pixels, and with --inception in features; the nearest pairs as CSV and PNG

The rest are of samples: drawn from the run into workdir/evaluations/samples/, where an interrupted
evaluation goes on, or any --samples. All of those but pixels and audit see them through
Inception-v3 of 2015-12-05, which is downloaded unless --inception names a file, and compare with a
--reference, which --build_reference makes, or the first evaluation that needs it. Numbers of other
than its 2048 features say so: FID-768 is no FID.

Every number is that of (weights, images, seed), whatever the batch size and the number of devices
and hosts.
"""

import argparse
from pathlib import Path

from ddpm_jax.cli import flags, values
from ddpm_jax.config import load_config
from ddpm_jax.data.source import SPLITS
from ddpm_jax.diffusion.gaussians import CDFS
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.spacing import SPACING_NAMES
from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.inception.resize import RESIZES
from ddpm_jax.evaluation.inception.weights import FEATURES
from ddpm_jax.evaluation.jobs import build_reference, evaluate
from ddpm_jax.evaluation.options import METRICS, EvaluationOptions


def parser() -> argparse.ArgumentParser:
    command = flags.parser(
        __doc__,
        "python scripts/evaluate.py --workdir=runs/cifar10 --metrics=nll,fid,is --num_images=50000",
    )
    flags.add_run(command, required=False)
    flags.add_data_dir(command, of_run=True)
    flags.add_config(command, required=False)
    add = command.add_argument
    add("--metrics", metavar="A,B", help=f"any of {', '.join(METRICS)}")
    add(
        "--num_images",
        type=int,
        metavar="N",
        help="(default: of a split all, samples 50000, or all of --samples)",
    )
    add(
        "--batch_size",
        type=int,
        default=128,
        metavar="N",
        help="images at once, over all devices (default: 128)",
    )
    add("--seed", type=int, default=0, help="of every draw (default: 0)")
    flags.add_weights(command)
    add(
        "--clip",
        choices=["true", "false"],
        help="clip x0_hat to [-1, 1] (default: true; samples: the config's; codes: never)",
    )
    of_images = command.add_argument_group("nll and reconstruction")
    of_images.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    of_images.add_argument(
        "--num_timesteps",
        type=int,
        default=0,
        metavar="K",
        help="terms an image; 0: all T (default: 0)",
    )
    of_images.add_argument(
        "--cdf",
        choices=sorted(CDFS),
        default="tanh",
        help="of the decoder: the paper's or exact (default: tanh)",
    )
    drawn = command.add_argument_group("samples")
    drawn.add_argument(
        "--samples",
        type=Path,
        metavar="PLACE",
        help="a folder of images, or an .npz, instead of the run's own",
    )
    drawn.add_argument(
        "--seeds",
        type=values.numbers,
        metavar="S,S..",
        help="several draws: mean and deviation (default: --seed)",
    )
    drawn.add_argument("--sampler", choices=sorted(SAMPLERS), help="(default: the config's)")
    drawn.add_argument(
        "--steps", type=int, metavar="S", help="reverse steps; 0: all (default: the config's)"
    )
    drawn.add_argument(
        "--spacing",
        metavar="NAME",
        help=f"of fewer steps: {', '.join(SPACING_NAMES)} (default: the config's)",
    )
    drawn.add_argument("--eta", type=float, help="of ddim, 0 to 1 (default: the config's)")
    drawn.add_argument(
        "--order", type=int, help="of deis and unipc, 2 or 3 (default: the config's, or 2)"
    )
    drawn.add_argument(
        "--dynamic_threshold",
        type=float,
        metavar="P",
        help="limit x0_hat by this percentile of each sample; 0 clips (default: the config's)",
    )
    drawn.add_argument(
        "--label",
        type=values.labels,
        metavar="K[,K..]",
        help="classes, in turn, by number or name (default: all, where there are any)",
    )
    drawn.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="classifier-free; 1 is none (default: 1)",
    )
    seen = command.add_argument_group("how they are seen, and beside what")
    flags.add_inception(seen)
    seen.add_argument(
        "--features", choices=FEATURES, default="2048", help="of Inception (default: 2048)"
    )
    seen.add_argument(
        "--resize",
        choices=RESIZES,
        default="tf",
        help="to 299x299: the paper's, or pytorch-fid's (default: tf)",
    )
    seen.add_argument(
        "--reference",
        default="train",
        metavar="WHAT",
        help="train, test, statistics or images (default: train)",
    )
    seen.add_argument(
        "--reference_images", type=int, metavar="N", help="of the split, the first N (default: all)"
    )
    seen.add_argument(
        "--build_reference",
        action="store_true",
        help="make the reference of a split, or of --samples, and stop",
    )
    seen.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of --build_reference (default: DATA_DIR/references/...npz)",
    )
    flags.add_hosts(command)
    return command


def options_of(parsed: argparse.Namespace, overrides: list[str]) -> EvaluationOptions:
    """Turn flags into the options of the same names."""
    if overrides and parsed.config is None:
        raise EvaluationError(
            f"--config.{overrides[0]}: of no use without --config: a run has its own, and --steps, "
            "--sampler and other flags of the samples say otherwise"
        )
    return flags.fill(
        EvaluationOptions,
        parsed,
        metrics=tuple(parsed.metrics.split(",")) if parsed.metrics else (),
        seeds=tuple(parsed.seeds or ()),
        label=None if parsed.label is None else tuple(parsed.label),
        clip=values.TRUTH[parsed.clip],
        config=None if parsed.config is None else load_config(parsed.config, overrides),
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parsed, overrides = flags.parse_with_overrides(parser(), argv)
    if bool(parsed.metrics) == parsed.build_reference:
        raise EvaluationError("either --metrics or --build_reference")
    options = options_of(parsed, overrides)
    flags.join_hosts(parsed)
    (build_reference if parsed.build_reference else evaluate)(options)
