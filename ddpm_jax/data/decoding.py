"""Decode one image to uint8 pixels [h, w, c]: decode, crop, shrink, channels, border.

`open_image` decodes every image that is trained on, held out or compared with, so that training,
figures and evaluation see the same pixels of the same file.

Published FIDs on CelebA and LSUN differ by tens for no other reason than this file, so each step
has one rule:

  orientation      EXIF's, so that a photo is upright.
  16 bits          become 8 by round(x / 257), which maps 0..65535 onto 0..255.
  crop "center"    the largest square in the middle, or rectangle of the shape asked for.
  crop "celeba64"  the crop of the DDIM paper's CelebA-64 (Song et al. 2021): the 128x128 square
                   centred on x=89, y=121 of the 178x218 aligned image, (25, 57)-(153, 185). On
                   aligned images of another size the square scales with the width and is rounded
                   to whole pixels: (12, 28)-(76, 92) on 89x109.
  resize           Pillow's antialiased bilinear filter, as torchvision resizes Pillow images;
                   never to a larger size.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ddpm_jax.errors import DataError

RESIZE = "antialiased bilinear (Pillow)"
# The formats that are read, whatever a file is called, and the names that they go by.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# A file of a few kilobytes can unfold to gigabytes. Above this, Pillow would warn.
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**30 // 12

_ALIGNED_WIDTH, _ALIGNED_HEIGHT = 178, 218  # of CelebA's img_align_celeba
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How files pack samples of 16 bits, in the words of Pillow's unpackers; BGR;16 is 5 + 6 + 5 bits.
_WIDE = re.compile(r"(?!BGR).*;16")
_WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
# Of colour Pillow reads the more significant byte of each sample alone. These are the unpackers for
# the other byte of big-endian samples; of grey and alpha, "RGBA" delivers all four bytes.
_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}

# What Pillow warns of, too many pixels and damaged metadata, is an error here or does not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(
    file: str | Path | BinaryIO, what: str, remedy: str = "repair or remove it"
) -> Image.Image:
    """Decode an image, upright and with 8 bits a channel.

    Args:
      file: a path, or a stream that can seek.
      what: how messages call it.
      remedy: the end of messages.

    Raises:
      DataError: `what` is no regular file, is none of `FORMATS`, is damaged, has too many pixels,
        or has more than 16 bits a channel (more than 8 in colour, but for PNG).
    """
    try:
        with _stream(file, what) as stream, Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"{what} has {image.width}x{image.height} pixels, more than the "
                    f"{MOST_PIXELS:,} that are decoded: shrink it first"
                )
            packing = _packing(image)
            image.load()
            image = _upright(image)
            if image.mode.startswith(("I", "F")) or _WIDE.match(packing):
                return _eight_bits(image, packing, stream, what)
            return image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{what} does not decode as an image (none of {', '.join(FORMATS)}): {remedy}"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # the file system's, not Pillow's
            raise DataError(f"{what} cannot be read ({error.strerror})") from error
        reason = str(error) or type(error).__name__
        raise DataError(f"{what} does not decode as an image ({reason}): {remedy}") from error


def to_channels(image: Image.Image, channels: int, what: str) -> Image.Image:
    """Convert to 8-bit grey (channels=1), RGB (channels=3) or RGBA (channels=4).

    Grey becomes RGB by repetition, and RGB whose channels are equal everywhere becomes grey. What
    has no transparency becomes opaque RGBA. Nothing else is converted silently.

    Raises:
      DataError: colour where grey is wanted, transparency, or more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{what} has more than 8 bits a channel (mode {image.mode}): convert it to 8"
        )
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise DataError(
            f"{what} is partly transparent: flatten it onto a background first, or set channels=4"
        )
    if channels == 3:
        return image.convert("RGB")
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    colours = image.convert("RGB")
    red, *others = (np.asarray(colours.getchannel(name)) for name in "RGB")
    if not all(np.array_equal(red, other) for other in others):
        raise DataError(f"{what} is in colour, channels=1: set channels=3 or convert it to grey")
    return colours.getchannel("R")


