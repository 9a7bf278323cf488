"""Load one split of any data set, as uint8 images [N, H, W, C] with or without labels.

A source is a length and `read(indices) -> {"image": uint8 [n, h, w, c], "label": int32 [n] if
labelled}`. It is held whole in RAM (ArraySource), or decoded record by record on demand
(RecordSource). Both give the same pixels in the same order.

The set "digits" holds out every tenth example. A folder holds out every fiftieth image (or as
`held_out_every` says), or the last one if it has fewer. A prepared set has its own test split;
`prepared.py` has the rule for those without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import Config, DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.batches import fingerprint
from ddpm_jax.data.folder import folder_classes, folder_source, scan
from ddpm_jax.data.source import (
    SPLITS,
    ArraySource,
    Source,
    Stream,
    check_images,
    check_shape,
    decode_into_memory,
    without_bad,
)
from ddpm_jax.errors import BadImages, DataError


def load_source(data: DataConfig, data_dir: str | Path, split: str) -> Source:
    """Open one split of the set that `data` names.

    Args:
      data: name, image_size (after padding), channels, padding, crop, in_memory, skip_bad; `flip`
        is applied elsewhere.
      data_dir: where prepare_data.py put the prepared sets; digits and folders do not need it.
      split: "train" or "test".

    Raises:
      DataError: the set is missing, half prepared or damaged, or its images do not fit the config.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}: one of {', '.join(SPLITS)}")
    if data.name == "digits":
        return _digits(data, split)
    if data.name == "folder":
        records = folder_source(data, split)
    else:
        # It imports TFDS and grain: 1.5 s that only these sets need.
        from ddpm_jax.data.prepared import open_prepared

        records = open_prepared(data, data_dir, split)
    title = f"{data.name} {split}"
    if data.in_memory:
        return decode_into_memory(records, title, skip_bad=data.skip_bad)
    return without_bad(records, title) if data.skip_bad else records


def load_splits(data: DataConfig, data_dir: str | Path, splits: Sequence[str]) -> list[Source]:
    """Open several splits of a set, as `load_source` does, and name what is bad in any of them.

    Raises:
      BadImages: naming the images of all splits that cannot be used.
      DataError: as `load_source`.
    """
    sources, refusals = [], []
    for split in splits:
        try:
            sources.append(load_source(data, data_dir, split))
        except BadImages as error:
            refusals.append(error)
    if refusals:
        reasons = [reason for error in refusals for reason in error.reasons]
        raise BadImages(reasons, sum(error.count for error in refusals) + sum(map(len, sources)))
    return sources


def crop_of(data: DataConfig, data_dir: str | Path) -> str:
    """Return the crop that made the images of a set, as they were prepared or as they are read."""
    if data.name in ("digits", "folder"):
        return data.crop
    from ddpm_jax.data import prepared

    done = prepared.crop_of(prepared.find_prepared(data.name, data_dir))
    return data.crop if done == "none" else done


def origin_of(
    data: DataConfig, data_dir: Path, sources: Mapping[str, Source], *, classes: bool = False
) -> dict[str, Any]:
    """Return what a run remembers of its data: where it is, its crop, and what stands for it.

    Args:
      classes: whether the run has classes, and remembers their names where they are known.
    """
    origin: dict[str, Any] = {
        "data_dir": str(data_dir.absolute()),
        "crop": crop_of(data, data_dir),
    }
    if names := class_names(data, data_dir) if classes else ():
        origin["classes"] = list(names)
    if data.name == "folder":
        return origin | {"files": scan(data.path).fingerprint()}
    known = {split: fingerprint(source) for split, source in sources.items()}
    if not data.skip_bad or data.name == "digits":
        return origin | known
    from ddpm_jax.data.prepared import open_prepared

    # Before anything is left out, as what is bad may change. Runs of earlier versions remember what
    # is left.
    whole = {split: open_prepared(data, data_dir, split) for split in known}
    marks = {split: fingerprint(records, skip_bad=True) for split, records in whole.items()}
    left = {f"{split}_left": mark for split, mark in known.items() if mark != marks[split]}
    return origin | marks | left


