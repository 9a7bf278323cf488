"""Ask what a process may use of its machine, and set it up to use a CPU well."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Which operations XLA hands to YNNPACK, a library of kernels for CPUs. By default single
# convolutions and products are among them, which takes a fifth to a third longer here than XLA's
# own code (docs/performance.md).
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
WITHOUT_PRODUCTS = "-individual_convolution,-individual_dot"
# XLA ends the process over a flag that it does not know. These versions of jaxlib know it.
FIRST, BEYOND = (0, 10, 2), (0, 12)

# XLA asks for the temporary memory of a program at every call, and the C library hands it back to
# the system after each. By this word of its environment it asks for it in pages of 2 MB, which are
# 88 of them for a step of the digits network, and not 43,000.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PAGE_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Files of the devices that JAX would prefer to a CPU; dxg is the GPU of WSL.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd", "accel[0-9]*", "accel/accel*", "vfio/[0-9]*")


def tune_cpu(devices: Path = Path("/dev")) -> list[str]:
    """Set this process up so that its programs for a CPU run fast.

    It must come before JAX runs anything. It does nothing but on Linux with the GNU C library,
    where JAX will use the CPU: where JAX_PLATFORMS says so, or says nothing and there is no other
    device. What the user has set in XLA_FLAGS stays. Results differ by rounding.

    Args:
      devices: the folder of device files.

    Returns:
      The variables of the environment that were set: "XLA_FLAGS" or none.
    """
    if not _uses_cpu(devices):
        return []
    return ["XLA_FLAGS"] if _avoid_ynnpack() else []


def with_huge_pages(devices: Path = Path("/dev")) -> dict[str, str] | None:
    """Return the environment in which a process for a CPU has its memory in pages of 2 MB.

    The C library reads it when a process starts: this one has to start anew to have it.

    Args:
      devices: the folder of device files.

    Returns:
      None where `tune_cpu` does nothing, where the system gives such pages to all or to none, and
      where the user has said something about memory.
    """
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if not _uses_cpu(devices) or any(name.startswith(names) for name in os.environ):
        return None
    if not PAGE_MODES.is_file() or "[madvise]" not in PAGE_MODES.read_text():
        return None
    return {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}


def _uses_cpu(devices: Path) -> bool:
    """Return whether JAX will use the CPU of a system that is known here.

    It is said without asking JAX, as far as it can be.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    platforms = os.environ.get("JAX_PLATFORMS", "").strip()
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(any(devices.glob(pattern)) for pattern in ACCELERATORS)


def _avoid_ynnpack() -> bool:
    """Add the flag to XLA_FLAGS, unless it is there or might not be understood."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    names_a_file = flags and not flags.startswith("-")
    if YNNPACK in flags or names_a_file or not FIRST <= _jaxlib() < BEYOND:
        return False
    os.environ["XLA_FLAGS"] = f"{flags} --{YNNPACK}={WITHOUT_PRODUCTS}".strip()
    return True


def _jaxlib() -> tuple[int, ...]:
    """Return the version of jaxlib, which is not imported; () where there is none."""
    try:
        version = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


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
