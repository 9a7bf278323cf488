"""Compiled programs, kept on disk from one start to the next."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jax


def keep_programs() -> Path | None:
    """Switches JAX's persistent compilation cache on, in ~/.cache/ddpm_jax, unless JAX was told where (or told not to).

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches it off. It may be deleted at any
    time.

    Returns:
      The folder, or None where it is not ours to choose or cannot be written.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache"))
    folder = home / "ddpm_jax" / f"programs-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a read-only home: every start compiles
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _processor() -> str:
    """Short name of what this machine's processor can do: a home shared by unlike machines must not share programs for CPUs."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else [" ".join(os.uname()[2:])]
    abilities = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))} or lines[:1])
    return hashlib.sha256("\n".join(abilities).encode()).hexdigest()[:8]
