"""Measure bits per dimension of a network over a data split (Ho et al. 2020, eq. 5, Table 1).

Noise and timesteps of image i depend on (seed, i) alone, so the result is that of the images,
whatever the batch size and the number of devices. A batch brings home a few numbers for each image
and timestep; over the split only sums are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params, build_process, denoiser
from ddpm_jax.config import Config
from ddpm_jax.data.batches import eval_batches, fingerprint
from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.bound import (
    RateDistortion,
    Strata,
    bound_terms,
    prior_term,
    rate_distortion,
    timestep_strata,
)
from ddpm_jax.diffusion.gaussians import CDFS
from ddpm_jax.diffusion.randomness import Stream, example_keys, stream_key
from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import read_on_all_hosts
from ddpm_jax.images import scale_images
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress

Terms = Callable[[tuple[Params, jax.Array, jax.Array], dict[str, jax.Array]], dict[str, jax.Array]]

CHUNK = 20  # terms a call: few enough that progress shows, enough that calls cost nothing


@dataclass(frozen=True)
class Protocol:
    """Options of the bound.

    Attributes:
      num_timesteps: terms an image; 0 for all T, else an unbiased estimate from as many strata.
      clip: limit x0_hat to [-1, 1]: the paper's numbers are with, its training loss is without.
      cdf: of the decoder, "tanh" (the paper's code) or "erf" (exact).
      seed: of noise and timesteps.
    """

    num_timesteps: int = 0
    clip: bool = True
    cdf: str = "tanh"
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, which covers images, noise and timesteps drawn."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """Average one value for each image, [N]; NaN where N = 1 leaves the error unknown."""
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), spread / math.sqrt(len(values)))


@dataclass(frozen=True, eq=False)
class Nll:
    """The bound in bits/dim and its parts.

    total = prior + middle + decoder, where prior + middle is the paper's rate and decoder its
    distortion.

    Attributes:
      prior, middle, decoder, total: L_T, the sum of L_t for t >= 1, L_0, and their sum.
      term, term_error: float64 [K], mean and standard error over images of the term in each
        stratum, t rising; NaN for the error of one image.
      curve: the rate-distortion curve, t falling.
      images: how many images.
      seconds: of measuring, compilation included.
    """

    strata: Strata
    prior: Estimate
    middle: Estimate
    decoder: Estimate
    total: Estimate
    term: np.ndarray
    term_error: np.ndarray
    curve: RateDistortion
    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Return the paper's rate, L_T and the sum of L_t for t >= 1."""
        return self.prior.mean + self.middle.mean


def evaluate_nll(
    config: Config,
    params: Params,
    source: Source,
    devices: Devices,
    *,
    protocol: Protocol,
    num_images: int | None = None,
    batch_size: int = 128,
    progress: bool = False,
    network: Network | None = None,
) -> Nll:
    """Measure the bound of the first `num_images` images of `source` (None: all).

    Args:
      params: replicated on `devices`.
      batch_size: images at once, over all devices; rounded up to a multiple of their number.
      network: in place of the config's.

    Raises:
      EvaluationError: no images, images that are not 8-bit or lack labels, a seed, num_timesteps or
        cdf that is impossible, a network whose output gives no finite bound.
      ConfigError: from building the process.
    """
    check_labels(config, source)
    count = len(source) if num_images is None else min(num_images, len(source))
    if count < 1:
        raise EvaluationError(
            f"the {config.data.name} split is empty: a likelihood needs at least one image"
        )
    if not 0 <= protocol.seed < 2**32:
        raise EvaluationError(f"seed={protocol.seed}: must be in 0..2^32-1")
    if protocol.cdf not in CDFS:
        raise EvaluationError(f"cdf={protocol.cdf}: one of {', '.join(CDFS)}")
    with hosts.together():
        mark = fingerprint(source)
    hosts.same("the data set", mark)
    process = build_process(config)
    try:
        strata = timestep_strata(process.schedule, protocol.num_timesteps)
    except ValueError as error:
        raise EvaluationError(str(error)) from error

    def prior(_: None, batch: dict[str, jax.Array]) -> jax.Array:
        return prior_term(process.schedule, scale_images(batch["image"]))

    terms_on_devices = devices.map_batch(chunk_of_terms(config, protocol, network))
    prior_on_devices = devices.map_batch(prior)
    parts, started = len(devices.devices), time.monotonic()
    # Batches of equal size, so that little of the last one is filling.
    batch_size = -(-count // (-(-count // batch_size) * parts)) * parts
    host, of_hosts = jax.process_index(), jax.process_count()
    share, sums = batch_size // of_hosts, _Sums(strata)
    calls = -(-count // batch_size) * len(strata)
    with Progress(
        calls, "batch term", enabled=progress and devices.is_main, scale=batch_size
    ) as bar:
        batches = eval_batches(source, count, batch_size, host, of_hosts)
        for number, batch in enumerate(read_on_all_hosts(batches)):
            if batch["image"].dtype != np.uint8:
                raise EvaluationError(
                    f"{config.data.name} holds {batch['image'].dtype}: "
                    "the likelihood is one of 8-bit images"
                )
            batch["index"] = (number * batch_size + host * share + np.arange(share)).astype(
                np.uint32
            )
            placed = devices.place(batch)
            valid = devices.rows(placed["mask"]) > 0
            columns: list[dict[str, np.ndarray]] = []
            for start in range(0, len(strata), CHUNK):
                first, size = (
                    jnp.asarray(a[start : start + CHUNK]) for a in (strata.first, strata.size)
                )
                rows = devices.rows(terms_on_devices((params, first, size), placed))
                rows = {name: column[valid] for name, column in rows.items()}
                _check_finite(config, rows)
                columns.append(rows)
                bar.update(rows["t"].shape[1])
            whole = {
                name: np.concatenate([rows[name] for rows in columns], axis=1)
                for name in columns[0]
            }
            sums.add(devices.rows(prior_on_devices(None, placed))[valid], **whole)
    return sums.result(time.monotonic() - started)


def check_labels(config: Config, source: Source) -> None:
    """Raise EvaluationError where the network needs a class of each image, and there is none."""
    classes = config.model.num_classes
    if classes and not source.labelled and not config.model.label_dropout:
        raise EvaluationError(
            f"{config.data.name} has no labels: this network has {classes} classes and knows no "
            "images without one (model.label_dropout=0); take a data set with labels"
        )


def chunk_of_terms(config: Config, protocol: Protocol, network: Network | None = None) -> Terms:
    """Build the function that computes a chunk of terms of one device's images.

    Returns:
      `f((params, first, size), batch) -> rows`: `bound_terms` of the strata `first`, `size` [K] and
      the images of a batch of `eval_batches` with their indices.
    """
    process, bind = build_process(config), denoiser(config, network)

    def terms(
        inputs: tuple[Params, jax.Array, jax.Array], batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        params, first, size = inputs
        keys = example_keys(stream_key(protocol.seed, Stream.LIKELIHOOD), batch["index"])
        denoise = bind(params, batch.get("label") if config.model.num_classes else None)
        x0 = scale_images(batch["image"])
        return bound_terms(
            process, denoise, x0, keys, first, size, clip=protocol.clip, cdf=protocol.cdf
        )

    return terms


class _Sums:
    """Sums over a split: a few numbers for each image, a few for each stratum, all float64."""

    def __init__(self, strata: Strata) -> None:
        self._strata = strata
        self._images: dict[str, list[np.ndarray]] = {"prior": [], "middle": [], "decoder": []}
        self._strata_sums = {
            name: np.zeros(len(strata))
            for name in ("term", "term_squared", "term_below", "squared_error")
        }

    def add(
        self, prior: np.ndarray, t: np.ndarray, term: np.ndarray, squared_error: np.ndarray
    ) -> None:
        """Add a batch: prior [b], the rest [b, K]."""
        term = term.astype(np.float64)
        weighted = term * self._strata.size
        self._images["prior"].append(prior.astype(np.float64))
        self._images["middle"].append(weighted[:, 1:].sum(axis=1))
        self._images["decoder"].append(weighted[:, 0])
        sums = self._strata_sums
        sums["term"] += term.sum(axis=0)
        sums["term_squared"] += (term**2).sum(axis=0)
        sums["term_below"] += (term * (t - self._strata.first)).sum(axis=0)
        sums["squared_error"] += squared_error.sum(axis=0, dtype=np.float64)

    def result(self, seconds: float) -> Nll:
        """Turn the sums into means and their errors."""
        per_image = {name: np.concatenate(values) for name, values in self._images.items()}
        count = len(per_image["prior"])
        mean = {name: values / count for name, values in self._strata_sums.items()}
        variance = np.maximum(mean["term_squared"] - mean["term"] ** 2, 0)
        variance = variance / (count - 1) if count > 1 else np.full_like(variance, math.nan)
        prior = Estimate.of(per_image["prior"])
        return Nll(
            strata=self._strata,
            prior=prior,
            middle=Estimate.of(per_image["middle"]),
            decoder=Estimate.of(per_image["decoder"]),
            total=Estimate.of(per_image["prior"] + per_image["middle"] + per_image["decoder"]),
            term=mean["term"],
            term_error=np.sqrt(variance),
            curve=rate_distortion(
                self._strata, prior.mean, mean["term"], mean["term_below"], mean["squared_error"]
            ),
            images=count,
            seconds=seconds,
        )


def _check_finite(config: Config, rows: dict[str, np.ndarray]) -> None:
    """Raise EvaluationError at the first term that is no number, before it gets into a mean."""
    bad = ~(np.isfinite(rows["term"]) & np.isfinite(rows["squared_error"]))
    if bad.any():
        t = rows["t"][bad][0]
        variance = config.diffusion.variance
        why = (
            "variance=learned is unbounded, and here it left float32: train with learned_range"
            if variance == "learned"
            else "the network's output is not finite: evaluate an earlier checkpoint, "
            "or other of its weights"
        )
        raise EvaluationError(
            f"no likelihood: the bound is not finite at t={t} "
            f"for {bad.sum()} image(s) and term(s); {why}"
        )
