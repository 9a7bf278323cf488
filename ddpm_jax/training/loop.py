"""Run the training loop: restore, then step, log, evaluate, sample and save, in this order.

On several hosts each runs this loop on its own rows. They meet in the step itself, when pictures
and held-out losses are gathered, and when they save. The first one alone writes logs and pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from clu import parameter_overview

from ddpm_jax.build import Params, build_network, signal_note
from ddpm_jax.config import Config, save_json
from ddpm_jax.data.batches import fingerprint, train_batches
from ddpm_jax.data.load import load_splits, origin_of, own_sources
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import ConfigError, WorkdirError, check
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import say, waiting
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.data_origin import check_origin, data_dir_of, save_origin
from ddpm_jax.runs.metrics import MetricWriter
from ddpm_jax.runs.workdir import (
    CONFIG,
    check_workdir,
    claim_network,
    claim_workdir,
    fixed_differences,
    sole_trainer,
    with_full_path,
)
from ddpm_jax.sampling.sampler import build_sampler
from ddpm_jax.training.form import TreeForm, state_form
from ddpm_jax.training.images import check_labels
from ddpm_jax.training.monitor import HeldOut, Log, SampleGrids
from ddpm_jax.training.origin import (
    Origin,
    find_origin,
    read_record,
    start_from,
    write_record,
)
from ddpm_jax.training.state import TrainState, abstract_state, init_state, sampling_params
from ddpm_jax.training.step import build_train_step
from ddpm_jax.training.stopping import StopRequest

StepBuilder = Callable[[Config, Devices, TreeForm, Origin | None], Callable[..., Any]]


def train(
    config: Config,
    workdir: Path,
    *,
    data_dir: Path | None = None,
    step: int | Literal["best"] | None = None,
    parent: Origin | None = None,
    devices: Devices | None = None,
    build_step: StepBuilder | None = None,
    network: Any = None,
    source: Any = None,
    held_out: Any = None,
) -> int:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      data_dir: the prepared data sets; by default where the run's data was, or "data".
      step: go on from this checkpoint instead; newer ones are moved aside, not deleted.
      parent: start from this checkpoint of another run where `workdir` is empty, and go on where
        it holds the run that began so.
      build_step: builds the compiled step of a student, from (config, devices, form, parent), the
        last as it was found; None where the run goes on.
      network: in place of the UNet of `config.model`; what `adapt` takes.
      source, held_out: images in place of those that `config.data` names; what `as_source` takes.

    Returns:
      0 when done, 128 + the signal's number when stopped by SIGTERM, SIGINT or SIGHUP; the state is
      saved either way.

    Raises:
      UserError: a config, data set or run directory that does not serve; hosts that differ; or
        Diverged.
    """
    devices = Devices() if devices is None else devices
    config = with_full_path(config)
    with contextlib.ExitStack() as stack:
        # All that can be refused is refused here, on all hosts, before anything is written or
        # compiled.
        with hosts.together():
            devices.check_batch(
                config.train.batch_size, config.train.accumulation, "train.batch_size"
            )
            build_sampler(config)
            if config.distillation.steps and build_step is None:
                raise ConfigError(
                    f"config.distillation.steps={config.distillation.steps}: a student goes on "
                    "with ddpm distill"
                )
            check_workdir(workdir, config)
            own_network = network is not None
            network = build_network(config, network)
            data_dir = data_dir_of(workdir, data_dir)
            if source is None and held_out is None:
                splits = SPLITS if config.train.eval_images else ("train",)
                sources = dict(zip(splits, load_splits(config.data, data_dir, splits)))
                named = sources
            else:
                sources = own_sources(config, data_dir, source, held_out)
                named = {"train": sources["train"]} if source is None else {}
            given = {split: part for split, part in sources.items() if split not in named}
            origin = {split: fingerprint(part) for split, part in given.items()}
            if named:
                classes = config.model.num_classes > 0
                origin |= origin_of(config.data, data_dir, named, classes=classes)
            source, held_out = sources["train"], sources.get("test")
            for part in sources.values():
                check_labels(config, part)
            check_origin(workdir, origin, f"data set {config.data.path or config.data.name!r}")
            abstract_state(config, network)  # traces it, which refuses what does not fit
        with hosts.together():
            parent = find_origin(workdir, parent, config)
            here = "network: a run that starts from another one has the network of its config"
            check(parent is None or not own_network, here)
        hosts.same("the run to start from", parent)
        where = dataclasses.replace(config.data, path="")  # a matter of the machine
        hosts.same("the config", save_json(dataclasses.replace(config, data=where)))
        hosts.same("the step to go on from", step)
        hosts.same("the data set", [fingerprint(part) for part in sources.values()])
        devices.meet()
        first = None if parent is None else start_from(parent, config, devices)
        form = state_form(config, devices, network)
        if build_step is None:
            train_step = devices.map_step(build_train_step(config, form, network))
        else:
            train_step = build_step(config, devices, form, parent)
        with hosts.together():
            stack.enter_context(sole_trainer(workdir))
            if not (workdir / CONFIG).exists():
                if parent is not None and devices.is_main:
                    write_record(workdir, parent, config)
                claim_workdir(workdir, config)
                if devices.is_main:
                    save_origin(workdir, origin)
            claim_network(workdir, own_network)
        with hosts.together():
            check_shared(workdir, config)
            writer = stack.enter_context(MetricWriter(workdir, enabled=devices.is_main))
        keep = {name: getattr(config.train, name) for name in ("keep_every", "keep_best")}
        checkpoints = stack.enter_context(
            Checkpoints(workdir, keep=config.train.keep_checkpoints, **keep)
        )
        stop = stack.enter_context(StopRequest(devices))
        state = restore_or_init(config, checkpoints, devices, step, first, network)
        with hosts.together():
            claim_workdir(workdir, config)  # what is free to change has changed from here on
            if devices.is_main:
                save_origin(workdir, origin)
        start = int(state.step)
        writer.truncate_after(start)
        if start >= config.train.steps:
            if devices.is_main:
                print(finished(workdir, start, config), flush=True)
            return 0
        if devices.is_main:
            describe(config, state.params, workdir, devices, start)
        state = form.pack(state)
        del first  # of the size of a state, which the device has once from here on
        evaluate = grids = None
        if held_out is not None:
            evaluate = HeldOut(config, devices, held_out, network)
        if config.train.sample_every:
            grids = SampleGrids(config, devices, workdir, writer, network)
        batches = train_batches(
            source, config.seed, config.train.batch_size, jax.process_index(), jax.process_count()
        )
        log = stack.enter_context(Log(config, writer, checkpoints, start, enabled=devices.is_main))
        upcoming = stack.enter_context(Prefetcher(batches, start, devices.place))
        signal = 0
        for done in range(start + 1, config.train.steps + 1):
            with saving_if_it_fails(checkpoints, form, state, done - 1):
                _, batch = next(upcoming)
            if done == start + 1:
                with waiting("compiling the training step", enabled=devices.is_main):
                    state, metrics = train_step(state, batch)
            else:
                state, metrics = train_step(state, batch)
            stop.listen()
            signal = stop.agreed()
            end, measured = done == config.train.steps, None
            last = end or signal > 0
            log.add(done, metrics, flush=last or done % config.train.log_every == 0)
            if evaluate and (end or done % config.train.eval_every == 0):
                with saving_if_it_fails(checkpoints, form, state, done):
                    measured = evaluate(form.tree(sampling_params(config, state)))
                writer.write_scalars(done, {"held_out_loss": measured})
                log.note(f"step {done:,}: held-out loss {measured:.4g}")
            if last or done % config.train.checkpoint_every == 0:
                checkpoints.save(done, form.unpack(state), measured)
            # After the save: whatever goes wrong with a picture, the step is kept.
            if grids and (end or done % config.train.sample_every == 0):
                grids(done, form.tree(sampling_params(config, state)))
            if last:
                break
        checkpoints.wait()
        return 128 + signal if signal else 0


