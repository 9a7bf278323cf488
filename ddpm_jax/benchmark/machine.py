"""On what, with what, and how a measurement was made: without it a number means nothing."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_jax.devices import Devices

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch", "diffusers")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "JAX_PLATFORMS")


def describe_machine(devices: Devices) -> dict[str, Any]:
    """Processor, devices, versions, and the environment variables that change programs; the load says who else was there."""
    return {
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "devices": [device.device_kind for device in devices.devices],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(filter(None, [found.get("model name"), platform.machine()]))


def peak_memory(devices: Devices) -> int:
    """Bytes that were in use at once: on the first device where it keeps count, else of this process."""
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
