"""Compute precision and recall, density and coverage by distances to nearest neighbours.

(Kynkaanniemi et al. 2019; Naeem et al. 2020.) B_k(x) is the ball around x that reaches to the k-th
nearest other member of its set.

    precision  share of samples inside any B_3 of a real image
    recall     share of real images inside any B_3 of a sample
    density    mean number of B_5 of real images that a sample is inside of, over 5
    coverage   share of real images whose B_5 holds a sample

All depend on how many images there are, and on the features: numbers by VGG16, or of other counts,
are other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpm_jax.errors import EvaluationError

PRECISION_K, DENSITY_K = 3, 5
_ROWS = 500  # of distances at once


@dataclass(frozen=True)
class Prdc:
    """The four numbers, as the head of this file defines them."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(samples: np.ndarray, real: np.ndarray) -> Prdc:
    """Compare features [n,d] of samples and [m,d] of real images.

    Raises:
      EvaluationError: no more images than neighbours, or features of different sizes.
    """
    if samples.shape[1] != real.shape[1]:
        raise EvaluationError(
            f"features of {samples.shape[1]} and of {real.shape[1]} numbers cannot be compared"
        )
    least = min(len(samples), len(real))
    if least <= DENSITY_K:
        raise EvaluationError(
            f"precision and recall: {least} images; more than {DENSITY_K} of each are needed"
        )
    x, y = (features.astype(np.float64) for features in (samples, real))
    x_radii, y_radii = _radii(x), _radii(y)
    inside_real = np.zeros(len(x), bool)
    balls = np.zeros(len(x))
    inside_samples, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for start in range(0, len(y), _ROWS):
        rows = slice(start, start + _ROWS)
        squares = squared_distances(y[rows], x)
        inside_real |= (squares <= y_radii[rows, PRECISION_K - 1, None]).any(axis=0)
        inside_samples[rows] = (squares <= x_radii[:, PRECISION_K - 1]).any(axis=1)
        within = squares < y_radii[rows, DENSITY_K - 1, None]
        balls += within.sum(axis=0)
        covered[rows] = within.any(axis=1)
    return Prdc(
        float(inside_real.mean()),
        float(inside_samples.mean()),
        float(balls.mean() / DENSITY_K),
        float(covered.mean()),
    )


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return float64 [n, m] of [n,d] and [m,d]; rounding never makes one negative."""
    return np.maximum((a**2).sum(axis=1)[:, None] - 2 * (a @ b.T) + (b**2).sum(axis=1), 0)


def _radii(x: np.ndarray) -> np.ndarray:
    """Return squared distances to the 1st to k-th nearest other member, [n, DENSITY_K]."""
    radii = np.empty((len(x), DENSITY_K))
    for start in range(0, len(x), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(x)))
        squares = squared_distances(x[rows], x)
        squares[np.arange(len(rows)), rows] = np.inf  # itself, wherever rounding would sort it
        radii[rows] = np.sort(np.partition(squares, DENSITY_K - 1, axis=1)[:, :DENSITY_K], axis=1)
    return radii
