"""Damage real images by a known amount: a metric that does not grow with it measures nothing."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage


def blur(images: np.ndarray, deviation: float) -> np.ndarray:
    """Blur uint8 [n,h,w,c] by a Gaussian of `deviation` pixels, borders mirrored."""
    soft = ndimage.gaussian_filter(
        images.astype(np.float64), (0, deviation, deviation, 0), mode="reflect"
    )
    return np.rint(soft).astype(np.uint8)


def add_noise(images: np.ndarray, deviation: float) -> np.ndarray:
    """Add Gaussian noise of `deviation` levels of 0..255 to uint8 [n,h,w,c], equal at each call."""
    noise = np.random.Generator(np.random.Philox(0)).normal(0, deviation, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def compress_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Send uint8 [n,h,w,3] through JPEG of `quality`, 1 (worst) to 95, as Pillow writes it."""
    out = np.empty_like(images)
    for image, row in zip(images, out):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
        with Image.open(buffer) as reopened:
            row[...] = np.asarray(reopened)
    return out


# The damage in three strengths, mild first.
DAMAGES: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]]] = {
    "blur, pixels": (blur, (0.5, 1.0, 2.0)),
    "noise, levels": (add_noise, (8, 16, 32)),
    "JPEG, quality": (compress_jpeg, (75, 40, 10)),
}
