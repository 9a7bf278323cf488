"""TPU slices by name: what their chips can do, and devices that programs can be compiled for without being there."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from importlib import metadata

import jax
from jax.experimental import topologies

from ddpm_jax.errors import UserError

GIB = 2**30


class TopologyError(UserError):
    """A slice that nothing can be compiled for; the message says what to name or to install."""


@dataclass(frozen=True)
class Chip:
    """One chip, which is one device of JAX, as its maker's data sheet has it.

    Attributes:
      hbm: bytes that the compiler lets a program use: the sheet's, less what it keeps for itself.
      peak: bfloat16 FLOP/s of all its cores.
      cores: tensor cores, each with four 128x128 matrix units; the compiler splits one program over them.
      clock: Hz.
      link: bytes/s to one neighbour, one way.
      shapes: the slices that can be had, up to 256 chips.
      cube: a slice closes to a torus along the dimensions that are multiples of this (v5e), or only if all are (3D).
    """

    hbm: int
    peak: float
    cores: int
    clock: float
    link: float
    shapes: tuple[str, ...]
    cube: int


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, cores=2, clock=1.05e9, link=50e9, shapes=SOLID, cube=4),
    "v5e": Chip(int(15.75 * GIB), 197e12, cores=1, clock=1.5e9, link=50e9, shapes=FLAT, cube=16),
    "v5p": Chip(int(95.74 * GIB), 459e12, cores=2, clock=1.75e9, link=100e9, shapes=SOLID, cube=4),
}

# What libtpu looks for where there is a TPU. Here it would ask the network, let one process at a time in, and complain about
# the rest; none of it changes what it compiles.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Topology:
    """A slice such as v5e:4x4. TopologyError if it cannot be had."""

    name: str

    def __post_init__(self) -> None:
        kind, _, shape = self.name.partition(":")
        if kind not in CHIPS or shape not in CHIPS[kind].shapes:
            known = "; ".join(f"{kind}:{', '.join(chip.shapes)}" for kind, chip in CHIPS.items())
            raise TopologyError(f"--topology={self.name}: not a TPU slice of up to 256 chips; there are {known}")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.name.partition(":")[2].split("x"))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is linked to the first."""
        closes = [size % self.chip.cube == 0 for size in self.shape]
        return tuple(closes) if len(closes) == 2 else (all(closes),) * len(closes)

    @property
    def egress(self) -> float:
        """Bytes/s, one way, that can leave the chip with the fewest links: a corner, where the slice is not a torus."""
        links = sum(1 + wraps for size, wraps in zip(self.shape, self.wraps) if size > 1)
        return links * self.chip.link


def libtpu_version() -> str:
    """TopologyError, with the command to install it, where libtpu is not."""
    if importlib.util.find_spec("libtpu") is None:
        command = "pip install -c requirements.lock -r requirements-tpu.txt"
        raise TopologyError(f"libtpu, the compiler for TPUs, is not installed; it needs no TPU: {command}")
    return metadata.version("libtpu")


def compile_only_devices(topology: Topology) -> list[jax.Device]:
    """Devices of `topology` that programs are compiled for and cannot run on."""
    version = libtpu_version()
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    chip = topology.chip
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.name,
            chip_config_name="megacore" if chip.cores > 1 else "default",
            chips_per_host_bounds=(1, 1, 1) if topology.chips == 1 else (2, 2, 1),
            wrap=(*topology.wraps, False)[:3],
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"--topology={topology.name}: libtpu {version} refuses it: {error}") from error
