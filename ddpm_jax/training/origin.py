"""Start a run from another one: from its weights, its averages and its optimizer.

The new run counts its steps from 0, and its learning rate begins anew with the warm-up that its
config has. origin.json in its directory says where it came from. From its checkpoint 0 on it needs
the other run no more.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from ddpm_jax.build import abstract_params
from ddpm_jax.config import Config, differences
from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import read_json
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.workdir import OWN_NETWORK, check_free, load_workdir_config
from ddpm_jax.training.state import (
    TrainState,
    abstract_state,
    ema_name,
    init_state,
    sampling_params,
)

# Orbax, behind runs.checkpoints, takes seconds to import: only reading a checkpoint imports it.

RECORD = "origin.json"
# Fields of the network that may change: its weights compute the same function of their inputs.
SAME_FUNCTION = ("dropout", "label_dropout", "dtype", "remat")
# Fields that change what the weights are good for without changing a shape, on purpose: those who
# divide the timesteps by 4 multiply this by 4, those who double the images double these sizes.
ON_PURPOSE = ("timestep_scale", "attention_resolutions")


@dataclass(frozen=True)
class Origin:
    """Name the checkpoint that a new run starts from.

    Attributes:
      run: the run directory.
      step: the checkpoint; "best" has the lowest held-out loss, None is the newest.
      sha256: of the checkpoint's content, once it was looked up; None where an early version of
        this project wrote it.
      averaged: start from the first average alone, with an optimizer of its own: a student does.
    """

    run: Path
    step: int | Literal["best"] | None = None
    sha256: str | None = None
    averaged: bool = False


def find_origin(workdir: Path, asked: Origin | None, config: Config) -> Origin | None:
    """Return the checkpoint that the run in `workdir` starts from; None where it goes on.

    Args:
      asked: what the user names; None also where a run that began this way goes on.

    Raises:
      WorkdirError: `workdir` is not empty and holds no run of this origin; there is no such
        checkpoint; or its weights do not fit `config`.
    """
    record = read_record(workdir)
    if record is not None and asked is not None:
        same = asked.run.resolve() == record.run and asked.step in (None, "best", record.step)
        if not same:
            raise WorkdirError(
                f"workdir={workdir} holds a run from {record.run}:{record.step}: take another"
            )
    if record is None:
        if asked is None:
            return None
        if check_free(workdir):
            raise WorkdirError(f"workdir={workdir} holds imported weights: take another")
    elif any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        return None
    origin = look_up(asked if record is None else record)
    check_fits(origin, config)
    return origin


def look_up(origin: Origin) -> Origin:
    """Return `origin` with its absolute path, the number of its step and its hash.

    Raises:
      WorkdirError: there is no such run, no such checkpoint, or another one than at first; or it
        is of a network of one's own.
    """
    for part, what in (
        ("config.json", "not a run directory"),
        ("checkpoints", "no checkpoint yet"),
    ):
        if not (origin.run / part).exists():
            raise WorkdirError(f"from={origin.run}: {what}, it has no {part}")
    if (origin.run / OWN_NETWORK).exists():
        raise WorkdirError(
            f"from={origin.run}: its network is not in its config, and another run starts from one "
            "that is: go on in its own directory, from Python"
        )
    from ddpm_jax.runs.checkpoints import Checkpoints

    with Checkpoints.reading(origin.run) as checkpoints:
        step = checkpoints.check(origin.step)
        sha256 = checkpoints.sha256(step)
    if origin.sha256 not in (None, sha256):
        raise WorkdirError(
            f"from={origin.run}: checkpoint {step} is not the one that this run began with: "
            "name another workdir"
        )
    return replace(origin, run=origin.run.resolve(), step=step, sha256=sha256)


def check_fits(origin: Origin, config: Config) -> None:
    """Check that the weights of `origin` serve the network of `config`.

    Raises:
      WorkdirError: naming the first parameter of another shape and the fields that may be at
        fault, or a field that would change what the same weights compute.
    """
    source = load_workdir_config(origin.run)
    theirs, ours = (
        {name: leaf.shape for name, leaf in flatten_dict(abstract_params(one), sep="/").items()}
        for one in (source, config)
    )
    shaping = ("model.", "data.image_size", "data.channels", "diffusion.variance")
    changed = [line for line in differences(source, config) if line.startswith(shaping)]
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            there, here = (
                "x".join(map(str, shapes[name])) if name in shapes else "absent"
                for shapes in (theirs, ours)
            )
            raise WorkdirError(
                f"from={origin.run}: parameter {name} is {there} there and {here} by this config: "
                f"{'; '.join(changed)}"
            )
    free = tuple(f"model.{name}:" for name in (*SAME_FUNCTION, *ON_PURPOSE))
    for line in changed:
        if line.startswith("model.") and not line.startswith(free):
            raise WorkdirError(
                f"from={origin.run}: its weights would not compute what they were trained to: "
                f"config.{line}"
            )


def start_from(origin: Origin, config: Config, devices: Devices) -> TrainState:
    """Return the state before the first step of a run of `config` that starts from `origin`.

    All hosts call it together.

    Raises:
      WorkdirError: the checkpoint cannot be read.
    """
    source = load_workdir_config(origin.run)
    like = devices.abstract_replicated(abstract_state(source))
    average = f"ema.{ema_name(source.train.ema_decays[0])}"
    from ddpm_jax.runs.checkpoints import Checkpoints

    with Checkpoints.reading(origin.run) as checkpoints:
        try:
            old = checkpoints.restore(like, origin.step, (average,) if origin.averaged else None)
        except WorkdirError as error:
            remedy = f": from={origin.run}:{error.step} can" if error.step is not None else ""
            raise WorkdirError(f"from={origin.run}:{origin.step} cannot be read{remedy}") from error
    local = functools.partial(jax.tree.map, lambda leaf: leaf.addressable_data(0))
    if origin.averaged:
        params = jax.tree.map(jnp.copy, local(sampling_params(source, old)))
        return devices.replicate(init_state(config, params))
    return devices.replicate(carry_over(source, local(old), config))


def carry_over(source: Config, old: TrainState, config: Config) -> TrainState:
    """Return the state before the first step of `config` that has what `old` has learned.

    Parameters and Adam's moments, with their count, are those of `old`. An average goes on where
    `old` has one of the same decay, and begins as its first average where it has not. The record of
    losses goes on where both sample timesteps by importance. Steps, updates and with them the
    learning rate begin at 0.
    """
    new = init_state(config, jax.tree.map(jnp.copy, old.params))
    first = sampling_params(source, old)
    history = new.loss_history
    if history is not None and old.loss_history is not None:
        same = jax.tree.map(jnp.shape, history) == jax.tree.map(jnp.shape, old.loss_history)
        history = jax.tree.map(jnp.copy, old.loss_history) if same else history
    return new.replace(
        opt_state=with_moments(new.opt_state, old.opt_state),
        # Copies: a donated state must not hold one buffer twice.
        ema={name: jax.tree.map(jnp.copy, old.ema.get(name, first)) for name in new.ema},
        loss_history=history,
    )


def with_moments(new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """Return the optimizer's state `new` with Adam's part taken from `old`."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    (adam,) = filter(is_adam, jax.tree.leaves(old, is_leaf=is_adam))
    return jax.tree.map(lambda node: adam if is_adam(node) else node, new, is_leaf=is_adam)


def write_record(workdir: Path, origin: Origin, config: Config) -> None:
    """Write origin.json: the run, its step, the hash, and the fields that were changed.

    Raises:
      WorkdirError: it cannot be written.
    """
    if (workdir / "config.json").exists():
        return  # it has begun before
    changed = differences(load_workdir_config(origin.run), config)
    values = {"run": str(origin.run), "step": origin.step, "sha256": origin.sha256}
    values |= {"averaged": origin.averaged, "changed": changed}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        part = workdir / f"{RECORD}.part"
        part.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(part, workdir / RECORD)
    except OSError as error:
        raise WorkdirError(f"workdir={workdir} cannot be written: {error.strerror}") from error


def read_record(workdir: Path) -> Origin | None:
    """Read where the run in `workdir` came from; None where it came from no other.

    Raises:
      WorkdirError: the record is damaged.
    """
    path = workdir / RECORD
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        averaged = bool(values.get("averaged", False))
        return Origin(Path(values["run"]), int(values["step"]), values["sha256"], averaged)
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged ({error}): name another workdir") from error
