"""Measure a trained run, or any images, metric by metric, and build references.

    evaluate(EvaluationOptions(metrics=("fid",), workdir=Path("runs/cifar10"), num_images=10_000))

All hosts compute features; the first one compares, prints and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_jax.data.source import SPLITS
from ddpm_jax.evaluation import (
    memorisation,
    pixels,
    quality,
    quality_report,
    rate_distortion,
    reconstruction,
    references,
)
from ddpm_jax.evaluation.inception.features import check_channels
from ddpm_jax.evaluation.inputs import Inputs
from ddpm_jax.evaluation.nll import Protocol, check_labels, evaluate_nll
from ddpm_jax.evaluation.options import METRICS, OF_IMAGES, EvaluationOptions, check
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.evaluations import NAME, append_evaluation

Record = dict[str, Any]


def evaluate(options: EvaluationOptions, devices: Devices | None = None) -> list[Record]:
    """Measure `options.metrics`: print tables, append a line for each number to evaluations.jsonl.

    Args:
      devices: all of the machine, and of the other hosts, by default.

    Returns:
      The records, on the first host.

    Raises:
      UserError: what cannot be measured, with the remedy.
      OSError: a file cannot be written.
    """
    check(bool(options.metrics), f"metrics: name any of {', '.join(METRICS)}")
    job = _Job(Inputs(options, devices or Devices()))
    job.open()
    if "nll" in options.metrics:
        job.measure_nll()
    if "reconstruction" in options.metrics:
        job.measure_reconstruction()
    if job.of_inception:
        job.measure_quality()
    if "pixels" in options.metrics:
        job.measure_pixels()
    if "audit" in options.metrics:
        job.audit()
    print(f"appended to {job.inputs.place / NAME}", flush=True)
    return job.records


class _Job:
    """The metrics of one evaluation, and their records.

    Attributes:
      of_inception: those of Inception's features.
      audit_features: whether an audit looks at features, too.
      reference: what samples are compared with; on the first host alone, and None for "is" alone.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.records, options = inputs, [], inputs.options
        self.of_inception = [name for name in quality.METRICS if name in options.metrics]
        self.audit_features = bool(self.of_inception) or options.inception is not None
        self.reference: Reference | None = None

    def open(self) -> None:
        """Open all that the metrics need but the samples, which may take hours to draw.

        Raises:
          UserError: what is missing, or does not serve.
        """
        inputs, options, metrics = self.inputs, self.inputs.options, {*self.inputs.options.metrics}
        splits = {options.split} if metrics & {*OF_IMAGES} else set()
        if "pixels" in metrics:
            named = options.reference
            check(named in SPLITS, f"reference={named}: pixels are compared with train or test")
            splits.add(named)
        for split in SPLITS:  # in the same order on all hosts
            if split in splits or "audit" in metrics:
                inputs.source(split)
        if metrics & {*OF_IMAGES}:
            check_labels(inputs.trained.config, inputs.source(options.split))
        if "pixels" in metrics:
            pixels.check_shapes(inputs.image_shape, inputs.source(options.reference).image_shape)
        if self.of_inception or ("audit" in metrics and self.audit_features):
            check_channels(inputs.image_shape, "samples")
            weights = inputs.extractor.weights
            quality.check_weights(weights, self.of_inception, options.features)
        if self.of_inception not in ([], ["is"]):
            self.reference = inputs.reference()
            with hosts.together():
                if self.reference is not None:
                    quality.check_reference(self.reference, inputs.image_shape, self.of_inception)

    def record(self, report: Callable[[], list[Record]]) -> None:
        """Append what `report` returns; it runs on the first host, and must not wait for others."""
        with hosts.together():
            if self.inputs.devices.is_main:
                for record in report():
                    append_evaluation(self.inputs.place, record)
                    self.records.append(record)

    def measure_nll(self) -> None:
        options, trained = self.inputs.options, self.inputs.trained
        protocol = Protocol(
            options.num_timesteps, options.clip is not False, options.cdf, options.seed
        )
        nll = evaluate_nll(
            trained.config,
            trained.params,
            self.inputs.source(options.split),
            self.inputs.devices,
            protocol=protocol,
            num_images=options.num_images,
            batch_size=options.batch_size,
            progress=True,
        )

        def report() -> list[Record]:
            place = self.inputs.place
            measured = rate_distortion.report(nll, protocol, trained, options.split, place)
            return [{"metric": "nll"} | self.inputs.about_network | measured]

        self.record(report)

    def measure_reconstruction(self) -> None:
        options, trained = self.inputs.options, self.inputs.trained
        errors = reconstruction.reconstruction_errors(
            trained.config,
            trained.params,
            self.inputs.source(options.split),
            self.inputs.devices,
            num_images=options.num_images,
            batch_size=options.batch_size,
            progress=True,
        )

        def report() -> list[Record]:
            measured = reconstruction.report(errors, trained, options.split)
            return [{"metric": "reconstruction"} | self.inputs.about_network | measured]

        self.record(report)

    def measure_quality(self) -> None:
        options, extractor, reference = self.inputs.options, self.inputs.extractor, self.reference
        tap = options.features
        runs = [
            quality.measure(extractor, samples, reference, self.of_inception, tap)
            for samples in self.inputs.samples
        ]

        def report() -> list[Record]:
            return quality_report.report(
                quality_report.over_seeds(runs),
                self.inputs.samples[0],
                reference,
                extractor,
                tap,
                self.inputs.about_samples,
                options.draws if options.samples is None else None,
            )

        self.record(report)

    def measure_pixels(self) -> None:
        split = self.inputs.options.reference
        samples = self.inputs.samples[0]
        real = self.inputs.split(split, self.inputs.options.reference_images)
        whole, about = real.count == len(self.inputs.source(split)), self.inputs.about_samples
        self.record(lambda: [pixels.report(samples, real, split, about, whole=whole)])

    def audit(self) -> None:
        """Search in pixels, and in the deepest features there are up to those asked for."""
        options, samples = self.inputs.options, self.inputs.samples[0]
        sets = memorisation.AuditSets(
            samples,
            self.inputs.split("train", options.reference_images),
            self.inputs.split("test", samples.count),
        )

        def report(audit: memorisation.Audit, space: str, seen: Record) -> Record:
            name = memorisation.file_name(sets, space, self.inputs.origin, seen)
            path = self.inputs.place / "evaluations" / name
            return memorisation.report(audit, sets, space, path, self.inputs.about_samples) | seen

        self.record(lambda: [report(memorisation.audit_pixels(sets, progress=True), "pixels", {})])
        if self.audit_features:
            extractor = self.inputs.extractor
            tap = extractor.weights.deepest(options.features)
            audit = memorisation.audit_features(extractor, tap, sets)
            self.record(lambda: [report(audit, f"features-{tap}", extractor.provenance())])


def build_reference(options: EvaluationOptions, devices: Devices | None = None) -> Path:
    """Compute the statistics of a split, or of `options.samples`, into a file that it returns.

    Raises:
      UserError: what cannot be computed, with the remedy.
      OSError: the file cannot be written.
    """
    of_split = options.samples is None
    check(
        of_split or options.output is not None,
        "build_reference of samples needs output=FILE.npz",
    )
    check(
        not of_split or options.reference in SPLITS,
        f"reference={options.reference}: train or test, or samples of anything else",
    )
    inputs = Inputs(options, devices or Devices())
    if of_split:
        images = inputs.split(options.reference, options.reference_images)
    else:
        images = inputs.given.first(options.reference_images)
    extractor, tap = inputs.extractor, options.features
    extractor.weights.require(tap, "this reference")
    path = options.output
    if path is None:
        name = references.file_name(images, extractor, tap)
        path = inputs.data_dir / "references" / name
    reference = references.build(extractor, images, tap)
    with hosts.together():
        if inputs.devices.is_main:
            references.save(path, reference)
            print(f"wrote {path}: {reference.describe()}", flush=True)
    return path
