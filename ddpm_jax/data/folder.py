"""List, split and decode a folder of images."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.classes import in_order, some_of
from ddpm_jax.data.decoding import SUFFIXES
from ddpm_jax.data.source import RecordSource
from ddpm_jax.errors import DataError
from ddpm_jax.progress import is_first

HELD_OUT_EVERY = 50  # of a folder, where nothing else is said
_SHOWN = 5  # kinds of files in a message


@dataclass(frozen=True)
class Listing:
    """What lies in a folder.

    Attributes:
      folder: as the user names it.
      images: their paths, sorted by the path inside the folder.
      left_out: how many entries are not listed, by kind: an ending such as ".gif", "no ending",
        "hidden", or "links to folders listed already".
    """

    folder: Path
    images: list[Path]
    left_out: Counter[str]

    def describe(self) -> str:
        """Return "FOLDER: 12 images, 7 other files left out (.gif 5, hidden 2)"."""
        line = f"{self.folder}: {len(self.images):,} images"
        if not self.left_out:
            return line
        kinds = [f"{kind} {count:,}" for kind, count in self.left_out.most_common()]
        kinds = [*kinds[:_SHOWN], "..."] if len(kinds) > _SHOWN else kinds
        total = self.left_out.total()
        return f"{line}, {total:,} other file{'s' * (total > 1)} left out ({', '.join(kinds)})"

    def names(self) -> list[str]:
        """Return the paths of the images inside the folder, in their order."""
        return [path.relative_to(self.folder).as_posix() for path in self.images]

    def fingerprint(self) -> str:
        """Return what stands for the list of the images: their number and a hash of their names.

        The split into training and held-out images is a function of this list.
        """
        digest = hashlib.sha256("\n".join(self.names()).encode(errors="surrogateescape"))
        return f"{len(self.images):,} images, {digest.hexdigest()[:16]}"


def scan(folder: str | Path) -> Listing:
    """List all images under `folder`, at any depth, and count what else is there.

    An image is known by its ending. Hidden files and folders are left out. Links to folders are
    followed, unless the folder is listed already, as where a link leads back to its parent.

    Raises:
      DataError: no such folder, a subfolder that cannot be read, something of an image's name that
        is no file, or no image at all.
    """
    folder = Path(os.path.expanduser(folder))
    if folder.is_file():
        raise DataError(
            f"{folder} is a file, not a folder: prepare-data makes a set of a zip or tar of images"
        )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    listed: set[tuple[int, int]] = set()
    # Folders themselves come before links to them, so that the names do not depend on the links.
    folders, links = [folder], []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in listed:
            left_out["links to folders listed already"] += 1
            continue
        listed.add((status.st_dev, status.st_ino))
        for entry in _entries(here):
            path = Path(entry.path)
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif _is(entry.is_dir):
                (links if entry.is_symlink() else folders).append(path)
            elif not entry.name.lower().endswith(SUFFIXES):
                left_out[path.suffix.lower() or "no ending"] += 1
            elif not _is(entry.is_file):
                raise DataError(f"{path} is no file that can be read, nor a link to one: remove it")
            else:
                images.append(path)
    if not images:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}), nor do its subfolders")
    images.sort(key=lambda path: path.relative_to(folder).as_posix())
    return Listing(folder, images, left_out)


def list_images(folder: str | Path) -> list[Path]:
    """List all images under `folder`, at any depth, sorted by their path inside it.

    Raises:
      DataError: as `scan`.
    """
    return scan(folder).images


@functools.cache
def announce(line: str) -> None:
    """Print a line on stderr, once for all hosts: both splits of a set open the same folder."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def split_folder(
    paths: Sequence[Path], split: str, held_out_every: int = HELD_OUT_EVERY
) -> list[Path]:
    """Return the train or test part of a sorted listing.

    Images 49, 99, ... are held out, of every 50; the last one where there are fewer.

    Raises:
      DataError: a single image cannot be split.
    """
    if len(paths) < 2:
        raise DataError(
            f"{paths[0].parent} has a single image: at least two are needed, "
            "one of them to hold out"
        )
    last = len(paths) - 1
    held_out = {i for i in range(len(paths)) if (i + 1) % held_out_every == 0} or {last}
    return [path for i, path in enumerate(paths) if (i in held_out) == (split == "test")]


