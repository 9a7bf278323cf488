"""Name machines that are not here, TPU slices and GPUs, and give the devices to compile for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

import jax
from jax.experimental import topologies

from ddpm_jax.ahead.gpus import GPUS, Gpu
from ddpm_jax.ahead.memory import GIB
from ddpm_jax.errors import TopologyError


@dataclass(frozen=True)
class Chip:
    """One chip, which is one device of JAX, as its maker's data sheet has it.

    Attributes:
      hbm: bytes that the compiler lets a program use: the sheet's, less what it keeps for itself.
      peak: bfloat16 FLOP/s of all its cores.
      cores: tensor cores, each with four 128x128 matrix units; the compiler splits one program over
        them.
      clock: Hz.
      link: bytes/s to one neighbour, one way.
      shapes: the slices that can be had, up to 256 chips.
      cube: a slice closes to a torus along the dimensions that are multiples of this (v5e), or only
        if all are (3D).
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
SLICES = "; ".join(f"{kind}:{', '.join(chip.shapes)}" for kind, chip in CHIPS.items())

# What libtpu looks for where there is a TPU. Here it would ask the network, let one process at a
# time in, and complain about the rest; none of it changes what it compiles.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice such as v5e:4x4.

    Raises:
      TopologyError: it cannot be had.
    """

    unit: ClassVar[str] = "chip"
    name: str

    def __post_init__(self) -> None:
        kind, _, shape = self.name.partition(":")
        if kind not in CHIPS or shape not in CHIPS[kind].shapes:
            raise TopologyError(
                f"topology={self.name}: not a TPU slice of up to 256 chips; there are {SLICES}"
            )

    @property
    def chip(self) -> Chip:
        """Return the chip that the slice is made of."""
        return CHIPS[self.name.partition(":")[0]]

    @property
    def memory(self) -> int:
        """Return the bytes that a program may use on a chip."""
        return self.chip.hbm

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the chips along each dimension."""
        return tuple(int(size) for size in self.name.partition(":")[2].split("x"))

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Say of each dimension whether the last chip along it is linked to the first."""
        closes = [size % self.chip.cube == 0 for size in self.shape]
        return tuple(closes) if len(closes) == 2 else (all(closes),) * len(closes)

    @property
    def egress(self) -> float:
        """Return the bytes/s, one way, that can leave the chip with the fewest links.

        It is a corner, where the slice is not a torus.
        """
        links = sum(1 + wraps for size, wraps in zip(self.shape, self.wraps) if size > 1)
        return links * self.chip.link


MOST_GPUS = {"host": 8, "all": 256}


@dataclass(frozen=True)
class GpuTopology:
    """GPUs of one kind: h100, h100:8 on one host, or 2x8xh100 on two hosts of eight each.

    Raises:
      TopologyError: the name has another form, or there are too many.
    """

    unit: ClassVar[str] = "GPU"
    name: str

    def __post_init__(self) -> None:
        kind, hosts, gpus = self._parts
        if (
            kind not in GPUS
            or not 1 <= gpus <= MOST_GPUS["host"]
            or not 1 <= hosts <= MOST_GPUS["all"] // gpus
        ):
            raise TopologyError(f"target={self.name}: not known; there are {known_gpus()}")

    @property
    def _parts(self) -> tuple[str, int, int]:
        """Return the kind, the hosts and the GPUs of each; zeros where the form is another."""
        if match := re.fullmatch(r"([a-z]\w*)(?::([1-9]\d{0,2}))?", self.name):
            return match[1], 1, int(match[2] or 1)
        if match := re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})x([a-z]\w*)", self.name):
            return match[3], int(match[1]), int(match[2])
        return "", 0, 0

    @property
    def gpu(self) -> Gpu:
        """Return the GPU that all of them are."""
        return GPUS[self._parts[0]]

    @property
    def memory(self) -> int:
        """Return the bytes of a GPU's memory."""
        return self.gpu.memory

    @property
    def hosts(self) -> int:
        """Return the number of hosts."""
        return self._parts[1]

    @property
    def chips(self) -> int:
        """Return the number of GPUs."""
        return math.prod(self._parts[1:])

    @property
    def shape(self) -> str:
        """Return partitions x hosts x GPUs of a host, as XLA writes them."""
        return f"1x{self.hosts}x{self.chips // self.hosts}"


