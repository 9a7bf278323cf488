"""Remember where a run's images were and which, in data.json of its directory.

What a run trains on and what it holds out is a function of the list of its images. A run that goes
on with another list would train on images that it has held out, and an evaluation would measure on
images that were trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import read_json, replacing

NAME = "data.json"
IDENTITY = ("files", "train", "test")  # entries that must stay what they are
LEFT = "_left"  # behind train and test: what is left without bad images


def read_origin(workdir: Path) -> dict[str, Any]:
    """Read what the run remembers of its data; {} if nothing, as runs of earlier versions do.

    Raises:
      WorkdirError: the file is damaged.
    """
    path = workdir / NAME
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise WorkdirError(
            f"{path} is damaged ({error}): remove it, if the run's images are what they were"
        ) from error


def check_origin(workdir: Path, origin: dict[str, Any], what: str) -> None:
    """Check that the images are those that the run began with.

    Args:
      origin: of the images at hand, as `save_origin` takes it.
      what: how the message calls them.

    Raises:
      WorkdirError: they are others, or of another kind.
    """
    there = read_origin(workdir)
    if other := _changed(there, origin, IDENTITY):
        raise WorkdirError(
            f"{what} has other images than when the run in {workdir} began ({other}), and what was "
            "held out might be trained on: make it what it was, or name another workdir"
        )
    known = [{*IDENTITY} & {*side} for side in (there, origin)]
    if all(known) and not set.intersection(*known):
        began = "a folder of images" if "files" in there else "images from Python"
        raise WorkdirError(
            f"the run in {workdir} began with {began}, and what was held out might be trained on: "
            "go on with what it began with, or name another workdir"
        )


def check_split(there: dict[str, Any], origin: dict[str, Any], split: str, name: str) -> None:
    """Check that a split of the data set `name` is what a run trained on, or held out.

    Args:
      there: what the run remembers of its data; {} for one that was imported.
      origin: of the split at hand, as `save_origin` takes it.

    Raises:
      WorkdirError: it is another one.
    """
    own = "name your own by reference=FILE or images=FILE, or measure from Python (Model)"
    if from_python(there) and there.get(split) != origin.get(split):
        raise WorkdirError(
            f"the run was given its images from Python, which are not those of data set {name!r}, "
            f"split {split}: {own}"
        )
    if other := _changed(there, origin, ("files", split)):
        raise WorkdirError(
            f"data set {name!r} has other images than when the run began ({other}), and split "
            f"{split} is not what it was: make it what it was, or {own}"
        )


def from_python(there: dict[str, Any]) -> bool:
    """Return whether the training images of a run were given to `train`, by what it remembers."""
    return "train" in there and "data_dir" not in there


def _changed(there: dict[str, Any], origin: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Return "before, now after" of the first of `names` that differs; None where none does."""
    for name in names:
        before, now = there.get(name), origin.get(name)
        if None not in (before, now) and before not in (now, origin.get(name + LEFT)):
            return f"{before}, now {now}"
    return None


def save_origin(workdir: Path, origin: dict[str, Any]) -> None:
    """Write data.json: "data_dir", "crop", names of "classes", what is known of IDENTITY and LEFT.

    Raises:
      OSError: it cannot be written.
    """
    there = read_origin(workdir)
    if there | origin != there:
        with replacing(workdir / NAME) as file:
            file.write((json.dumps(there | origin, indent=2) + "\n").encode())


def data_dir_of(workdir: Path | None, data_dir: Path | None = None) -> Path:
    """Return `data_dir`; or else where the run's data was, if that is still there; or "data"."""
    if data_dir is not None:
        return data_dir
    recorded = None if workdir is None else read_origin(workdir).get("data_dir")
    return Path(recorded) if recorded and Path(recorded).is_dir() else Path("data")
