"""Compile the programs of a run for machines that are not here, and read off what can be read.

What the compiler decides is a fact: memory, operations, exchanges, and for GPUs launches. Times
are known for TPUs alone, where they are the compiler's own estimates, never a measurement.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ddpm_jax.ahead import gpu, tpu
from ddpm_jax.ahead.batches import fitting_batch, largest_batch
from ddpm_jax.ahead.memory import OutOfMemory, gib
from ddpm_jax.ahead.programs import LOWER, PROGRAMS, steps_a_call
from ddpm_jax.ahead.topology import (
    GpuTopology,
    Target,
    compile_only_devices,
    compiler_version,
    prepare_environment,
)
from ddpm_jax.build import abstract_params, forward_flops
from ddpm_jax.config import Config
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.state import abstract_state

Say = Callable[[str], None]


class DoesNotFit(UserError):
    """A program that needs more memory than a device has; the message names a batch that fits."""


def compile_lowered(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """Compile a program as it would be compiled on a machine that runs it.

    Returns:
      The program, and the seconds that it took.

    Raises:
      OutOfMemory: the compiler found that a device is too small.
    """
    start = time.monotonic()
    try:
        with no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error)) from error
    return compiled, time.monotonic() - start


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Switch JAX's compilation cache off for a while, and all optimisations on.

    The cache would store programs for absent devices, and fail to read them again. Without
    optimisations, as tests like it, other programs would come out.
    """
    names = "jax_enable_compilation_cache", "jax_disable_most_optimizations"
    before = {name: jax.config.values[name] for name in names}
    for name in names:
        jax.config.update(name, False)
    reset_cache()  # JAX asks once whether there is a cache, and remembers the answer
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def compile_programs(
    config: Config,
    target: Target,
    programs: Sequence[str] = PROGRAMS[:2],
    *,
    samples_per_chip: int = 16,
    largest: bool = False,
    say: Say = print,
) -> Iterator[dict[str, Any]]:
    """Compile programs one after the other, the training step at the config's batch size.

    Args:
      programs: some of PROGRAMS.
      samples_per_chip: images that a chip or GPU draws, or evaluates, at once.
      largest: look for the largest batch that fits, of each program.
      say: receives a line about what goes on.

    Returns:
      An iterator over the report of each program, as `report` gives it.

    Raises:
      ConfigError: an unknown program or no samples; and, on the way, whatever `report` raises.
    """
    if not set(programs) <= set(PROGRAMS):
        raise ConfigError(
            f"what={','.join(programs)}: any of {', '.join(PROGRAMS)}, with commas between"
        )
    if samples_per_chip < 1:
        raise ConfigError(f"samples_per_chip={samples_per_chip}: must be at least 1")
    prepare_environment()
    write = report_largest if largest else report
    sizes = dict.fromkeys(PROGRAMS, samples_per_chip * target.chips)
    sizes["train"] = config.train.batch_size
    return (write(config, target, name, sizes[name], say=say) for name in programs)


def report(
    config: Config, target: Target, what: str, batch_size: int, *, say: Say = print
) -> dict[str, Any]:
    """Compile one program for `target`, and return its figures, ready for JSON.

    Args:
      what: one of PROGRAMS.
      batch_size: images at once, over all devices.
      say: receives a line about what goes on.

    Raises:
      ConfigError: a batch that the devices do not divide; the message names the nearest that they
        do.
      DoesNotFit: a batch too large for the devices; the message names one that was compiled and
        fits.
      TopologyError: the compiler is not installed.
    """
    trials = _Trials(config, target, what, batch_size, say)
    try:
        return trials.report(batch_size, trials.compile(batch_size))
    except OutOfMemory as error:
        needs = gib(error.needed) if error.needed else "more"
        problem = (
            f"{trials.field(batch_size)} on {target.name}: {what} needs {needs} "
            f"of the {gib(target.memory)} GiB that a {target.unit} has"
        )
        say(f"{problem}; looking for a batch that fits")
        used = max(error.needed, target.memory + 1)
        fits = fitting_batch(
            trials.needed, batch_size, trials.unit, used, trials.fixed, target.memory
        )
        remedy = (
            f"{trials.field(fits)} fits"
            if fits
            else f"{trials.field(trials.unit)} does not fit either; "
            f"try config.model.remat=true, or {target.unit}s with more memory"
        )
        raise DoesNotFit(f"{problem}; {remedy}") from error


