"""Define what a data source is: arrays in memory, records read at random, or a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.errors import BadImages, DataError
from ddpm_jax.machine import cores, memory
from ddpm_jax.progress import Progress, is_first, say

SPLITS = ("train", "test")
_QUICK = 10_000  # images, decoded before anyone wonders

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArraySource:
    """Split in RAM."""

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
    """Split on disk, read by random access.

    Args:
      count: how many records.
      fetch: indices -> as many undecoded records.
      decode: (record, index) -> (uint8 pixels of `image_shape`, label); it must be safe to call
        from several threads.
      image_shape: (h, w, c).
      labelled: whether the labels mean anything.
      num_classes: how many classes the set says it has; None where it says nothing.
    """

    def __init__(
        self,
        count: int,
        fetch: Callable[[list[int]], Sequence[Any]],
        decode: Callable[[Any, int], tuple[np.ndarray, int]],
        image_shape: tuple[int, int, int],
        labelled: bool,
        num_classes: int | None = None,
    ) -> None:
        self._count, self._fetch, self._decode = count, fetch, decode
        self.image_shape, self.labelled = image_shape, labelled
        self.num_classes, self._check_labels = num_classes, lambda labels: None
        self._threads = cores()
        self._pool = ThreadPoolExecutor(
            self._threads, thread_name_prefix="decode"
        )  # Pillow decodes outside the GIL

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray, bad: dict[int, str] | None = None) -> Batch:
        """Read and decode these records.

        Args:
          bad: takes the message of each record that cannot be decoded, by its index, instead of an
            error; the images of these are not defined.

        Raises:
          DataError: naming the record that is damaged.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)

        def read_block(rows: np.ndarray) -> None:
            numbers = [int(indices[row]) for row in rows]
            for row, index, record in zip(rows, numbers, self._fetch(numbers)):
                try:
                    images[row], labels[row] = self._decode(record, index)
                except DataError as error:
                    if bad is None:
                        raise
                    bad[index] = str(error)

        blocks = [
            rows for rows in np.array_split(np.arange(len(indices)), self._threads) if len(rows)
        ]
        for _ in self._pool.map(read_block, blocks):
            pass
        if not self.labelled:
            return {"image": images}
        self._check_labels(labels)
        return {"image": images, "label": labels}

    def check_each(self, check: Callable[[np.ndarray], None]) -> None:
        """Call `check` with the labels of each batch, before it is handed out."""
        self._check_labels = check

    def only(self, indices: np.ndarray) -> RecordSource:
        """Return the source of these records alone, in this order."""

        def fetch(rows: list[int]) -> list[tuple[Any, int]]:
            numbers = [int(indices[row]) for row in rows]
            return list(zip(self._fetch(numbers), numbers))

        def decode(pair: tuple[Any, int], row: int) -> tuple[np.ndarray, int]:
            return self._decode(*pair)

        shape, classes = self.image_shape, self.num_classes
        return RecordSource(len(indices), fetch, decode, shape, self.labelled, classes)


Source = ArraySource | RecordSource


class Stream:
    """Training images that come in an order of their own, one array after the other.

    Args:
      make: `make()` returns a new iterable of arrays uint8 [n,h,w,c], of any n, or of dicts
        {"image": such an array, "label": whole numbers [n]}. It is called again where the iterable
        ends. A run that goes on, and every host of several, calls it and skips what was read
        before. It must therefore give the same images each time.

    Raises:
      DataError: the first item is not such an array.
    """

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make, self._check_labels = make, lambda labels: None
        first = next(self.arrays())
        self.first: Batch = {name: column[:8] for name, column in first.items()}
        self._first_labels = first.get("label")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.first["image"].shape[1:]

    @property
    def labelled(self) -> bool:
        return "label" in self.first

    def check_each(self, check: Callable[[np.ndarray], None]) -> None:
        """Call `check` with the labels of the first array now, and of each one as it is read."""
        self._check_labels = check
        if self._first_labels is not None:
            check(self._first_labels)

    def arrays(self) -> Iterator[Batch]:
        """Yield the items without end: {"image": [n,h,w,c], "label": int32 [n] where there are}.

        Raises:
          DataError: an item that is not as the first one, or no item at all.
        """
        shape = names = None
        while True:
            empty = True
            for number, item in enumerate(self._make()):
                batch = item if isinstance(item, dict) else {"image": item}
                batch = {name: np.asarray(column) for name, column in batch.items()}
                what = f"source: item {number} of the stream"
                check_images(what, batch.get("image"))
                if shape is None:
                    shape, names = batch["image"].shape[1:], set(batch)
                if batch["image"].shape[1:] != shape or set(batch) != names:
                    raise DataError(
                        f"{what} is not as the first one, "
                        f"{'x'.join(map(str, shape))} with {', '.join(sorted(names))}"
                    )
                if "label" in batch:
                    _check_stream_labels(what, batch["label"], len(batch["image"]))
                    self._check_labels(batch["label"])
                    batch["label"] = batch["label"].astype(np.int32)
                empty = False
                yield batch
            if empty:
                raise DataError("source: the stream is empty")