@contextlib.contextmanager
def saving_if_it_fails(
    checkpoints: Checkpoints, form: TreeForm, state: TrainState, step: int
) -> Iterator[None]:
    """Save `state`, of `step`, where what runs meanwhile raises: an image that cannot be read, say.

    The other hosts would wait in it, so that only a run of one host can save what it has.
    """
    try:
        yield
    except Exception:
        if step > max(checkpoints.steps(), default=0) and jax.process_count() == 1:
            try:
                checkpoints.save(step, form.unpack(state))
                checkpoints.wait()
            except Exception as error:  # what failed first is the cause, and ends the run
                say(f"step {step:,} is not saved: {error}")
        raise


def check_shared(workdir: Path, config: Config) -> None:
    """Check that this host sees the run directory that the first one has just claimed.

    Raises:
      WorkdirError: it does not.
    """
    if not (workdir / CONFIG).is_file() or fixed_differences(workdir, config):
        raise WorkdirError(f"workdir={workdir} is not on a disk that all hosts share")


def restore_or_init(
    config: Config,
    checkpoints: Checkpoints,
    devices: Devices,
    step: int | Literal["best"] | None,
    first: TrainState | None,
    network: Network | None = None,
) -> TrainState:
    """Restore checkpoint `step`, or the newest, and move newer ones aside; or start a new state.

    Args:
      first: the new state, where it comes from another run; it becomes checkpoint 0, so that the
        other run may go.

    Raises:
      WorkdirError: the checkpoint cannot be read, on this host or on another.
    """
    if step is None:
        # As the first host has it: a shared disk may show the others an older state of itself.
        step = int(hosts.from_main(np.array(max(checkpoints.steps(), default=-1))))
        if step == -1 and first is not None:
            checkpoints.save(0, first)
            return first
        if step == -1:
            return devices.replicate(init_state(config, network=network))
    with hosts.together():
        checkpoints.check(step)
    state = checkpoints.restore(devices.abstract_replicated(abstract_state(config, network)), step)
    aside = checkpoints.set_aside_after(int(state.step))
    if aside and devices.is_main:
        print(
            f"newer checkpoints moved to checkpoints.aside/: {', '.join(map(str, aside))}",
            flush=True,
        )
    return state


