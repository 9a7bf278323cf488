"""Draw samples and the paper's figures from a trained run.

grid            samples: a PNG grid, the images as .npz (arr_0, uint8 [n,h,w,c]), or a folder of PNGs. Many are written block by
                block; the same command again goes on where it was stopped
denoising       x_t on its way down, a .gif or .webp
progressive     x0_hat on its way down, a row for each sample (Figure 6); .gif and .webp too
shared_latents  samples that share x_t at the --levels, a row for each (Figure 7)
interpolation   between two real images, mixed at the --levels and denoised (Figure 8); --mix=slerp mixes DDIM codes
coarse_to_fine  the same at --rows levels from 0 to T (Figure 9)
neighbours      the nearest images of the train split next to each sample, in pixels; --space=inception in features of the network
                behind FID, --space=both a row of each
inpaint         a hole in real images filled in (RePaint)
reconstruction  real images encoded and decoded by DDIM, and the error

Sample i depends on --seed and i alone, whatever --num_images, --batch_size and the number of devices and hosts. Weights are the
EMA unless --weights says otherwise.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_jax import cli, galleries, images, shards
from ddpm_jax.config import ConfigError
from ddpm_jax.data.sources import SPLITS, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import of_array, of_split
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.generate import Generator, config_table, with_sampling
from ddpm_jax.inpainting import Repaint
from ddpm_jax.samplers import SAMPLERS, SPACING_NAMES
from ddpm_jax.trained import Trained, open_trained

FILMS = (".gif", ".webp")
SPACES = ("pixel", "inception", "both")


@dataclass(frozen=True)
class Job:
    """What a mode works with; `trained.config.sampling` has the flags in it."""

    options: argparse.Namespace
    trained: Trained
    devices: Devices

    def count(self, default: int) -> int:
        return self.options.num_images or default

    @property
    def label(self) -> int | None:
        """The one class of a figure."""
        check(self.options.label is None or len(self.options.label) == 1, f"--label: one class for mode {self.options.mode}")
        return None if self.options.label is None else self.options.label[0]

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """The classes of samples `indices`, in turn."""
        return None if self.options.label is None else np.array(self.options.label)[indices % len(self.options.label)]

    def indices(self, count: int) -> np.ndarray:
        return self.options.first + np.arange(count)

    def generator(self, count: int, **options) -> Generator:
        """One for `count` samples, or more."""
        made = Generator(
            self.trained.config,
            self.devices,
            batch_size=min(self.options.batch_size, count),
            guidance=self.options.guidance,
            progress=True,
            **options,
        )
        weights = f"{self.trained.weights}, step {self.trained.step}"
        print(f"{count} samples of {weights}: {made.table.steps} reverse steps", flush=True)
        return made

    def ddim_pair(self, count: int) -> tuple[Generator, Generator]:
        """Encoder and decoder, neither of which clips unless told to."""
        config = with_sampling(self.trained.config, sampler="ddim", eta=0.0, clip=self.options.clip == "true")
        job = dataclasses.replace(self, trained=dataclasses.replace(self.trained, config=config))
        return job.generator(count, table=config_table(config, inverted=True)), job.generator(count)

    def originals(self, least: int, step: int = 1) -> np.ndarray:
        """The real images of --indices or --images, at least `least` of them and a multiple of `step`."""
        chosen, data = self.options, self.trained.config.data
        check((chosen.indices is None) != (chosen.images is None), f"mode {chosen.mode}: name --indices or --images")
        if chosen.images is not None:
            found = galleries.images_from(chosen.images, data)
        else:
            source = load_source(data, chosen.data_dir, chosen.split)
            found = galleries.images_of(source, chosen.indices, f"{data.name} {chosen.split}")
        check(len(found) >= least and len(found) % step == 0, f"mode {chosen.mode}: {least} images, or a multiple of it")
        return found

    def save(self, panel: np.ndarray) -> None:
        self.write(lambda path: images.save_png(path, galleries.picture(panel, self.options.scale)))

    def write(self, save: Callable[[Path], None]) -> None:
        if self.devices.is_main:
            save(self.options.output)
            print(f"wrote {self.options.output}")


def grid(job: Job) -> None:
    options, indices = job.options, job.indices(job.count(64))
    generator = job.generator(len(indices))

    def draw(indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        return generator.draw(job.trained.params, seed=options.seed, indices=indices, labels=labels)

    if options.output.suffix == ".png":
        samples = images.to_uint8(draw(indices, job.labels(indices)))
        job.write(lambda path: images.save_png(path, images.grid(samples, scale=options.scale)))
        return
    protocol = {
        "config": dataclasses.asdict(job.trained.config),
        "weights": job.trained.weights,
        "step": job.trained.step,
        "seed": options.seed,
        "guidance": options.guidance,
        "label": options.label,
    }
    drawn = shards.fill(options.output, protocol, indices, job.labels(indices), draw, job.devices)
    print(f"{drawn} drawn, {len(indices) - drawn} were there")
    job.write(lambda path: None)


def film(job: Job, record: str, count: int, frames: int) -> None:
    indices = job.indices(job.count(count))
    most = config_table(job.trained.config).steps + (record == "x_t")
    generator = job.generator(len(indices), record=record, num_frames=job.options.frames or min(frames, most))
    inputs = {"seed": job.options.seed, "indices": indices, "labels": job.labels(indices)}
    if job.options.output.suffix in FILMS:
        pictures = galleries.denoising(generator, job.trained.params, scale=job.options.scale, **inputs)
        pictures = np.concatenate([pictures, pictures[-1:].repeat(max(1, len(pictures) // 4), axis=0)])  # a rest at the end
        job.write(lambda path: images.save_animation(path, pictures, job.options.milliseconds))
    else:
        job.save(generator.draw(job.trained.params, **inputs))


def shared_latents(job: Job) -> None:
    timesteps, variants = job.trained.config.diffusion.timesteps, job.count(7)
    levels = job.options.levels or [timesteps * part // 4 for part in (4, 3, 2, 1)]
    generator = job.generator(variants * len(levels))
    inputs = {"seed": job.options.seed, "index": job.options.first, "levels": levels, "variants": variants}
    job.save(galleries.shared_latents(generator, job.trained.params, label=job.label, **inputs))


def interpolation(job: Job) -> None:
    options, pairs = job.options, job.originals(2, step=2)
    weights = np.linspace(0, 1, options.points)
    rows = []
    if options.mix == "slerp":
        encoder, decoder = job.ddim_pair(options.points)
        for pair in pairs.reshape(-1, 2, *pairs.shape[1:]):
            inputs = {"pair": pair, "weights": weights, "label": job.label}
            rows.append(galleries.latent_interpolation(encoder, decoder, job.trained.params, **inputs))
    else:
        generator = job.generator(options.points)
        for pair in pairs.reshape(-1, 2, *pairs.shape[1:]):
            for level in options.levels or [job.trained.config.diffusion.timesteps // 2]:
                rows.append(galleries.interpolation(generator, job.trained.params, level=level, **mixing(job, pair)))
    job.save(np.concatenate(rows))


def coarse_to_fine(job: Job) -> None:
    pair = job.originals(2)
    check(len(pair) == 2, "mode coarse_to_fine: two images")
    generator = job.generator(job.options.points)
    job.save(galleries.coarse_to_fine(generator, job.trained.params, rows=job.options.rows, **mixing(job, pair)))


def mixing(job: Job, pair: np.ndarray) -> dict:
    weights, shared = np.linspace(0, 1, job.options.points), job.options.forward_noise == "shared"
    return {"seed": job.options.seed, "pair": pair, "weights": weights, "shared_noise": shared, "label": job.label}


def neighbours(job: Job) -> None:
    options, indices, data = job.options, job.indices(job.count(8)), job.trained.config.data
    source = load_source(data, options.data_dir, "train")
    train = of_split(source, data, "train").first(options.search or len(source))
    check(1 <= options.columns <= train.count, f"--columns={options.columns}: must be in 1..{train.count}")
    extractor = None
    if options.space != "pixel":
        weights = load_inception(options.inception, options.cache / "inception")
        cache = options.cache / "features"
        extractor = Extractor(weights, job.devices, cache=cache, batch_size=options.batch_size, progress=True)
    generator = job.generator(len(indices))
    inputs = {"seed": options.seed, "indices": indices, "labels": job.labels(indices)}
    samples = images.to_uint8(generator.draw(job.trained.params, **inputs))
    spaces = {}
    if options.space != "inception":
        spaces["levels 0..255"] = galleries.nearest(samples, source, options.columns, within=train.count, progress=True)
    if extractor is not None:
        tap = next(tap for tap in ("2048", "768", "192", "64") if tap in extractor.weights.taps)
        drawn = of_array(samples, {"file": "samples"})
        spaces[f"{tap} Inception features"] = galleries.nearest_in_features(extractor, tap, drawn, train, options.columns)
    for space, (distances, found) in spaces.items():
        for index, row, nearest in zip(indices, distances, found):
            near = ", ".join(f"{number} ({distance:.3g})" for number, distance in zip(nearest, row))
            print(f"sample {index}: train images (RMSE in {space}) {near}")
    panels = [galleries.neighbours(samples, source, found) for _, found in spaces.values()]
    job.save(np.stack(panels, axis=1).reshape(-1, *panels[0].shape[1:]))


def inpaint(job: Job) -> None:
    options, originals, size = job.options, job.originals(1), job.trained.config.data.image_size
    box = options.hole or (size // 4, size // 4, size // 2, size // 2)
    mask = galleries.hole(size, box) if options.mask is None else galleries.mask_from(options.mask, size)
    check(options.resample >= 1 and options.jump >= 1, "--resample and --jump: at least 1")
    variants = job.count(4)
    generator = job.generator(variants * len(originals), repaint=Repaint(options.resample, options.jump))
    inputs = {"seed": options.seed, "originals": originals, "mask": mask, "variants": variants, "label": job.label}
    job.save(galleries.inpainting(generator, job.trained.params, **inputs))


def reconstruction(job: Job) -> None:
    originals = job.originals(1)
    encoder, decoder = job.ddim_pair(len(originals))
    panel, error = galleries.reconstruction(encoder, decoder, job.trained.params, originals=originals, label=job.label)
    print(f"{decoder.table.steps} steps: mean squared error a pixel {error:.6f}, values in [0, 1], {len(originals)} images")
    job.save(panel)


MODES: dict[str, Callable[[Job], None]] = {
    "grid": grid,
    "denoising": lambda job: film(job, "x_t", 16, 40),
    "progressive": lambda job: film(job, "x0", 8, 12),
    "shared_latents": shared_latents,
    "interpolation": interpolation,
    "coarse_to_fine": coarse_to_fine,
    "neighbours": neighbours,
    "inpaint": inpaint,
    "reconstruction": reconstruction,
}
OUTPUTS = {"grid": (".png", ".npz", ""), "denoising": FILMS, "progressive": (".png", *FILMS)}


def numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def flags() -> argparse.ArgumentParser:
    made = cli.parser(
        __doc__,
        "python scripts/sample.py --workdir=runs/cifar10 --mode=grid --steps=1000 --num_images=64 --output=grid.png",
    )
    cli.add_run(made)
    cli.add_data_dir(made)
    add = made.add_argument
    add("--mode", choices=MODES, default="grid", help="what to draw (default: grid)")
    add("--output", type=Path, required=True, metavar="FILE", help=".png; grid: or .npz or a folder; films: .gif or .webp")
    add("--num_images", type=int, metavar="N", help="samples, or variants of each (default: 64 in a grid, else a few)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--first", type=int, default=0, metavar="I", help="number of the first sample (default: 0)")
    add("--label", type=numbers, metavar="K[,K..]", help="the class, or several in turn, where the config has classes")
    add("--guidance", type=float, default=1.0, metavar="S", help="classifier-free: u + S (c - u); 1 is none (default: 1)")
    add("--sampler", choices=sorted(SAMPLERS), help="(default: the config's)")
    add("--steps", type=int, metavar="S", help="reverse steps; 0: all (default: the config's)")
    add("--spacing", metavar="NAME", help=f"of fewer steps: {', '.join(SPACING_NAMES)} (default: the config's)")
    add("--eta", type=float, help="of ddim, 0 to 1 (default: the config's)")
    add("--clip", choices=["true", "false"], help="clip x0_hat to [-1, 1] (default: the config's; false for DDIM codes)")
    add("--rederive_eps", choices=["true", "false"], help="eps_hat of ddim from the clipped x0_hat (default: the config's)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, or a decay such as 0.9999 (default: ema)")
    add("--step", type=cli.step, metavar="N", help="the checkpoint (default: the newest)")
    add("--batch_size", type=int, default=64, metavar="N", help="samples at once, over all devices (default: 64)")
    add("--scale", type=int, default=1, metavar="K", help="side of a pixel in the picture (default: 1)")
    real = made.add_argument_group("real images")
    real.add_argument("--indices", type=numbers, metavar="I,I..", help="of the run's data set")
    real.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    real.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="image files")
    mode = made.add_argument_group("of single modes")
    mode.add_argument("--frames", type=int, metavar="N", help="denoising, progressive (default: 40, 12)")
    mode.add_argument("--milliseconds", type=int, default=100, help="a frame of a film (default: 100)")
    mode.add_argument("--levels", type=numbers, metavar="T,T..", help="shared_latents, interpolation (default: quarters; T/2)")
    mode.add_argument("--points", type=int, default=9, help="weights from 0 to 1 of a mix (default: 9)")
    mode.add_argument("--rows", type=int, default=9, help="coarse_to_fine: levels from 0 to T (default: 9)")
    mode.add_argument("--forward_noise", choices=["shared", "own"], default="shared", help="of the images (default: shared)")
    mode.add_argument("--mix", choices=["linear", "slerp"], default="linear", help="x_t, or DDIM's codes (default: linear)")
    mode.add_argument("--columns", type=int, default=8, help="neighbours: how many (default: 8)")
    mode.add_argument("--space", choices=SPACES, default="pixel", help="neighbours: what is near (default: pixel)")
    mode.add_argument("--search", type=int, metavar="N", help="neighbours: the first N train images (default: all)")
    cli.add_inception(mode)
    mode.add_argument("--hole", type=numbers, metavar="TOP,LEFT,HEIGHT,WIDTH", help="inpaint (default: the middle quarter)")
    mode.add_argument("--mask", type=Path, metavar="PNG", help="inpaint: instead of --hole, white where to fill in")
    mode.add_argument("--resample", type=int, default=10, help="inpaint: times each stretch is gone through (default: 10)")
    mode.add_argument("--jump", type=int, default=10, help="inpaint: steps of a stretch (default: 10)")
    cli.add_hosts(made)
    return made


def check_flags(options: argparse.Namespace) -> None:
    known = OUTPUTS.get(options.mode, (".png",))
    named = " or ".join(suffix for suffix in known if suffix) + (", or be a folder" if "" in known else "")
    check(options.output.suffix in known, f"--output={options.output}: must end in {named}")
    for name in ("num_images", "batch_size", "scale", "frames", "points", "rows", "columns", "search"):
        value = getattr(options, name)
        check(value is None or value >= 1, f"--{name}={value}: must be at least 1")
    check(0 <= options.seed < 2**32, f"--seed={options.seed}: must be in 0..2^32-1")
    check(options.first >= 0, f"--first={options.first}: must be at least 0")
    check(options.points >= 2, f"--points={options.points}: must be at least 2")
    check(options.hole is None or len(options.hole) == 4, "--hole: write --hole=TOP,LEFT,HEIGHT,WIDTH")
    check(options.guidance == 1 or options.label is not None, f"--guidance={options.guidance}: towards which class? give --label")


def open_job(options: argparse.Namespace) -> Job:
    devices = Devices()
    cli.find_run(options, devices)
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    given = {name: getattr(options, name) for name in ("sampler", "steps", "spacing", "eta")}
    for name in ("clip", "rederive_eps"):
        given[name] = {None: None, "true": True, "false": False}[getattr(options, name)]
    config = with_sampling(trained.config, **given)
    check(options.rederive_eps is None or config.sampling.sampler == "ddim", "--rederive_eps: only ddim uses eps_hat")
    classes = config.model.num_classes
    for label in options.label or []:
        check(classes > 0, f"--label={label}: this run has no classes")
        check(0 <= label < classes, f"--label={label}: must be in 0..{classes - 1}")
    unlabelled = classes and not config.model.label_dropout and options.label is None
    check(not unlabelled, f"this run has {classes} classes and was trained with a label always: give --label")
    return Job(options, dataclasses.replace(trained, config=config), devices)


def main(argv: list[str] | None = None) -> None:
    options = flags().parse_args(argv)
    check_flags(options)
    cli.join_hosts(options)
    MODES[options.mode](open_job(options))


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


if __name__ == "__main__":
    cli.run(main)