def report_largest(
    config: Config, target: Target, what: str, batch_size: int, *, say: Say = print
) -> dict[str, Any]:
    """Look for the largest batch of one program that fits, and return its figures.

    Args:
      batch_size: to begin with.

    Returns:
      What `report` gives of that batch, and "too_large", the least batch that was found not to fit.

    Raises:
      See `report`.
    """
    trials = _Trials(config, target, what, batch_size, say)
    fits, too_large = largest_batch(
        trials.needed, batch_size, trials.unit, trials.fixed, target.memory
    )
    if not fits:
        raise DoesNotFit(
            f"{trials.field(trials.unit)} on {target.name}: {what} does not fit into the "
            f"{gib(target.memory)} GiB of a {target.unit}; "
            f"try config.model.remat=true, or {target.unit}s with more memory"
        )
    return trials.report(fits, trials.fitting[fits]) | {"too_large": too_large}


class _Trials:
    """One program of a config, compiled for `target` with one batch after the other.

    Attributes:
      unit: the least batch.
      fixed: bytes that no batch makes fewer.
      fitting: what was compiled by `needed` and fits, by batch.
    """

    def __init__(
        self, config: Config, target: Target, what: str, batch_size: int, say: Say
    ) -> None:
        self._config, self._target, self._what, self._say = config, target, what, say
        self._devices = Devices(compile_only_devices(target))
        self._calls = steps_a_call(config, what)
        parts = config.train.accumulation if what == "train" else 1
        self._devices.check_batch(batch_size, parts, "train.batch_size")
        self.unit = target.chips * parts
        arrays = abstract_state(config) if what == "train" else abstract_params(config)
        self.fixed = array_bytes(arrays)
        self.fitting: dict[int, tpu.Compiled | gpu.Compiled] = {}

    def compile(self, size: int) -> tpu.Compiled | gpu.Compiled:
        """Compile and read the program for `size` images.

        Raises:
          OutOfMemory: they do not fit.
        """
        target, what = self._target, self._what
        self._say(
            f"compiling {what} for {target.name}, {size} images, "
            f"{size // target.chips} a {target.unit}: a few minutes"
        )
        lowered = LOWER[what](self._config, self._devices, size)
        executable, seconds = compile_lowered(lowered)
        if isinstance(target, GpuTopology):
            return gpu.read(executable, target, self._calls)
        return tpu.read(executable, target.chips, seconds)

    def needed(self, size: int) -> int:
        """Return the bytes that `size` images need; more than there are where they do not fit."""
        try:
            compiled = self.compile(size)
        except OutOfMemory as error:
            return max(error.needed, self._target.memory + 1)
        self.fitting[size] = compiled
        return compiled.memory.peak

    def field(self, size: int) -> str:
        """Name the setting that gives a batch of `size` images."""
        if self._what == "train":
            return f"config.train.batch_size={size}"
        return f"samples_per_chip={size // self._target.chips}"

    def report(self, size: int, compiled: tpu.Compiled | gpu.Compiled) -> dict[str, Any]:
        """Return the figures of a compiled program, ready for JSON."""
        config, target, calls = self._config, self._target, self._calls
        each, is_gpu = size // target.chips, isinstance(target, GpuTopology)
        passes = forward_flops(config) * (3 if self._what == "train" else 1)
        figures = (
            gpu.figures(compiled, target, each, passes)
            if is_gpu
            else tpu.figures(compiled, target, each, passes * calls)
        )
        return {
            "what": self._what,
            "target" if is_gpu else "topology": target.name,
            "chips": target.chips,
            "batch_size": size,
            "images_per_chip": each,
            "steps": calls,
            "parameters": sum(x.size for x in jax.tree.leaves(abstract_params(config))),
            **figures,
            "software": {"jax": jax.__version__, **compiler_version(target)},
        }


def array_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree, without the padding of their layouts."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
