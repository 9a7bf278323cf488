"""Images to be scored, wherever they come from: a split of a data set, a folder, an .npz of other people's samples.

All are uint8 [n,h,w,c] at their own size. Nothing is resized, cropped or scaled on the way in: how that is done moves a FID more
than most papers do, so it stays with whoever made the images.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.sources import Source, list_images
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.shards import PROTOCOL, flat


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`read(indices)` gives uint8 [n,h,w,c]; `description` is what a record says about where they are from."""

    description: dict[str, Any]
    shape: tuple[int, int, int]
    count: int
    read: Callable[[np.ndarray], np.ndarray]

    def check_count(self, what: str) -> None:
        """EvaluationError for fewer than two images."""
        if self.count < 2:
            raise EvaluationError(f"{what}: {self.count} image(s); a distribution needs at least two")

    def describe(self) -> str:
        """One line for people."""
        return ", ".join(
            f"{name.rpartition('.')[2]} {value}" for name, value in flat(self.description).items() if value is not None
        )

    def first(self, count: int) -> ImageSet:
        """The first `count` images, or all if there are fewer."""
        return dataclasses.replace(self, count=min(count, self.count))


def of_split(source: Source, data: DataConfig, split: str) -> ImageSet:
    """A split as it is, un-augmented."""
    description = {
        "data": data.name if data.name != "folder" else f"folder {Path(data.path).name}",
        "split": split,
        "image_size": data.image_size,
        "channels": data.channels,
        "padding": data.padding,
        "crop": data.crop,
        "resize": decoding.RESIZE if data.crop != "none" else "none",
        "pixels": "uint8, no flips",
    }
    return ImageSet(description, source.image_shape, len(source), lambda indices: source.read(indices)["image"])


def of_array(images: np.ndarray, description: dict[str, Any]) -> ImageSet:
    """Images in memory or mapped into it.

    Raises:
      EvaluationError: not uint8 [n,h,w,c], or values that only look like 8-bit images.
    """
    what = description.get("file", "images")
    if images.dtype != np.uint8:
        raise EvaluationError(
            f"{what}: pixels are {images.dtype}; FID is of 8-bit images, so save uint8 0..255, rounded and not cut off"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        remedy = "move the channels to the end" if first else "expected [images, height, width, 1 or 3]"
        raise EvaluationError(f"{what}: shape {list(images.shape)}: {remedy}")
    if len(images) and images[:1000].max() <= 1:
        raise EvaluationError(f"{what}: pixels are all 0 or 1: scale them to 0..255 before they become uint8")
    return ImageSet(description, images.shape[1:], len(images), lambda indices: np.asarray(images[indices]))


def open_images(path: Path) -> ImageSet:
    """A folder of images, at any depth and all of one size, or an .npz with arr_0.

    Raises:
      EvaluationError: nothing there, or not images as `of_array` wants them.
      DataError: a folder without images.
    """
    if path.suffix == ".npz":
        return of_array(_array_of(path), {"file": path.name} | _protocol(path.with_name(f"{path.name}.parts")))
    if path.is_file():
        raise EvaluationError(f"--samples={path}: a folder of images, or an .npz with arr_0")
    paths = list_images(path)
    shape = _read_file(paths[0]).shape

    def read(indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), *shape), np.uint8)
        for row, index in enumerate(indices):
            image = _read_file(paths[index])
            if image.shape != shape:
                sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
                others = f"{paths[0].name} is {sizes[1]}"
                raise EvaluationError(f"{paths[index]} is {sizes[0]}, {others}: bring all to one size first, and say how you did")
            images[row] = image
        return images

    return ImageSet({"folder": path.name, "formats": _suffixes(paths)} | _protocol(path), shape, len(paths), read)


def _protocol(folder: Path) -> dict[str, Any]:
    """What sample.py noted of samples that it drew into `folder`; nothing for those of others."""
    path = folder / PROTOCOL
    if not path.is_file():
        return {}
    try:
        noted = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is damaged ({error}): remove it") from error
    wanted = {
        name: value for name, value in noted.items() if name.startswith("config.sampling.") or not name.startswith("config.")
    }
    return {"drawn": wanted}


def _suffixes(paths: list[Path]) -> str:
    """ ".png", or ".jpg, .png": compression moves a FID, so a record should show it."""
    return ", ".join(sorted({path.suffix.lower() for path in paths}))


def _read_file(path: Path) -> np.ndarray:
    return decoding.to_pixels(decoding.to_channels(decoding.open_image(path, str(path)), 3, str(path)))


def _array_of(path: Path) -> np.ndarray:
    """arr_0 of an .npz, mapped rather than read where it is not compressed: 50,000 large images need not fit into RAM."""
    if not path.is_file():
        raise EvaluationError(f"--samples={path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise EvaluationError(f"{path} has no array arr_0, only {', '.join(archive.namelist()) or 'nothing'}")
            stored = archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
            with archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
                shape, fortran, dtype = header(member)
                start = member.tell()
        if stored and not fortran and not dtype.hasobject and np.prod(shape):
            return np.memmap(path, dtype, "r", _member_start(path) + start, shape)
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return file["arr_0"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{path} is damaged or no .npz file ({error}): write it anew") from error


def _member_start(path: Path) -> int:
    """Where the bytes of arr_0.npy begin: behind a header of 30 bytes, its name and its extra field."""
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("arr_0.npy").header_offset
    with path.open("rb") as file:
        file.seek(offset + 26)
        lengths = file.read(4)
    return offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
