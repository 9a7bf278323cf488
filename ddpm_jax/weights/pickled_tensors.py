"""PyTorch's own files (.pth, .pt, .ckpt) as NumPy arrays, without PyTorch and without running anything.

Both formats: the zip of PyTorch 1.6 and later, and the stream of pickles and raw numbers before that, which older published
weights are in. A pickle names the functions it wants called; here it gets the three that rebuild tensors, and nothing else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ddpm_jax.weights.errors import WeightsError

_MAGIC = 0x1950A86A20F9469CFC6C  # what the first pickle of the older format holds
_TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


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

    def array(self, numbers: dict[str, np.ndarray]) -> np.ndarray:
        flat = numbers[self.storage.key]
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.offset < 0 or min(self.strides, default=0) < 0 or (0 not in self.shape and last >= len(flat)):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides).copy()


class _Refused(Exception):
    """A global that rebuilds no tensor."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return np.dtype(_TYPES[name])
        rebuild = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _Tensor(
                storage, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in rebuild:
            raise _Refused(f"{module}.{name}")
        return rebuild[module, name]

    def persistent_load(self, reference: tuple) -> _Storage:
        kind, dtype, key, _, _, *view = reference
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("a storage of an unknown kind")
        return _Storage(str(key), dtype)


def read_tensors(path: Path) -> Any:
    """What `torch.save` put into a file: dicts and lists as they were, with arrays for tensors.

    Raises:
      WeightsError: no such file, a damaged one, or one with more in it than tensors.
    """
    try:
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(file)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except _Refused as error:
        raise WeightsError(f"{path} holds more than tensors ({error}), which could run code: nothing was loaded") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        line = " ".join(str(error).split())[:80] or type(error).__name__
        raise WeightsError(f"{path} is damaged or no PyTorch file ({line}): fetch it again") from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        contents = _Unpickler(io.BytesIO(archive.read(index))).load()
        folder = index.removesuffix("data.pkl") + "data/"
        return _filled(contents, lambda storage: np.frombuffer(archive.read(folder + storage.key), storage.dtype))


def _read_stream(file: BinaryIO) -> Any:
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("its first number is not PyTorch's")
    _Unpickler(file).load(), _Unpickler(file).load()  # version of the format; sizes of integers where it was written
    contents = _Unpickler(file).load()
    dtypes = {storage.key: storage.dtype for storage in _storages(contents)}
    numbers = {}
    for key in map(str, _Unpickler(file).load()):
        count = int.from_bytes(file.read(8), "little")
        raw = file.read(count * dtypes[key].itemsize)
        numbers[key] = np.frombuffer(raw, dtypes[key], count)
    return _filled(contents, lambda storage: numbers[storage.key])


def _storages(contents: Any) -> list[_Storage]:
    if isinstance(contents, _Tensor):
        return [contents.storage]
    children = contents.values() if isinstance(contents, dict) else contents if isinstance(contents, (list, tuple)) else ()
    return [storage for child in children for storage in _storages(child)]


def _filled(contents: Any, numbers_of: Any) -> Any:
    numbers = {storage.key: storage for storage in _storages(contents)}
    numbers = {key: numbers_of(storage) for key, storage in numbers.items()}

    def fill(value: Any) -> Any:
        if isinstance(value, _Tensor):
            return value.array(numbers)
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, (list, tuple)) else value

    return fill(contents)
