"""Write files as `torch.save` does, without PyTorch: arrays stand for tensors.

tests/interop/test_interop_files.py has PyTorch read what is written here.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Global:
    """A function or class that a pickle names, whether or not it exists here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:  # pickle wants a callable to reduce with
        raise NotImplementedError


class _Storage:
    def __init__(self, reference: tuple) -> None:
        self.reference = reference


class _Pickler(pickle._Pickler):  # the pure Python one lets its opcodes be written directly
    def __init__(self, file: Any, legacy: bool) -> None:
        super().__init__(file, protocol=2)
        self.legacy, self.arrays = legacy, {}

    def persistent_id(self, value: Any) -> tuple | None:
        return value.reference if isinstance(value, _Storage) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, np.ndarray) and value.dtype in STORAGES:
            key = str(len(self.arrays))
            self.arrays[key] = value
            kind = Global("torch", STORAGES[value.dtype])
            reference = ("storage", kind, key, "cpu", value.size, *([None] * self.legacy))
            strides = tuple(stride // value.itemsize for stride in value.strides)
            arguments = (_Storage(reference), 0, value.shape, strides, False, {})
            self.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
        else:
            super().save(value, save_persistent_id)


def write_torch(path: Path, contents: Any, *, legacy: bool = False) -> Path:
    """Write `contents` to `path`, as PyTorch 1.6 and later do or, legacy, as those before.

    The arrays must be contiguous, in C or Fortran order: an array of the latter becomes a
    transposed tensor.
    """
    out = io.BytesIO()
    pickler = _Pickler(out, legacy)
    pickler.dump(contents)
    raw = {key: array.tobytes("A") for key, array in pickler.arrays.items()}
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", out.getvalue())
            archive.writestr("archive/byteorder", "little")
            for key, numbers in raw.items():
                archive.writestr(f"archive/data/{key}", numbers)
            archive.writestr("archive/version", "3\n")
        return path
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    with path.open("wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, machine):
            file.write(pickle.dumps(head, 2))
        file.write(out.getvalue())
        file.write(pickle.dumps(list(raw), 2))
        for key, numbers in raw.items():
            file.write(pickler.arrays[key].size.to_bytes(8, "little") + numbers)
    return path
