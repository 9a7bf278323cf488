"""Keep samples on disk, any number, block by block: a finished block stays whatever ends the run.

There are two stores with the same face. `PngFolder` is its own result, a file for each sample.
`NpzFile` keeps blocks as .npy in FILE.npz.parts/, and puts them together at the end without holding
them all in memory; from then on the file itself is the store of its blocks.

Next to the samples lies protocol.json, everything that they are a function of. Samples of another
protocol are not mixed in, and files of others are not overwritten.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax import images
from ddpm_jax.config import Config, to_dict
from ddpm_jax.errors import ShardError
from ddpm_jax.files import check_member, read_json, replacing
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices

PROTOCOL = "protocol.json"
CONTENTS = "contents.json"
BLOCK = 512  # samples that are drawn and written at once


class PngFolder:
    """FOLDER/000000.png, 000001.png, ... by the number of the sample."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        self._folder = folder
        claim(folder, protocol, str(folder))

    def has(self, indices: np.ndarray) -> bool:
        """Return whether all of these samples are there."""
        return all(self._path(index).exists() for index in indices)

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """Write uint8 samples with numbers `indices`."""
        for index, sample in zip(indices, samples, strict=True):
            images.save_png(self._path(index), sample)

    def finish(self, blocks: list[np.ndarray], labels: np.ndarray | None) -> None:
        """Do nothing: the folder is the result."""

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.png"


class NpzFile:
    """FILE.npz: arr_0 uint8 [n,h,w,c], and with labels arr_1 [n], in the order of the blocks."""

    def __init__(self, path: Path, protocol: dict[str, Any], first: int = 0) -> None:
        self._path, self._parts = path, path.with_name(f"{path.name}.parts")
        self._checked = False  # whether the file was compared with its CRC
        if path.exists() and not (self._parts / PROTOCOL).exists():
            raise ShardError(
                f"{path} is there, and holds no samples of this program: choose another output, or "
                "move it"
            )
        claim(self._parts, protocol, str(path))
        there = self._contents()
        if there is not None and there["first"] != first:
            last = there["first"] + there["count"] - 1
            raise ShardError(
                f"{path} holds samples {there['first']} to {last}, not those from {first} on: "
                "choose another output, or move it"
            )

    def has(self, indices: np.ndarray) -> bool:
        """Return whether all of these samples are there."""
        return self._part(indices).exists() or self._holds(indices)

    def write(self, indices: np.ndarray, samples: np.ndarray) -> None:
        """Write uint8 samples with numbers `indices`, a block."""
        with replacing(self._part(indices)) as file:
            np.save(file, samples)

    def finish(self, blocks: list[np.ndarray], labels: np.ndarray | None) -> None:
        """Put the file together, unless it holds these samples already."""
        first, count = int(blocks[0][0]), sum(len(block) for block in blocks)
        contents = {"first": first, "count": count, "labels": labels is not None}
        there = self._contents()
        if there is not None and there["count"] >= count and there["labels"] == contents["labels"]:
            return
        header = {"descr": "|u1", "fortran_order": False}
        header["shape"] = (count, *self._read(blocks[0]).shape[1:])
        with replacing(self._path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(self._read(block).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels)
        contents["bytes"] = self._path.stat().st_size
        with replacing(self._parts / CONTENTS) as file:
            file.write(json.dumps(contents).encode())
        for block in blocks:  # the file has them now
            self._part(block).unlink(missing_ok=True)

    def _contents(self) -> dict[str, Any] | None:
        """Return what the file holds, or None if it is not there or not as this program left it."""
        try:
            contents = read_json(self._parts / CONTENTS)
            return contents if contents["bytes"] == self._path.stat().st_size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _holds(self, indices: np.ndarray) -> bool:
        there = self._contents()
        if there is None:
            return False
        return there["first"] <= indices[0] and indices[-1] < there["first"] + there["count"]

    def _read(self, indices: np.ndarray) -> np.ndarray:
        path = self._part(indices)
        if not path.exists():
            return self._read_from_file(indices)
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            remedy = "remove it and run the command again"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error

    def _read_from_file(self, indices: np.ndarray) -> np.ndarray:
        if not self._checked:
            try:
                check_member(self._path, "arr_0.npy")
            except zipfile.BadZipFile as error:
                remedy = "remove it and run the command again"
                raise ShardError(f"{self._path} is damaged ({error}): {remedy}") from error
            self._checked = True
        with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            assert version == (1, 0)
            (_, *shape), _, _ = np.lib.format.read_array_header_1_0(member)
            start, size = indices[0] - self._contents()["first"], int(np.prod(shape))
            member.seek(member.tell() + int(start) * size)
            levels = np.frombuffer(member.read(len(indices) * size), np.uint8)
            return levels.reshape(len(indices), *shape)

    def _part(self, indices: np.ndarray) -> Path:
        return self._parts / f"{indices[0]:06d}-{indices[-1]:06d}.npy"


def claim(folder: Path, protocol: dict[str, Any], what: str) -> None:
    """Make `folder` the home of samples of this protocol, or check that it is.

    Raises:
      ShardError: it has samples of another protocol, or something else.
    """
    path = folder / PROTOCOL
    protocol = flatten_dict(protocol, sep=".")
    protocol = json.loads(json.dumps(protocol))  # tuples become lists, as in the file
    if path.exists():
        try:
            there = dict(read_json(path))
        except (ValueError, TypeError) as error:
            remedy = f"choose another output or remove {folder}"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        # A field that is younger than the samples had its default when they were drawn.
        younger = json.loads(json.dumps(flatten_dict({"config": to_dict(Config())}, sep=".")))
        there |= {name: younger[name] for name in {*younger} & {*protocol} - {*there}}
        names = sorted({*there, *protocol})
        changed = [name for name in names if there.get(name) != protocol.get(name)]
        if changed:
            name = changed[0]
            raise ShardError(
                f"{what} has samples of another protocol ({name}: {there.get(name)!r}, now "
                f"{protocol.get(name)!r}): choose another output or remove {folder}"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ShardError(
            f"{folder} is not empty and holds no samples of this program: choose another output"
        )
    else:
        with replacing(path) as file:
            file.write((json.dumps(protocol, indent=2) + "\n").encode())


def fill(
    place: Path,
    protocol: dict[str, Any],
    indices: np.ndarray,
    labels: np.ndarray | None,
    draw: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    devices: Devices,
    *,
    size: int = BLOCK,
) -> int:
    """Draw the samples that are not there yet into `place`, in blocks of `size`.

    Args:
      place: a .npz file, or a folder of PNGs.
      indices: numbers of the samples, rising by 1. labels: [n], one for each.
      draw: (indices, labels) -> samples float32 [n,h,w,c] in [-1, 1].

    Returns:
      How many samples were drawn.

    Raises:
      ShardError: the place holds other samples, or damaged ones, or files of others.
    """
    store = None
    with hosts.together():
        if devices.is_main:
            if place.suffix == ".npz":
                store = NpzFile(place, protocol, int(indices[0]))
            else:
                store = PngFolder(place, protocol)
    blocks = [slice(start, start + size) for start in range(0, len(indices), size)]
    missing = np.array([store is not None and not store.has(indices[block]) for block in blocks])
    count = 0
    for block, due in zip(blocks, devices.from_main(missing)):
        if not due:
            continue
        samples = draw(indices[block], None if labels is None else labels[block])
        count += len(samples)
        with hosts.together():  # a full disk is one to all
            if store is not None:
                store.write(indices[block], images.to_uint8(samples))
    with hosts.together():
        if store is not None:
            store.finish([indices[block] for block in blocks], labels)
    return count
