"""Pictures out of arrays: the 8-bit grid of values, tiles, and the files they end in.

Everywhere in this project an image in memory is [h, w, c] with c = 1 (grey) or 3 (RGB); the network sees floats in
[-1, 1], files hold uint8 in 0..255, and `to_uint8` and `from_uint8` are the one way between the two. Files appear
whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from ddpm_jax.errors import UserError


class ImageError(UserError):
    """An array that is no picture, or a picture file that cannot be read or written as asked."""


# ---------------------------------------------------------------------------------------------- values


def to_uint8(x: ArrayLike) -> np.ndarray:
    """round(127.5 (x + 1)) clipped to 0..255, any shape: the nearest of the 256 levels of a value in [-1, 1].

    Rounded, because truncation darkens every picture by half a level; clipped, because a cast alone wraps around.

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
    """levels / 127.5 - 1 as float32 in [-1, 1]: how section 3.3 of the paper scales its data.

    Raises:
      ImageError: `levels` is not uint8.
    """
    levels = np.asarray(levels)
    if levels.dtype != np.uint8:
        raise ImageError(f"from_uint8: expected uint8, got {levels.dtype}")
    return levels.astype(np.float32) / np.float32(127.5) - np.float32(1)


# ---------------------------------------------------------------------------------------------- tiles


def grid(images: ArrayLike, columns: int | None = None, gap: int = 2, scale: int = 1, background: int = 255) -> np.ndarray:
    """One picture of n images, row by row, the rest of the last row left as background.

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
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), background, np.uint8)
    for i, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas


# ---------------------------------------------------------------------------------------------- files


def encode_png(image: ArrayLike) -> bytes:
    """The PNG file of a uint8 image [h, w, c]."""
    buffer = io.BytesIO()
    _pil(image, "encode_png").save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, image: ArrayLike) -> None:
    """Writes a uint8 image [h, w, c].

    Raises:
      ImageError: another dtype or shape, or a path that does not end in .png.
      OSError: the file cannot be written.
    """
    _suffix(path, ".png")
    with replacing(path) as file:
        file.write(encode_png(image))


def load_png(path: str | Path) -> np.ndarray:
    """The uint8 image [h, w, c] of a grey or RGB PNG file.

    Raises:
      ImageError: no such file, no PNG, a damaged one, or one of another kind (palette, transparency, 16 bits).
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("L", "RGB"):
                raise ImageError(f"{path}: a PNG of mode {image.mode}; convert it to 8-bit grey or RGB")
            pixels = np.array(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (UnidentifiedImageError, SyntaxError, OSError) as error:  # PIL's names for what is damaged
        raise ImageError(f"{path}: not a readable PNG file ({error})") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def save_animation(path: str | Path, frames: ArrayLike, milliseconds: int = 100) -> None:
    """Writes uint8 frames [n, h, w, c], `milliseconds` each, as an endless .gif (256 colours) or .webp (lossless).

    Raises:
      ImageError: another dtype or shape, another suffix, or a duration below 20 ms, which viewers slow down to 100.
      OSError: the file cannot be written.
    """
    suffix = _suffix(path, ".gif", ".webp")
    frames = _checked(frames, "save_animation", "n h w c")
    if milliseconds < 20:
        raise ImageError(f"save_animation: milliseconds={milliseconds} must be at least 20")
    first, *rest = (_pil(frame, "save_animation") for frame in frames)
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    if suffix == ".webp":
        options["lossless"] = True
    with replacing(path) as file:
        first.save(file, format=suffix[1:].upper(), **options)


def save_npz(path: str | Path, images: ArrayLike, labels: ArrayLike | None = None) -> None:
    """Writes samples as public evaluators read them: `arr_0` uint8 [n, h, w, c] and, with labels, `arr_1` [n].

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


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once the block ends well; after an error `path` is as it was.

    Raises:
      OSError: see `naming`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # nothing to remove after success, or where the folder cannot be made
                temporary.unlink()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes an OSError of the block, such as a full disk, one that names the file: writing to it does not by itself."""
    try:
        yield
    except OSError as error:
        what = f"could not be written: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, what, str(path)) from error


def _suffix(path: str | Path, *accepted: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise ImageError(f"{path}: the name must end in {' or '.join(accepted)}")
    return suffix


def _checked(images: ArrayLike, where: str, shape: str) -> np.ndarray:
    """`images` as an array on the host, if it has `shape` ("h w c" or "n h w c") and is uint8."""
    images = np.asarray(images)
    dimensions = len(shape.split())
    if images.dtype != np.uint8 or images.ndim != dimensions or images.shape[-1] not in (1, 3) or not images.size:
        expected = f"uint8 [{shape.replace(' ', ', ')}] with c = 1 or 3"
        raise ImageError(f"{where}: expected {expected}, got {images.dtype} {list(images.shape)}")
    return images


def _pil(image: ArrayLike, where: str) -> Image.Image:
    image = _checked(image, where, "h w c")
    return Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)