def check_images(what: str, images: Any) -> None:
    """Raise DataError unless `images` is an array uint8 [n,h,w,c]."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        got = type(images).__name__
        if isinstance(images, np.ndarray):
            got = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{what} is {got}: must be images uint8 [n,h,w,c]")


def _check_stream_labels(what: str, labels: np.ndarray, count: int) -> None:
    """Raise DataError unless `labels` has one class for each of `count` images."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{what} has labels {labels.dtype} {list(labels.shape)} for {count} images: "
            f"must be whole numbers [{count}], one for each"
        )


def decode_into_memory(records: RecordSource, title: str, *, skip_bad: bool = False) -> Source:
    """Decode all of `records`, once; where they do not fit into memory, say so and return them.

    They fit if they leave a fifth of what this process may use.

    Args:
      skip_bad: leave out what cannot be decoded, and say so.

    Raises:
      BadImages: naming all that cannot be decoded.
    """
    count = len(records)
    needed, allowed = count * int(np.prod(records.image_shape)), memory()
    if needed > 0.8 * allowed:
        say(
            f"{title} takes {needed / 2**30:.1f} GiB of memory, and {allowed / 2**30:.1f} may be "
            "used: it is read from disk at every step, as with config.data.in_memory=false"
        )
        return without_bad(records, title) if skip_bad else records
    images = np.empty((count, *records.image_shape), np.uint8)
    labels = np.empty(count, np.int32)
    bad: dict[int, str] = {}
    for rows, batch in _read_all(records, title, bad):
        images[rows] = batch["image"]
        if records.labelled:
            labels[rows] = batch["label"]
    if bad:
        good = _good(count, title, bad, skip_bad)
        images, labels = images[good], labels[good]
    return ArraySource(images, labels if records.labelled else None)


def without_bad(records: RecordSource, title: str) -> RecordSource:
    """Decode all of `records` once, and return the source of those that can be decoded."""
    bad: dict[int, str] = {}
    for _ in _read_all(records, title, bad):
        pass
    return records.only(_good(len(records), title, bad, skip_bad=True)) if bad else records


def _read_all(
    records: RecordSource, title: str, bad: dict[int, str]
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield the numbers and the content of block after block; `bad` is filled on the way."""
    count, block = len(records), 1024
    with Progress(count, unit="image", enabled=count > _QUICK and is_first()) as progress:
        for start in range(0, count, block):
            rows = np.arange(start, min(start + block, count))
            yield rows, records.read(rows, bad)
            progress.update(len(rows), of=title)


def _good(count: int, title: str, bad: dict[int, str], skip_bad: bool) -> np.ndarray:
    """Return the numbers of the images that can be used, and say how many cannot.

    Raises:
      BadImages: there are some, and they are not to be skipped, or there are no others.
    """
    if not skip_bad or len(bad) == count:
        raise BadImages([bad[index] for index in sorted(bad)], count)
    say(f"{title}: {len(bad):,} of {count:,} images cannot be used and are left out")
    return np.setdiff1d(np.arange(count), list(bad))


def check_shape(what: str, height: int, width: int, channels: int, data: DataConfig) -> None:
    """Raise DataError unless images of this shape, padded as `data` says, are what it asks for."""
    padded = height + 2 * data.padding, width + 2 * data.padding
    if height != width and isinstance(data.image_size, int):
        raise DataError(
            f"{what} has images of {width}x{height}, not square: "
            "set config.data.crop=center (or celeba64), or "
            f"config.data.image_size={size_text(padded)}"
        )
    if padded != data.sides:
        borders = {asked - own for asked, own in zip(data.sides, (height, width))}
        border = borders.pop() if len(borders) == 1 else 0
        other = f" or config.data.padding={border // 2}" if border > 0 and border % 2 == 0 else ""
        raise DataError(
            f"{what} has {width}x{height} images, {padded[1]}x{padded[0]} with "
            f"config.data.padding={data.padding}, but config.data.image_size="
            f"{size_text(data.sides)}: set config.data.image_size={size_text(padded)}{other}"
        )
    if channels != data.channels:
        raise DataError(
            f"{what} has {channels} channel(s), not {data.channels}: "
            f"set config.data.channels={channels}"
        )


def size_text(sides: tuple[int, int]) -> str:
    """Write (height, width) as config.data.image_size takes it: "32", or "32,64"."""
    height, width = sides
    return f"{height}" if height == width else f"{height},{width}"
