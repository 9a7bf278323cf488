"""Open the images to be scored: a split of a data set, a folder, or an .npz of anyone's samples.

All are uint8 [n,h,w,c] at their own size. Nothing is resized, cropped or scaled on the way in: how
that is done moves a FID more than most papers do, so it stays with whoever made the images.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.folder import list_images
from ddpm_jax.data.source import Source
from ddpm_jax.errors import EvaluationError
from ddpm_jax.files import NPZ_DAMAGE, NpzError, check_member, open_npz, read_json
from ddpm_jax.parallel import hosts
from ddpm_jax.sampling.shards import PROTOCOL

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A set of images and where they are from.

    Attributes:
      description: what a record says about their origin.
      shape: (h, w, c) of each.
      count: how many there are.
      read: `read(indices)` returns uint8 [n,h,w,c].
    """

    description: dict[str, Any]
    shape: tuple[int, int, int]
    count: int
    read: Callable[[np.ndarray], np.ndarray]

    def check_count(self, what: str) -> None:
        """Raise EvaluationError for fewer than two images."""
        if self.count < 2:
            raise EvaluationError(
                f"{what}: {self.count} image(s); a distribution needs at least two"
            )

    def describe(self) -> str:
        """Return one line for people."""
        return ", ".join(
            f"{name.rpartition('.')[2]} {value}"
            for name, value in flatten_dict(self.description, sep=".").items()
            if value is not None
        )

    def first(self, count: int | None) -> ImageSet:
        """Return the first `count` images; all where there are fewer, or for None."""
        return self if count is None else dataclasses.replace(self, count=min(count, self.count))

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first image, uint8 [<= size,h,w,c]) along the set."""
        for start in range(0, self.count, size):
            yield start, self.read(np.arange(start, min(start + size, self.count)))


def read_on_all_hosts(items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`; what one host cannot read ends the others too, which would wait for it.

    Every host has as many items. Reading them must not wait for other hosts.
    """
    iterator = iter(items)
    while True:
        with hosts.together():
            item = next(iterator, iterator)
        if item is iterator:
            return
        yield item


def describe_split(data: DataConfig, split: str) -> dict[str, Any]:
    """Return what a record says about the images of a split, which need not be at hand."""
    return {
        "data": data.name if data.name != "folder" else f"folder {Path(data.path).name}",
        "split": split,
        "image_size": data.image_size if isinstance(data.image_size, int) else [*data.sides],
        "channels": data.channels,
        "padding": data.padding,
        "crop": data.crop,
        "resize": decoding.RESIZE if data.crop != "none" else "none",
        "pixels": "uint8, no flips",
    }


def of_split(source: Source, data: DataConfig, split: str) -> ImageSet:
    """Take the images of a split as they are, un-augmented."""
    return ImageSet(
        describe_split(data, split),
        source.image_shape,
        len(source),
        lambda indices: source.read(indices)["image"],
    )


def of_array(images: np.ndarray, description: dict[str, Any]) -> ImageSet:
    """Take images that are in memory or mapped into it.

    Raises:
      EvaluationError: not uint8 [n,h,w,c], or values that only look like 8-bit images.
    """
    what = description.get("file", "images")
    if images.dtype != np.uint8:
        raise EvaluationError(
            f"{what}: pixels are {images.dtype}; FID is of 8-bit images, "
            "so save uint8 0..255, rounded and not cut off"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        first = images.ndim == 4 and images.shape[1] in (1, 3, 4)
        expected = "expected [images, height, width, 1, 3 or 4]"
        remedy = "move the channels to the end" if first else expected
        raise EvaluationError(f"{what}: shape {list(images.shape)}: {remedy}")
    if len(images) and images[:1000].max() <= 1:
        raise EvaluationError(
            f"{what}: pixels are all 0 or 1: scale them to 0..255 before they become uint8"
        )
    return ImageSet(
        description, images.shape[1:], len(images), lambda indices: np.asarray(images[indices])
    )


def open_images(path: Path, channels: int = 3) -> ImageSet:
    """Open a folder of images, at any depth and all of one size, or an .npz with arr_0.

    Args:
      channels: of the images of a folder, 1, 3 or 4; those of an .npz are as they are.

    Raises:
      EvaluationError: nothing there, or not images that `of_array` takes.
      DataError: a folder without images, or an image that has not these channels.
    """
    if path.suffix == ".npz":
        description = {"file": path.name} | _protocol(path.with_name(f"{path.name}.parts"))
        return of_array(_array_of(path), description)
    if path.is_file():
        raise EvaluationError(
            f"samples={path}: a folder of images, or an .npz with arr_0; unpack an archive first"
        )
    paths = list_images(path)
    shape = _read_file(paths[0], channels).shape

    def read(indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), *shape), np.uint8)
        for row, index in enumerate(indices):
            image = _read_file(paths[index], channels)
            if image.shape != shape:
                sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
                raise EvaluationError(
                    f"{paths[index]} is {sizes[0]}, {paths[0].name} is {sizes[1]}: "
                    "bring all to one size first, and say how you did"
                )
            images[row] = image
        return images

    # Compression moves a FID, so a record shows the formats.
    formats = ", ".join(sorted({path.suffix.lower() for path in paths}))
    description = {"folder": path.name, "formats": formats} | _protocol(path)
    return ImageSet(description, shape, len(paths), read)


def _protocol(folder: Path) -> dict[str, Any]:
    """Read what sample.py noted of samples that it drew into `folder`; {} if others drew them."""
    path = folder / PROTOCOL
    if not path.is_file():
        return {}
    try:
        noted = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is damaged ({error}): remove it") from error
    drawn = {
        name: value
        for name, value in noted.items()
        if name.startswith("config.sampling.") or not name.startswith("config.")
    }
    return {"drawn": drawn}


def _read_file(path: Path, channels: int) -> np.ndarray:
    image = decoding.open_image(path, str(path))
    return decoding.to_pixels(decoding.to_channels(image, channels, str(path)))


def _array_of(path: Path) -> np.ndarray:
    """Open arr_0 of an .npz, mapped where it is not compressed: it need not fit into RAM."""
    if not path.is_file():
        raise EvaluationError(f"samples={path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise EvaluationError(
                    f"{path} has no array arr_0, only {', '.join(archive.namelist()) or 'nothing'}"
                )
            stored = archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
            with archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, fortran, dtype = read_header(member)
                start = member.tell()
        check_member(path, "arr_0.npy")
        if stored and not fortran and not dtype.hasobject and np.prod(shape):
            return np.memmap(path, dtype, "r", _member_start(path) + start, shape)
        with open_npz(path) as file:
            return file["arr_0"]
    except NPZ_DAMAGE as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{NpzError.of(path, error)}: write it anew") from error


def _member_start(path: Path) -> int:
    """Find where arr_0.npy begins: behind a header of 30 bytes, its name and its extra field."""
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("arr_0.npy").header_offset
    with path.open("rb") as file:
        file.seek(offset + 26)
        lengths = file.read(4)
    return (
        offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    )
