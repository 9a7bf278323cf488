"""Training steps as a run takes them on this machine, from a tree to a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import build_train_step


def plain_step(config: Config) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)` as a function of one device, which keeps its arguments."""
    return _of_trees(config, Devices(jax.devices()[:1]), jax.jit)


def mapped_step(config: Config, devices: Devices) -> Callable[..., Any]:
    """The same over `devices`, which takes replicated states and placed batches."""
    return _of_trees(config, devices, devices.map_step)


def _of_trees(config: Config, devices: Devices, compiled: Callable[..., Any]) -> Callable[..., Any]:
    form = state_form(config, devices)
    step = compiled(build_train_step(config, form))

    def of_trees(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = step(form.pack(state), batch)
        return form.unpack(state), metrics

    return of_trees
