"""A run goes on with the list of images that it began with, wherever the images are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data.load import origin_of
from ddpm_jax.errors import WorkdirError
from ddpm_jax.runs.data_origin import check_origin, save_origin


def origin(folder: Path) -> dict:
    return origin_of(DataConfig(name="folder", path=str(folder), image_size=8), folder.parent, {})


@pytest.mark.parametrize("number", [0, 5, 11])
def test_a_folder_may_move_but_no_image_be_renamed(tmp_path: Path, number: int) -> None:
    """Which images are held out follows from the order of all names."""
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.png").touch()
    began = origin(folder)
    save_origin(run, began)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert origin(moved)["files"] == began["files"]
    check_origin(run, origin(moved), "data set")
    (moved / f"{number:02d}.png").rename(moved / f"{number:02d}a.png")
    assert origin(moved)["files"] != began["files"]
    with pytest.raises(WorkdirError, match="data set has other images .* .12 images, .* 12 images"):
        check_origin(run, origin(moved), "data set")


@pytest.mark.parametrize("name", ["files", "train", "test"])
def test_images_held_out_stay_those_they_were(tmp_path: Path, name: str) -> None:
    began = {"data_dir": "here", "train": "a", "test": "b", "files": "c"}
    save_origin(tmp_path, began)
    check_origin(tmp_path, began | {"data_dir": "there"}, "data set")
    with pytest.raises(WorkdirError, match=rf"data set has other images .*\({began[name]}, now d"):
        check_origin(tmp_path, began | {name: "d"}, "data set")
