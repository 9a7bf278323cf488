"""Cut Gaussians into bins with integer frequencies that a coder can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtr, ndtri

from ddpm_jax.coding.ans import SLOTS, Stack
from ddpm_jax.errors import CodingError


def cdf_erf(z: np.ndarray) -> np.ndarray:
    """Return the exact cumulative distribution of N(0, 1), float64."""
    return ndtr(z)


def cdf_tanh(z: np.ndarray) -> np.ndarray:
    """Return the paper's approximation of it, float64.

    `diffusion.gaussians.standard_normal_cdf_tanh` is the same in float32.
    """
    return expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


@dataclass(frozen=True)
class Lattice:
    """The bins that real numbers are cut into.

    Bin k is [origin + k width, origin + (k+1) width); the outer two are open.
    """

    origin: float
    width: float
    bins: int

    def centres(self, k: np.ndarray) -> np.ndarray:
        """Return the middles of bins k."""
        return self.origin + (k + 0.5) * self.width


class BinnedGaussian:
    """A Gaussian N(mean, std^2) over the bins of a lattice, in slots.

    Args:
      mean, std: float64 [n].
      leak: give every bin at least one slot, at the cost of bins / 2^30 for the others. The model
        of what may be anything must leak, or an unlikely symbol has no code. The model that symbols
        are drawn from must not: its far tails would be drawn far too often.
    """

    def __init__(
        self,
        lattice: Lattice,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        leak: bool,
        cdf: Callable[[np.ndarray], np.ndarray] = cdf_erf,
    ) -> None:
        self._lattice, self._mean, self._std, self._leak, self._cdf = lattice, mean, std, leak, cdf

    def push(self, stack: Stack, k: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Code bins k, int64 [n].

        Raises:
          CodingError: a bin has no slot.
        """
        rows = slice(0, len(k))
        start, end = self._edge(rows, k), self._edge(rows, k + 1)
        if (end <= start).any():
            raise CodingError(
                "the message is of another model, or this machine computes the network differently"
            )
        stack.push(start.astype(np.uint64), (end - start).astype(np.uint64), mask)

    def pop(self, stack: Stack, mask: np.ndarray | None = None) -> np.ndarray:
        """Decode, or draw, bins int64 [n]."""
        return stack.pop(len(self._mean), self._symbol_at, mask)

    def _edge(self, rows: slice, k: np.ndarray) -> np.ndarray:
        """Return the slot where bin k begins, int64."""
        lattice = self._lattice
        edge = lattice.origin + k * lattice.width
        share = self._cdf((edge - self._mean[rows]) / self._std[rows])
        leak = 1 if self._leak else 0
        slots = np.floor((SLOTS - leak * lattice.bins) * share).astype(np.int64) + leak * k
        return np.where(k <= 0, 0, np.where(k >= lattice.bins, SLOTS, slots))

    def _symbol_at(
        self, rows: slice, slots: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the bin that a slot lies in, by bisection from the Gaussian's quantile on."""
        lattice, slots = self._lattice, slots.astype(np.int64)
        quantile = self._mean[rows] + self._std[rows] * ndtri((slots + 0.5) / SLOTS)
        position = (quantile - lattice.origin) / lattice.width
        guess = np.clip(position, 0, lattice.bins - 1).astype(np.int64)
        low, high = np.maximum(guess - 1, 0), np.minimum(guess + 2, lattice.bins)
        low = np.where(self._edge(rows, low) <= slots, low, 0)
        high = np.where(self._edge(rows, high) > slots, high, lattice.bins)
        while (high - low > 1).any():
            middle = (low + high) // 2
            below = self._edge(rows, middle) <= slots
            low, high = (
                np.where(below, middle, low),
                np.where(below, high, np.maximum(middle, low + 1)),
            )
        start = self._edge(rows, low)
        return low, start.astype(np.uint64), (self._edge(rows, low + 1) - start).astype(np.uint64)
