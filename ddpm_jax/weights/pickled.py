"""Read PyTorch's own files (.pth, .pt, .ckpt, .bin) without PyTorch and without running anything.

Two formats exist: the zip of PyTorch 1.6 and later, and before that a stream of pickles and raw
numbers, which older published weights are in. A pickle names the functions it wants called. Here
it gets a short list of stand-ins, written in this file, which rebuild tensors, NumPy numbers and
a few plain values. Any other name ends the reading.

Training loops also save their hyper-parameters, in classes of Lightning, OmegaConf and the like. In
their place stands an object that holds nothing and does nothing (`_Opaque`); no such class is
imported.

A small file cannot claim much: tensors that share numbers, dicts that hold each other and zip
members that unfold are counted before anything is allocated (`_check_sizes`).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import WeightsError
from ddpm_jax.files import check_unfolding, open_file

_MAGIC = 0x1950A86A20F9469CFC6C  # what the first pickle of the older format holds
_TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_NUMBER = re.compile(r"[<>=|]?(?:[biuf][1248]|f16|[?bBhHiIlLqQefd])")  # codes of numpy.dtype

MOST_ITEMS, DEEPEST = 1_000_000, 100  # of dicts and lists in a file
MOST_SHARED = 4  # times the numbers of a file that its tensors may be, where several share them

# Classes that hold settings beside weights: whole packages by their first part, single names.
_SETTINGS_PACKAGES = ("lightning", "lightning_fabric", "omegaconf", "pytorch_lightning")
_SETTINGS = {
    ("argparse", "Namespace"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "device"),
    ("torch", "float16"),
    ("torch", "float32"),
    ("typing", "Any"),
}


class _Opaque:
    """Stand-in for a class of settings: takes whatever it is told, and keeps nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> _Opaque:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item as a list does."""

    def extend(self, values: Any) -> None:
        """Take items as a list does."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    """What the pickle says of a tensor; its numbers come later in the file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def array(self, numbers: dict[str, np.ndarray]) -> np.ndarray:
        flat = numbers[self.storage.key]
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if (
            self.offset < 0
            or min(self.strides, default=0) < 0
            or (0 not in self.shape and last >= len(flat))
        ):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides).copy()


class _Refused(Exception):
    """A global that rebuilds no tensor."""


class _NumberType:
    """Stand-in for numpy.dtype, of numbers alone; training loops save scores beside weights."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise _Refused(f"numpy.dtype of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def scalar(self, raw: bytes) -> Any:
        return np.frombuffer(raw, self.dtype, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 spells as Latin-1 text."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Make new stand-ins, since a pickle may set attributes of what it is given."""

    def rebuild(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def scalar(kind: _NumberType, raw: bytes) -> Any:
        return kind.scalar(raw)

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): lambda counts=(): dict(counts),  # of a schedule's milestones
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): rebuild,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        ("_codecs", "encode"): lambda text, encoding="utf-8": _encode(text, encoding),
        ("numpy", "dtype"): lambda code, *_: _NumberType(code),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy._core.multiarray", "scalar"): scalar,
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return name
        stand_ins = _stand_ins()
        if module.split(".")[0] in _SETTINGS_PACKAGES or (module, name) in _SETTINGS:
            return type("_Opaque", (_Opaque,), {})  # a new one: a pickle may set its attributes
        if (module, name) not in stand_ins:
            raise _Refused(f"{module}.{name}")
        return stand_ins[module, name]

    def persistent_load(self, reference: tuple) -> _Storage:
        kind, name, key, _, _, *view = reference
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("a storage of an unknown kind")
        return _Storage(str(key), np.dtype(_TYPES[name]))


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` put into a file: dicts and lists, with arrays for tensors.

    Raises:
      WeightsError: no such file, a damaged one, or one with more in it than tensors.
    """
    try:
        with open_file(path) as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(file)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except _Refused as error:
        raise WeightsError(
            f"{path} holds more than tensors ({error}), which could run code: nothing was loaded"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        if isinstance(error, OSError) and error.filename is not None:  # not of a bad offset in it
            raise
        line = " ".join(str(error).split())[:80] or type(error).__name__
        raise WeightsError(
            f"{path} is damaged or no PyTorch file ({line}): fetch it again"
        ) from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        check_unfolding(archive, _size(file))
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = index.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") == b"big":
            raise ValueError("its numbers are big-endian")
        contents = _Unpickler(io.BytesIO(archive.read(index))).load()
        stored = sum(member.file_size for member in archive.infolist())
        _check_sizes(contents, stored)
        return _fill(
            contents,
            lambda storage: np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.dtype),
        )


def _read_stream(file: BinaryIO) -> Any:
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("its first number is not PyTorch's")
    _Unpickler(file).load()  # the version of the format
    machine = _Unpickler(file).load()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise ValueError("its numbers are big-endian")
    contents = _Unpickler(file).load()
    _check_sizes(contents, _size(file))
    dtypes = {storage.key: storage.dtype for storage in _storages(contents)}
    numbers = {}
    for key in map(str, _Unpickler(file).load()):
        count = int.from_bytes(file.read(8), "little")
        length = count * dtypes[key].itemsize
        if length > _size(file):
            raise ValueError(f"{length:,} bytes of numbers in a file of {_size(file):,}")
        raw = file.read(length)
        numbers[key] = np.frombuffer(raw, dtypes[key], count)
    return _fill(contents, lambda storage: numbers[storage.key])


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _check_sizes(contents: Any, stored: int) -> None:
    """Refuse contents that are many times the `stored` bytes they are made of.

    A tensor of stride 0 repeats one number as often as it says, and dicts that hold one another
    twice, level upon level, are as many as 2 to the power of their depth.

    Raises:
      ValueError: too many items, too deep, or more bytes of tensors than the file may have.
    """
    items, level, tensors = 0, [contents], set()
    for _ in range(DEEPEST):
        items += len(level)
        if items > MOST_ITEMS:
            raise ValueError(f"more than {MOST_ITEMS:,} items")
        tensors |= {value for value in level if isinstance(value, _Tensor)}
        level = [child for value in level for child in _children(value)]
        if not level:
            break
    else:
        raise ValueError(f"more than {DEEPEST} levels of dicts and lists")
    unfolded = sum(tensor.bytes for tensor in tensors)
    if unfolded > MOST_SHARED * stored:
        raise ValueError(f"{stored:,} bytes that claim {unfolded:,} of tensors")


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _storages(contents: Any) -> list[_Storage]:
    """List the storages of all tensors in nested dicts, lists and tuples."""
    if isinstance(contents, _Tensor):
        return [contents.storage]
    return [storage for child in _children(contents) for storage in _storages(child)]


def _fill(contents: Any, numbers_of: Any) -> Any:
    """Put arrays in the place of tensors; tensors that are the same share one array."""
    storages = {storage.key: storage for storage in _storages(contents)}
    numbers = {key: numbers_of(storage) for key, storage in storages.items()}
    arrays: dict[_Tensor, np.ndarray] = {}

    def fill(value: Any) -> Any:
        if isinstance(value, _Tensor):
            if value not in arrays:
                arrays[value] = value.array(numbers)
            return arrays[value]
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, (list, tuple)) else value

    return fill(contents)
