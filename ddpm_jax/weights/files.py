"""Read files of weights as NumPy arrays, and write them: safetensors, PyTorch, .npz, TensorFlow.

Nothing in a file is ever executed. Reading needs no PyTorch: `pickled.py` rebuilds its tensors.
TensorFlow is needed for its own checkpoints, and PyTorch to write a file of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import WeightsError
from ddpm_jax.files import NpzError, open_file, open_npz, read_json
from ddpm_jax.weights.pickled import read_tensors

Tensors = dict[str, np.ndarray]
INDEX = ".index.json"  # behind the name that the shards of one file would have together
SUFFIXES = (".safetensors", ".npz", ".index", ".pt", ".pth", ".ckpt", ".bin")

# In the safetensors header of what an export writes: the config, and which weights they are.
CONFIG_KEY, WEIGHTS_KEY = "ddpm_jax.config", "ddpm_jax.weights"


@dataclass(frozen=True)
class Source:
    """Contents of a file of weights.

    Attributes:
      contents: dicts and lists of arrays, as the file nests them; floats are float32.
      metadata: the strings of a safetensors header.
      files: the paths that were read.
    """

    contents: Any
    metadata: dict[str, str]
    files: tuple[Path, ...]


def find_file(path: Path) -> Path:
    """Return `path`, or the one file of weights in a folder.

    Raises:
      WeightsError: the folder holds none, or several without an index.
    """
    if not path.is_dir():
        return path
    indices = sorted(file for file in path.iterdir() if file.name.endswith(INDEX))
    if len(indices) == 1:
        return indices[0]
    candidates = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(candidates) != 1:
        names = ", ".join(file.name for file in candidates[:5]) or "none"
        raise WeightsError(
            f"input={path}: name the file in this folder; files of weights there: {names}"
        )
    return candidates[0]


def read(path: Path) -> Source:
    """Read one file, or a TensorFlow checkpoint by its prefix or by its .index file.

    The suffix chooses the reader: .safetensors, .npz, .index.json of a file in shards, and
    PyTorch's format for any other.

    Raises:
      WeightsError: no such file, a damaged one, one that wants to run code, a shard that is
        missing, or a TensorFlow checkpoint where TensorFlow is not installed.
    """
    index = path if path.suffix == ".index" else path.with_name(path.name + ".index")
    if index.is_file():
        return _read_tensorflow(index.with_suffix(""))
    if not path.is_file():
        raise WeightsError(f"input={path}: no such file")
    _check_fetched(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return Source(_all_float32(read_tensors(path)), {}, (path,))


def fingerprint(path: Path) -> dict[str, Any]:
    """Return name, size and SHA-256 of a file: what to compare when a result is asked about."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write one flat set of tensors, as safetensors or, under any other suffix, for torch.load.

    Args:
      path: ends in .safetensors for that format.
      tensors: by name.
      metadata: for the header of a safetensors file; PyTorch's format has no place for it.

    Raises:
      WeightsError: PyTorch's format is asked for and PyTorch is not installed.
    """
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata={"format": "pt", **metadata})
        return
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            f"{path} must be written by PyTorch: pip install 'ddpm_jax[torch]', "
            "or write format=safetensors"
        )
    import torch

    torch.save({name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}, path)


def _check_fetched(path: Path) -> None:
    """Raise WeightsError if the file is what stands for one that was not fetched."""
    with open_file(path) as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull there, or "
            "download the file"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path} is a web page, not a file of weights: download it again")


def _read_shards(index: Path) -> Source:
    """Read a file that was split: its index names the shard of each tensor.

    Raises:
      WeightsError: a damaged index, a shard that is missing or damaged, or a tensor that is not
        where the index says.
    """
    try:
        places = dict(read_json(index)["weight_map"])
        shards = sorted(set(places.values()))
        if not all(Path(name).name == name and not name.endswith(INDEX) for name in shards):
            raise ValueError("it names something else than files beside it")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{index} is damaged ({error}): fetch it again") from error
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise WeightsError(
            f"{index} names {len(shards)} shards, of which {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} not there: fetch them all"
        )
    sources = [read(index.parent / name) for name in shards]
    tensors = {
        name: tensor
        for source in sources
        if isinstance(source.contents, dict)
        for name, tensor in source.contents.items()
    }
    if missing := [name for name in places if name not in tensors]:
        raise WeightsError(f"{index} names {missing[0]}, which no shard holds: fetch them again")
    metadata = {key: value for source in sources for key, value in source.metadata.items()}
    return Source(tensors, metadata, tuple(file for source in sources for file in source.files))


def _read_safetensors(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: _float32(file.get_tensor(name)) for name in file.keys()}
            return Source(tensors, file.metadata() or {}, (path,))
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({error}): fetch it again"
        ) from error


def _read_npz(path: Path) -> Source:
    try:
        with open_npz(path) as file:
            return Source({name: _float32(file[name]) for name in file.files}, {}, (path,))
    except NpzError as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path} holds pickled objects, not arrays: they are not loaded, "
                "as they could run code"
            ) from error
        raise WeightsError(f"{error}: fetch it again") from error


def _read_tensorflow(prefix: Path) -> Source:
    if importlib.util.find_spec("tensorflow") is None:
        raise WeightsError(
            f"{prefix} is a TensorFlow checkpoint: pip install 'ddpm_jax[tensorflow]', "
            "or export its variables to an .npz"
        )
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except Exception as error:  # a short read alone has several types
        line = str(error).splitlines()[0][:120]
        raise WeightsError(
            f"{prefix} is damaged or incomplete ({line}): fetch all its files again"
        ) from error
    files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
    numbers = {name: _float32(x) for name, x in tensors.items() if isinstance(x, np.ndarray)}
    return Source(numbers, {}, tuple(file for file in files if file.suffix != ".meta"))


def _all_float32(value: Any) -> Any:
    """Apply `_float32` to every array in nested dicts and lists."""
    if isinstance(value, np.ndarray):
        return _float32(value)
    if isinstance(value, dict):
        return {key: _all_float32(item) for key, item in value.items()}
    return [_all_float32(item) for item in value] if isinstance(value, list) else value


def _float32(array: np.ndarray) -> np.ndarray:
    """Return floats of any width as float32, exact for half precision; integers as they are."""
    wide = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if wide else array
