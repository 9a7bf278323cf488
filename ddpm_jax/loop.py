"""The training loop: restore, then step, log, evaluate, sample and save, in this order, until done or told to stop.

On several hosts each runs this loop on its own rows; they meet in the step itself, when pictures and held-out losses are
gathered, and when they save. The first one alone writes logs and pictures.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from clu.metrics import Average

from ddpm_jax import config as configs
from ddpm_jax import hosts, images
from ddpm_jax.build import Params
from ddpm_jax.checkpoints import Checkpoints, WorkdirError, claim_workdir, load_workdir_config, sole_trainer
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.data.batches import TrainBatches, eval_batches, fingerprint
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.sources import Source, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.errors import UserError
from ddpm_jax.generate import Generator, config_table
from ddpm_jax.progress import Progress, waiting
from ddpm_jax.training import (
    Metrics,
    TrainState,
    abstract_state,
    build_held_out_loss,
    build_train_step,
    init_state,
    sampling_params,
)
from ddpm_jax.writers import MetricWriter


class Diverged(UserError):
    """Too many steps in a row were not finite."""


class StopRequest:
    """SIGTERM or SIGINT, remembered until the step under way is done; a second one acts at once.

    On several hosts a request to one is one to all, and all hear of it at the same step: after each step the devices exchange
    what their hosts have received, and the answer is read LAG steps later, when it is there and nothing has to wait for it.
    """

    signals = (signal.SIGTERM, signal.SIGINT)
    LAG = 2

    def __init__(self, devices: Devices) -> None:
        self._devices, self._received = devices, 0
        self._before: dict[int, Any] = {}
        self._asked: deque[Any] = deque()

    def listen(self) -> None:
        """From here on signals wait. Before there is a step to save, they end the process as they always do."""
        self._before = self._before or {number: signal.signal(number, self._note) for number in self.signals}

    def agreed(self) -> int:
        """To be called after each step, on all hosts: the signal on which all of them stop now, or 0."""
        self._asked.append(self._devices.largest(self._received))
        lag = self.LAG if jax.process_count() > 1 else 0
        return int(self._asked.popleft()) if len(self._asked) > lag else 0

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._before[number])


def train(
    config: Config,
    workdir: Path,
    *,
    data_dir: Path,
    step: int | None = None,
    devices: Devices | None = None,
) -> int:
    """Trains until `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      step: go on from this checkpoint instead; newer ones are moved aside, not deleted.

    Returns:
      0 when done, 128 + the signal's number when stopped by SIGTERM or SIGINT; the state is saved either way.

    Raises:
      UserError: a config, data set or run directory that does not serve; hosts that differ; or Diverged.
    """
    devices = Devices() if devices is None else devices
    with contextlib.ExitStack() as stack:
        # All that can be refused is refused here, on all hosts, before anything is written or compiled.
        with hosts.together():
            devices.check_batch(config.train.batch_size, config.train.accumulation, "train.batch_size")
            config_table(config)
            source = load_source(config.data, data_dir, "train")
            held_out = load_source(config.data, data_dir, "test") if config.train.eval_images else None
            check_labels(config, source)
        hosts.same("the config", configs.save_json(config))
        hosts.same("--step", step)
        hosts.same("the data set", [fingerprint(part) for part in (source, held_out) if part is not None])
        devices.meet()
        with hosts.together():
            claim_workdir(workdir, config)
            stack.enter_context(sole_trainer(workdir))
        with hosts.together():
            check_shared(workdir, config)
            writer = stack.enter_context(MetricWriter(workdir, enabled=devices.is_main))
        keep = {name: getattr(config.train, name) for name in ("keep_every", "keep_best")}
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.train.keep_checkpoints, **keep))
        stop = stack.enter_context(StopRequest(devices))
        state = restore_or_init(config, checkpoints, devices, step)
        start = int(state.step)
        writer.truncate_after(start)
        if devices.is_main:
            describe(config, state.params, workdir, devices, start)
        train_step = devices.map_step(build_train_step(config))
        evaluate = HeldOut(config, devices, held_out) if held_out is not None else None
        grids = SampleGrids(config, devices, workdir) if config.train.sample_every else None
        batches = TrainBatches(source, config.seed, config.train.batch_size, jax.process_index(), jax.process_count())
        log = stack.enter_context(Log(config, writer, checkpoints, start, enabled=devices.is_main))
        upcoming = stack.enter_context(Prefetcher(batches, start, devices.place))
        told = 0
        for done in range(start + 1, config.train.steps + 1):
            _, batch = next(upcoming)
            if done == start + 1:
                with waiting("compiling the training step", enabled=devices.is_main):
                    state, metrics = train_step(state, batch)
            else:
                state, metrics = train_step(state, batch)
            stop.listen()
            told = stop.agreed()
            end, measured = done == config.train.steps, None
            last = end or told > 0
            log.add(done, metrics, flush=last or done % config.train.log_every == 0)
            if evaluate and (end or done % config.train.eval_every == 0):
                measured = evaluate(sampling_params(config, state))
                writer.write_scalars(done, {"held_out_loss": measured})
            if grids and (end or done % config.train.sample_every == 0):
                writer.write_images(done, {"samples": grids(done, sampling_params(config, state))})
            if last or done % config.train.checkpoint_every == 0:
                checkpoints.save(done, devices.as_global(state), measured)
            if last:
                break
        checkpoints.wait()
        return 128 + told if told else 0


def check_shared(workdir: Path, config: Config) -> None:
    """WorkdirError unless this host sees the run directory that the first one has just claimed."""
    there = (workdir / "config.json").is_file()
    if not there or configs.differences(load_workdir_config(workdir), config):
        raise WorkdirError(f"--workdir={workdir} is not on a disk that all hosts share")


def restore_or_init(config: Config, checkpoints: Checkpoints, devices: Devices, step: int | None) -> TrainState:
    if step is None:
        # As the first host has it: a shared disk may show the others an older state of itself.
        step = int(hosts.from_main(np.array(max(checkpoints.steps(), default=-1))))
        if step == -1:
            return devices.replicate(init_state(config))
    with hosts.together():
        state = checkpoints.restore(devices.abstract_replicated(abstract_state(config)), step)
    aside = checkpoints.set_aside_after(int(state.step))
    if aside and devices.is_main:
        print(f"newer checkpoints moved to checkpoints.aside/: {', '.join(map(str, aside))}", flush=True)
    return state


def check_labels(config: Config, source: Source) -> None:
    """ConfigError unless `source` has the classes that the network is told about."""
    classes, name = config.model.num_classes, config.data.name
    if classes and not source.labelled:
        raise ConfigError(f"config.model.num_classes={classes}: data set {name!r} has no labels; set it to 0")
    labels = getattr(source, "labels", None)  # known at once only where the set is in memory
    if classes and labels is not None and labels.max() >= classes:
        raise ConfigError(f"config.model.num_classes={classes}: data set {name!r} has labels up to {labels.max()}")


def describe(config: Config, params: Params, workdir: Path, devices: Devices, start: int) -> None:
    """Tells what is about to run; the list of parameters goes to workdir/parameters.txt."""
    (workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(jax.device_get(params)) + "\n")
    count = parameter_overview.count_parameters(params)
    kinds = sorted({device.device_kind for device in devices.devices})
    begin = f"going on from step {start}" if start else "a new run"
    print(f"{workdir}: {begin}, {config.train.steps} steps of {config.train.batch_size} images", flush=True)
    print(f"{count:,} parameters on {len(devices.devices)} device(s): {', '.join(kinds)}", flush=True)


class Log:
    """Metrics wait on the device until a log step; then one transfer, one line in each log, one check."""

    def __init__(self, config: Config, writer: MetricWriter, checkpoints: Checkpoints, start: int, *, enabled: bool) -> None:
        self._limit, self._writer, self._checkpoints = config.train.max_nonfinite_steps, writer, checkpoints
        self._batch_size, self._since = config.train.batch_size, time.monotonic()
        self._window: list[Metrics] = []
        self._progress = Progress(
            config.train.steps,
            unit="step",
            initial=start,
            enabled=enabled,
            scale=config.train.batch_size,
            scale_unit="images",
        )

    def add(self, step: int, metrics: Metrics, *, flush: bool) -> None:
        self._window.append(metrics)
        if not flush:
            self._progress.update()
            return
        fetched = jax.device_get(self._window)
        columns = {name: np.stack([row[name] for row in fetched]) for name in fetched[0]}
        taken = columns["skipped"] == 0
        scalars = {
            name: float(Average.from_model_output(values, mask=taken).compute()) if taken.any() else float("nan")
            for name, values in columns.items()
        }
        scalars["skipped"] = float(columns["skipped"].sum())
        scalars["nonfinite_streak"] = float(columns["nonfinite_streak"].max())
        seconds = time.monotonic() - self._since
        scalars["steps_per_second"] = len(fetched) / seconds
        scalars["images_per_second"] = len(fetched) * self._batch_size / seconds
        self._writer.write_scalars(step, scalars)
        self._progress.update(loss=scalars["loss"])
        self._window, self._since = [], time.monotonic()
        if scalars["nonfinite_streak"] >= self._limit:
            good = self._checkpoints.steps()
            kept = f"checkpoint {good[-1]} is the last one" if good else "there is no checkpoint yet"
            raise Diverged(
                f"{int(scalars['nonfinite_streak'])} steps in a row up to step {step} were not finite; {kept}: "
                "try a lower optimizer.learning_rate, or float32"
            )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()


class HeldOut:
    """The loss on the first held-out images, at fixed timesteps and noise, each image counted once."""

    def __init__(self, config: Config, devices: Devices, source: Source) -> None:
        self._devices, self._source, self._config = devices, source, config
        self._loss = devices.map_batch(build_held_out_loss(config))

    def __call__(self, params: Params) -> float:
        size, host, hosts = self._config.train.batch_size, jax.process_index(), jax.process_count()
        batches = eval_batches(self._source, self._config.train.eval_images, size, host, hosts)
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
    """A grid of the same seeds at every call, so that two grids show what training changed."""

    def __init__(self, config: Config, devices: Devices, workdir: Path) -> None:
        self._seed, self._workdir, self._is_main = config.seed, workdir, devices.is_main
        self._indices = np.arange(config.train.sample_images)
        self._generator = Generator(config, devices, batch_size=min(config.train.sample_images, 256))

    def __call__(self, step: int, params: Params) -> np.ndarray:
        batches = list(self._generator(params, seed=self._seed, indices=self._indices))
        grid = images.grid(images.to_uint8(np.concatenate(batches)))
        if self._is_main:
            images.save_png(self._workdir / "samples" / f"step_{step:07d}.png", grid)
        return grid
