"""Programs that several tests run are traced and compiled once a process.

A training step of the smallest network takes seconds to trace and compile and milliseconds to run,
and a run that resumes another builds the very same step again. Devices.map_step and map_batch hand
out the program that they made of an equal function before: one of the same code, whose closure
holds equal values. A function that holds anything else is compiled as ever.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import build
from ddpm_jax.config import Config, to_dict
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training import state
from ddpm_jax.training.form import JoinedForm, TreeForm

# What a run's loop reads, and no program.
OF_THE_LOOP = (
    "steps",
    "log_every",
    "eval_every",
    "eval_images",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "sample_every",
    "sample_images",
    "max_nonfinite_steps",
)


class Unknown(Exception):
    """A value that cannot be compared with another."""


def identity(value: Any) -> Any:
    """Return a hashable that two values share only if a program cannot tell them apart.

    Raises:
      Unknown: of a value of another kind than those below.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type)):
        return type(value), repr(value)
    if isinstance(value, Config):
        sections = to_dict(value)
        for name in OF_THE_LOOP:
            del sections["train"][name]
        return json.dumps(sections, sort_keys=True)
    if isinstance(value, jax.core.Tracer):
        raise Unknown(type(value))
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = np.asarray(value)
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(identity, value))
    if isinstance(value, dict):
        return type(value), tuple((identity(key), identity(item)) for key, item in value.items())
    if isinstance(value, functools.partial):
        return identity((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        owner = value.__self__
        if any(getattr(item, "__self__", None) is owner for item in vars(owner).values()):
            raise Unknown("it reports to its owner, which another owner would not hear")
        return identity(value.__func__), type(owner), identity(vars(owner))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, identity((value.__defaults__, value.__kwdefaults__, cells))
    if isinstance(value, Devices):
        return value.devices
    if type(value) is TreeForm:  # it has no state
        return TreeForm
    if isinstance(value, JoinedForm):  # equal where the layout is
        return value
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value), identity(fields)
    raise Unknown(type(value))


class Programs:
    """The programs of this process so far.

    Attributes:
      shared: whether an equal function gets one of them. A test that puts something else in the
        place of a part of the package must compile for itself.
    """

    def __init__(self) -> None:
        self.shared = False
        self._mapped: dict[Any, Callable[..., Any]] = {}
        self._traced: dict[Any, Callable[..., Any]] = {}
        self._drawn: dict[Any, Any] = {}

    def install(self) -> None:
        """Let the package take its programs, and the parameters that runs begin with, from here."""
        Devices.map_step = self._sharing(Devices.map_step)
        Devices.map_batch = self._sharing(Devices.map_batch)
        build._init = self._traced_once(build._init)
        state.init_params = self._drawn_once(state.init_params)

    def forget(self) -> None:
        """Drop all programs, those that JAX keeps as well."""
        for kept in (self._mapped, self._traced, self._drawn):
            kept.clear()
        jax.clear_caches()
        gc.collect()  # or what they held would stay, and the next file find no more room

    def _sharing(self, build_program: Callable[..., Any]) -> Callable[..., Any]:
        def program(devices: Devices, function: Callable[..., Any]) -> Callable[..., Any]:
            try:
                key = build_program.__name__, devices.devices, identity(function)
            except (Unknown, ValueError):  # ValueError: a cell of a closure that is still empty
                return build_program(devices, function)
            if not self.shared:
                return build_program(devices, function)
            if key not in self._mapped:
                self._mapped[key] = build_program(devices, function)
            return self._mapped[key]

        return program

    def _network(self, config: Config, network: Any) -> Any:
        """Return what the parameters that a run begins with depend on, beside its seed."""
        return build.network_key(config), identity(network)

    def _traced_once(self, init: Callable[..., Any]) -> Callable[..., Any]:
        def traced(config: Config, network: Any, seed: jax.Array) -> Any:
            try:
                key = self._network(config, network)
            except (Unknown, ValueError):
                return init(config, network, seed)
            if not self.shared:
                return init(config, network, seed)
            if key not in self._traced:
                self._traced[key] = jax.jit(functools.partial(init, config, network))
            return self._traced[key](seed)

        return traced

    def _drawn_once(self, init_params: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(config: Config, network: Any = None) -> Any:
            try:
                key = config.seed, self._network(config, network)
            except (Unknown, ValueError):
                return init_params(config, network)
            if not self.shared:
                return init_params(config, network)
            if key not in self._drawn:
                self._drawn[key] = jax.device_get(init_params(config, network))
            return jax.tree.map(jnp.array, self._drawn[key])  # copies: a run donates its state

        return drawn


def under_pressure() -> bool:
    """Return whether this process should forget what it has compiled.

    All programs of the tests would take 10 GB, and more memory maps than Linux lets a process have.
    """
    maps, memory = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.is_file():
        return True  # no such list to look at: after every file, then
    pages = int(memory.read_text().split()[1])
    return maps.read_text().count("\n") > 30_000 or pages * os.sysconf("SC_PAGE_SIZE") > 3 << 30
