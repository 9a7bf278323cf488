"""Read the original files of CIFAR-10 and the MNIST family, from an archive or a folder.

They are checked before they are believed. Archives are read member by member into memory: nothing
of them is ever written to disk, whatever their names say.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import DataError

Splits = dict[
    str, tuple[np.ndarray, np.ndarray]
]  # split -> (uint8 images [N, h, w, c], uint8 labels [N])

# MD5 of the six batches, as published: the pickles of cifar-10-python.tar.gz and the records of
# cifar-10-binary.tar.gz.
CIFAR10_PICKLES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_RECORDS = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
CIFAR10_LABELS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FASHION_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)  # in the README of its publisher; the files have numbers alone
MNIST_EXAMPLES = {
    "train": ("train", 60_000),
    "test": ("t10k", 10_000),
}  # split -> (prefix of its files, examples)
_LARGEST_MEMBER = 64 * 2**20  # bytes; no batch of CIFAR-10 has half as many


def read_cifar10(source: str | Path) -> Splits:
    """Read CIFAR-10 from cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or a folder of either.

    Raises:
      DataError: a batch is missing or differs from the published one, or the archive is damaged.
    """
    source = Path(source)
    batches = (*CIFAR10_PICKLES, *CIFAR10_RECORDS)
    blobs = _read_folder(source, batches) if source.is_dir() else _read_tar(source, batches)
    forms = ((CIFAR10_PICKLES, _parse_pickle), (CIFAR10_RECORDS, _parse_records))
    present = [
        (checksums, parse) for checksums, parse in forms if any(name in blobs for name in checksums)
    ]
    if not present:
        raise DataError(
            f"{source} holds no CIFAR-10: neither data_batch_1 ... test_batch nor their .bin forms"
        )
    checksums, parse = present[0]
    parsed = {}
    for name, md5 in checksums.items():
        if name not in blobs:
            raise DataError(f"{source} lacks {name}: extract or download it again")
        if hashlib.md5(blobs[name]).hexdigest() != md5:
            raise DataError(
                f"{source}: the MD5 of {name} differs from the published one: "
                "extract or download it again"
            )
        parsed[name] = parse(blobs[name])
    *train, test = parsed.values()
    return {"train": tuple(map(np.concatenate, zip(*train))), "test": test}


def read_mnist(source: str | Path) -> Splits:
    """Read MNIST or Fashion-MNIST from a folder with the four idx files, gzipped or not.

    Raises:
      DataError: a file is missing, truncated, or not the idx file that its name says.
    """
    source, splits = Path(source), {}
    if not source.is_dir():
        raise DataError(
            f"source={source} is not a folder: name the one with train-images-idx3-ubyte.gz "
            "and its kin"
        )
    for split, (prefix, count) in MNIST_EXAMPLES.items():
        arrays = []
        for kind, shape in (("images", (count, 28, 28)), ("labels", (count,))):
            name = f"{prefix}-{kind}-idx{len(shape)}-ubyte"
            blobs = _read_folder(source, (name, f"{name}.gz", name.replace("-idx", ".idx")))
            if not blobs:
                raise DataError(f"{source} lacks {name} (or {name}.gz)")
            array = parse_idx(_gunzip(*blobs.popitem()))
            if array.shape != shape:
                raise DataError(
                    f"{source}: {name} holds an array {array.shape}, not {shape}: download it again"
                )
            arrays.append(array)
        splits[split] = (arrays[0][..., None], arrays[1])
    return splits


def parse_idx(blob: bytes) -> np.ndarray:
    """Parse an idx file of uint8.

    It holds the bytes 0, 0, 8 (unsigned byte), the number of axes, big-endian lengths, and data.

    Raises:
      DataError: another type, or more or less data than the header says.
    """
    axes = blob[3] if blob[:3] == b"\0\0\x08" and len(blob) > 3 else 0
    if not axes or len(blob) < 4 + 4 * axes:
        raise DataError("not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{axes}I", blob, 4)
    data = np.frombuffer(blob, np.uint8, offset=4 + 4 * axes)
    if data.size != np.prod(shape, dtype=np.int64):
        raise DataError(
            f"an idx file {shape} with {data.size} bytes of data is truncated or damaged: "
            "download it again"
        )
    return data.reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of dicts, lists, strings, numbers and NumPy arrays, which calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("_core", "core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == (
            "numpy",
            "dtype",
        ):  # files of 2009 say 0 and 1 where NumPy 2 wants booleans
            return lambda code, align=False, copy=False: np.dtype(
                code, align=bool(align), copy=bool(copy)
            )
        raise DataError(
            f"a pickle that calls {module}.{name} is not a CIFAR-10 batch: it was not run"
        )


def unpickle_arrays(blob: bytes) -> Any:
    """Unpickle what Python 2 or 3 put into `blob`, strings of Python 2 as bytes.

    Raises:
      DataError: it would call anything but NumPy's array reconstruction, or is damaged.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(blob), encoding="bytes").load()
    except DataError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        raise DataError(f"a damaged pickle ({error})") from error


def _parse_pickle(blob: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = unpickle_arrays(blob)
    return _planes_to_pixels(batch[b"data"]), np.array(batch[b"labels"], np.uint8)


def _parse_records(blob: bytes) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(blob, np.uint8).reshape(-1, 1 + 3072)  # a label, then the planes
    return _planes_to_pixels(records[:, 1:]), records[:, 0]


def _planes_to_pixels(planes: np.ndarray) -> np.ndarray:
    """Turn [N, 3072], a red, a green and a blue plane each, into [N, 32, 32, 3]."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_folder(source: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read the files of these names that lie in `source`, or together in one of its subfolders."""
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        blobs = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        if blobs:
            return blobs
    return {}


def _read_tar(source: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read the members of these names, wherever they lie in the archive."""
    blobs: dict[str, bytes] = {}
    if not source.is_file():
        raise DataError(f"{source}: no such file or folder")
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and member.isreg() and member.size <= _LARGEST_MEMBER:
                    blobs[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source} is truncated or damaged ({error}): download it again") from error
    return blobs


def _gunzip(name: str, blob: bytes) -> bytes:
    if not name.endswith(".gz"):
        return blob
    try:
        return gzip.decompress(blob)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is truncated or damaged ({error}): download it again") from error
