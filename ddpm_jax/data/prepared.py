"""Read data sets that prepare_data.py (or TFDS itself) prepared as array_record.

It takes no TensorFlow: TFDS describes and deserialises the records, grain reads them by random
access, Pillow decodes the images.

The split "test" is the set's own test split, or else its validation split (LSUN scenes). A set with
train alone (CelebA-HQ) holds out the last fiftieth of it. Since TFDS stores examples in the order
of a hash of their keys, that is a random but fixed part.
"""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format, message
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.source import RecordSource, check_shape
from ddpm_jax.errors import DataError
from ddpm_jax.files import read_json

KNOWN = (
    "cifar10",
    "fashion_mnist",
    "mnist",
    "celeb_a",
    "celeb_a_hq",
    "lsun",
)  # what prepare_data.py takes, and folder
HELD_OUT_FRACTION = 50
_INFO = "dataset_info.json"  # written last: a version without it is not whole
METADATA = "metadata.json"  # how a set of one's own was made
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# TFDS imports the class that features.json names, which runs its module: these and no other.
_FEATURES = {
    f"{kind.__module__}.{kind.__name__}"
    for kind in (
        tfds.features.FeaturesDict,
        tfds.features.Image,
        tfds.features.ClassLabel,
        tfds.features.Text,
        tfds.features.Tensor,
        tfds.features.Scalar,
    )
}


def find_prepared(name: str, data_dir: str | Path) -> Path:
    """Find the folder data_dir/NAME/VERSION of a prepared set, the newest version of several.

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
        raise DataError(
            f"data set {name!r} is only half prepared in {data_dir}/: run {command} to start afresh"
        )
    configurations = [path.name for path in children if any(path.glob(f"*/{_INFO}"))]
    if configurations:
        raise DataError(
            f"data set {name!r} has configurations: set config.data.name={name}/{configurations[0]}"
        )
    family = name.split("/")[0]
    if family in KNOWN:
        raise DataError(f"data set {name!r} is not prepared in {data_dir}/: run {command}")
    there = [path.name for path in data_dir.glob("*") if any(path.glob(f"*/{_INFO}"))]
    near = difflib.get_close_matches(name, [*there, *KNOWN, "digits", "folder"], 1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"there are {', '.join([*there, 'digits', 'folder', *KNOWN])}"
    )
    raise DataError(
        f"data set {name!r} is not prepared in {data_dir}/, nor known to prepare_data.py: {hint}"
    )


def crop_of(folder: Path) -> str:
    """Return the crop that a set of one's own was prepared with; "none" for all other sets."""
    try:
        crop = read_json(folder / METADATA)["crop"]
    except (OSError, ValueError, KeyError, TypeError):
        return "none"
    return crop if isinstance(crop, str) else "none"


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of a set's classes; () where it has none, or numbers alone."""
    _check_features(read_json(folder / "features.json"))
    features = tfds.builder_from_directory(folder).info.features
    label = features["label"] if "label" in features else None
    if not isinstance(label, tfds.features.ClassLabel):
        return ()
    numbers = tuple(str(number) for number in range(label.num_classes))
    return () if tuple(label.names) == numbers else tuple(label.names)


def _crop_left(data: DataConfig, folder: Path, what: str) -> str:
    """Return what `data.crop` still has to do to images that were cropped when they were prepared.

    They have its shape by then, and the same crop is not applied a second time: they are only
    shrunk.

    Raises:
      DataError: they were cropped in another way, which nothing brings back.
    """
    done = crop_of(folder)
    if done == "none" or data.crop in ("none", "center"):
        return data.crop  # the center crop keeps the whole of what has its shape
    if data.crop != done:
        raise DataError(
            f"{what} was prepared with crop={done}, config.data.crop={data.crop} comes too late: "
            f"set config.data.crop={done}, or prepare it anew"
        )
    return "center"


def unfinished(name: str, data_dir: str | Path) -> list[Path]:
    """List what interrupted preparations of `name` left: TFDS renames incomplete.* at the end."""
    root = Path(data_dir) / name
    broken = [
        path
        for path in root.glob("*")
        if _VERSION.fullmatch(path.name) and not (path / _INFO).is_file()
    ]
    return sorted([*root.glob("incomplete.*"), *broken])


