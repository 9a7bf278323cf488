"""Data sets that prepare_data.py (or TFDS itself) prepared as array_record, read without TensorFlow.

TFDS describes and deserialises the records, grain reads them by random access, Pillow decodes the images.

Splits. "test" is the set's own test split, or else its validation split (LSUN scenes); a set with train alone
(CelebA-HQ) holds out the last fiftieth of it: since TFDS stores examples in the order of a hash of their keys, that is
a random but fixed part.
"""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format, message
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.errors import DataError
from ddpm_jax.data.sources import RecordSource, check_shape

KNOWN = ("cifar10", "fashion_mnist", "mnist", "celeb_a", "celeb_a_hq", "lsun")  # what prepare_data.py takes, and folder
HELD_OUT_FRACTION = 50
_INFO = "dataset_info.json"  # written last: a version without it is not whole
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find_prepared(name: str, data_dir: str | Path) -> Path:
    """The folder data_dir/NAME/VERSION of a prepared set, the newest version if there are several.

    Raises:
      DataError: missing, half prepared, or a name that lacks its configuration (celeb_a_hq/256).
    """
    data_dir = Path(data_dir)
    command = _command(name, data_dir)
    if not re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?", name):
        raise DataError(f"data set {name!r}: a name, or NAME/CONFIGURATION as in celeb_a_hq/256")
    children = sorted(path for path in (data_dir / name).glob("*") if path.is_dir())
    versions = [path for path in children if _VERSION.fullmatch(path.name)]
    whole = [path for path in versions if (path / _INFO).is_file()]
    if whole:
        return max(whole, key=lambda path: tuple(map(int, path.name.split("."))))
    if versions or unfinished(name, data_dir):
        raise DataError(f"data set {name!r} is only half prepared in {data_dir}/: run {command} to start afresh")
    configurations = [path.name for path in children if any(path.glob(f"*/{_INFO}"))]
    if configurations:
        raise DataError(f"data set {name!r} has configurations: set config.data.name={name}/{configurations[0]}")
    family = name.split("/")[0]
    if family in KNOWN:
        raise DataError(f"data set {name!r} is not prepared in {data_dir}/: run {command}")
    there = [path.name for path in data_dir.glob("*") if any(path.glob(f"*/{_INFO}"))]
    near = difflib.get_close_matches(name, [*there, *KNOWN, "digits", "folder"], 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*there, 'digits', 'folder', *KNOWN])}"
    raise DataError(f"data set {name!r} is not prepared in {data_dir}/, nor known to prepare_data.py: {hint}")


def unfinished(name: str, data_dir: str | Path) -> list[Path]:
    """What interrupted preparations of `name` left behind: TFDS writes to incomplete.* and renames at the end."""
    root = Path(data_dir) / name
    broken = [path for path in root.glob("*") if _VERSION.fullmatch(path.name) and not (path / _INFO).is_file()]
    return sorted([*root.glob("incomplete.*"), *broken])


def open_prepared(data: DataConfig, data_dir: str | Path, split: str) -> RecordSource:
    """One split of the prepared set `data.name`; the arguments and errors of `sources.load_source`."""
    folder = find_prepared(data.name, data_dir)
    what = f"data set {data.name!r}"
    again = f"delete {folder} and run {_command(data.name, data_dir)}"
    try:
        info = tfds.builder_from_directory(folder).info
    except (OSError, ValueError, json_format.ParseError) as error:
        raise DataError(f"{what} is damaged ({error}): {again}") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(f"{what} in {folder} is prepared as {info.file_format.value}, not as array_record: {again}")
    image = info.features["image"] if "image" in info.features else None
    if not isinstance(image, tfds.features.Image):
        raise DataError(f"{what} in {folder} has no feature 'image'")
    size = data.image_size - 2 * data.padding
    height, width, channels = image.shape
    if data.crop != "none":
        check_shape(what, size, size, channels, data)  # the size is the crop's business, the channels are the set's
    elif None in (height, width):
        raise DataError(f"{what} has images of various sizes: set config.data.crop=center")
    else:
        check_shape(what, height, width, channels, data)

    stored, start, count = _locate(info.splits, split, what)
    for path in info.splits[stored].filepaths:
        if not Path(path).is_file():
            raise DataError(f"{what} is damaged ({path} is missing): {again}")
    records = grain.sources.ArrayRecordDataSource(info.splits[stored].file_instructions)
    labelled = "label" in info.features
    undecoded = {"image": tfds.decode.SkipDecoding()}

    def fetch(indices: list[int]) -> list[bytes]:
        try:
            fetched = records.__getitems__([start + i for i in indices])
        except RuntimeError as error:  # what array_record raises for damaged and unreadable files alike
            raise DataError(f"{what} is damaged ({error}): {again}") from error
        if not all(fetched):  # what array_record returns for records beyond the end of a truncated file
            raise DataError(f"{what} is damaged (records are missing): {again}")
        return fetched

    def decode(record: bytes, index: int) -> tuple[np.ndarray, int]:
        name = f"{what}, {stored} record {start + index}"
        try:
            example = info.features.deserialize_example_np(record, decoders=undecoded)
        except (message.DecodeError, ValueError, KeyError) as error:
            raise DataError(f"{name} is damaged ({error}): {again}") from error
        picture = decoding.open_image(io.BytesIO(example["image"]), name, remedy=again)
        picture = decoding.to_channels(picture, channels, name)
        if data.crop != "none":
            picture = decoding.fit(picture, data.crop, size, name)
        return _padded(picture, size, data.padding, name), int(example["label"]) if labelled else 0

    return RecordSource(count, fetch, decode, (data.image_size, data.image_size, channels), labelled)


def _command(name: str, data_dir: str | Path) -> str:
    dataset = name if name.split("/")[0] in KNOWN else f"folder --name={name}"
    return f"scripts/prepare_data.py --dataset={dataset} --data_dir={data_dir}"


def _padded(picture: Image.Image, size: int, padding: int, name: str) -> np.ndarray:
    if picture.size != (size, size):
        raise DataError(f"{name} is {picture.width}x{picture.height}, not {size}x{size} as the set says: prepare it anew")
    return decoding.pad(decoding.to_pixels(picture), padding)


def _locate(splits: tfds.core.splits.SplitDict, split: str, what: str) -> tuple[str, int, int]:
    """(stored split, first record, number of records) of "train" or "test"; see the head of this file."""
    if "train" not in splits:
        raise DataError(f"{what} has no train split")
    total = splits["train"].num_examples
    for held_out in ("test", "validation"):
        if held_out in splits:
            return ("train", 0, total) if split == "train" else (held_out, 0, splits[held_out].num_examples)
    tail = -(-total // HELD_OUT_FRACTION)
    return ("train", 0, total - tail) if split == "train" else ("train", total - tail, tail)