def class_of(path: Path, folder: Path) -> str:
    """Return the name of the folder right below `folder` that an image lies in."""
    return path.relative_to(folder).parts[0]


def folder_classes(listing: Listing) -> tuple[str, ...]:
    """List the classes of a folder of images: the folders right below it.

    Raises:
      DataError: images beside these folders, a folder without images, a name that cannot be
        written down, or fewer than two classes.
    """
    folder = listing.folder
    beside = [name for name in listing.names() if "/" not in name]
    if beside:
        raise DataError(
            f"{folder}: classes are the folders in it, but {len(beside):,} images lie beside "
            f"them ({some_of(beside, 3)}): move each into the folder of its class"
        )
    names = [
        entry.name
        for entry in _entries(folder)
        if _is(entry.is_dir) and not entry.name.startswith(".")
    ]
    there = {class_of(path, folder) for path in listing.images}
    if empty := [name for name in names if name not in there]:
        raise DataError(
            f"{folder}: a class needs images, and there are none in {some_of(empty)} (a link to "
            "another class has none of its own): fill or remove these folders"
        )
    if odd := [name for name in names if not name.isprintable()]:
        raise DataError(f"{folder}: a class is called {odd[0]!r}: rename it to what can be printed")
    if len(names) < 2:
        raise DataError(
            f"{folder} has a single folder, {names[0]!r}, and so a single class: if the folders "
            f"in it are the classes, name {folder / names[0]}"
        )
    return in_order(names)


def check_training_images(listing: Listing, classes: Sequence[str], train: Sequence[Path]) -> None:
    """Check that each class has images to train on, not only such as are held out.

    Raises:
      DataError: naming the classes that have none.
    """
    there = {class_of(path, listing.folder) for path in train}
    if lost := [name for name in classes if name not in there]:
        raise DataError(
            f"{listing.folder}: of {some_of(lost)} all images are held out, none would be trained "
            "on: add images to these classes"
        )


def decode_file(path: Path, crop: str, sides: tuple[int, int], channels: int) -> Image.Image:
    """Decode one image file in `channels`, cropped and shrunk to `sides`, (height, width)."""
    image = decoding.to_channels(decoding.open_image(path, str(path)), channels, str(path))
    return decoding.fit(image, crop, sides, str(path))


def folder_source(data: DataConfig, split: str) -> RecordSource:
    """Open a split of the folder `data.path`, and say what is in it.

    Raises:
      DataError: as `scan`, `split_folder` and, with `data.classes`, `folder_classes`; later, for an
        image that cannot be used.
    """
    if not Path(os.path.expanduser(data.path)).exists():
        raise DataError(
            f"{data.path}: no such folder; where a run's images have moved, ddpm train takes their "
            "new place once, beside its workdir: images=FOLDER"
        )
    listing = scan(data.path)
    announce(listing.describe())
    # Before anything is left out as bad: what is held out stays held out.
    paths = split_folder(listing.images, split, data.held_out_every)
    classes = folder_classes(listing) if data.classes else ()
    if classes and split == "train":
        check_training_images(listing, classes, paths)
    numbers = {name: number for number, name in enumerate(classes)}

    def decode(path: Path, index: int) -> tuple[np.ndarray, int]:
        image = decode_file(path, data.crop, data.inner_sides, data.channels)
        label = numbers[class_of(path, listing.folder)] if classes else 0
        return decoding.pad(decoding.to_pixels(image), data.padding), label

    return RecordSource(
        len(paths),
        lambda indices: [paths[i] for i in indices],
        decode,
        (*data.sides, data.channels),
        labelled=bool(classes),
        num_classes=len(classes) or None,
    )


def _is(kind: Callable[[], bool]) -> bool:
    """Ask an entry for its kind; links that lead nowhere, or in a circle, are of none."""
    try:
        return kind()
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry]:
    """List a folder by name; DataError if that is not allowed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}): make it readable or remove it"
        ) from error
