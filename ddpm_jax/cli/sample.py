"""Draw samples and the paper's figures from a trained run.

grid            samples: a PNG grid, the images as .npz (arr_0, uint8 [n,h,w,c]), or a folder of
                PNGs. Many are written block by block; the same command again goes on where it was
                stopped
denoising       x_t on its way down, a .gif or .webp
progressive     x0_hat on its way down, a row for each sample (Figure 6); .gif and .webp too
shared_latents  samples that share x_t at the --levels, a row for each (Figure 7)
interpolation   between two real images, mixed at the --levels and denoised (Figure 8); --mix=slerp
                mixes DDIM codes
coarse_to_fine  the same at --rows levels from 0 to T (Figure 9)
classes         a row for each class, at the --guidances side by side
neighbours      the nearest images of the train split next to each sample, in pixels;
                --space=inception in features of the network behind FID, --space=both a row of each
inpaint         a hole in real images filled in (RePaint)
reconstruction  real images encoded and decoded by DDIM, and the error

Sample i depends on --seed and i alone, whatever --num_images, --batch_size and the number of
devices and hosts. Weights are the EMA unless --weights says otherwise.
"""

import argparse
import dataclasses
from pathlib import Path

from ddpm_jax.cli import flags, values
from ddpm_jax.cli.run import with_dashes
from ddpm_jax.data.classes import names_of_run, numbers_of
from ddpm_jax.data.source import SPLITS
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.spacing import SPACING_NAMES
from ddpm_jax.errors import check
from ddpm_jax.figures.films import FILMS
from ddpm_jax.figures.job import Job, Options
from ddpm_jax.figures.modes import MODES, OUTPUTS
from ddpm_jax.figures.neighbours import SPACES
from ddpm_jax.images import LEAST_MILLISECONDS, check_picture
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import say
from ddpm_jax.runs.data_origin import data_dir_of, read_origin
from ddpm_jax.sampling.sampler import with_sampling
from ddpm_jax.trained import open_trained


def parser() -> argparse.ArgumentParser:
    made = flags.parser(
        __doc__,
        "python scripts/sample.py --workdir=runs/cifar10 --mode=grid --steps=1000 --num_images=64 "
        "--output=grid.png",
        folder_output=True,  # a film or a picture over a folder is refused by `check_flags`
    )
    flags.add_run(made)
    flags.add_data_dir(made, of_run=True)
    add = made.add_argument
    add("--mode", choices=MODES, default="grid", help="what to draw (default: grid)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".png; grid: or .npz or a folder; films: .gif or .webp",
    )
    add(
        "--num_images",
        type=int,
        metavar="N",
        help="samples, or variants of each (default: 64 in a grid, else a few)",
    )
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--first", type=int, default=0, metavar="I", help="number of the first sample (default: 0)")
    add(
        "--label",
        type=values.labels,
        metavar="K[,K..]",
        help="the class, or several in turn, by number or name, where the config has classes",
    )
    add(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="classifier-free: u + S (c - u); 1 is none (default: 1)",
    )
    add("--sampler", choices=sorted(SAMPLERS), help="(default: the config's)")
    add("--steps", type=int, metavar="S", help="reverse steps; 0: all (default: the config's)")
    add(
        "--spacing",
        metavar="NAME",
        help=f"of fewer steps: {', '.join(SPACING_NAMES)} (default: the config's)",
    )
    add("--eta", type=float, help="of ddim, 0 to 1 (default: the config's)")
    add("--order", type=int, help="of deis and unipc, 2 or 3 (default: the config's, or 2)")
    add(
        "--clip",
        choices=["true", "false"],
        help="clip x0_hat to [-1, 1] (default: the config's; false for DDIM codes)",
    )
    add(
        "--dynamic_threshold",
        type=float,
        metavar="P",
        help="limit x0_hat by this percentile of each sample; 0 clips (default: the config's)",
    )
    add(
        "--rederive_eps",
        choices=["true", "false"],
        help="eps_hat of ddim from the clipped x0_hat (default: the config's)",
    )
    flags.add_weights(made)
    add(
        "--batch_size",
        type=int,
        default=64,
        metavar="N",
        help="samples at once, over all devices (default: 64)",
    )
    add(
        "--scale",
        type=int,
        default=1,
        metavar="K",
        help="side of a pixel in the picture (default: 1)",
    )
    add(
        "--labels",
        choices=["true", "false"],
        help="captions of rows and columns (default: true; of a grid, and of films, false)",
    )
    real = made.add_argument_group("real images")
    real.add_argument(
        "--indices", type=values.numbers, metavar="I,I..", help="of the run's data set"
    )
    real.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    real.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="image files of the run's size or larger",
    )
    mode = made.add_argument_group("of single modes")
    mode.add_argument(
        "--frames", type=int, metavar="N", help="denoising, progressive (default: 40, 12)"
    )
    mode.add_argument(
        "--milliseconds", type=int, default=100, help="a frame of a film (default: 100)"
    )
    mode.add_argument(
        "--levels",
        type=values.numbers,
        metavar="T,T..",
        help="shared_latents, interpolation (default: quarters; T/2)",
    )
    mode.add_argument(
        "--points", type=int, default=9, help="weights from 0 to 1 of a mix (default: 9)"
    )
    mode.add_argument(
        "--rows", type=int, default=9, help="coarse_to_fine: levels from 0 to T (default: 9)"
    )
    mode.add_argument(
        "--forward_noise",
        choices=["shared", "own"],
        default="shared",
        help="of the images (default: shared)",
    )
    mode.add_argument(
        "--mix",
        choices=["linear", "slerp"],
        default="linear",
        help="x_t, or DDIM's codes (default: linear)",
    )
    mode.add_argument(
        "--guidances",
        type=weights,
        default=(1.0, 2.0, 4.0),
        metavar="S,S..",
        help="classes: (default: 1,2,4)",
    )
    mode.add_argument("--columns", type=int, default=8, help="neighbours: how many (default: 8)")
    mode.add_argument(
        "--space", choices=SPACES, default="pixel", help="neighbours: what is near (default: pixel)"
    )
    mode.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="neighbours: the first N train images (default: all)",
    )
    flags.add_inception(mode)
    mode.add_argument(
        "--hole",
        type=values.numbers,
        metavar="TOP,LEFT,HEIGHT,WIDTH",
        help="inpaint (default: the middle quarter)",
    )
    mode.add_argument(
        "--mask",
        type=Path,
        metavar="PNG",
        help="inpaint: instead of --hole, white where to fill in",
    )
    mode.add_argument(
        "--resample",
        type=int,
        default=10,
        help="inpaint: times each stretch is gone through (default: 10)",
    )
    mode.add_argument(
        "--jump", type=int, default=10, help="inpaint: steps of a stretch (default: 10)"
    )
    flags.add_hosts(made)
    return made


