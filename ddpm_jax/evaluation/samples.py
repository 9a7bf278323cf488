"""Samples to be scored, drawn from a run into its own directory, block by block: a stopped evaluation draws nothing twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax import shards
from ddpm_jax.devices import Devices
from ddpm_jax.evaluation.image_sets import ImageSet, open_images
from ddpm_jax.generate import Generator
from ddpm_jax.trained import Trained


def drawn_samples(
    workdir: Path,
    trained: Trained,
    devices: Devices,
    *,
    count: int,
    seed: int,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
) -> ImageSet:
    """The first `count` samples of `seed`, as `trained.config.sampling` says, in workdir/evaluations/samples/NAME.npz.

    NAME has the hash of all that the samples depend on in it, so a change of any of it draws anew; a larger `count` adds to them.

    Args:
      labels: classes, taken in turn.
      batch_size: samples at once, over all devices.

    Raises:
      ConfigError: as `Generator`.
    """
    config = trained.config
    protocol = {
        "config": dataclasses.asdict(config),
        "weights": trained.weights,
        "step": trained.step,
        "seed": seed,
        "guidance": guidance,
        "label": None if labels is None else list(labels),
    }
    generator = Generator(config, devices, batch_size=min(batch_size, count), guidance=guidance, progress=True)
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    options, weights = config.sampling, trained.weights.replace(" ", "")
    name = f"step{trained.step}_{weights}_{options.sampler}{generator.table.steps}_seed{seed}_{digest}.npz"
    path = workdir / "evaluations" / "samples" / name

    def draw(indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        return generator.draw(trained.params, seed=seed, indices=indices, labels=labels)

    indices = np.arange(count)
    in_turn = None if labels is None else np.array(labels)[indices % len(labels)]
    shards.fill(path, protocol, indices, in_turn, draw, devices)
    devices.from_main(np.zeros(1))  # the other hosts wait until the file is whole
    images = open_images(path)
    description = {
        "run": workdir.resolve().name,
        "sampling": dataclasses.asdict(options) | {"steps": generator.table.steps},
        "seed": seed,
        "guidance": guidance,
        "labels": protocol["label"],
        "pixels": "uint8, rounded",
    }
    return dataclasses.replace(images, description=description).first(count)
