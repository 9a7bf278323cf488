"""Eight simulated devices, no silent rank promotion: what a pod does to the code, on any machine."""

import os
import signal
from collections.abc import Iterator

import pytest

# The compiled programs of one run serve the next, and the subprocesses that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell's background job, which the tests may be, ignores SIGINT, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops a file's programs when it is done: all of them take 10 GB, and more memory maps than Linux lets a process have."""
    yield
    jax.clear_caches()
