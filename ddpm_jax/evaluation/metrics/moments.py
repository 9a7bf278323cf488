"""Sum up mean and covariance of features, block by block, in float64.

Float32 sums lose the digits that FIDs differ in, and 50,000 x 2048 numbers at once are more than is
needed. So each block leaves its count, mean and scatter, and these are merged (Chan, Golub &
LeVeque 1983). The result is exact whatever the blocks and their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ddpm_jax.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Moments:
    """Count n, mean [d] and scatter [d,d] = sum over n of (x - mean)(x - mean)^T.

    `Moments()` are those of no features at all: the start of a sum.
    """

    count: int = 0
    mean: np.ndarray = np.float64(0)
    scatter: np.ndarray = np.float64(0)

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Compute the moments of one block [n, d], n at least 1."""
        x = features.astype(np.float64)
        mean = x.mean(axis=0)
        x -= mean
        return cls(len(x), mean, x.T @ x)

    @classmethod
    def over(cls, blocks: Iterable[np.ndarray]) -> Moments:
        """Compute the moments of all `blocks` [n, d] as of one set; only one block is in memory."""
        return sum(map(cls.of, blocks), start=cls())

    def __add__(self, other: Moments) -> Moments:
        """Merge the moments of two sets into those of their union."""
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(
            count, self.mean + step * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> np.ndarray:
        """Return scatter / (n - 1), as np.cov and all published FIDs; EvaluationError for n < 2."""
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least two images, there is {self.count}")
        return self.scatter / (self.count - 1)
