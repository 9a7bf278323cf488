"""Declare what an evaluation may be asked for. scripts/evaluate.py has a flag for each field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddpm_jax.config import Config
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation import quality
from ddpm_jax.evaluation.inception.weights import FEATURES
from ddpm_jax.files import default_cache

OF_IMAGES = ("nll", "reconstruction")  # of a split of the run's data, not of samples
METRICS = (*OF_IMAGES, *quality.METRICS, "pixels", "audit")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation: what to measure, of what, and beside what.

    Attributes:
      metrics: any of METRICS.
      workdir: the run directory.
      pretrained: in place of it, the name of a network that ships.
      config: in place of both, a config whose data set `reference` means.
      data_dir: prepared data sets; None for where the run's data was, or "data".
      num_images: None for all of a split, 50,000 samples of a run, or all of `samples`.
      batch_size: images at once, over all devices.
      seed: of every draw.
      weights: "ema", "raw", or a decay such as "0.9999".
      step: of the checkpoint; None for the newest.
      clip: limit x0_hat to [-1, 1]; None: true for the bound, the config's for samples.

      split: of nll and reconstruction.
      num_timesteps: of nll, terms an image; 0 for all T.
      cdf: of nll's decoder, "tanh" (the paper's) or "erf" (exact).

      samples: a folder of images or an .npz, instead of the run's own.
      seeds: several draws, for mean and deviation; empty for `seed` alone.
      sampler, steps, spacing, eta, order, dynamic_threshold: of the samples; None for the
        config's.
      label: classes, in turn, by number or name; None for all, where there are any.
      guidance: classifier-free; 1 is none.

      inception: a file of weights; None for those that are downloaded.
      cache: where weights and features are kept.
      features: of Inception, one of FEATURES.
      resize: to Inception's 299x299, "tf" (the paper's) or "half_pixel" (pytorch-fid's).
      reference: "train", "test", or a file of statistics or images.
      reference_images: the first so many of the split; None for all.
      output: the file of `build_reference`; None for its place in `data_dir`.

    Raises:
      EvaluationError: a value that is impossible, or of no use beside another.
    """

    metrics: tuple[str, ...] = ()
    workdir: Path | None = None
    pretrained: str | None = None
    config: Config | None = None
    data_dir: Path | None = None
    num_images: int | None = None
    batch_size: int = 128
    seed: int = 0
    weights: str = "ema"
    step: int | Literal["best"] | None = None
    clip: bool | None = None

    split: str = "test"
    num_timesteps: int = 0
    cdf: str = "tanh"

    samples: Path | None = None
    seeds: tuple[int, ...] = ()
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    order: int | None = None
    dynamic_threshold: float | None = None
    label: tuple[int | str, ...] | None = None
    guidance: float = 1.0

    inception: Path | None = None
    cache: Path = field(default_factory=default_cache)
    features: str = "2048"
    resize: str = "tf"
    reference: str = "train"
    reference_images: int | None = None
    output: Path | None = None

    @property
    def draws(self) -> tuple[int, ...]:
        """Return the seed of each set of samples."""
        return self.seeds or (self.seed,)

    def __post_init__(self) -> None:
        for name in self.metrics:
            check(
                name in METRICS, f"metrics={name}: any of {', '.join(METRICS)}, with commas between"
            )
        for name, values in (("features", FEATURES), ("split", SPLITS)):
            value = getattr(self, name)
            check(value in values, f"{name}={value}: one of {', '.join(values)}")
        for name in ("num_images", "batch_size", "reference_images"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name}={value}: must be at least 1")
        if self.num_images is not None:
            quality.check_count(self.num_images, self.metrics)
        if self.reference_images is not None and {*self.metrics} & {*quality.METRICS} - {"is"}:
            quality.check_count(self.reference_images, [x for x in self.metrics if x != "is"])
        for seed in (self.seed, *self.seeds):
            check(0 <= seed < 2**32, f"seed={seed}: must be in 0..2^32-1")
        run = self.workdir or self.pretrained
        of_run = bool(self.metrics) and self.samples is None or bool({*OF_IMAGES} & {*self.metrics})
        check(
            run is not None or not of_run,
            "workdir: which run? (or pretrained, or samples of any other origin)",
        )
        check(
            run is None or self.config is None,
            "config: of no use with workdir, which has its own",
        )
        for name in ("pixels", "audit"):
            check(
                name not in self.metrics or len(self.draws) == 1,
                f"seeds: {name} is of one draw: measure it by itself, with seed=S",
            )
        if self.samples is not None:
            for name in (
                "seeds",
                "sampler",
                "steps",
                "spacing",
                "eta",
                "order",
                "dynamic_threshold",
                "label",
                "guidance",
            ):
                check(
                    getattr(self, name) == getattr(EvaluationOptions, name),  # its default
                    f"{name}: of no use with samples, which are drawn already",
                )


def check(condition: bool, message: str) -> None:
    """Raise EvaluationError(message) unless `condition`."""
    if not condition:
        raise EvaluationError(message)
