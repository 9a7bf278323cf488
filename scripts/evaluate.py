"""Measure a trained run, or any images: print a table, append one line for each metric to workdir/evaluations.jsonl.

nll    the variational bound of a data split in bits/dim (eq. 5 of the paper), its terms, and the rate-distortion curve (Table 4,
       Figure 5): CSV and plot in workdir/evaluations/. All T terms take T forward passes an image; --num_timesteps=K estimates
       from K of them, drawn by strata anew for each image
reconstruction
       mean squared error of DDIM's codes: images of the split to x_T and back in --steps steps (Song et al. 2021, Table 2)
fid    Frechet Inception distance, and what it would be at infinite N
kid    kernel Inception distance, unbiased, with its standard error
is     Inception Score over 10 splits
sfid   FID of spatial features
prdc   precision, recall, density and coverage
pixels Frechet distance of the pixels themselves, for images too small for Inception; comparable with nothing but itself
audit  does the model remember? Distances of samples to the training set, against those of held-out images: in pixels, and with
       --inception in features; the nearest pairs as CSV and PNG

The rest are of samples: drawn from the run into workdir/evaluations/samples/, where an interrupted evaluation goes on, or any
--samples. All of those but pixels and audit see them through Inception-v3 of 2015-12-05, which is downloaded unless --inception
names a file, and compare with a --reference, which --build_reference makes, or the first evaluation that needs it. Numbers of
other than its 2048 features say so: FID-768 is no FID.

Every number is that of (weights, images, seed), whatever the batch size and the number of devices and hosts.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import cli, hosts, images
from ddpm_jax.config import DataConfig, load_config
from ddpm_jax.data.sources import SPLITS, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.diffusion import CDFS
from ddpm_jax.evaluation import memorisation, quality, rate_distortion, references
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import ImageSet, of_split, open_images
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.evaluation.nll import Estimate, Protocol, evaluate_nll
from ddpm_jax.evaluation.pixels import pixel_distance
from ddpm_jax.evaluation.reconstruction import reconstruction_errors
from ddpm_jax.evaluation.record import NAME, append_evaluation
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.evaluation.resize import RESIZES
from ddpm_jax.evaluation.samples import drawn_samples
from ddpm_jax.generate import with_sampling
from ddpm_jax.samplers import SAMPLERS, SPACING_NAMES
from ddpm_jax.trained import Trained, open_trained

OF_IMAGES = ("nll", "reconstruction")  # of a split of the run's data, not of samples
METRICS = (*OF_IMAGES, *quality.METRICS, "pixels", "audit")


def measure_nll(trained: Trained, devices: Devices, options: argparse.Namespace) -> dict[str, Any]:
    config = trained.config
    protocol = Protocol(options.num_timesteps, options.clip != "false", options.cdf, options.seed)
    nll = evaluate_nll(
        config,
        trained.params,
        load_source(config.data, options.data_dir, options.split),
        devices,
        protocol=protocol,
        num_images=options.num_images,
        batch_size=options.batch_size,
        progress=True,
    )
    title = (
        f"{config.data.name} {options.split}, {nll.images} images, {len(nll.strata)} of {nll.strata.timesteps} terms, weights "
        f"{trained.weights}, step {trained.step}, clip {str(protocol.clip).lower()}, cdf {options.cdf}, seed {options.seed}"
    )
    print(title, rate_distortion.format_table(nll), sep="\n")
    if config.data.padding:
        print(f"dimensions counted: all of the image, with its border of {config.data.padding} pixels")
    print(f"{nll.seconds:.0f} s for {nll.images} x {len(nll.strata)} forward passes, one for each image and term")
    name = f"nll_{options.split}_step{trained.step}_{trained.weights.replace(' ', '')}_{nll.images}x{len(nll.strata)}"
    path = options.workdir / "evaluations" / name
    if devices.is_main:
        rate_distortion.save_csv(path.with_name(f"{name}.csv"), nll)
        rate_distortion.save_plot(path.with_name(f"{name}.png"), nll, title)
        print(f"wrote {path}.csv and .png")
    parts = {"prior": nll.prior, "middle": nll.middle, "decoder": nll.decoder, "total": nll.total}
    return {
        **{name: part.mean for name, part in parts.items()},
        **{f"{name}_standard_error": part.standard_error for name, part in parts.items() if nll.images > 1},
        "rate": nll.rate,
        "rmse": float(nll.curve.rmse[-1]),
        "unit": "bits/dim",
        "split": options.split,
        "num_images": nll.images,
        "num_timesteps": len(nll.strata),
        "timesteps": nll.strata.timesteps,
        "clip": protocol.clip,
        "cdf": protocol.cdf,
        "seed": protocol.seed,
        "forward_passes": nll.images * len(nll.strata),
        "seconds": round(nll.seconds, 3),
        "curve": f"evaluations/{name}.csv",
    }


def measure_reconstruction(trained: Trained, devices: Devices, options: argparse.Namespace) -> dict[str, Any]:
    config = trained.config
    source = load_source(config.data, options.data_dir, options.split)
    sizes = {"num_images": options.num_images, "batch_size": options.batch_size}
    errors = reconstruction_errors(config, trained.params, source, devices, progress=True, **sizes)
    found, steps = Estimate.of(errors), config.sampling.steps or config.diffusion.timesteps
    protocol = (
        f"{len(errors)} images, {steps} steps, spacing {config.sampling.spacing}, weights {trained.weights}, step {trained.step}"
    )
    print(f"{config.data.name} {options.split}, {protocol}")
    print(f"{'reconstruction':16}{found.mean:12.6f} +- {found.standard_error:.6f}  (squared error a pixel, values in [0, 1])")
    return {
        "value": found.mean,
        "standard_error": found.standard_error if len(errors) > 1 else None,
        "split": options.split,
        "num_images": len(errors),
        "steps": steps,
        "spacing": config.sampling.spacing,
    }


class Evaluation:
    """Images and what they are compared with, each opened when it is first asked for."""

    def __init__(self, options: argparse.Namespace, overrides: list[str]) -> None:
        self.options, self.devices = options, Devices()
        self.trained: Trained | None = None
        self.data: DataConfig | None = None
        cli.find_run(options, self.devices)
        if options.workdir is not None:
            trained = open_trained(options.workdir, self.devices, weights=options.weights, step=options.step)
            given = {name: getattr(options, name) for name in ("sampler", "steps", "spacing", "eta")}
            given["clip"] = {None: None, "true": True, "false": False}[options.clip]
            config = with_sampling(trained.config, **given)
            self.trained, self.data = dataclasses.replace(trained, config=config), config.data
            classes = config.model.num_classes
            for label in options.label or []:
                check(0 <= label < classes, f"--label={label}: this run has {classes or 'no'} classes")
        if options.config is not None:
            self.data = load_config(options.config, overrides).data
        self._extractor: Extractor | None = None
        self._splits: dict[str, ImageSet] = {}
        self._drawn: list[ImageSet] | None = None
        if options.samples is not None and not options.build_reference:
            found = open_images(options.samples)
            self._drawn = [found if options.num_images is None else found.first(options.num_images)]

    @property
    def place(self) -> Path:
        """Where records and pictures go: the run directory, or beside the samples."""
        return self.options.workdir if self.options.workdir is not None else self.options.samples.resolve().parent

    @property
    def extractor(self) -> Extractor:
        if self._extractor is None:
            options = self.options
            self._extractor = Extractor(
                load_inception(options.inception, options.cache / "inception"),
                self.devices,
                resize=options.resize,
                cache=options.cache / "features",
                batch_size=options.batch_size,
                progress=True,
            )
        return self._extractor

    def split(self, name: str, count: int | None = None) -> ImageSet:
        check(self.data is not None, f"the {name} split of which data set? pass --workdir or --config, or --reference=FILE")
        if name not in self._splits:
            self._splits[name] = of_split(load_source(self.data, self.options.data_dir, name), self.data, name)
        return self._splits[name] if count is None else self._splits[name].first(count)

    def samples(self) -> list[ImageSet]:
        """Those of --samples, or one set for each seed."""
        options = self.options
        if self._drawn is None:
            count = options.num_images or quality.CUSTOM
            classes = self.trained.config.model.num_classes
            labels = options.label or (range(classes) if classes else None)
            sampling = self.trained.config.sampling
            print(f"{count} samples for each of {len(options.seeds)} seed(s): {sampling}", flush=True)
            draw = {"count": count, "labels": labels, "guidance": options.guidance, "batch_size": options.batch_size}
            self._drawn = [
                drawn_samples(options.workdir, self.trained, self.devices, seed=seed, **draw) for seed in options.seeds
            ]
        return self._drawn

    def reference(self) -> Reference | None:
        """On the first host, which compares; None on the others."""
        options, tap = self.options, self.options.features
        path, found = Path(options.reference), None
        if options.reference in SPLITS:
            real = self.split(options.reference, options.reference_images)
            found = references.kept(options.data_dir / "references", self.extractor, real, tap)
        elif path.suffix != ".npz" or not references.has_statistics(path):
            found = references.build(self.extractor, open_images(path), tap)
        with hosts.together():
            if self.devices.is_main:
                found = found or references.load(path)
                references.check(found, self.extractor, tap, None if self.data is None else self.split("train").description)
        return found if self.devices.is_main else None

    def protocol(self) -> dict[str, Any]:
        """What any record says first."""
        trained = self.trained
        run = {} if trained is None or self.options.samples is not None else {"weights": trained.weights, "step": trained.step}
        return run | {"data": None if self.data is None else self.data.name}


def measure_quality(evaluation: Evaluation, metrics: list[str]) -> None:
    tap, extractor = evaluation.options.features, evaluation.extractor
    quality.check_weights(extractor.weights, metrics, tap)
    reference = evaluation.reference() if metrics != ["is"] else None
    with hosts.together():
        runs = [quality.measure(extractor, samples, reference, metrics, tap) for samples in evaluation.samples()]
        if evaluation.devices.is_main:
            report_quality(evaluation, reference, quality.over_seeds(runs))


def report_quality(evaluation: Evaluation, reference: Reference | None, numbers: list[quality.Number]) -> None:
    options, (samples, *_), extractor = evaluation.options, evaluation.samples(), evaluation.extractor
    print(f"{samples.count:,} images: {samples.describe()}")
    if reference is not None:
        print(f"reference: {reference.describe()}")
    seen = f"SHA-256 of its numbers {extractor.weights.sha256[:16]}), resize {options.resize}, features {options.features}"
    print(f"Inception {extractor.weights.name} ({seen}")
    print(quality.format_numbers(numbers, samples.count), flush=True)
    shared = evaluation.protocol() | {
        "num_images": samples.count,
        "samples": samples.description | ({"seeds": options.seeds} if options.samples is None else {}),
        **extractor.provenance(),
        "reference": None if reference is None else {"file": reference.file, "provenance": reference.provenance},
    }
    for number in numbers:
        append_evaluation(evaluation.place, {"metric": number.metric, "value": number.value, **number.extra, **shared})


def measure_pixels(evaluation: Evaluation) -> None:
    options, (samples, *_) = evaluation.options, evaluation.samples()
    check(options.reference in SPLITS, f"--reference={options.reference}: pixels are compared with train or test")
    real = evaluation.split(options.reference, options.reference_images)
    with hosts.together():
        if evaluation.devices.is_main:
            distance = pixel_distance(samples, real)
            print(f"{samples.count:,} images: {samples.describe()}; reference: {real.count:,} images of {options.reference}")
            print(f"{'pixels':16}{distance:12.5f}  (Frechet, [-1, 1]; not a FID)")
            record = {"metric": "pixels", "value": distance} | evaluation.protocol() | {"num_images": samples.count}
            record |= {"samples": samples.description, "reference": {"split": options.reference, "count": real.count}}
            append_evaluation(evaluation.place, record)


def measure_audit(evaluation: Evaluation, *, in_features: bool) -> None:
    options, (samples, *_) = evaluation.options, evaluation.samples()
    train, held_out = evaluation.split("train", options.reference_images), evaluation.split("test", samples.count)
    memorisation.check_shapes(samples, train, held_out)
    with hosts.together():
        if evaluation.devices.is_main:
            audit = memorisation.audit_pixels(samples, train, held_out, progress=True)
            report_audit(evaluation, audit, "pixels", samples, train, held_out)
    if in_features:
        taps = evaluation.extractor.weights.taps
        tap = next(tap for tap in (options.features, "768", "192", "64") if tap in taps)
        audit = memorisation.audit_features(evaluation.extractor, tap, samples, train, held_out)
        with hosts.together():
            if evaluation.devices.is_main:
                report_audit(evaluation, audit, f"features-{tap}", samples, train, held_out)


def report_audit(
    evaluation: Evaluation, audit: memorisation.Audit, space: str, samples: ImageSet, train: ImageSet, held_out: ImageSet
) -> None:
    """The table, every sample's nearest image as CSV, the nearest pairs as PNG, and the record."""
    options, counts = evaluation.options, f"{samples.count:,} samples, {held_out.count:,} held-out images"
    print(f"nearest of {train.count:,} train images in {space}: {counts}")
    print(audit.table())
    origin = f"step{evaluation.trained.step}" if options.samples is None else options.samples.stem
    path = evaluation.place / "evaluations" / f"audit_{space}_{origin}_{samples.count}.csv"
    memorisation.save_csv(path, audit)
    closest = np.argsort(audit.samples, kind="stable")[:10]
    pairs = np.concatenate([samples.read(closest), train.read(audit.nearest[closest])])
    images.save_png(path.with_suffix(".png"), images.grid(pairs, columns=len(closest), scale=max(1, 64 // samples.shape[0])))
    print(f"wrote {path} and .png: the samples that lie nearest, above what they are nearest to", flush=True)
    record = {"metric": f"audit-{space}", "value": audit.nearer, "suspects": audit.suspects}
    record |= evaluation.protocol() | {"num_images": samples.count, "samples": samples.description}
    record |= {"train_images": train.count, "held_out_images": held_out.count, "pairs": f"evaluations/{path.name}"}
    append_evaluation(evaluation.place, record | (evaluation.extractor.provenance() if space != "pixels" else {}))


def build_reference(evaluation: Evaluation) -> None:
    options = evaluation.options
    if options.samples is not None:
        check(options.output is not None, "--build_reference of --samples needs --output=FILE.npz")
        found = open_images(options.samples)
        real = found if options.reference_images is None else found.first(options.reference_images)
    else:
        check(options.reference in SPLITS, f"--reference={options.reference}: train or test, or --samples of anything else")
        real = evaluation.split(options.reference, options.reference_images)
    extractor, tap = evaluation.extractor, options.features
    extractor.weights.require(tap, "this reference")
    path = options.output or options.data_dir / "references" / references.file_name(real, extractor, tap)
    found = references.build(extractor, real, tap)
    with hosts.together():
        if evaluation.devices.is_main:
            references.save(path, found)
            print(f"wrote {path}: {found.describe()}", flush=True)


def flags() -> argparse.ArgumentParser:
    made = cli.parser(__doc__, "python scripts/evaluate.py --workdir=runs/cifar10 --metrics=nll,fid,is --num_images=50000")
    cli.add_run(made, required=False)
    cli.add_data_dir(made)
    cli.add_config(made, required=False)
    add = made.add_argument
    add("--metrics", metavar="A,B", help=f"any of {', '.join(METRICS)}")
    add("--num_images", type=int, metavar="N", help="(default: of a split all, samples 50000, or all of --samples)")
    add("--batch_size", type=int, default=128, metavar="N", help="images at once, over all devices (default: 128)")
    add("--seed", type=int, default=0, help="of every draw (default: 0)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, or a decay such as 0.9999 (default: ema)")
    add("--step", type=cli.step, metavar="N", help="the checkpoint (default: the newest)")
    add(
        "--clip",
        choices=["true", "false"],
        help="clip x0_hat to [-1, 1] (default: true; samples: the config's; codes: never)",
    )
    nll = made.add_argument_group("nll and reconstruction")
    nll.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    nll.add_argument("--num_timesteps", type=int, default=0, metavar="K", help="terms an image; 0: all T (default: 0)")
    nll.add_argument("--cdf", choices=sorted(CDFS), default="tanh", help="of the decoder: the paper's or exact (default: tanh)")
    drawn = made.add_argument_group("samples")
    drawn.add_argument("--samples", type=Path, metavar="PLACE", help="a folder of images, or an .npz, instead of the run's own")
    drawn.add_argument("--seeds", type=numbers, metavar="S,S..", help="several draws: mean and deviation (default: --seed)")
    drawn.add_argument("--sampler", choices=sorted(SAMPLERS), help="(default: the config's)")
    drawn.add_argument("--steps", type=int, metavar="S", help="reverse steps; 0: all (default: the config's)")
    drawn.add_argument("--spacing", metavar="NAME", help=f"of fewer steps: {', '.join(SPACING_NAMES)} (default: the config's)")
    drawn.add_argument("--eta", type=float, help="of ddim, 0 to 1 (default: the config's)")
    drawn.add_argument("--label", type=numbers, metavar="K[,K..]", help="classes, in turn (default: all, where there are any)")
    drawn.add_argument("--guidance", type=float, default=1.0, metavar="S", help="classifier-free; 1 is none (default: 1)")
    seen = made.add_argument_group("how they are seen, and beside what")
    cli.add_inception(seen)
    seen.add_argument("--features", choices=quality.FEATURES, default="2048", help="of Inception (default: 2048)")
    seen.add_argument("--resize", choices=RESIZES, default="tf", help="to 299x299: the paper's, or pytorch-fid's (default: tf)")
    seen.add_argument("--reference", default="train", metavar="WHAT", help="train, test, statistics or images (default: train)")
    seen.add_argument("--reference_images", type=int, metavar="N", help="of the split, the first N (default: all)")
    seen.add_argument("--build_reference", action="store_true", help="make the reference of a split, or of --samples, and stop")
    seen.add_argument("--output", type=Path, metavar="FILE", help="of --build_reference (default: DATA_DIR/references/...npz)")
    cli.add_hosts(made)
    return made


def numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def check_flags(options: argparse.Namespace) -> list[str]:
    """The metrics asked for."""
    names = options.metrics.split(",") if options.metrics else []
    for name in names:
        check(name in METRICS, f"--metrics={name}: any of {', '.join(METRICS)}, with commas between")
    check(bool(names) != options.build_reference, "either --metrics or --build_reference")
    for name in ("num_images", "batch_size", "reference_images"):
        value = getattr(options, name)
        check(value is None or value >= 1, f"--{name}={value}: must be at least 1")
    options.seeds = options.seeds or [options.seed]
    for seed in (options.seed, *options.seeds):
        check(0 <= seed < 2**32, f"--seed={seed}: must be in 0..2^32-1")
    needs_run = bool({*OF_IMAGES} & {*names}) or options.samples is None and bool(names)
    run = options.workdir or options.pretrained
    check(run is not None or not needs_run, "--workdir: which run? (or --pretrained, or --samples of any other origin)")
    check(run is None or options.config is None, "--config: of no use with --workdir, which has its own")
    given = [f"--{name}" for name in ("sampler", "steps", "spacing", "eta", "label") if getattr(options, name) is not None]
    check(options.samples is None or not given, f"{' '.join(given)}: of no use with --samples, which are drawn already")
    return names


def main(argv: list[str] | None = None) -> None:
    options, overrides = cli.parse_with_overrides(flags(), argv)
    names = check_flags(options)
    cli.join_hosts(options)
    evaluation = Evaluation(options, overrides)
    if options.build_reference:
        build_reference(evaluation)
        return
    seen = [name for name in quality.METRICS if name in names]
    for name, measure in zip(OF_IMAGES, (measure_nll, measure_reconstruction)):
        if name in names:
            record = {"metric": name} | evaluation.protocol() | measure(evaluation.trained, evaluation.devices, options)
            with hosts.together():
                if evaluation.devices.is_main:
                    append_evaluation(options.workdir, record)
    if seen:
        measure_quality(evaluation, seen)
    if "pixels" in names:
        measure_pixels(evaluation)
    if "audit" in names:
        measure_audit(evaluation, in_features=bool(seen) or options.inception is not None)
    print(f"appended to {evaluation.place / NAME}", flush=True)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise EvaluationError(message)


if __name__ == "__main__":
    cli.run(main)
