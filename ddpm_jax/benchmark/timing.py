"""Time calls on machines that have other things to do.

What is compared runs in turn, and ratios are taken pair by pair.
"""

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
    """Return how long a call takes until all that it returns has been computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def in_turn(
    calls: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1
) -> dict[str, Seconds]:
    """Call each in turn, `rounds` times over, and return the seconds that each gives.

    Who goes first changes from round to round, so that no one always follows the same neighbour.
    The first `warmup` rounds, in which programs are still compiled and memory is fetched, do not
    count.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            value = calls[name]()
            if turn >= 0:
                times[name].append(value)
    return {name: np.array(values) for name, values in times.items()}


def summary(times: Seconds) -> dict[str, float]:
    """Return the median, the fastest and the quartiles, in milliseconds."""
    low, median, high = np.percentile(times, [25, 50, 75]) * 1e3
    return {
        "median_ms": float(median),
        "best_ms": float(times.min() * 1e3),
        "low_ms": float(low),
        "high_ms": float(high),
    }


def paired_ratio(ours: Seconds, theirs: Seconds) -> dict[str, float]:
    """Return our time by theirs, below 1 where we are faster.

    It is the median of the ratios of each round, with their quartiles.
    """
    low, median, high = np.percentile(ours / theirs, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def median_difference(longer: Seconds, shorter: Seconds) -> float:
    """Return the median of the differences of each round, in seconds."""
    return float(np.median(longer - shorter))


def matrix_peak(
    dtype: str, sizes: tuple[int, ...] = (1024, 2048, 4096, 8192), budget: float = 2.0
) -> float:
    """Return the most FLOP/s that a plain product of two square matrices reaches on one device.

    Args:
      budget: seconds for all sizes together; a size that would not fit into what is left is not
        tried.
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
        times = [seconds(product, a, b) for _ in range(repeats)]
        best, left = max(best, 2 * size**3 / min(times)), left - sum(times)
    return best
