"""Keep compiled programs on disk from one start to the next."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ddpm_jax.files import default_cache

# Loading a program takes milliseconds. JAX would keep only those that took a second to compile, and
# every start would compile the many small ones anew.
LEAST_SECONDS = 0.05


def keep_programs() -> Path | None:
    """Switch JAX's persistent compilation cache on, in ~/.cache/ddpm_jax.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches it
    off. The folder may be deleted at any time. This imports no JAX, which takes half a second.

    Returns:
      The folder, or None where it is not ours to choose or cannot be written.
    """
    # JAX does not write its entries at one stroke: a process that was killed leaves a torn one, and
    # one that is being written looks the same. JAX compiles anew, and there is nothing to do.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        _set("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    enabled = str(_value("jax_enable_compilation_cache", True)).lower()
    if _value("jax_compilation_cache_dir") or enabled in ("n", "no", "f", "false", "off", "0"):
        return None
    folder = default_cache() / f"programs-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a read-only home: every start compiles
    _set("jax_compilation_cache_dir", str(folder))
    return folder


def _value(name: str, default: Any = None) -> Any:
    """Return a setting of JAX, which it reads from the environment when it is imported."""
    if "jax" in sys.modules:
        return getattr(sys.modules["jax"].config, name)
    return os.environ.get(name.upper(), default)


def _set(name: str, value: Any) -> None:
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)
    else:
        os.environ[name.upper()] = str(value)


def _processor() -> str:
    """Return a short name of what this machine's processor can do.

    Unlike machines that share a home must not share programs for CPUs.
    """
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else [" ".join(os.uname()[2:])]
    abilities = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        or lines[:1]
    )
    return hashlib.sha256("\n".join(abilities).encode()).hexdigest()[:8]
