"""Find the files that ship, write others whole or not at all, and read what strangers wrote."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it: then nothing can raise it
    LZMAError = zlib.error

if TYPE_CHECKING:  # listing a command's flags need not wait for NumPy
    import numpy as np

DEEPEST_JSON = 64  # dicts and lists in each other; what this program writes has 6
MOST_DIGITS = 18  # of a whole number that a user writes
LONGEST_NUMBER = 20  # digits of a whole number in JSON, sign included: all that 64 bits hold
# A file of arrays may unfold to so many times its size, and by so many bytes in any case.
MOST_UNFOLDING, FREE_UNFOLDING = 64, 2**26
# What Python's and NumPy's readers raise for an .npz that is damaged or none.
NPZ_DAMAGE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,  # a password, or a compression that Python does not know
    ValueError,
    LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)

_INSIDE = Path(__file__).with_name("shipped")  # setup.py puts it there


def checkout() -> Path | None:
    """Return the root of the checkout that this code runs from; None where a wheel is installed."""
    return None if _INSIDE.is_dir() else Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """Return the path of a file or folder that ships, such as "configs" or "pretrained/digits".

    A wheel holds them inside the package. In a checkout they lie beside it.
    """
    return (checkout() or _INSIDE) / name


def default_cache() -> Path:
    """Return the folder of this user for what is downloaded, computed or compiled once."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "ddpm_jax")


def check_member(path: str | Path, member: str) -> None:
    """Read a member of a zip archive to its end, which compares it with its CRC-32.

    Reading a part of it, or mapping the file, compares nothing.

    Raises:
      zipfile.BadZipFile: it is not what was written.
    """
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        while stream.read(1 << 22):
            pass


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` once the block ends well.

    After an error `path` is as it was.

    Raises:
      OSError: see `naming`.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # the link stays, and leads there
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            # There is nothing to remove after success, or where the folder cannot be made.
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in an OSError of the block, such as a full disk: writing does not by itself."""
    try:
        yield
    except OSError as error:
        what = f"could not be written: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, what, str(path)) from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Check that a file can be made at `path`, where folders on the way may be missing.

    It is for the time before the work whose result the file is. Nothing is left behind.

    Args:
      folder: whether `path` may be a folder that the files go into.

    Raises:
      OSError: it cannot; IsADirectoryError for a folder in the place of the file.
    """
    places = path.absolute().parents
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    if path.is_dir():
        if not folder:
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
        places = [path]
    folder = next(place for place in places if place.exists())
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; opening a pipe would wait for a writer.

    Raises:
      OSError: there is no such file, it cannot be read, or it is a folder, a pipe or a device.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    with open(path, "rb") as file:
        yield file


def read_json(path: str | Path, *, nan: bool = False) -> Any:
    """Read a JSON file; arguments as `parse_json`.

    Raises:
      OSError: it cannot be read, or is a pipe or a device.
      ValueError: as `parse_json`.
    """
    with open_file(path) as file:
        return parse_json(file.read(), nan=nan)


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """Parse JSON that anybody may have written; a byte-order mark before it is passed over.

    Args:
      text: UTF-8 where it is bytes.
      nan: accept NaN, Infinity and numbers that are too large for a float, which become infinite.

    Raises:
      ValueError: it is no JSON, or holds such a number, a whole number of more than 64 bits, or
        more levels than DEEPEST_JSON.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")

    def whole(digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not (nan or math.isfinite(number)):
            raise ValueError(f"the number {digits[:LONGEST_NUMBER]}, which is not finite")
        return number

    try:
        value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=real)
    except RecursionError:
        value, depth = None, DEEPEST_JSON + 1
    else:
        depth = _depth(value)
    if depth > DEEPEST_JSON:
        raise ValueError(f"more than {DEEPEST_JSON} levels of dicts and lists")
    return value


def _depth(value: Any) -> int:
    """Count levels of dicts and lists, without a recursion that they could exhaust."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


class NpzError(ValueError):
    """An .npz that cannot be read; the message names it and what is wrong, and lacks a remedy."""

    @classmethod
    def of(cls, path: str | Path, error: Exception) -> NpzError:
        """Return `error`, one of NPZ_DAMAGE that reading `path` ended in, as an NpzError."""
        if isinstance(error, cls):
            return error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return cls(f"{path} is damaged or no .npz file ({reason})")


class Arrays:
    """The arrays of an open .npz.

    Attributes:
      files: their names.
    """

    def __init__(self, path: str | Path, opened: np.lib.npyio.NpzFile) -> None:
        self._path, self._opened = path, opened
        self.files: list[str] = opened.files

    def __getitem__(self, name: str) -> np.ndarray:
        """Read an array.

        Raises:
          NpzError: there is none of this name, it is damaged, or it holds pickled objects.
        """
        if name not in self.files:
            others = ", ".join(self.files) or "nothing"
            raise NpzError(f"{self._path} has no array {name}, only {others}")
        try:
            array = self._opened[name]
        except NPZ_DAMAGE as error:
            raise NpzError.of(self._path, error) from error
        if isinstance(array, bytes):  # what NumPy gives of other files in the archive
            raise NpzError(f"{self._path} holds {name}, which is no array")
        return array


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[Arrays]:
    """Open an .npz of plain arrays whose sizes are those of the file.

    Raises:
      NpzError: there is no such file, it is damaged or no .npz, or it claims arrays that are larger
        than what is stored.
    """
    import numpy as np

    with contextlib.ExitStack() as open_files:
        try:
            stream = open_files.enter_context(open_file(path))
            with zipfile.ZipFile(stream) as archive:
                check_unfolding(archive, os.fstat(stream.fileno()).st_size)
                for member in archive.infolist():
                    if member.filename.endswith(".npy"):
                        with archive.open(member) as file:
                            _check_array(file, member)
            stream.seek(0)
            opened = open_files.enter_context(np.load(stream, allow_pickle=False))
        except NPZ_DAMAGE as error:
            raise NpzError.of(path, error) from error
        yield Arrays(path, opened)


def check_unfolding(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError if the members of a zip file of `size` bytes unfold to a multiple of it."""
    unfolded = sum(member.file_size for member in archive.infolist())
    if unfolded > size * MOST_UNFOLDING + FREE_UNFOLDING:
        raise ValueError(f"{size:,} bytes that unfold to {unfolded:,}")


def _check_array(file: Any, member: zipfile.ZipInfo) -> None:
    """Raise ValueError if an array claims more numbers than its member of the archive holds."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    name = member.filename.removesuffix(".npy")
    try:
        shape, _, dtype = read(file)
    except ValueError as error:  # it quotes the header, which may claim to be of any length
        raise ValueError(f"array {name}: {str(error)[:60]}...") from error
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"array {name} of shape {shape} in {member.file_size:,} bytes")