def crop_box(
    crop: str, width: int, height: int, what: str, shape: tuple[int, int] = (1, 1)
) -> tuple[int, int, int, int]:
    """Compute the rectangle that `crop` keeps, (left, top, right, bottom) in pixels.

    The head of this file has the rules.

    Args:
      shape: height and width that it is as high and as wide as, in proportion.

    Raises:
      DataError: crop "none" of an image of another shape, or "celeba64" of one without CelebA's
        proportions.
    """
    tall, wide = shape
    if crop == "none":
        if width * tall != height * wide:
            square = "square" if tall == wide else f"in the proportions of {wide}x{tall}"
            remedy = "set crop=center" + " (or celeba64)" * (tall == wide)
            raise DataError(f"{what} is {width}x{height}, not {square}: {remedy}")
        return 0, 0, width, height
    if crop == "center":
        across, down = min(width, height * wide // tall), min(height, width * tall // wide)
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down
    if crop == "celeba64":
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


def fit(image: Image.Image, crop: str, sides: tuple[int, int], what: str) -> Image.Image:
    """Crop `image` to the shape of `sides`, (height, width), and shrink it to them.

    Raises:
      DataError: as `crop_box`, or what the crop leaves is smaller than `sides`.
    """
    height, width = sides
    box = crop_box(crop, image.width, image.height, what, sides)
    across, down = box[2] - box[0], box[3] - box[1]
    if across < width or down < height:
        smaller = f"{across}" if across == down else f"{down},{across} or less"
        raise DataError(
            f"{what} is {image.width}x{image.height}, which leaves {across}x{down} (crop={crop}), "
            f"less than the {width}x{height} asked for; images are never enlarged: "
            f"set image_size={smaller} or remove it"
        )
    return image.crop(box).resize((width, height), Image.Resampling.BILINEAR)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return uint8 [h, w, 1] of a grey image, [h, w, 3] of an RGB one, [h, w, 4] of RGBA."""
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def pad(images: np.ndarray, padding: int) -> np.ndarray:
    """Add a border of zeros (black), `padding` wide on each side, to uint8 [..., h, w, c]."""
    border = [(padding, padding), (padding, padding), (0, 0)]
    return np.pad(images, [(0, 0)] * (images.ndim - 3) + border) if padding else images


@contextlib.contextmanager
def _stream(file: str | Path | BinaryIO, what: str) -> Iterator[BinaryIO]:
    """Open a path for reading, or pass a stream on; opening a pipe would wait for a writer."""
    if not isinstance(file, (str, Path)):
        yield file
        return
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise DataError(f"{what} is no regular file: remove it")
    with open(file, "rb") as stream:
        yield stream


def _packing(image: Image.Image) -> str:
    """Return how the file packs its pixels, in Pillow's words ("RGB;16B"), of an image not loaded.

    WebP has no such word: it is always of 8 bits.
    """
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    packings = {part[0] if isinstance(part, tuple) and part else part for part in arguments}
    return " ".join(sorted(str(packing) for packing in packings))


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF (or XMP) says, and take both off."""
    if blob := image.info.get("exif"):
        _check_exif(blob)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    upright = image.transpose(method) if method is not None else image
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        upright.info.pop(name, None)
    return upright


def _check_exif(blob: bytes) -> None:
    """Raise ValueError unless the first directory of EXIF data is whole.

    Pillow reads what there is of a broken one, and might miss the orientation. EXIF data is a TIFF
    file: "II*\\0" or "MM\\0*", the offset of the directory, there a count and 12 bytes an entry.
    """
    blob = blob.removeprefix(b"Exif\0\0")
    if not blob:
        return
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(blob[:4])
    try:
        if order is None:
            raise ValueError("its EXIF data is damaged")
        (offset,) = struct.unpack_from(f"{order}I", blob, 4)
        (count,) = struct.unpack_from(f"{order}H", blob, offset)
    except struct.error:
        raise ValueError("its EXIF data breaks off") from None
    if len(blob) < offset + 2 + 12 * count:
        raise ValueError("its EXIF data breaks off")


def _eight_bits(image: Image.Image, packing: str, stream: BinaryIO, what: str) -> Image.Image:
    """Scale samples of 16 bits to 8, round(x / 257).

    Pillow decodes grey ones whole. Of colour it keeps the upper byte alone, so the file is decoded
    once more for the lower ones.

    Args:
      image: decoded and upright.
      packing: as `_packing`.
      stream: the file.
      what: how messages call it.

    Raises:
      DataError: samples that are not of 16 bits, or 16-bit colour in another format than PNG.
    """
    if packing in _WIDE_GREY:
        samples = np.asarray(image).astype(np.int64)
    elif packing in _LOW_BYTES:
        low = np.asarray(_decode_again(stream, _LOW_BYTES[packing]), np.int64)
        if packing == "LA;16B":
            samples = 256 * low[..., ::2] + low[..., 1::2]
        else:
            samples = 256 * np.asarray(image, np.int64) + low
    else:
        raise DataError(f"{what} has more than 8 bits a channel ({packing}): convert it to 8")
    pixels = _scale(samples)
    if "transparency" in image.info:  # PNG names one colour that is transparent, in 16 bits
        clear = samples == np.array(image.info["transparency"])
        clear = clear.all(-1) if clear.ndim == 3 else clear
        pixels = np.dstack([pixels, np.where(clear, 0, 255).astype(np.uint8)])
    return Image.fromarray(pixels)


def _decode_again(stream: BinaryIO, packing: str) -> Image.Image:
    """Decode a file from its beginning with another unpacker, upright."""
    stream.seek(0)
    with Image.open(stream, formats=FORMATS) as image:
        image.tile = [(*tile[:3], packing) for tile in image.tile]
        image.load()
        return _upright(image)


def _scale(samples: np.ndarray) -> np.ndarray:
    """Return round(x / 257) of x in 0..65535, as uint8; no x lies half way between two results."""
    return ((samples + 128) // 257).astype(np.uint8)