def finished(workdir: Path, step: int, config: Config) -> str:
    """Return one line for a run that has nothing left to do."""
    line = f"{workdir}: finished at step {step} of {config.train.steps}"
    if step > config.train.steps:
        return f"{line}, which asks for fewer than are done"
    if config.optimizer.schedule == "constant":
        return f"{line}; a larger train.steps goes on"
    return f"{line}, where its learning rate ends; a run --from={workdir} goes on"


def describe(config: Config, params: Params, workdir: Path, devices: Devices, start: int) -> None:
    """Print what is about to run, and write the list of parameters to workdir/parameters.txt."""
    record = read_record(workdir)
    begin = "a new run" if record is None else f"a new run from {record.run}, step {record.step}"
    begin = f"going on from step {start}" if start else begin
    (workdir / "parameters.txt").write_text(
        parameter_overview.get_parameter_overview(jax.device_get(params)) + "\n"
    )
    count = parameter_overview.count_parameters(params)
    kinds = sorted({device.device_kind for device in devices.devices})
    if note := signal_note(config):
        print(note, flush=True)
    print(
        f"{workdir}: {begin}, {config.train.steps} steps of {config.train.batch_size} images",
        flush=True,
    )
    print(
        f"{count:,} parameters on {len(devices.devices)} device(s): {', '.join(kinds)}", flush=True
    )