def class_names(data: DataConfig, data_dir: str | Path) -> tuple[str, ...]:
    """Return the names of the classes of a set, in the order of their numbers; () for none."""
    if data.name == "digits":
        return ()
    if data.name == "folder":
        return folder_classes(scan(data.path)) if data.classes else ()
    from ddpm_jax.data import prepared

    return prepared.class_names(prepared.find_prepared(data.name, data_dir))


def as_source(what: Any, data: DataConfig, name: str = "source") -> Source | Stream:
    """Return images of one's own as a source.

    Args:
      what: an array uint8 [N,h,w,c]; a pair of it and its labels [N]; a function that returns an
        iterable of arrays (see Stream); or a source.
      data: what the images must be: image_size and channels. Its padding and crop are for sets
        that are read from disk.
      name: of the argument, for messages.

    Raises:
      DataError: it is none of these, or its images have another shape.
    """
    if hasattr(what, "__next__"):
        raise DataError(
            f"{name}: an iterator can be read once: give the function that makes it, so that a "
            "run can go on where it was"
        )
    if type(what) is ArraySource:  # looked at as the arrays that it holds
        what = what.images if what.labels is None else (what.images, what.labels)
    if callable(what):
        source: Any = Stream(what)
    elif isinstance(what, Stream):
        source = what
    elif hasattr(what, "read"):
        source = what
        check_images(name, source.read(np.arange(min(1, len(source))))["image"])
    else:
        images, labels = what if isinstance(what, tuple) and len(what) == 2 else (what, None)
        images = np.asarray(images)
        check_images(name, images)
        labels = None if labels is None else np.asarray(labels)
        if len(images) == 0 or (labels is not None and labels.shape != images.shape[:1]):
            raise DataError(f"{name}: needs at least one image, and one label for each if any")
        if labels is not None and labels.dtype.kind not in "iu":
            raise DataError(f"{name}: labels are {labels.dtype}: must be whole numbers")
        source = ArraySource(images, None if labels is None else labels.astype(np.int32))
    expected = (*data.sides, data.channels)
    if tuple(source.image_shape) != expected:
        raise DataError(
            f"{name}: images of {'x'.join(map(str, source.image_shape))}, not "
            f"{'x'.join(map(str, expected))}: set config.data.image_size and config.data.channels"
        )
    return source


def own_sources(
    config: Config, data_dir: Path, source: Any, held_out: Any
) -> dict[str, Source | Stream]:
    """Open the images that were given, and those of `config.data` where one of the two was not.

    Raises:
      DataError: see `load_source` and `as_source`; held-out images that are a stream, or are
        missing beside a source of one's own; or labels for a network without classes.
    """
    wanted = config.train.eval_images > 0
    if source is None:
        (own,) = load_splits(config.data, data_dir, ["train"])
    elif held_out is None and wanted:
        raise DataError("held_out: give images that are not trained on, or train.eval_images=0")
    sources = {"train": own if source is None else as_source(source, config.data)}
    if wanted:
        sources["test"] = as_source(held_out, config.data, "held_out")
        if isinstance(sources["test"], Stream):
            raise DataError("held_out: a stream has no end: give an array")
    for name, what, part in zip(("source", "held_out"), (source, held_out), sources.values()):
        # A source may have labels that nobody asked for, as those of data sets do.
        given = part.labelled and isinstance(what, (tuple, Callable))
        if given and config.model.num_classes == 0:
            raise DataError(
                f"{name} has labels, and the network no classes, config.model.num_classes=0: set "
                "model.num_classes, or leave the labels out"
            )
    return sources


def _digits(data: DataConfig, split: str) -> ArraySource:
    """Load the 1,797 8x8 digits that scikit-learn carries; their levels 0..16 become 0..255."""
    levels, labels = _digits_of_scikit_learn()
    images = np.rint(levels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    check_shape("data set 'digits'", *images.shape[1:], data)
    held_out = np.arange(len(images)) % 10 == 9
    chosen = held_out if split == "test" else ~held_out
    return ArraySource(decoding.pad(images[chosen], data.padding), labels[chosen].astype(np.int32))


def _digits_of_scikit_learn() -> tuple[np.ndarray, np.ndarray]:
    """Return levels [N, 64] and labels [N] from its file: importing the package takes a second."""
    package = importlib.util.find_spec("sklearn")
    folder = Path(package.origin).parent if package and package.origin else Path()
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",")
        return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits  # of a version that keeps the file elsewhere

    return load_digits(return_X_y=True)
