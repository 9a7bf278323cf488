"""Make pictures of arrays: 8-bit levels, tiles, and the files they end in.

Everywhere in this project an image in memory is [h, w, c] with c = 1 (grey), 3 (RGB) or 4 (RGBA).
The network sees floats in [-1, 1], files hold uint8 in 0..255, and `to_uint8` and `from_uint8` are
the one way between the two. Files appear whole or not at all.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.files import open_file, replacing

LEAST_MILLISECONDS = 20  # of a frame: viewers slow shorter ones down to 100
MOST_DRAWN = 2**30  # pixels of a picture that is made
MOST_PIXELS = 2**26  # of a PNG file that is read: a few kilobytes can unfold to gigabytes


class ImageError(UserError):
    """An array that is no picture, or a picture file that cannot be read or written as asked."""


# ------------------------------------------------------------------------------------------- values


def to_uint8(x: ArrayLike) -> np.ndarray:
    """Return the nearest of the 256 levels of each value in [-1, 1], any shape.

        round(127.5 (x + 1)) clipped to 0..255

    Rounded, because truncation darkens every picture by half a level; clipped, because a cast alone
    wraps around.

    Raises:
      ImageError: `x` holds NaN, which no level stands for, or is already an integer array.
    """
    x = np.asarray(x)
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        raise ImageError(f"to_uint8: expected floats in [-1, 1], got {x.dtype}")
    levels = (x.astype(np.float32) + 1.0) * 127.5
    if np.isnan(levels).any():
        raise ImageError(f"to_uint8: {np.isnan(levels).sum()} of {levels.size} values are NaN")
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def from_uint8(levels: ArrayLike) -> np.ndarray:
    """Return levels / 127.5 - 1 as float32 in [-1, 1], as section 3.3 of the paper scales its data.

    Raises:
      ImageError: `levels` is not uint8.
    """
    levels = np.asarray(levels)
    if levels.dtype != np.uint8:
        raise ImageError(f"from_uint8: expected uint8, got {levels.dtype}")
    return levels.astype(np.float32) / np.float32(127.5) - np.float32(1)


# -------------------------------------------------------------------------------------------- tiles


def grid(
    images: ArrayLike,
    columns: int | None = None,
    gap: int = 2,
    scale: int = 1,
    background: int = 255,
) -> np.ndarray:
    """Tile n images into one picture, row by row; the rest of the last row stays background.

    Args:
      images: uint8 [n, h, w, c].
      columns: images a row; by default the least whose square holds them all.
      gap: pixels between neighbours.
      scale: each pixel of an image becomes scale x scale pixels, so that 8x8 digits can be seen.
      background: level of the gaps, 0..255.

    Returns:
      uint8 [rows * h * scale + (rows - 1) * gap, columns * w * scale + (columns - 1) * gap, c].
    """
    images = _checked(images, "grid", "n h w c")
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    for name, value, least in (("columns", columns, 1), ("gap", gap, 0), ("scale", scale, 1)):
        if value < least:
            raise ImageError(f"grid: {name}={value} must be at least {least}")
    if not 0 <= background <= 255:
        raise ImageError(f"grid: background={background} must be in 0..255")
    rows, h, w = math.ceil(n / columns), h * scale, w * scale
    check_picture(rows * (h + gap) * columns * (w + gap))
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), background, np.uint8)
    for i, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas


def check_picture(pixels: int) -> None:
    """Raise ImageError for a picture of more than MOST_DRAWN pixels: memory would not hold it."""
    if pixels > MOST_DRAWN:
        raise ImageError(
            f"a picture of {pixels:,} pixels is more than the {MOST_DRAWN:,} that are drawn: "
            "a smaller scale or fewer images"
        )


# -------------------------------------------------------------------------------------------- files


def encode_png(image: ArrayLike) -> bytes:
    """Return the PNG file of a uint8 image [h, w, c]."""
    buffer = io.BytesIO()
    _pil(image, "encode_png").save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, image: ArrayLike) -> None:
    """Write a uint8 image [h, w, c].

    Raises:
      ImageError: another dtype or shape, or a path that does not end in .png.
      OSError: the file cannot be written.
    """
    _suffix(path, ".png")
    with replacing(path) as file:
        file.write(encode_png(image))


def load_png(path: str | Path) -> np.ndarray:
    """Read the uint8 image [h, w, c] of a grey, RGB or RGBA PNG file.

    Raises:
      ImageError: no such file, no PNG, a damaged one, or one of another kind (palette, grey with
        transparency, 16 bits).
    """
    try:
        with open_file(path) as file, Image.open(file, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(f"{path}: {image.width}x{image.height} pixels are too many")
            if image.mode not in ("L", "RGB", "RGBA"):
                raise ImageError(
                    f"{path}: a PNG of mode {image.mode}; convert it to 8-bit grey, RGB or RGBA"
                )
            pixels = np.array(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except ImageError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ImageError(f"{path}: not a readable PNG file ({error})") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def save_animation(path: str | Path, frames: ArrayLike, milliseconds: int = 100) -> None:
    """Write uint8 frames [n, h, w, c] as an endless .gif (256 colours) or .webp (lossless).

    Args:
      milliseconds: how long each frame stays.

    Raises:
      ImageError: another dtype or shape, another suffix, or a duration below 20 ms, which viewers
        slow down to 100.
      OSError: the file cannot be written.
    """
    suffix = _suffix(path, ".gif", ".webp")
    frames = _checked(frames, "save_animation", "n h w c")
    if milliseconds < LEAST_MILLISECONDS:
        raise ImageError(
            f"save_animation: milliseconds={milliseconds} must be at least {LEAST_MILLISECONDS}"
        )
    first, *rest = (_pil(frame, "save_animation") for frame in frames)
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    if suffix == ".webp":
        options["lossless"] = True
    with replacing(path) as file:
        first.save(file, format=suffix[1:].upper(), **options)


def save_npz(path: str | Path, images: ArrayLike, labels: ArrayLike | None = None) -> None:
    """Write samples as public evaluators read them.

    `arr_0` is uint8 [n, h, w, c] and, with labels, `arr_1` is [n].

    Raises:
      ImageError: another dtype or shape, or a path that does not end in .npz.
      OSError: the file cannot be written.
    """
    _suffix(path, ".npz")
    images = _checked(images, "save_npz", "n h w c")
    arrays = [images]
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ImageError(f"save_npz: expected {len(images)} integer labels, got {got}")
        arrays.append(labels)
    with replacing(path) as file:
        np.savez(file, *arrays)


def _suffix(path: str | Path, *accepted: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise ImageError(f"{path}: the name must end in {' or '.join(accepted)}")
    return suffix


def _checked(images: ArrayLike, where: str, shape: str) -> np.ndarray:
    """Return `images` on the host, if it is uint8 of `shape`, "h w c" or "n h w c"."""
    images = np.asarray(images)
    dimensions = len(shape.split())
    if (
        images.dtype != np.uint8
        or images.ndim != dimensions
        or images.shape[-1] not in (1, 3, 4)
        or not images.size
    ):
        expected = f"uint8 [{shape.replace(' ', ', ')}] with c = 1, 3 or 4"
        raise ImageError(f"{where}: expected {expected}, got {images.dtype} {list(images.shape)}")
    return images


def _pil(image: ArrayLike, where: str) -> Image.Image:
    image = _checked(image, where, "h w c")
    return Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)


def scale_images(image: jax.Array) -> jax.Array:
    """Scale uint8 levels k to k/127.5 - 1, float32 in [-1, 1], on the device."""
    return image.astype(jnp.float32) / 127.5 - 1
