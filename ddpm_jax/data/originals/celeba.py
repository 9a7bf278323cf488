"""Read CelebA's aligned faces and their official split, as their publishers give them away.

There are img_align_celeba (202,599 faces of 178x218, a folder or img_align_celeba.zip) and
list_eval_partition.txt, a line "000001.jpg 0" each: 0 is train, 1 validation, 2 test. Kaggle has
the same as list_eval_partition.csv, with commas and a first line "image_id,partition".

Faces in a zip file are read from it one by one: nothing of it is written to disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ddpm_jax.data import decoding
from ddpm_jax.data.archives import DAMAGE, is_image
from ddpm_jax.data.decoding import SUFFIXES
from ddpm_jax.errors import DataError
from ddpm_jax.progress import say

PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
SPLITS = ("train", "validation", "test")  # by the number in the partition
FACES = "img_align_celeba"
OFFICIAL = {"train": 162_770, "validation": 19_867, "test": 19_962}
_LARGEST_MEMBER = 64 * 2**20  # bytes; a face has 7,000
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Faces:
    """The faces of each split by the names of their files, and the way to read one.

    Attributes:
      source: where they are from, for messages.
      names: split -> names, in the order of the partition; splits without any are left out.
      missing: names in the partition that are not among the files.
      read: (name) -> the bytes of the file; DataError where it cannot be read.
    """

    source: Path
    names: dict[str, list[str]]
    missing: list[str]
    read: Callable[[str], bytes]

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def decode(self, name: str, blob: bytes) -> Image.Image:
        """Decode the bytes of a file, in colour; DataError where they are damaged."""
        what = f"{self.source}: {name}"
        return decoding.to_channels(decoding.open_image(io.BytesIO(blob), what), 3, what)

    def shape(self) -> tuple[int, int]:
        """Return height and width of the first face for training."""
        first = self.names["train"][0]
        image = self.decode(first, self.read(first))
        return image.height, image.width

    def describe(self) -> str:
        """Return "SOURCE: 3 train, 1 test faces", and whether that is the official split."""
        counts = {split: len(names) for split, names in self.names.items()}
        line = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        official = ": the official split, whole" if counts == OFFICIAL else ""
        return f"{self.source}: {line} faces{official}"

    def contents(self) -> dict[str, Any]:
        """Return what tells one selection of faces from another: their number, names and split."""
        lines = [f"{name} {split}\n" for split, names in self.names.items() for name in names]
        digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape"))
        return {"images": len(self), "files": digest.hexdigest()[:16]}

    def check_whole(self) -> None:
        """Check that no face is missing.

        Raises:
          DataError: naming the first that are.
        """
        if self.missing:
            some = ", ".join([*self.missing[:_SHOWN], *["..."] * (len(self.missing) > _SHOWN)])
            raise DataError(
                f"source={self.source} lacks {len(self.missing):,} of the "
                f"{len(self) + len(self.missing):,} faces in the partition ({some}), which "
                "skip_bad=true leaves out: unpack it again"
            )


@contextlib.contextmanager
def open_faces(source: Path) -> Iterator[Faces]:
    """Open the faces in `source` for the while.

    Args:
      source: a folder with img_align_celeba/ or img_align_celeba.zip and the partition, at most
        two folders deep; or a zip file of both.

    Raises:
      DataError: one of the two is missing, or damaged; or no face for training is there.
    """
    with contextlib.ExitStack() as stack:
        if source.is_file():
            files, read = _open_zip(source, stack)
            partition = next((name for name in PARTITIONS if name in files), None)
            text = None if partition is None else read(partition).decode(errors="replace")
        else:
            folders = _folders(source)
            path = _first(folder / name for folder in folders for name in PARTITIONS)
            partition, text = (None, None) if path is None else (path.name, _read_text(path))
            files, read = _open_images(source, folders, stack)
        if partition is None or text is None:
            raise DataError(
                f"source={source} has no {PARTITIONS[0]}, which says what is train and what is "
                "test: put it there, or prepare the faces with dataset=folder"
            )
        splits = parse_partition(text, partition)
        there = {name for name in files if is_image(name)}
        names = {split: [name for name in splits[split] if name in there] for split in SPLITS}
        missing = [name for split in SPLITS for name in splits[split] if name not in there]
        names = {split: part for split, part in names.items() if part}
        faces = Faces(source, names, missing, read)
        if "train" not in faces.names:
            raise DataError(
                f"source={source}: none of the faces that {partition} has for training is there: "
                f"it names files such as {(splits['train'] or ['none'])[0]}"
            )
        if others := len(there) - len(faces):
            say(f"{source}: {others:,} images that {partition} does not name, left out")
        yield faces


def parse_partition(text: str, name: str) -> dict[str, list[str]]:
    """Parse the partition, into the names of each split in their order.

    Raises:
      DataError: naming the line that is no name with 0, 1 or 2, or that repeats a name.
    """
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    known: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and words == ["image_id", "partition"]):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2") or words[0] in known:
            wrong = "has a name twice" if words[0] in known else "is no name with 0, 1 or 2"
            raise DataError(f"{name}: line {number} {wrong} ({line[:40]!r}): download it again")
        known.add(words[0])
        splits[SPLITS[int(words[1])]].append(words[0])
    return splits


def _open_images(
    source: Path, folders: list[Path], stack: contextlib.ExitStack
) -> tuple[set[str], Callable[[str], bytes]]:
    """Find the faces below `source`: the names of the files, and the way to read one."""
    # Kaggle has a folder of this name within the other.
    for folder in reversed([folder for folder in folders if folder.name == FACES]):
        names = {path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
        if names:
            return names, functools.partial(_read_face, folder)
    archive = _first(folder / f"{FACES}.zip" for folder in folders)
    if archive is None:
        raise DataError(
            f"source={source} has neither {FACES}/ nor {FACES}.zip: name the folder they are in"
        )
    return _open_zip(archive, stack)


def _open_zip(path: Path, stack: contextlib.ExitStack) -> tuple[set[str], Callable[[str], bytes]]:
    """Open a zip file: the names of its members without their folders, and the way to read one."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except DAMAGE as error:
        raise DataError(f"{path} is damaged or no zip file ({error}): download it again") from error
    members = {}
    for member in archive.infolist():
        parts = PurePosixPath(member.filename).parts
        if not member.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in parts):
            members[parts[-1]] = member

    def read(name: str) -> bytes:
        member = members[name]
        if member.file_size > _LARGEST_MEMBER:
            raise DataError(f"{path}: {name} unfolds to {member.file_size:,} bytes: not read")
        try:
            return archive.read(member)
        except DAMAGE as error:
            raise DataError(f"{path}: {name} is damaged ({error})") from error

    return set(members), read


def _folders(source: Path) -> list[Path]:
    """List `source` and the folders in it, two deep, the outer ones first."""
    level, folders = [source], [source]
    for _ in range(2):
        level = [
            path
            for folder in level
            for path in sorted(folder.iterdir())
            if not path.suffix and not path.name.startswith(".") and path.is_dir()
        ]
        folders += level
    return folders


def _first(paths: Iterator[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _read_face(folder: Path, name: str) -> bytes:
    return _read_bytes(folder / name)


def _read_text(path: Path) -> str:
    return _read_bytes(path).decode(errors="replace")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
