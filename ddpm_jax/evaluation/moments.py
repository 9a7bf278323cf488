"""Mean and covariance of features, block by block, in float64.

Float32 sums lose the digits that FIDs differ in, and 50,000 x 2048 numbers at once are more than is needed: of each block its
count, mean and scatter are kept and merged (Chan, Golub & LeVeque 1983), which is exact whatever the blocks and their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpm_jax.evaluation.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Moments:
    """count n, mean [d], scatter [d,d] = sum over n of (x - mean)(x - mean)^T."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of one block [n, d], n at least 1."""
        x = features.astype(np.float64)
        mean = x.mean(axis=0)
        x -= mean
        return cls(len(x), mean, x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """scatter / (n - 1), as np.cov and all published FIDs; EvaluationError for n < 2."""
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least two images, there is {self.count}")
        return self.scatter / (self.count - 1)