def weights(text: str) -> tuple[float, ...]:
    """Return the numbers that a flag lists with commas between."""
    return tuple(float(item) for item in text.split(","))


def check_flags(options: argparse.Namespace) -> None:
    known = OUTPUTS.get(options.mode, (".png",))
    named = " or ".join(suffix for suffix in known if suffix) + (
        ", or be a folder" if "" in known else ""
    )
    check(options.output.suffix in known, f"--output={options.output}: must end in {named}")
    for name in (
        "num_images",
        "batch_size",
        "scale",
        "frames",
        "points",
        "rows",
        "columns",
        "search",
    ):
        value = getattr(options, name)
        check(value is None or value >= 1, f"--{name}={value}: must be at least 1")
    check(0 <= options.seed < 2**32, f"--seed={options.seed}: must be in 0..2^32-1")
    last = 2**32 - (options.num_images or 1)
    check(0 <= options.first <= last, f"--first={options.first}: must be in 0..{last}")
    film = options.output.suffix in FILMS
    check(
        options.milliseconds >= LEAST_MILLISECONDS or not film,
        f"--milliseconds={options.milliseconds}: must be at least {LEAST_MILLISECONDS}, below "
        "which viewers slow down",
    )
    folder = options.output.suffix and options.output.is_dir()
    check(not folder, f"--output={options.output}: a folder has this name")
    check(options.points >= 2, f"--points={options.points}: must be at least 2")
    check(
        options.hole is None or len(options.hole) == 4, "--hole: write --hole=TOP,LEFT,HEIGHT,WIDTH"
    )
    several = "--guidance: of no use with --mode=classes, which has --guidances"
    check(options.guidance == 1 or options.mode != "classes", several)
    check(
        options.guidance == 1 or options.label is not None,
        f"--guidance={options.guidance}: towards which class? give --label",
    )
    coded = options.mode == "reconstruction" or (
        options.mode == "interpolation" and options.mix == "slerp"
    )
    for name in ("sampler", "eta", "order"):
        value = getattr(options, name)
        own = value is None or value == {"sampler": "ddim", "eta": 0}.get(name)
        check(own or not coded, f"--{name}={value}: images have codes under ddim alone, with eta 0")


def open_job(options: argparse.Namespace) -> Job:
    devices = Devices()
    flags.find_run(options, devices)
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    if devices.is_main:
        for note in trained.notes:
            say(with_dashes(note))
    clip, rederive_eps = values.TRUTH[options.clip], values.TRUTH[options.rederive_eps]
    labels = values.TRUTH[options.labels]
    config = with_sampling(
        trained.config,
        sampler=options.sampler,
        steps=options.steps,
        spacing=options.spacing,
        eta=options.eta,
        order=options.order,
        clip=clip,
        rederive_eps=rederive_eps,
        dynamic_threshold=options.dynamic_threshold,
    )
    check(
        rederive_eps is None or config.sampling.sampler in ("ddim", "deis"),
        "--rederive_eps: only ddim and deis use eps_hat",
    )
    least = (options.num_images or 1) if options.mode == "grid" else 1
    height, width = config.data.sides
    check_picture(least * height * width * options.scale**2)
    classes = config.model.num_classes
    unlabelled = (
        options.mode != "classes"
        and classes
        and not config.model.label_dropout
        and options.label is None
    )
    always = f"this run has {classes} classes and was trained with a label always: give --label"
    check(not unlabelled, always)
    with hosts.together():
        origin = read_origin(options.workdir)
        options.data_dir = data_dir_of(options.workdir, options.data_dir)
        if options.label is not None:
            names = names_of_run(origin, config.data.name, classes)
            options.label = numbers_of(options.label, names, classes)
    figure = flags.fill(Options, options, clip=clip, labels=labels, crop=origin.get("crop"))
    return Job(figure, dataclasses.replace(trained, config=config), devices)


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    check_flags(options)
    flags.join_hosts(options)
    MODES[options.mode](open_job(options))
