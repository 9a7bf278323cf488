"""Files of weights as NumPy arrays, and back: safetensors, PyTorch, .npz, TensorFlow checkpoints.

Nothing in a file is ever executed: PyTorch reads with `weights_only`, NumPy without pickles. PyTorch and TensorFlow are needed
for their own formats only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.weights.errors import WeightsError

Tensors = dict[str, np.ndarray]
# In PyTorch's refusals: what a pickle wanted to call or to build.
_FOREIGN = re.compile(r"(?:GLOBAL |allowlisted via `add_safe_globals`, but got <class ')([\w.]+)")


@dataclass(frozen=True)
class Source:
    """contents: dicts and lists of arrays, as the file nests them; metadata: strings of a safetensors header."""

    contents: Any
    metadata: dict[str, str]
    files: tuple[Path, ...]


def read(path: Path) -> Source:
    """The contents of one file, or of a TensorFlow checkpoint by its prefix (model.ckpt-790000) or its .index file.

    Raises:
      WeightsError: no such file, a damaged one, one that wants to run code, or a package that is not installed.
    """
    index = path if path.suffix == ".index" else path.with_name(path.name + ".index")
    if index.is_file():
        return _read_tensorflow(index.with_suffix(""))
    if not path.is_file():
        raise WeightsError(f"--input={path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_torch(path)


def fingerprint(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file: what to compare when a result is asked about later."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """One flat set of tensors: .safetensors with `metadata` in its header, or a PyTorch state dict under any other name."""
    if path.suffix == ".safetensors":
        _package("safetensors", path)
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata={"format": "pt", **metadata})
    else:
        _package("torch", path)
        import torch

        torch.save({name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}, path)


def _read_safetensors(path: Path) -> Source:
    _package("safetensors", path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: _float32(file.get_tensor(name)) for name in file.keys()}
            return Source(tensors, file.metadata() or {}, (path,))
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error


def _read_npz(path: Path) -> Source:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return Source({name: _float32(file[name]) for name in file.files}, {}, (path,))
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path} holds pickled objects, not arrays: they are not loaded, as they could run code"
            ) from error
        raise WeightsError(f"{path} is damaged or no .npz file ({error}): fetch it again") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise WeightsError(f"{path} is damaged or no .npz file ({error}): fetch it again") from error


def _read_torch(path: Path) -> Source:
    _package("torch", path)
    import torch

    # Scores that training loops put beside the weights, as NumPy numbers. None of these can run anything.
    scalar = np.float64(0).__reduce__()[0]
    harmless = [
        np.dtype,
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if found := _FOREIGN.search(str(error)):
            raise WeightsError(
                f"{path} holds more than tensors ({found[1]}), which could run code: nothing was loaded"
            ) from error
        line = " ".join(str(error).split())[:80] or type(error).__name__
        raise WeightsError(f"{path} is damaged or no PyTorch file ({line}): fetch it again") from error

    def numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return _float32((value.float() if value.is_floating_point() else value).numpy())
        if isinstance(value, dict):
            return {key: numpy(item) for key, item in value.items()}
        return [numpy(item) for item in value] if isinstance(value, (list, tuple)) else value

    return Source(numpy(contents), {}, (path,))


def _read_tensorflow(prefix: Path) -> Source:
    if importlib.util.find_spec("tensorflow") is None:
        raise WeightsError(
            f"{prefix} is a TensorFlow checkpoint: pip install -r requirements-tensorflow.txt, or export its variables to an .npz"
        )
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except Exception as error:  # a short read alone has several types
        line = str(error).splitlines()[0][:120]
        raise WeightsError(f"{prefix} is damaged or incomplete ({line}): fetch all its files again") from error
    files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
    numbers = {name: _float32(x) for name, x in tensors.items() if isinstance(x, np.ndarray)}
    return Source(numbers, {}, tuple(file for file in files if file.suffix != ".meta"))


def _float32(array: np.ndarray) -> np.ndarray:
    """Floats of any width as float32, exact for half precision; integers as they are."""
    wide = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if wide else array


def _package(name: str, path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        remedy = ", or convert it to .safetensors where PyTorch is" if name == "torch" else ""
        raise WeightsError(f"{path} needs the package {name}: pip install -r requirements-torch.txt{remedy}")
