"""The programs of a run compiled for a TPU slice that is not there, and what can be read off them.

It is the step that `training.build_train_step` builds and the chain that `generate.Generator` builds, mapped over the slice's
chips by the same `jax.pmap` of `devices.Devices` that maps them on a machine; only the arguments are shapes. What the compiler
decides is a fact: memory, operations, collectives. Times are its own estimates, never a measurement.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from ddpm_jax.build import abstract_params, image_shape
from ddpm_jax.config import Config
from ddpm_jax.devices import Devices
from ddpm_jax.errors import UserError
from ddpm_jax.flops import forward_flops
from ddpm_jax.generate import Generator
from ddpm_jax.hlo import Program
from ddpm_jax.tpu import Topology, compile_only_devices, libtpu_version
from ddpm_jax.tpu_report import Compiled, Memory, figures, gib
from ddpm_jax.training import abstract_state, build_train_step

Say = Callable[[str], None]


class DoesNotFit(UserError):
    """A program that needs more memory than a chip has; the message names the batch that does not."""


class OutOfMemory(Exception):
    """The compiler gave up; `needed` bytes a chip, or 0 where it did not say."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
        number, unit = [part for part in sizes.groups() if part] if sizes else ("0", "K")
        self.needed = int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def compile_program(lowered: jax.stages.Lowered, devices: int) -> Compiled:
    """Raises OutOfMemory where the compiler finds that a chip is too small."""
    start = time.monotonic()
    try:
        with no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error)) from error
    seconds = time.monotonic() - start
    program, memory = Program(compiled.as_text(), devices), compiled.memory_analysis()
    return Compiled(
        Memory(
            memory.peak_memory_in_bytes,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        ),
        compiled.cost_analysis()["flops"] * program.turns,
        program.cycles,
        program.collectives,
        program.endless,
        seconds,
    )


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Keeps JAX's compilation cache out of it: it would store programs for absent devices, and fail to read them again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once whether there is a cache, and remembers the answer
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


# ---------------------------------------------------------------------------------------------- the two programs


def lower_train_step(config: Config, devices: Devices, batch_size: int) -> jax.stages.Lowered:
    """The training step of a global batch of `batch_size`, for `devices`."""
    chips = len(devices.devices)
    rows = chips, batch_size // chips
    batch = {"image": jax.ShapeDtypeStruct((*rows, *image_shape(config)), jnp.uint8)}
    if config.model.num_classes:
        batch["label"] = jax.ShapeDtypeStruct(rows, jnp.int32)
    step = devices.map_step(build_train_step(config))
    return step.lower(devices.abstract_replicated(abstract_state(config)), batch)


def lower_sampler(config: Config, devices: Devices, batch_size: int) -> jax.stages.Lowered:
    """The whole chain of `config.sampling`, `batch_size` samples at once over `devices`."""
    generator = Generator(config, devices, batch_size=batch_size)
    return generator.lower(devices.abstract_replicated(abstract_params(config)))


def report(config: Config, topology: Topology, what: str, batch_size: int, *, say: Say = print) -> dict[str, Any]:
    """Compiles `what` ("train" or "sample") for `topology`; the figures, ready for JSON.

    Args:
      batch_size: images at once, over all chips.
      say: told what is going on, line by line.

    Raises:
      ConfigError: a batch that the chips do not divide; the message names the nearest that they do.
      DoesNotFit: a batch too large for the chips; the message names one that was compiled and fits.
      TopologyError: no libtpu.
    """
    devices, lower = Devices(compile_only_devices(topology)), {"train": lower_train_step, "sample": lower_sampler}[what]
    parts = config.train.accumulation if what == "train" else 1
    devices.check_batch(batch_size, parts, "train.batch_size")

    def flag(size: int) -> str:
        return f"config.train.batch_size={size}" if what == "train" else f"--samples_per_chip={size // topology.chips}"

    def compile_at(size: int) -> Compiled:
        say(f"compiling {what} for {topology.name}, {size} images, {size // topology.chips} a chip: a few minutes")
        return compile_program(lower(config, devices, size), topology.chips)

    def needed_at(size: int) -> int:
        try:
            return compile_at(size).memory.peak
        except OutOfMemory as error:
            return max(error.needed, hbm + 1)

    hbm = topology.chip.hbm
    try:
        compiled = compile_at(batch_size)
    except OutOfMemory as error:
        needs = gib(error.needed) if error.needed else "more"
        problem = f"{flag(batch_size)} on {topology.name}: {what} needs {needs} of the {gib(hbm)} GiB that a chip has"
        say(f"{problem}; looking for a batch that fits")
        fixed, unit = array_bytes(abstract_state(config) if what == "train" else abstract_params(config)), topology.chips * parts
        fits = fitting_batch(needed_at, batch_size, unit, max(error.needed, hbm + 1), fixed, hbm)
        too_much = f"{flag(unit)} does not fit either; try config.model.remat=true, or chips with more memory"
        raise DoesNotFit(f"{problem}; {f'{flag(fits)} fits' if fits else too_much}") from error
    calls = 1 if what == "train" else config.sampling.steps or config.diffusion.timesteps
    work = forward_flops(config) * (3 if what == "train" else calls)
    return {
        "what": what,
        "topology": topology.name,
        "chips": topology.chips,
        "batch_size": batch_size,
        "images_per_chip": batch_size // topology.chips,
        "steps": calls,
        "parameters": sum(x.size for x in jax.tree.leaves(abstract_params(config))),
        **figures(compiled, topology, batch_size // topology.chips, work),
        "software": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }


def fitting_batch(needed: Callable[[int], int], batch_size: int, unit: int, used: int, fixed: int, hbm: int) -> int:
    """A batch below `batch_size` that fits, a multiple of `unit` by 2^a or 3 2^a; 0 if not even `unit` does.

    `used` bytes, more than `hbm`, are taken as `fixed` plus so many an image, and the batch that follows is put to the test:
    `needed(size)` compiles it and gives its bytes.
    """
    while batch_size > unit:
        share = max(hbm - fixed, 0) / (used - fixed) if used > fixed else 0.5
        batch_size = unit * round_down(int(batch_size * share) // unit)
        used = needed(batch_size)
        if used <= hbm:
            return batch_size
    return 0


def round_down(count: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to `count`, and 1 below."""
    power = 1 << max(count.bit_length() - 1, 0)
    return power + power // 2 if power > 1 and count >= power + power // 2 else power


def array_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
