"""Compute the Frechet distance of two Gaussians, and FID-infinity.

Fitted to Inception features it is the FID (Heusel et al. 2017):

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

The last trace is the sum of the singular values of S1^1/2 S2^1/2. Symmetric roots come from
eigendecompositions, so nothing is ever imaginary or NaN, whatever the rank. Singular values, unlike
roots of the eigenvalues of a product, are right to rounding where covariances are singular (fewer
images than features).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.metrics.moments import Moments

LEAST = 20  # images that a limit can be told from


class Gaussian:
    """A Gaussian: mean [d] and covariance [d,d], with its symmetric root.

    Raises:
      EvaluationError: shapes that do not fit, numbers that are not finite, or a matrix that is no
        covariance.
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        self.mean, self.covariance = (
            np.asarray(mean, np.float64),
            np.asarray(covariance, np.float64),
        )
        width = self.mean.size
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise EvaluationError(
                f"statistics: mean {list(self.mean.shape)} "
                f"and covariance {list(self.covariance.shape)} do not fit"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise EvaluationError("statistics: numbers that are not finite")
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        lopsided = np.abs(self.covariance - self.covariance.T).max()
        if values[0] < -1e-5 * abs(values[-1]) or lopsided > 1e-5 * abs(values[-1]):
            raise EvaluationError(
                "statistics: the covariance is not symmetric and positive, so it is no covariance"
            )
        # Of the null space, where the root would blow them up.
        values[values < width * np.finfo(np.float64).eps * values[-1]] = 0
        self.root = (vectors * np.sqrt(values)) @ vectors.T

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """Fit a Gaussian to features by their moments."""
        return cls(moments.mean, moments.covariance)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Compute d^2, at least 0; EvaluationError for features of different sizes."""
    if first.mean.size != second.mean.size:
        raise EvaluationError(
            f"features of {first.mean.size} and of {second.mean.size} numbers cannot be compared"
        )
    between = np.linalg.svd(first.root @ second.root, compute_uv=False).sum()
    step = first.mean - second.mean
    return max(
        float(step @ step + np.trace(first.covariance) + np.trace(second.covariance) - 2 * between),
        0.0,
    )


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """A limit in the number of images.

    Attributes:
      distance: for as many images as there could be.
      standard_error: from the fit.
      counts, distances: the points of the fit.
    """

    distance: float
    standard_error: float
    counts: np.ndarray
    distances: np.ndarray


def frechet_infinity(
    features: np.ndarray, reference: Gaussian, *, points: int = 10, seed: int = 0
) -> Extrapolation:
    """Extrapolate the FID to infinitely many samples (Chong & Forsyth 2020).

    It is linear in 1/N to first order, so a line in 1/N is fitted and read at 0. Each of the
    `points` N, from N/4 to N in equal steps, takes a random subset. Only the bias of the samples
    goes away; that of the reference, which is one and the same for all models, stays.

    Args:
      features: [N, d], N at least LEAST.
    """
    count = len(features)
    if count < LEAST:
        raise EvaluationError(
            f"FID-infinity: {count} images; at least {LEAST} are needed to extrapolate"
        )
    generator = np.random.Generator(np.random.Philox(seed))
    counts = np.rint(np.linspace(count / 4, count, points)).astype(int)
    distances = []
    for size in counts:
        chosen = np.sort(generator.permutation(count)[:size])
        distances.append(frechet_distance(Gaussian.of(Moments.of(features[chosen])), reference))
    design = np.stack([np.ones(points), 1 / counts], axis=1)
    values = np.array(distances)
    fit, *_ = np.linalg.lstsq(design, values)
    residual = values - design @ fit
    covariance = np.linalg.inv(design.T @ design) * (residual @ residual) / max(points - 2, 1)
    return Extrapolation(float(fit[0]), float(np.sqrt(covariance[0, 0])), counts, values)
