"""Where images come from: `load_source` gives any set, of a split, as uint8 images [N, H, W, C] with or without labels.

A source is a length and `read(indices) -> {"image": uint8 [n, h, w, c], "label": int32 [n] if labelled}`: held whole in
RAM (ArraySource), or decoded record by record on demand (RecordSource). Both give the same pixels in the same order.

Splits. "digits" holds out every tenth example, a folder every fiftieth image (the last one, if it has fewer). A
prepared set has its own test split; see `prepared.py` for those that have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.errors import DataError
from ddpm_jax.progress import Progress

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HELD_OUT_EVERY = 50  # of a folder
_QUICK = 10_000  # images, decoded before anyone wonders
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArraySource:
    """A split in RAM."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray | None = None  # int32 [N]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> Batch:
        batch = {"image": self.images[indices]}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch


class RecordSource:
    """A split on disk, read by random access.

    Args:
      count: how many records.
      fetch: indices -> as many undecoded records.
      decode: (record, index) -> (uint8 pixels of `image_shape`, label); it must be safe to call from several threads.
      image_shape: (h, w, c).
      labelled: whether the labels mean anything.
    """

    def __init__(
        self,
        count: int,
        fetch: Callable[[list[int]], Sequence[Any]],
        decode: Callable[[Any, int], tuple[np.ndarray, int]],
        image_shape: tuple[int, int, int],
        labelled: bool,
    ) -> None:
        self._count, self._fetch, self._decode = count, fetch, decode
        self.image_shape, self.labelled = image_shape, labelled
        self._threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")  # Pillow decodes outside the GIL

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray) -> Batch:
        """Raises DataError naming the record where one is damaged."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)

        def read_block(rows: np.ndarray) -> None:
            wanted = [int(indices[row]) for row in rows]
            for row, index, record in zip(rows, wanted, self._fetch(wanted)):
                images[row], labels[row] = self._decode(record, index)

        blocks = [rows for rows in np.array_split(np.arange(len(indices)), self._threads) if len(rows)]
        for _ in self._pool.map(read_block, blocks):
            pass
        return {"image": images, "label": labels} if self.labelled else {"image": images}


Source = ArraySource | RecordSource


def load_source(data: DataConfig, data_dir: str | Path, split: str) -> Source:
    """One split of the set that `data` names.

    Args:
      data: name, image_size (after padding), channels, padding, crop, in_memory; `flip` is not for here.
      data_dir: where prepare_data.py put the prepared sets; digits and folders do not need it.
      split: "train" or "test".

    Raises:
      DataError: the set is missing, half prepared or damaged, or its images do not fit the config.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}: one of {', '.join(SPLITS)}")
    if data.name == "digits":
        return _digits(data, split)
    if data.name == "folder":
        records = _folder(data, split)
    else:
        from ddpm_jax.data.prepared import open_prepared  # imports TFDS and grain: 1.5 s that only these sets need

        records = open_prepared(data, data_dir, split)
    return decode_into_memory(records, f"{data.name} {split}") if data.in_memory else records


def decode_into_memory(records: RecordSource, title: str) -> ArraySource:
    """All of `records`, decoded once.

    Raises:
      DataError: it does not fit into this machine's RAM.
    """
    count, block = len(records), 1024
    needed = count * int(np.prod(records.image_shape))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * installed:
        raise DataError(
            f"{title} takes {needed / 2**30:.1f} GiB of RAM, this machine has {installed / 2**30:.1f}: "
            "set config.data.in_memory=false"
        )
    images = np.empty((count, *records.image_shape), np.uint8)
    labels = np.empty(count, np.int32)
    with Progress(count, unit="image", enabled=count > _QUICK) as progress:
        for start in range(0, count, block):
            rows = np.arange(start, min(start + block, count))
            batch = records.read(rows)
            images[rows] = batch["image"]
            if records.labelled:
                labels[rows] = batch["label"]
            progress.update(len(rows), of=title)
    return ArraySource(images, labels if records.labelled else None)


def check_shape(what: str, height: int, width: int, channels: int, data: DataConfig) -> None:
    """Raises DataError unless images of height x width x channels, padded as `data` says, are what `data` asks for."""
    padded = height + 2 * data.padding
    if height != width:
        raise DataError(f"{what} has images of {width}x{height}, not square: set config.data.crop=center (or celeba64)")
    if padded != data.image_size:
        border = data.image_size - height
        other = f" or config.data.padding={border // 2}" if border > 0 and border % 2 == 0 else ""
        raise DataError(
            f"{what} has {height}x{width} images, {padded}x{padded} with config.data.padding={data.padding}, but "
            f"config.data.image_size={data.image_size}: set config.data.image_size={padded}{other}"
        )
    if channels != data.channels:
        raise DataError(f"{what} has {channels} channel(s), not {data.channels}: set config.data.channels={channels}")


def list_images(folder: str | Path) -> list[Path]:
    """All images under `folder`, at any depth, sorted by their path inside it.

    Raises:
      DataError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = [
        Path(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}), nor do its subfolders")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def split_folder(paths: Sequence[Path], split: str) -> list[Path]:
    """The train or test part of a sorted listing: images 49, 99, ... are held out; the last where there are fewer.

    Raises:
      DataError: a single image cannot be split.
    """
    if len(paths) < 2:
        raise DataError(f"{paths[0].parent} has a single image: at least two are needed, one of them to hold out")
    last = len(paths) - 1
    held_out = {i for i in range(len(paths)) if (i + 1) % HELD_OUT_EVERY == 0} or {last}
    return [path for i, path in enumerate(paths) if (i in held_out) == (split == "test")]


def decode_file(path: Path, crop: str, size: int, channels: int) -> Image.Image:
    """One image file, upright as its EXIF says, in `channels`, cropped and shrunk to size x size."""
    image = decoding.to_channels(ImageOps.exif_transpose(decoding.open_image(path, str(path))), channels, str(path))
    return decoding.fit(image, crop, size, str(path))


def _folder(data: DataConfig, split: str) -> RecordSource:
    paths = split_folder(list_images(data.path), split)
    size = data.image_size - 2 * data.padding

    def decode(path: Path, index: int) -> tuple[np.ndarray, int]:
        image = decode_file(path, data.crop, size, data.channels)
        return decoding.pad(decoding.to_pixels(image), data.padding), 0

    shape = (data.image_size, data.image_size, data.channels)
    return RecordSource(len(paths), lambda indices: [paths[i] for i in indices], decode, shape, labelled=False)


def _digits(data: DataConfig, split: str) -> ArraySource:
    """The 1,797 8x8 digits that scikit-learn carries; their levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits  # half a second that only this set needs

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    check_shape("data set 'digits'", *images.shape[1:], data)
    held_out = np.arange(len(images)) % 10 == 9
    chosen = held_out if split == "test" else ~held_out
    return ArraySource(decoding.pad(images[chosen], data.padding), digits.target[chosen].astype(np.int32))
