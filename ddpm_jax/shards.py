"""Any number of samples on disk, block by block: what is finished stays finished, whatever ends the run.

Two stores with the same face. `PngFolder` is its own result, a file for each sample. `NpzFile` keeps blocks as .npy in
FILE.npz.parts/ and puts them together at the end without holding them all in memory.

Next to the samples lies protocol.json, everything they are a function of; samples of another protocol are not mixed in.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import hosts, images
from ddpm_jax.devices import Devices
from ddpm_jax.errors import UserError

PROTOCOL = "protocol.json"


class ShardError(UserError):
    """A place that holds other samples, or damaged ones."""


class PngFolder:
    """FOLDER/000000.png, 000001.png, ... by the number of the sample."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        self._folder = folder
        claim(folder, protocol, str(folder))

    def has(self, indices: np.ndarray) -> bool:
        return all(self._path(index).exists() for index in indices)

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """uint8 samples number `indices`."""
        for index, sample in zip(indices, samples, strict=True):
            images.save_png(self._path(index), sample)

    def finish(self, blocks: list[np.ndarray], labels: np.ndarray | None) -> None:
        """Nothing is left to do: the folder is the result."""

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.png"


class NpzFile:
    """FILE.npz: arr_0 uint8 [n,h,w,c], and with labels arr_1 [n], in the order of the blocks."""

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self._path, self._parts = path, path.with_name(f"{path.name}.parts")
        claim(self._parts, protocol, str(path))

    def has(self, indices: np.ndarray) -> bool:
        return self._part(indices).exists()

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """uint8 samples number `indices`, a block."""
        with images.replacing(self._part(indices)) as file:
            np.save(file, samples)

    def finish(self, blocks: list[np.ndarray], labels: np.ndarray | None) -> None:
        """Puts the file together; the parts stay, so that asking again, or for more, computes nothing twice."""
        count = sum(len(block) for block in blocks)
        shape = (count, *self._read(blocks[0]).shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with images.replacing(self._path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(self._read(block).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        path = self._part(indices)
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ShardError(f"{path} is damaged ({error}): remove it and run the command again") from error

    def _part(self, indices: np.ndarray) -> Path:
        return self._parts / f"{indices[0]:06d}-{indices[-1]:06d}.npy"


def claim(folder: Path, protocol: dict[str, Any], what: str) -> None:
    """Makes `folder` the place of samples of `protocol`; ShardError if it is that of others."""
    path, protocol = folder / PROTOCOL, json.loads(json.dumps(flat(protocol)))  # tuples become lists, as in the file
    if path.exists():
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ShardError(f"{path} is damaged ({error}): choose another --output or remove {folder}") from error
        changed = [name for name in sorted({*there, *protocol}) if there.get(name) != protocol.get(name)]
        if changed:
            name = changed[0]
            raise ShardError(
                f"{what} has samples of another protocol ({name}: {there.get(name)!r}, now {protocol.get(name)!r}): "
                f"choose another --output or remove {folder}"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ShardError(f"{folder} is not empty and holds no samples of this program: choose another --output")
    else:
        with images.replacing(path) as file:
            file.write((json.dumps(protocol, indent=2) + "\n").encode())


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their path, so that a difference names one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def fill(
    place: Path,
    protocol: dict[str, Any],
    indices: np.ndarray,
    labels: np.ndarray | None,
    draw: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    devices: Devices,
    *,
    size: int = 512,
) -> int:
    """Samples number `indices` into `place`, a .npz file or a folder of PNGs, in blocks of `size`: those that are not there yet.

    Args:
      labels: [n], one for each index.
      draw: (indices, labels) -> samples float32 [n,h,w,c] in [-1, 1].

    Returns:
      How many samples were drawn.

    Raises:
      ShardError: the place holds other samples, or damaged ones.
    """
    store = None
    with hosts.together():
        if devices.is_main:
            store = NpzFile(place, protocol) if place.suffix == ".npz" else PngFolder(place, protocol)
    blocks = [slice(start, start + size) for start in range(0, len(indices), size)]
    missing = np.array([store is not None and not store.has(indices[block]) for block in blocks])
    drawn = 0
    for block in (block for block, wanted in zip(blocks, devices.from_main(missing)) if wanted):
        samples = draw(indices[block], None if labels is None else labels[block])
        drawn += len(samples)
        if store is not None:
            store.write(indices[block], images.to_uint8(samples))
    if store is not None:
        store.finish([indices[block] for block in blocks], labels)
    return drawn
