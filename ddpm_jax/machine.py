"""Ask what a process may use of its machine, and set it up to use a CPU well."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# What XLA is told, and the versions of jaxlib that know it, from the first to the one beyond: XLA
# ends the process over a flag that it does not know. docs/performance.md has what each is worth.
FLAGS = {
    # Which operations go to YNNPACK, a library of kernels for CPUs. By default single convolutions
    # and products are among them; XLA's own code for these is faster.
    "xla_cpu_experimental_ynn_fusion_type": (
        "-individual_convolution,-individual_dot",
        ((0, 10, 2), (0, 12)),
    ),
    # The new emitters cut every small loop for all cores, and the cores then wait for each other
    # thousands of times a step.
    "xla_cpu_use_fusion_emitters": ("false", ((0, 10, 2), (0, 11))),
}

# XLA asks for the temporary memory of a program at every call. By these numbers of <malloc.h> the
# C library keeps it, instead of handing it back to the system and fetching each page anew. With
# more than one arena it hands memory back all the same.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
ALLOCATOR = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 256 << 20, M_ARENA_MAX: 1}

# Files of the devices that JAX would prefer to a CPU; dxg is the GPU of WSL.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "accel/accel*", "vfio/[0-9]*")


def tune_cpu(devices: Path = Path("/dev")) -> list[str]:
    """Set this process up so that its programs for a CPU run fast.

    It must come before JAX runs anything. It does nothing but on Linux with the GNU C library,
    where JAX will use the CPU: where JAX_PLATFORMS says so, or says nothing and there is no other
    device. What the user has set in XLA_FLAGS or about malloc stays. Results differ by rounding.

    Args:
      devices: the folder of device files.

    Returns:
      What was set: "XLA_FLAGS", "malloc", both or none.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or not _uses_cpu(devices):
        return []
    steps = {"XLA_FLAGS": _set_flags, "malloc": _keep_memory}
    return [name for name, step in steps.items() if step()]


def _uses_cpu(devices: Path) -> bool:
    """Return whether JAX will use the CPU, as far as can be said without asking it."""
    platforms = os.environ.get("JAX_PLATFORMS", "").strip()
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(any(devices.glob(pattern)) for pattern in ACCELERATORS)


def _set_flags() -> bool:
    """Add to XLA_FLAGS what is not there yet, and what this jaxlib understands."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # it names a file
        return False
    version = _jaxlib()
    added = [
        f"--{name}={value}"
        for name, (value, (first, beyond)) in FLAGS.items()
        if name not in flags and first <= version < beyond
    ]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()
    return bool(added)


def _jaxlib() -> tuple[int, ...]:
    """Return the version of jaxlib, which is not imported; () where there is none."""
    try:
        version = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _keep_memory() -> bool:
    """Tell the C library to keep memory that was freed, unless the user has told it something."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name.startswith(names) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in ALLOCATOR.items()])


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Return the bytes of memory that this process may use.

    They are those of the machine, or of its container where that has fewer.
    """
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *_container_limits(Path("/"))])


def _container_limits(root: Path) -> Iterator[int]:
    """Yield the limits of memory of this process's control groups, versions 1 and 2.

    A group has its own limit and those of all groups above it. Inside a container the path that
    the kernel names may lie outside what is mounted; what is mounted is then the group itself.

    Args:
      root: where /proc and /sys are.
    """
    listing = root / "proc/self/cgroup"
    if not listing.is_file():
        return
    for line in listing.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / name
            if file.is_file() and (text := file.read_text().strip()) != "max":
                yield int(text)
            if folder == mount:
                break