Target = Topology | GpuTopology


def known_gpus() -> str:
    """Say which names GPUs have."""
    kinds = " and ".join(GPUS)
    kind = next(iter(GPUS))
    return (
        f"{kinds}, as {kind}, {kind}:2 to {kind}:{MOST_GPUS['host']} on one host, "
        f"2x8x{kind} on several, up to {MOST_GPUS['all']}"
    )


def parse_target(name: str) -> Target:
    """Return the machine of this name.

    Raises:
      TopologyError: there is none; the message lists those that there are.
    """
    kind, _, shape = name.partition(":")
    if kind in CHIPS and shape in CHIPS[kind].shapes:
        return Topology(name)
    try:
        return GpuTopology(name)
    except TopologyError as error:
        raise TopologyError(f"{error}; TPU slices {SLICES}") from None


def libtpu_version() -> str:
    """Return the version of libtpu.

    Raises:
      TopologyError: it is not installed; the message has the command that installs it.
    """
    if importlib.util.find_spec("libtpu") is None:
        command = "pip install 'ddpm_jax[tpu]'"
        raise TopologyError(
            f"libtpu, the compiler for TPUs, is not installed; it needs no TPU: {command}"
        )
    return metadata.version("libtpu")


def plugin_version() -> str:
    """Return the version of JAX's plugin for CUDA, which holds the compiler for GPUs.

    Raises:
      TopologyError: it is not installed, or belongs to another JAX; the message has the command
        that installs the one that is needed.
    """
    packages = "jax-cuda12-plugin", "jax-cuda12-pjrt"
    versions = []
    for package in packages:
        try:
            versions.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            versions.append("")
    if set(versions) != {jax.__version__}:
        problem = "is of another JAX" if all(versions) else "is not installed; it needs no GPU"
        command = " ".join(f"{package}=={jax.__version__}" for package in packages)
        raise TopologyError(f"the compiler for GPUs {problem}: pip install --no-deps {command}")
    return versions[0]


def prepare_environment() -> None:
    """Make this process fit to compile for machines that are not here.

    JAX must run on the CPU: without this it would look for a TPU, or drop the plugin for CUDA,
    which finds no driver. XLA takes blank XLA_FLAGS for the name of a file. It must come before
    JAX's first computation.
    """
    jax.config.update("jax_platforms", "cpu")
    if not os.environ.get("XLA_FLAGS", "-").strip():
        del os.environ["XLA_FLAGS"]


def compiler_version(target: Target) -> dict[str, str]:
    """Return the name and the version of the package that compiles for `target`.

    Raises:
      TopologyError: it is not installed.
    """
    if isinstance(target, GpuTopology):
        return {"jax-cuda12-plugin": plugin_version()}
    return {"libtpu": libtpu_version()}


def compile_only_devices(target: Target) -> list[jax.Device]:
    """Return the devices of `target`, for which programs can be compiled but not run.

    Raises:
      TopologyError: the compiler is not installed, or refuses the target.
    """
    prepare_environment()
    return _gpus(target) if isinstance(target, GpuTopology) else _tpus(target)


def _tpus(topology: Topology) -> list[jax.Device]:
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
        raise TopologyError(
            f"topology={topology.name}: libtpu {version} refuses it: {error}"
        ) from error


def _gpus(topology: GpuTopology) -> list[jax.Device]:
    version = plugin_version()
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=topology.gpu.description, topology=topology.shape
        ).devices
    except NotImplementedError as error:
        raise TopologyError(
            f"target={topology.name}: JAX has started without its plugin for CUDA; "
            "set JAX_PLATFORMS=cpu in the environment"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"target={topology.name}: jax-cuda12-plugin {version} refuses it: {error}"
        ) from error
