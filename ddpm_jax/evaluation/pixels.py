"""The Frechet distance of the pixels themselves: for images so small that Inception has nothing to see in them.

It knows means and covariances of pixels and no more: not what a picture shows. Comparable with nothing but itself.
"""

from __future__ import annotations

import numpy as np

from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import BLOCK
from ddpm_jax.evaluation.frechet import Gaussian, frechet_distance
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.moments import Moments

MOST = 4096  # numbers an image: the covariance of more would not fit, nor be known from a few thousand images


def pixel_distance(samples: ImageSet, real: ImageSet) -> float:
    """d^2 of Gaussians fitted to the pixels of both sets, scaled to [-1, 1].

    Raises:
      EvaluationError: fewer than two images, sets of different shapes, or more than MOST numbers an image.
    """
    if samples.shape != real.shape:
        raise EvaluationError(f"pixels: images of {[*samples.shape]} and of {[*real.shape]} cannot be compared")
    if np.prod(samples.shape) > MOST:
        raise EvaluationError(f"pixels: images of {[*samples.shape]} are too large for it: take fid")
    return frechet_distance(*(Gaussian.of(_moments(images)) for images in (samples, real)))


def _moments(images: ImageSet) -> Moments:
    total: Moments | None = None
    for start in range(0, images.count, BLOCK):
        rows = images.read(np.arange(start, min(start + BLOCK, images.count)))
        found = Moments.of(rows.reshape(len(rows), -1) / 127.5 - 1)
        total = found if total is None else total + found
    if total is None:
        raise EvaluationError("pixels: there are no images")
    return total
