"""Describe on what, with what, and how a measurement was made: else a number means nothing."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_jax.machine import cores, memory
from ddpm_jax.parallel.devices import Devices

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch", "diffusers")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "JAX_PLATFORMS")


def describe_machine(devices: Devices) -> dict[str, Any]:
    """Describe processor, devices, versions, and the environment variables that change programs.

    The load says who else was there.
    """
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(memory() / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "devices": [device.device_kind for device in devices.devices],
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }


def processor() -> str:
    """Return the name of the processor and its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    pairs = (line.partition(":") for line in lines)
    values = {name.strip(): value.strip() for name, _, value in pairs}
    return " ".join(filter(None, [values.get("model name"), platform.machine()]))


def peak_memory(devices: Devices) -> int:
    """Return the bytes that were in use at once.

    They are those of the first device where it keeps count, else of this process.
    """
    stats = devices.local[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
