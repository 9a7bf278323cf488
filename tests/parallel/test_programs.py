"""Programs that are kept from one start to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.layers import ROOT

CODE = """
from ddpm_jax.parallel import programs
programs.keep_programs()
import jax, jax.numpy as jnp
print(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((3, 3))).sum())
"""


def run(folder: Path) -> tuple[str, str]:
    """Return what a process prints that keeps its programs in `folder`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("length", [0, 40])
def test_a_torn_program_is_compiled_anew_without_a_word(tmp_path, length):
    printed, _ = run(tmp_path)
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[:length])
    assert run(tmp_path) == (printed, "")
