"""Watch a run: metrics, the held-out loss, grids of samples."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
from clu.metrics import Average

from ddpm_jax import images
from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.data.batches import eval_batches
from ddpm_jax.data.source import Source
from ddpm_jax.errors import UserError
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress, say, waiting
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.metrics import MetricWriter
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.training.state import Metrics
from ddpm_jax.training.step import build_held_out_loss


class Diverged(UserError):
    """Too many steps in a row were not finite."""


class Log:
    """The metrics of a run, which wait on the device until a log step.

    Then there is one transfer, one line in each log, and one check that the run is alive.

    In between the progress counts the steps that are done. The loop only starts them, and may be
    far ahead of the devices. To ask whether the metrics of a step are there waits for nothing.
    """

    def __init__(
        self,
        config: Config,
        writer: MetricWriter,
        checkpoints: Checkpoints,
        start: int,
        *,
        enabled: bool,
    ) -> None:
        self._limit, self._writer, self._checkpoints = (
            config.train.max_nonfinite_steps,
            writer,
            checkpoints,
        )
        self._batch_size, self._since = config.train.batch_size, time.monotonic()
        self._window: list[Metrics] = []
        self._counted = 0  # how many of the window the progress has
        self._progress = Progress(
            config.train.steps,
            unit="step",
            initial=start,
            enabled=enabled,
            scale=config.train.batch_size,
            scale_unit="images",
        )

    def add(self, step: int, metrics: Metrics, *, flush: bool) -> None:
        """Add the metrics of `step`; with `flush`, write the means of those since the last time.

        Raises:
          Diverged: too many steps in a row were not finite.
        """
        self._window.append(metrics)
        if not flush:
            self._progress.update(self._newly_done())
            return
        fetched = jax.device_get(self._window)
        columns = {name: np.stack([row[name] for row in fetched]) for name in fetched[0]}
        finite = columns["skipped"] == 0
        scalars = {
            name: float(Average.from_model_output(values, mask=finite).compute())
            if finite.any()
            else float("nan")
            for name, values in columns.items()
        }
        scalars["skipped"] = float(columns["skipped"].sum())
        scalars["nonfinite_streak"] = float(columns["nonfinite_streak"].max())
        seconds = time.monotonic() - self._since
        scalars["steps_per_second"] = len(fetched) / seconds
        scalars["images_per_second"] = len(fetched) * self._batch_size / seconds
        self._writer.write_scalars(step, scalars)
        self._progress.update(len(fetched) - self._counted, loss=scalars["loss"])
        self._window, self._counted, self._since = [], 0, time.monotonic()
        if scalars["nonfinite_streak"] >= self._limit:
            steps = self._checkpoints.steps()
            newest = (
                f"checkpoint {steps[-1]} is the last one" if steps else "there is no checkpoint yet"
            )
            raise Diverged(
                f"{int(scalars['nonfinite_streak'])} steps in a row up to step {step} were not "
                f"finite; {newest}: try a lower optimizer.learning_rate, or float32"
            )

    def _newly_done(self) -> int:
        """Count the steps done that no call before has counted; they end in their order."""
        before = self._counted
        while self._counted < len(self._window) and self._window[self._counted]["loss"].is_ready():
            self._counted += 1
        return self._counted - before

    def note(self, line: str) -> None:
        """Print a line above the progress."""
        self._progress.write(line)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()


class HeldOut:
    """The loss on the first held-out images, at fixed timesteps and noise.

    Each image counts once. A microbatch of them is in memory at a time, as in a step.
    """

    def __init__(
        self, config: Config, devices: Devices, source: Source, network: Network | None = None
    ) -> None:
        self._devices, self._source, self._config = devices, source, config
        self._loss = devices.map_batch(build_held_out_loss(config, network))

    def __call__(self, params: Params) -> float:
        """Return the mean loss of `params`; all hosts call it together."""
        train, host, hosts = self._config.train, jax.process_index(), jax.process_count()
        size = train.batch_size // train.accumulation
        batches = eval_batches(self._source, train.eval_images, size, host, hosts)
        total, count = 0.0, 0.0
        for number, batch in enumerate(batches):
            share = size // hosts
            batch["index"] = number * size + host * share + np.arange(share, dtype=np.int32)
            placed = self._devices.place(batch)
            rows = self._devices.rows({"loss": self._loss(params, placed), "mask": placed["mask"]})
            total += float(np.sum(rows["mask"] * rows["loss"], dtype=np.float64))
            count += float(rows["mask"].sum())
        return total / count


class SampleGrids:
    """A grid of the same seeds at every call, so that two grids show what training changed.

    Where the network has classes, the samples take them in turn: 0, 1, 2, ..., and again from 0.

    It only watches: a picture that cannot be drawn or written is told on stderr, and training goes
    on.
    """

    def __init__(
        self,
        config: Config,
        devices: Devices,
        workdir: Path,
        writer: MetricWriter,
        network: Network | None = None,
    ) -> None:
        self._seed, self._workdir, self._is_main = config.seed, workdir, devices.is_main
        self._writer, self._indices = writer, np.arange(config.train.sample_images)
        classes = config.model.num_classes
        # Without labels a network draws what label_dropout alone trains it to.
        self._labels = self._indices % classes if classes else None
        self._generator = build_generator(
            config, devices, batch_size=min(config.train.sample_images, 256), network=network
        )

    def __call__(self, step: int, params: Params) -> None:
        """Draw the grid and write it to samples/ and the log; all hosts call it together."""
        try:
            with waiting(f"drawing the grid of step {step:,}", enabled=self._is_main):
                samples = self._generator.draw(
                    params, seed=self._seed, indices=self._indices, labels=self._labels
                )
        except jax.errors.JaxRuntimeError as error:
            # Several hosts cannot go on apart: the others may have their pictures.
            if jax.process_count() > 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"no grid of step {step}: out of memory; train.sample_images takes fewer")
            return
        if self._is_main:
            self._write(step, samples)

    def _write(self, step: int, samples: np.ndarray) -> None:
        broken = np.isnan(samples).any(axis=(1, 2, 3))
        if broken.any():
            say(
                f"grid of step {step}: {broken.sum()} of {len(broken)} samples hold NaN, shown grey"
            )
        grid = images.grid(images.to_uint8(np.nan_to_num(samples)))  # 0 is the grey in the middle
        try:
            images.save_png(self._workdir / "samples" / f"step_{step:07d}.png", grid)
            self._writer.write_images(step, {"samples": grid})
        except OSError as error:
            say(f"no grid of step {step}: {error}")
