"""Unpack the images of a zip or tar file, whoever made it, into a folder that goes away again.

Only regular members with the name of an image are written, each below the folder and none twice.
Links, devices and everything else in the archive stay in it.
"""

from __future__ import annotations

import contextlib
import errno
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ddpm_jax.data.decoding import SUFFIXES
from ddpm_jax.errors import DataError
from ddpm_jax.files import FREE_UNFOLDING, MOST_UNFOLDING, LZMAError, open_file
from ddpm_jax.progress import Progress, say

_BLOCK = 2**20
DAMAGE = (
    EOFError,
    NotImplementedError,  # a compression that Python does not know
    RuntimeError,  # a password
    ValueError,
    LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def unpacked(source: Path, data_dir: Path) -> Iterator[Path]:
    """Yield the folder `source`, or one with the images of the archive `source` for the while.

    Args:
      source: a zip, tar, tar.gz, tar.bz2 or tar.xz; anything but a file is yielded as it is.
      data_dir: where the images are unpacked; it is left as it was.

    Raises:
      DataError: a file of another kind, a damaged archive, one whose names lead out of it, or
        one that unfolds to many times its size.
    """
    if not source.is_file():
        yield source
        return
    missing = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=data_dir) as temporary:
            folder = Path(temporary, source.name)  # whose name the recipe of the set will have
            folder.mkdir()
            with open_file(source) as file:
                _unpack(source, file, folder)
            yield folder
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def innermost(folder: Path) -> Path:
    """Return the folder that `folder` holds and nothing beside, at any depth, or `folder` itself.

    Many archives have such a folder around what is in them.
    """
    while len(entries := list(folder.iterdir())) == 1 and entries[0].is_dir():
        folder = entries[0]
    return folder


def _unpack(source: Path, file: BinaryIO, folder: Path) -> None:
    """Write the images of the archive `file` below `folder`, and count its other files."""
    size = source.stat().st_size
    most = size * MOST_UNFOLDING + FREE_UNFOLDING
    members = _zip_members if zipfile.is_zipfile(file) else _tar_members
    unfolded, others = 0, 0
    file.seek(0)

    def check(total: int) -> None:
        if total > most:
            raise DataError(
                f"source={source}: {size:,} bytes that unfold to more than {MOST_UNFOLDING} times "
                "as many: unpack it yourself"
            )

    try:
        with Progress(None, unit="image") as progress:
            for name, end, stream in members(file):
                check(end)
                if not is_image(name):
                    others += 1
                    continue
                target = folder / _inside(source, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as out:
                    while block := stream.read(_BLOCK):
                        unfolded += len(block)
                        check(unfolded)
                        out.write(block)
                progress.update(of=source.name)
        if others:
            say(f"{source}: {others:,} other files in it left out")
    except FileExistsError as error:
        raise DataError(f"source={source} holds {Path(error.filename).name} twice") from error
    except tarfile.ReadError as error:
        raise DataError(
            f"source={source}: neither a folder of images nor a zip or tar file ({error})"
        ) from error
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"source={source} is damaged or cannot be unpacked ({error})") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the latter is of a bad offset
            raise
        raise DataError(f"source={source} is damaged ({error})") from error


def _zip_members(file: BinaryIO) -> Iterator[tuple[str, int, BinaryIO]]:
    """Yield name, place and stream of the files in a zip file."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                with archive.open(member) as stream:
                    yield member.filename, member.header_offset, stream


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, int, BinaryIO]]:
    """Yield name, end in what the archive unfolds to, and stream of the files in a tar file."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isreg():
                stream = archive.extractfile(member)
                assert stream is not None  # of a regular member
                yield member.name, member.offset_data + member.size, stream


def is_image(name: str) -> bool:
    """Tell by the name; hidden files, such as those of macOS beside each image, are none."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hidden = any(part.startswith(".") and part.strip(".") for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


def _inside(source: Path, name: str) -> PurePosixPath:
    """Return the path of a member below the folder; DataError if it leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise DataError(f"source={source} holds {name!r}, a path that leads out of it: refused")
    return path