def open_prepared(data: DataConfig, data_dir: str | Path, split: str) -> RecordSource:
    """Open one split of the prepared set `data.name`; arguments and errors as `load_source`."""
    folder = find_prepared(data.name, data_dir)
    what = f"data set {data.name!r}"
    again = f"delete {folder} and run {_command(data.name, data_dir)}"
    try:
        _check_features(read_json(folder / "features.json"))
        info = tfds.builder_from_directory(folder).info
    except (OSError, ValueError, TypeError, AttributeError, json_format.ParseError) as error:
        raise DataError(f"{what} is damaged ({error}): {again}") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{what} in {folder} is prepared as {info.file_format.value}, not as array_record: "
            f"{again}"
        )
    image = info.features["image"] if "image" in info.features else None
    if not isinstance(image, tfds.features.Image):
        raise DataError(f"{what} in {folder} has no feature 'image'")
    sides = data.inner_sides
    height, width, channels = image.shape
    crop = _crop_left(data, folder, what)
    if crop != "none":
        # The size is the crop's business, the channels are the set's.
        check_shape(what, *sides, channels, data)
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
            blobs = records.__getitems__([start + i for i in indices])
        except RuntimeError as error:  # array_record's, for damaged and unreadable files alike
            raise DataError(f"{what} is damaged ({error}): {again}") from error
        if not all(blobs):  # array_record's, for records beyond the end of a truncated file
            raise DataError(f"{what} is damaged (records are missing): {again}")
        return blobs

    def decode(record: bytes, index: int) -> tuple[np.ndarray, int]:
        name = f"{what}, {stored} record {start + index}"
        try:
            example = info.features.deserialize_example_np(record, decoders=undecoded)
        except (message.DecodeError, ValueError, KeyError) as error:
            raise DataError(f"{name} is damaged ({error}): {again}") from error
        picture = decoding.open_image(io.BytesIO(example["image"]), name, remedy=again)
        picture = decoding.to_channels(picture, channels, name)
        if crop != "none":
            picture = decoding.fit(picture, crop, sides, name)
        return _padded(picture, sides, data.padding, name), int(example["label"]) if labelled else 0

    return RecordSource(
        count,
        fetch,
        decode,
        (*data.sides, channels),
        labelled,
        getattr(info.features["label"], "num_classes", None) if labelled else None,
    )


def _check_features(feature: Any) -> None:
    """Check that features.json names classes of `_FEATURES` alone, at every depth.

    Raises:
      ValueError: another class, or an older spelling of TFDS, which may hide one in text.
    """
    if not isinstance(feature, dict) or {"type", "jsonFeature", "json_feature"} & set(feature):
        raise ValueError("features.json: no feature as TFDS 4.9 writes it")
    spellings = ("pythonClassName", "python_class_name")
    for name in [feature.get(key) for key in spellings if key in feature] or [None]:
        if name not in _FEATURES:
            raise ValueError(f"features.json names the class {name}, which is not loaded")
    for key in ("featuresDict", "features_dict"):
        for child in (feature.get(key) or {}).get("features", {}).values():
            _check_features(child)


def _command(name: str, data_dir: str | Path) -> str:
    """Write the command line that prepares a set."""
    dataset = name if name.split("/")[0] in KNOWN else f"folder --name={name}"
    return f"ddpm prepare-data --dataset={dataset} --data_dir={data_dir}"


def _padded(picture: Image.Image, sides: tuple[int, int], padding: int, name: str) -> np.ndarray:
    height, width = sides
    if picture.size != (width, height):
        raise DataError(
            f"{name} is {picture.width}x{picture.height}, not {width}x{height} as the set says: "
            "prepare it anew"
        )
    return decoding.pad(decoding.to_pixels(picture), padding)


def _locate(splits: tfds.core.splits.SplitDict, split: str, what: str) -> tuple[str, int, int]:
    """Return stored split, first record and number of records of "train" or "test".

    The head of this file has the rules.
    """
    if "train" not in splits:
        raise DataError(f"{what} has no train split")
    total = splits["train"].num_examples
    for held_out in ("test", "validation"):
        if held_out in splits:
            return (
                ("train", 0, total)
                if split == "train"
                else (held_out, 0, splits[held_out].num_examples)
            )
    tail = -(-total // HELD_OUT_FRACTION)
    return ("train", 0, total - tail) if split == "train" else ("train", total - tail, tail)
