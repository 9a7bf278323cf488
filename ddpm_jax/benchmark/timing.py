"""Timing on machines that have other things to do: what is compared runs in turn, and ratios are taken pair by pair."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Seconds = np.ndarray  # [rounds]


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """How long a call takes until all that it returns has been computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def in_turn(calls: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, Seconds]:
    """Calls them one after the other, `rounds` times over; each says how long it took.

    Who goes first changes from round to round, so that no one always follows the same neighbour. The first `warmup` rounds,
    in which programs are still compiled and memory is fetched, do not count.
    """
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            value = calls[name]()
            if turn >= 0:
                taken[name].append(value)
    return {name: np.array(values) for name, values in taken.items()}


def summary(taken: Seconds) -> dict[str, float]:
    """Milliseconds: the median, the fastest and the quartiles."""
    low, median, high = np.percentile(taken, [25, 50, 75]) * 1e3
    return {"median_ms": float(median), "best_ms": float(taken.min() * 1e3), "low_ms": float(low), "high_ms": float(high)}


def paired_ratio(ours: Seconds, theirs: Seconds) -> dict[str, float]:
    """Our time by theirs, below 1 where we are faster: median and quartiles of the ratios of each round."""
    low, median, high = np.percentile(ours / theirs, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def median_difference(longer: Seconds, shorter: Seconds) -> float:
    """Seconds, of the differences of each round."""
    return float(np.median(longer - shorter))


def matrix_peak(dtype: str, sizes: tuple[int, ...] = (1024, 2048, 4096, 8192), budget: float = 2.0) -> float:
    """The most FLOP/s that a plain product of two square matrices reaches in this process, on one device.

    Args:
      budget: seconds for all sizes together; a size that would not fit into what is left is not tried.
    """
    best, left = 0.0, budget
    for size in sizes:
        if best and 4 * 2 * size**3 / best > left:
            break
        a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        seconds(product, a, b)
        once = seconds(product, a, b)
        repeats = max(3, min(20, int(left / 4 / once)))
        taken = [seconds(product, a, b) for _ in range(repeats)]
        best, left = max(best, 2 * size**3 / min(taken)), left - sum(taken)
    return best
