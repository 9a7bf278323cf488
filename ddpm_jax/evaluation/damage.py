"""Real images made worse by a known amount: a metric that does not grow with it measures something else."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage


def blurred(images: np.ndarray, deviation: float) -> np.ndarray:
    """uint8 [n,h,w,c] under a Gaussian of `deviation` pixels, borders mirrored."""
    soft = ndimage.gaussian_filter(images.astype(np.float64), (0, deviation, deviation, 0), mode="reflect")
    return np.rint(soft).astype(np.uint8)


def noised(images: np.ndarray, deviation: float) -> np.ndarray:
    """uint8 [n,h,w,c] with Gaussian noise of `deviation` levels of 0..255, the same for the same shape."""
    noise = np.random.Generator(np.random.Philox(0)).normal(0, deviation, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [n,h,w,3] through JPEG of `quality`, 1 (worst) to 95, as Pillow writes it."""
    out = np.empty_like(images)
    for image, row in zip(images, out):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
        with Image.open(buffer) as found:
            row[...] = np.asarray(found)
    return out


# The damage in three strengths, mild first.
DAMAGES: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]]] = {
    "blur, pixels": (blurred, (0.5, 1.0, 2.0)),
    "noise, levels": (noised, (8, 16, 32)),
    "JPEG, quality": (jpeg, (75, 40, 10)),
}
