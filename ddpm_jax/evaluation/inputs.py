"""Open what an evaluation needs: the run, its samples, real images, Inception, a reference.

Each is opened when it is first asked for, on all hosts at once: a property or method here waits for
the other hosts, so it must not be used where only one of them comes by, or inside `hosts.together`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.batches import fingerprint
from ddpm_jax.data.classes import names_of_run, numbers_of
from ddpm_jax.data.load import load_source
from ddpm_jax.data.source import SPLITS, Source
from ddpm_jax.evaluation import references
from ddpm_jax.evaluation.image_sets import ImageSet, describe_split, of_split, open_images
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import InceptionWeights, load_inception
from ddpm_jax.evaluation.options import EvaluationOptions, check
from ddpm_jax.evaluation.quality_report import CUSTOM
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import say
from ddpm_jax.runs.data_origin import data_dir_of, read_origin
from ddpm_jax.sampling import shards
from ddpm_jax.sampling.generate import build_generator, even_batch
from ddpm_jax.sampling.sampler import chain_steps, with_sampling
from ddpm_jax.trained import Trained, find, open_trained


class Inputs:
    """Everything that `options` name.

    Attributes:
      workdir: the run directory, None without a run.
      data_dir: the prepared data sets.
      trained: its network, with the samplers' options put into its config.
      data: the data set of the run, or of `options.config`.
      given: the images of `options.samples`.

    Raises:
      UserError: something cannot be opened, or a class that the network does not have.
    """

    def __init__(self, options: EvaluationOptions, devices: Devices) -> None:
        self.options, self.devices = options, devices
        self.trained: Trained | None = None
        self.data: DataConfig | None = None if options.config is None else options.config.data
        self.workdir = find(options.workdir, options.pretrained, devices)
        with hosts.together():
            self.data_dir = data_dir_of(self.workdir, options.data_dir)
        if self.workdir is not None:
            self.trained = self._open_run(self.workdir)
            self.data = self.trained.config.data
        self.given: ImageSet | None = None
        if options.samples is not None:
            channels = 3 if self.data is None else self.data.channels
            self.given = _open_everywhere(options.samples, channels)
        self._sources: dict[str, Source] = {}

    def _open_run(self, workdir: Path) -> Trained:
        options = self.options
        trained = open_trained(workdir, self.devices, weights=options.weights, step=options.step)
        config = with_sampling(
            trained.config,
            sampler=options.sampler,
            steps=options.steps,
            spacing=options.spacing,
            eta=options.eta,
            order=options.order,
            dynamic_threshold=options.dynamic_threshold,
            clip=options.clip,
        )
        if self.devices.is_main:
            for note in trained.notes:
                say(note)
        if options.label is not None:
            classes = config.model.num_classes
            with hosts.together():
                names = names_of_run(read_origin(workdir), config.data.name, classes)
                label = tuple(numbers_of(options.label, names, classes))
            self.options = dataclasses.replace(options, label=label)
        return dataclasses.replace(trained, config=config)

    @property
    def place(self) -> Path:
        """Return where records and pictures go: the run directory, or beside the samples."""
        return self.options.samples.resolve().parent if self.workdir is None else self.workdir

    @property
    def origin(self) -> str:
        """Return what names of files call the samples, those of the first seed."""
        samples = self.options.samples
        return self._name(self.options.draws[0]) if samples is None else samples.stem

    def _name(self, seed: int) -> str:
        """Return what people know a draw by; it does not tell all draws apart."""
        trained, sampler = self.trained, self.trained.config.sampling.sampler
        return f"{trained.tag}_{sampler}{chain_steps(trained.config)}_seed{seed}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape [h,w,c] of the samples, drawn or not."""
        if self.given is not None:
            return self.given.shape
        return (*self.data.sides, self.data.channels)

    @property
    def about_network(self) -> dict[str, Any]:
        """Return what any record of the network says first, whatever the samples are."""
        trained = self.trained
        return {"weights": trained.weights, "step": trained.step, "data": self.data.name}

    @property
    def about_samples(self) -> dict[str, Any]:
        """Return what any record of samples says first; those of others have no network."""
        if self.trained is not None and self.options.samples is None:
            return self.about_network
        return {"data": None if self.data is None else self.data.name}

    @functools.cached_property
    def extractor(self) -> Extractor:
        """Load Inception onto all devices."""
        options = self.options
        with hosts.together():  # the first host may download what the others then have
            weights = self._load_inception() if self.devices.is_main else None
        with hosts.together():
            weights = weights or self._load_inception()
        hosts.same("Inception", weights.sha256)
        return Extractor(
            weights,
            self.devices,
            resize=options.resize,
            cache=options.cache / "features",
            batch_size=options.batch_size,
            progress=True,
        )

    def _load_inception(self) -> InceptionWeights:
        return load_inception(self.options.inception, self.options.cache / "inception")

    def source(self, split: str) -> Source:
        """Load a split of the data set, the same on all hosts and that of the run."""
        check(
            self.data is not None,
            f"the {split} split of which data set? give workdir or config, "
            "or statistics as reference",
        )
        if split not in self._sources:
            with hosts.together():
                if self.trained is None:
                    source = load_source(self.data, self.data_dir, split)
                else:
                    source = self.trained.open_split(self.data_dir, split)
                mark = fingerprint(source) if len(source) else "empty"
            hosts.same(f"the {split} split", mark)
            self._sources[split] = source
        return self._sources[split]

    def split(self, name: str, count: int | None = None) -> ImageSet:
        """Open the images of a split, the first `count` of them."""
        return of_split(self.source(name), self.data, name).first(count)

    @functools.cached_property
    def samples(self) -> list[ImageSet]:
        """Return the images of `options.samples`, or a set drawn from the run for each seed."""
        options = self.options
        if self.given is not None:
            return [self.given.first(options.num_images)]
        count, config = options.num_images or CUSTOM, self.trained.config
        print(
            f"{count} samples for each of {len(options.draws)} seed(s): {config.sampling}",
            flush=True,
        )
        return [self._draw(seed, count) for seed in options.draws]

    def _draw(self, seed: int, count: int) -> ImageSet:
        """Draw the first `count` samples of `seed` into workdir/evaluations/samples/NAME.npz.

        NAME has the hash of all that the samples depend on in it, so a change of any of it draws
        anew. What is there already is not drawn again, so a stopped evaluation goes on, and a
        larger `count` adds to a smaller one.
        """
        options, trained, config = self.options, self.trained, self.trained.config
        classes, labels = config.model.num_classes, options.label
        if labels is None and classes:
            labels = tuple(range(classes))
        protocol = {
            "config": dataclasses.asdict(config),
            "weights": trained.weights,
            "step": trained.step,
            "seed": seed,
            "guidance": options.guidance,
            "label": None if labels is None else list(labels),
        }
        generator = build_generator(
            config,
            self.devices,
            batch_size=even_batch(options.batch_size, min(count, shards.BLOCK)),
            guidance=options.guidance,
            progress=True,
        )
        digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
        path = self.workdir / "evaluations" / "samples" / f"{self._name(seed)}_{digest}.npz"

        def draw(indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
            return generator.draw(trained.params, seed=seed, indices=indices, labels=labels)

        indices = np.arange(count)
        in_turn = None if labels is None else np.array(labels)[indices % len(labels)]
        shards.fill(path, protocol, indices, in_turn, draw, self.devices)
        hosts.barrier("samples")  # the first host puts the file together
        description = {
            "run": self.workdir.resolve().name,
            "sampling": dataclasses.asdict(config.sampling) | {"steps": chain_steps(config)},
            "seed": seed,
            "guidance": options.guidance,
            "labels": protocol["label"],
            "pixels": "uint8, rounded",
        }
        images = _open_everywhere(path)
        return dataclasses.replace(images, description=description).first(count)

    def reference(self) -> Reference | None:
        """Open, or compute, what samples are compared with.

        Returns:
          The reference on the first host, which compares; None on the others.

        Raises:
          EvaluationError: it cannot be had, or is of another kind than the samples.
        """
        options, tap, is_main = self.options, self.options.features, self.devices.is_main
        path, reference = Path(os.path.expanduser(options.reference)), None
        if options.reference in SPLITS:
            images = self.split(options.reference, options.reference_images)
            folder = self.data_dir / "references"
            whole = images.count == len(self.source(options.reference))
            reference = references.look_up(folder, self.extractor, images, tap)
            if reference is not None:
                reference = dataclasses.replace(reference, whole=whole)
        else:
            with hosts.together():
                ready = is_main and path.suffix == ".npz" and references.has_statistics(path)
            if not self.devices.from_main(np.array(ready)):
                reference = references.build(self.extractor, _open_everywhere(path), tap)
        extractor = self.extractor
        with hosts.together():
            if not is_main:
                return None
            reference = reference or references.load(path)
            own = None if self.data is None else describe_split(self.data, "train")
            references.check(reference, extractor, tap, own)
            return reference


def _open_everywhere(path: Path, channels: int = 3) -> ImageSet:
    """Open images on all hosts; they must be the same on each."""
    with hosts.together():
        images = open_images(path, channels)
    hosts.same(f"the images in {path.name}", (images.description, images.shape, images.count))
    return images
