"""Read the real images and masks that figures start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax import images
from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.folder import decode_file
from ddpm_jax.data.source import Source
from ddpm_jax.errors import ConfigError, DataError


def images_of(source: Source, indices: Sequence[int], what: str) -> np.ndarray:
    """Read images of a split by number, float32 in [-1, 1].

    Raises:
      DataError: a number outside the split.
    """
    for index in indices:
        if not 0 <= index < len(source):
            raise DataError(f"indices={index}: {what} has images 0..{len(source) - 1}")
    return images.from_uint8(source.read(np.asarray(indices))["image"])


def images_from(paths: Sequence[Path], data: DataConfig, crop: str | None = None) -> np.ndarray:
    """Read image files, float32 in [-1, 1], cropped, shrunk and padded as the run's own.

    Args:
      crop: how the run's images were cropped before it saw them. Without it, and without
        `data.crop`, the largest square in the middle is taken.

    Raises:
      DataError: a file that is no image, or smaller than the run's images.
    """
    (height, width), levels = data.inner_sides, []
    crops = [name for name in (data.crop, crop, "center") if name not in (None, "none")]
    for path in paths:
        # An image of the run's own size is one that was cropped already.
        as_it_is = decoding.open_image(path, str(path)).size == (width, height)
        pixels = decoding.to_pixels(
            decode_file(path, "none" if as_it_is else crops[0], (height, width), data.channels)
        )
        levels.append(decoding.pad(pixels, data.padding))
    return images.from_uint8(np.stack(levels))


def hole(sides: tuple[int, int], box: Sequence[int]) -> np.ndarray:
    """Make the mask of an image but for `box` (top, left, height, width), float32 [h,w,1].

    Raises:
      ConfigError: a box that is not inside the image.
    """
    top, left, height, width = box
    fits = top + height <= sides[0] and left + width <= sides[1]
    if not (top >= 0 <= left and height >= 1 <= width and fits):
        size = f"{sides[1]}x{sides[0]}"
        raise ConfigError(
            f"hole={top},{left},{height},{width}: top,left,height,width within {size}"
        )
    mask = np.ones((*sides, 1), np.float32)
    mask[top : top + height, left : left + width] = 0
    return mask


def mask_from(path: Path, sides: tuple[int, int]) -> np.ndarray:
    """Read a mask from a grey PNG, white where the image is to be filled in.

    Raises:
      DataError: a picture of another kind or size.
    """
    levels = images.load_png(path)
    if levels.shape != (*sides, 1):
        size = f"{sides[1]}x{sides[0]}"
        raise DataError(f"{path}: a mask is a grey PNG of {size}, this one is {list(levels.shape)}")
    return (levels <= 127).astype(np.float32)
