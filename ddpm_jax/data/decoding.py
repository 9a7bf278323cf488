"""From the bytes of one image to uint8 pixels [h, w, c]: decode, crop, shrink, channels, border.

Published FIDs on CelebA and LSUN differ by tens for no other reason than this file, so each step has one rule:

  crop "center"    the largest square in the middle.
  crop "celeba64"  the crop of the DDIM paper's CelebA-64 (Song et al. 2021): the 128x128 square centred on x=89, y=121
                   of the 178x218 aligned image, that is (25, 57)-(153, 185). On aligned images of another size the
                   square scales with the width and is rounded to whole pixels: (12, 28)-(76, 92) on 89x109.
  resize           Pillow's antialiased bilinear filter, as torchvision resizes Pillow images; never to a larger size.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpm_jax.data.errors import DataError

RESIZE = "antialiased bilinear (Pillow)"
_ALIGNED_WIDTH, _ALIGNED_HEIGHT = 178, 218  # of CelebA's img_align_celeba


def open_image(file: str | Path | BinaryIO, what: str, remedy: str = "repair or remove it") -> Image.Image:
    """The decoded image.

    Raises:
      DataError: `what` does not decode, with Pillow's reason and the remedy.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} does not decode as an image ({reason}): {remedy}") from error


def to_channels(image: Image.Image, channels: int, what: str) -> Image.Image:
    """8-bit grey (channels=1) or RGB (channels=3). Grey becomes RGB by repetition; nothing else is converted silently.

    Raises:
      DataError: colour where grey is wanted, transparency, or more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{what} has more than 8 bits a channel (mode {image.mode}): convert it to 8")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise DataError(f"{what} is partly transparent: flatten it onto a background first")
    if channels == 1 and image.mode not in ("1", "L", "LA"):
        raise DataError(f"{what} is in colour, channels=1: set channels=3 or convert it to grey")
    return image.convert("L" if channels == 1 else "RGB")


def crop_box(crop: str, width: int, height: int, what: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of the square that `crop` keeps; see the head of this file.

    Raises:
      DataError: crop "none" of an image that is not square, or "celeba64" of one without CelebA's proportions.
    """
    if crop == "none":
        if width != height:
            raise DataError(f"{what} is {width}x{height}, not square: set crop=center (or celeba64)")
        left, top, side = 0, 0, width
    elif crop == "center":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    elif crop == "celeba64":
        scale = width / _ALIGNED_WIDTH
        if abs(height - scale * _ALIGNED_HEIGHT) > 1:
            raise DataError(
                f"{what} is {width}x{height}; crop=celeba64 is for aligned CelebA images, "
                f"{_ALIGNED_WIDTH}x{_ALIGNED_HEIGHT} or smaller in proportion: set crop=center"
            )
        left, top, side = round(25 * scale), round(57 * scale), round(128 * scale)
    else:
        raise DataError(f"crop={crop}: one of none, center, celeba64")
    return left, top, left + side, top + side


def fit(image: Image.Image, crop: str, size: int, what: str) -> Image.Image:
    """`image` cropped to a square and shrunk to size x size.

    Raises:
      DataError: as `crop_box`, or the square is smaller than `size`.
    """
    box = crop_box(crop, image.width, image.height, what)
    side = box[2] - box[0]
    if side < size:
        raise DataError(
            f"{what} is {image.width}x{image.height}, which leaves {side}x{side} (crop={crop}), less than the "
            f"{size}x{size} asked for; images are never enlarged: set image_size={side} or remove it"
        )
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 1] of a grey image, [h, w, 3] of an RGB one."""
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def pad(images: np.ndarray, padding: int) -> np.ndarray:
    """uint8 [..., h, w, c] with a border of zeros (black), `padding` wide on each side."""
    border = [(padding, padding), (padding, padding), (0, 0)]
    return np.pad(images, [(0, 0)] * (images.ndim - 3) + border) if padding else images
