"""Hold what a figure is drawn with: its options, a trained network, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import images
from ddpm_jax.data.source import Source
from ddpm_jax.errors import check
from ddpm_jax.figures.originals import images_from, images_of
from ddpm_jax.figures.panels import picture
from ddpm_jax.files import default_cache
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import Generator, build_generator, even_batch
from ddpm_jax.sampling.sampler import codes_config
from ddpm_jax.trained import Trained


@dataclass(frozen=True)
class Options:
    """What can be asked of a figure; each mode reads those that concern it.

    Attributes:
      output: the file, or for a grid a folder.
      num_images: samples, or variants of each; None is the mode's own number.
      first: number of the first sample.
      label: classes, in turn; None where the run has none.
      guidance: classifier-free; 1 is none. guidances: those of classes, side by side.
      clip: limit x0_hat to [-1, 1]; None is the config's, and False for DDIM codes.
      scale: side of a pixel in the picture.
      labels: captions of rows and columns; None has them in figures, not in grids.
      indices, split, images: real images of the run's data set by number, or image files.
      crop: how the run's images were cropped, and these files will be; None if nobody knows.
      frames, milliseconds: of films. levels: of shared_latents and interpolation.
      points: weights from 0 to 1 of a mix. rows: levels of coarse_to_fine.
      forward_noise: "shared" or "own". mix: "linear" in x_t, or "slerp" between DDIM's codes.
      columns, space, search, inception, cache: of neighbours.
      hole, mask, resample, jump: of inpaint.
    """

    output: Path
    mode: str = "grid"
    num_images: int | None = None
    seed: int = 0
    first: int = 0
    label: list[int] | None = None
    guidance: float = 1.0
    guidances: tuple[float, ...] = (1.0, 2.0, 4.0)
    clip: bool | None = None
    batch_size: int = 64
    scale: int = 1
    labels: bool | None = None
    data_dir: Path = Path("data")
    indices: list[int] | None = None
    split: str = "test"
    images: list[Path] | None = None
    crop: str | None = None
    frames: int | None = None
    milliseconds: int = 100
    levels: list[int] | None = None
    points: int = 9
    rows: int = 9
    forward_noise: str = "shared"
    mix: str = "linear"
    columns: int = 8
    space: str = "pixel"
    search: int | None = None
    inception: Path | None = None
    cache: Path = dataclasses.field(default_factory=default_cache)
    hole: list[int] | None = None
    mask: Path | None = None
    resample: int = 10
    jump: int = 10


@dataclass(frozen=True)
class Job:
    """A figure to be drawn; `trained.config.sampling` says how samples are drawn."""

    options: Options
    trained: Trained
    devices: Devices

    def count(self, default: int) -> int:
        """Return how many images are asked for."""
        return self.options.num_images or default

    @property
    def label(self) -> int | None:
        """Return the one class of a figure."""
        label = self.options.label
        check(label is None or len(label) == 1, f"label: one class for mode {self.options.mode}")
        return None if label is None else label[0]

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the classes of samples `indices`, in turn."""
        label = self.options.label
        return None if label is None else np.array(label)[indices % len(label)]

    def indices(self, count: int) -> np.ndarray:
        """Return the numbers of `count` samples."""
        return self.options.first + np.arange(count)

    def generator(self, count: int, *, block: int | None = None, **how: Any) -> Generator:
        """Build a generator for `count` samples, or more, `block` at once where it is given."""
        generator = build_generator(
            self.trained.config,
            self.devices,
            batch_size=even_batch(self.options.batch_size, min(count, block or count)),
            guidance=self.options.guidance,
            progress=True,
            **how,
        )
        weights, steps = (
            f"{self.trained.weights}, step {self.trained.step}",
            generator.sampler.steps,
        )
        print(f"{count} samples of {weights}: {steps} reverse steps", flush=True)
        return generator

    def ddim_pair(self, count: int) -> tuple[Generator, Generator]:
        """Build DDIM's encoder and decoder, neither of which clips unless told to."""
        config = codes_config(self.trained.config, clip=self.options.clip is True)
        trained = dataclasses.replace(self.trained, config=config)
        job = dataclasses.replace(self, trained=trained)
        return job.generator(count, inverted=True), job.generator(count)

    def source(self, split: str) -> Source:
        """Open a split of the run's data set, which must be that of the run."""
        return self.trained.open_split(self.options.data_dir, split)

    def originals(self, least: int, step: int = 1) -> np.ndarray:
        """Read the real images that were named: at least `least`, and a multiple of `step`."""
        options, data = self.options, self.trained.config.data
        one = (options.indices is None) != (options.images is None)
        check(one, f"mode {options.mode}: name indices of the data set, or images")
        if options.images is not None:
            originals = images_from(options.images, data, options.crop)
        else:
            source = self.source(options.split)
            originals = images_of(source, options.indices, f"{data.name} {options.split}")
        fits = len(originals) >= least and len(originals) % step == 0
        check(fits, f"mode {options.mode}: {least} images, or a multiple of it")
        return originals

    def save(
        self, panel: np.ndarray, *, rows: Sequence[str] = (), columns: Sequence[str] = ()
    ) -> None:
        """Write a panel as a PNG, on the first host, with its captions unless labels=False."""
        if self.options.labels is False:
            rows = columns = ()
        drawn = picture(panel, self.options.scale, rows=rows, columns=columns)
        self.write(lambda path: images.save_png(path, drawn))

    def write(self, save: Callable[[Path], None]) -> None:
        """Call `save` with the path of the output, on the first host."""
        if self.devices.is_main:
            save(self.options.output)
            print(f"wrote {self.options.output}")
