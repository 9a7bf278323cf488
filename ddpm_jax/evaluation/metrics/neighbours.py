"""Find the nearest of many vectors to each of a few, block by block, exactly."""

from __future__ import annotations

import numpy as np


class Nearest:
    """The `count` vectors nearest to each of `queries` [n,d] among all added, nearest first.

    Sums are float64: of pixels 0..255 they are exact, integers below 2^53.
    """

    def __init__(self, queries: np.ndarray, count: int) -> None:
        self._queries = queries.reshape(len(queries), -1).astype(np.float64)
        self._norms = (self._queries**2).sum(axis=1)[:, None]
        self._best = np.full((len(queries), count), np.inf)
        self.indices = np.zeros((len(queries), count), np.int64)

    def add(self, block: np.ndarray, start: int) -> None:
        """Add vectors [b,d], numbers `start` to start + b."""
        vectors = block.reshape(len(block), -1).astype(np.float64)
        squares = self._norms - 2 * self._queries @ vectors.T + (vectors**2).sum(axis=1)
        numbers = np.broadcast_to(start + np.arange(len(block)), squares.shape)
        best = np.concatenate([self._best, squares], axis=1)
        indices = np.concatenate([self.indices, numbers], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, : self._best.shape[1]]
        self._best, self.indices = (
            np.take_along_axis(values, order, axis=1) for values in (best, indices)
        )

    @property
    def distances(self) -> np.ndarray:
        """Return root mean squared differences, float64 [n, count]."""
        return np.sqrt(np.maximum(self._best, 0) / self._queries.shape[1])
