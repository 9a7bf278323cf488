"""Remember where a run's images were and which, in data.json of its directory.

What a run trains on and what it holds out is a function of the list of its images. A run that goes
on with another list would train on images that it has held out.
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
      WorkdirError: they are others.
    """
    there = read_origin(workdir)
    for name in IDENTITY:
        before, now = there.get(name), origin.get(name)
        if None not in (before, now) and before not in (now, origin.get(name + LEFT)):
            raise WorkdirError(
                f"{what} has other images than when the run in {workdir} began ({before}, now "
                f"{now}), and what was held out might be trained on: make it what it was, or "
                "name another workdir"
            )


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
