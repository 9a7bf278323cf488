"""Measure the Frechet distance of the pixels themselves, where Inception has nothing to see.

It is for very small images. It knows means and covariances of pixels and no more: not what a
picture shows. It compares with nothing but itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception.features import BLOCK
from ddpm_jax.evaluation.metrics.frechet import Gaussian, frechet_distance
from ddpm_jax.evaluation.metrics.moments import Moments

# Numbers an image: the covariance of more would not fit, nor be known from a few thousand images.
MOST = 4096


def check_shapes(samples: tuple[int, int, int], real: tuple[int, int, int]) -> None:
    """Raise EvaluationError unless images of these shapes [h,w,c] have a distance.

    It is for the time before anything is drawn.
    """
    if samples != real:
        raise EvaluationError(f"pixels: images of {[*samples]} and of {[*real]} cannot be compared")
    if np.prod(samples) > MOST:
        raise EvaluationError(f"pixels: images of {[*samples]} are too large for it: take fid")


def pixel_distance(samples: ImageSet, real: ImageSet) -> float:
    """Compute d^2 of Gaussians fitted to the pixels of both sets, scaled to [-1, 1].

    Raises:
      EvaluationError: fewer than two images, or as `check_shapes`.
    """
    check_shapes(samples.shape, real.shape)
    return frechet_distance(*(Gaussian.of(_moments(images)) for images in (samples, real)))


def _moments(images: ImageSet) -> Moments:
    return Moments.over(
        pixels.reshape(len(pixels), -1) / 127.5 - 1 for _, pixels in images.blocks(BLOCK)
    )


def report(
    samples: ImageSet, real: ImageSet, split: str, protocol: dict[str, Any], *, whole: bool
) -> dict[str, Any]:
    """Print the distance of `samples` to a split of real images, and return the record.

    Args:
      protocol: what any record says first.
      whole: whether `real` are all images of the split.
    """
    distance = pixel_distance(samples, real)
    print(
        f"{samples.count:,} images: {samples.describe()}; "
        f"reference: {real.count:,} images of {split}"
    )
    print(f"{'pixels':16}{distance:12.5f}  (Frechet, [-1, 1]; not a FID)")
    record = {"metric": "pixels", "value": distance} | protocol | {"num_images": samples.count}
    reference = {"split": split, "count": real.count, "whole": whole}
    return record | {"samples": samples.description, "reference": reference}
