"""Compute the KID, the squared maximum mean discrepancy of two sets (Binkowski et al. 2018).

    KID = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)
    k(a, b) = (a.b / d + 1)^3

It has no bias at any N. All pairs are used, once each; the usual mean over random subsets estimates
the same number with more noise. The standard error is that of the jackknife: each set is dealt into
groups, and group g of both is left out in turn. Where both sets are of the very same distribution
it is too large, by a factor of 2^1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpm_jax.errors import EvaluationError

GROUPS = 20


@dataclass(frozen=True)
class Kid:
    """The KID and its standard error."""

    mean: float
    standard_error: float


def kernel_inception_distance(x: np.ndarray, y: np.ndarray, groups: int = GROUPS) -> Kid:
    """Compare features x [n,d] and y [m,d], in a mixed order: every `groups`-th row is a group.

    Raises:
      EvaluationError: fewer than twice as many as groups, or features of different sizes.
    """
    if x.shape[1] != y.shape[1]:
        raise EvaluationError(
            f"features of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared"
        )
    if min(len(x), len(y)) < 2 * groups:
        raise EvaluationError(
            f"KID: {min(len(x), len(y))} images; at least {2 * groups} of each are needed"
        )
    parts = [
        [rows.astype(np.float64) for rows in (z[g::groups] for g in range(groups))] for z in (x, y)
    ]
    sizes = [np.array([len(rows) for rows in part]) for part in parts]
    same = [_sums(part, part) for part in parts]
    for part, sums in zip(parts, same):
        sums[np.diag_indices(groups)] -= [_kernel_of_itself(rows).sum() for rows in part]
    across = _sums(*parts)

    def statistic(keep: np.ndarray) -> float:
        n, m = (int(size[keep].sum()) for size in sizes)
        inside = [sums[np.ix_(keep, keep)].sum() for sums in (*same, across)]
        return float(
            inside[0] / (n * (n - 1)) + inside[1] / (m * (m - 1)) - 2 * inside[2] / (n * m)
        )

    every = np.arange(groups)
    left_out = np.array([statistic(np.delete(every, g)) for g in every])
    variance = (groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum()
    return Kid(statistic(every), float(np.sqrt(variance)))


def _sums(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Sum the kernel over all pairs of two groups, float64 [groups, groups]."""
    starts = np.cumsum([0, *(len(b) for b in second[:-1])])
    together = np.concatenate(second)
    return np.array([np.add.reduceat(_kernel(a, together).sum(axis=0), starts) for a in first])


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_of_itself(a: np.ndarray) -> np.ndarray:
    return ((a**2).sum(axis=1) / a.shape[1] + 1) ** 3
