"""GroupNorm keeps what it has traced: a test that changes it asks for a fresh start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ddpm_jax.network import normalization


@contextlib.contextmanager
def traced_anew() -> Iterator[None]:
    """Let norms choose their form anew inside, and again afterwards."""
    kept = normalization._normalize.fun, normalization._backward
    for traces in kept:
        traces.clear_cache()
    yield
    for traces in kept:
        traces.clear_cache()
