"""A trained network and the images of its run: what is measured is what was trained on, or held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.coding.jobs import CodingOptions, read_images
from ddpm_jax.config import DataConfig
from ddpm_jax.data.batches import fingerprint
from ddpm_jax.data.classes import names_of_run
from ddpm_jax.data.load import load_source, origin_of
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import WorkdirError
from ddpm_jax.evaluation import inputs
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.figures.job import Job, Options
from ddpm_jax.figures.neighbours import draw_neighbours
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.data_origin import check_origin, save_origin
from ddpm_jax.trained import Trained
from tests.support.tiny import tiny_config

CONFIG = tiny_config()


def trained_on(origin: dict, data: DataConfig = CONFIG.data) -> Trained:
    return Trained(tiny_config(data=vars(data)), {}, "raw", 3, data_origin=origin)


def add(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for level, name in enumerate(names):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{name}.png")


def test_a_folder_that_grew_is_no_more_what_was_held_out(tmp_path: Path) -> None:
    """One name more, and every image after it changes its place in the list."""
    folder = tmp_path / "photos"
    data = DataConfig(name="folder", path=str(folder), image_size=8, channels=1, held_out_every=2)
    add(folder, "b", "c", "d", "e")
    trained = trained_on(origin_of(data, tmp_path, {}), data)
    before = trained.open_split(tmp_path, "test").images
    add(folder, "a")
    assert not np.array_equal(before, load_source(data, tmp_path, "test").images)
    for split in SPLITS:
        message = rf"'{folder}' has other images .*\(4 images.*now 5 images.*split {split} is not"
        with pytest.raises(WorkdirError, match=message):
            trained.open_split(tmp_path, split)
    assert len(trained_on({}, data).open_split(tmp_path, "test")) == 2  # as an import has none


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("held_out", [True, False])
def test_images_from_python_are_not_those_that_the_config_names(split: str, held_out: bool) -> None:
    marks = {"train": "a stream, 3", "test": "7 images, 4"}
    trained = trained_on(marks if held_out else {"train": marks["train"]})
    with pytest.raises(WorkdirError, match=rf"from Python, .*'digits', split {split}: name your"):
        trained.open_split(Path("data"), split)


def test_images_that_are_the_same_are_taken_wherever_they_came_from() -> None:
    sources = {split: load_source(CONFIG.data, "data", split) for split in SPLITS}
    marks = {split: fingerprint(source) for split, source in sources.items()}
    here = {"data_dir": "there", "crop": "none"}
    for origin in (marks, marks | here, here | {"train": marks["train"]}, here):
        for split, source in sources.items():
            assert len(trained_on(origin).open_split(Path("data"), split)) == len(source)
    bad = {"train": "before, with black ones", "train_left": marks["train"]}
    with pytest.raises(WorkdirError, match="digits' has other images .*split train is not what"):
        trained_on(bad | here).open_split(Path("data"), "train")


@pytest.mark.parametrize("command", ["evaluate", "original", "neighbours", "code_images"])
def test_every_command_holds_its_images_against_the_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, trained = Devices(), trained_on({"train": "3 images", "test": "1 image"})
    monkeypatch.setattr(inputs, "open_trained", lambda *_, **__: trained)
    job = Job(Options(tmp_path / "x.png", indices=[0]), trained, devices)
    ask = {
        "evaluate": lambda: inputs.Inputs(
            EvaluationOptions(metrics=("nll",), workdir=tmp_path), devices
        ).source("test"),
        "original": lambda: job.originals(1),
        "neighbours": lambda: draw_neighbours(job),
        "code_images": lambda: read_images(trained, CodingOptions("measure")),
    }[command]
    with pytest.raises(WorkdirError, match="the run was given its images from Python"):
        ask()


def test_classes_from_python_have_no_published_names() -> None:
    assert names_of_run({"train": "3 images"}, "cifar10", 10) == ()
    assert names_of_run({"train": "3 images", "data_dir": "data"}, "cifar10", 10)[3] == "cat"
    assert names_of_run({}, "cifar10", 20) == names_of_run({}, "cifar10", 9) == ()
    assert names_of_run({"classes": ["cats", "dogs"]}, "cifar10", 20) == ("cats", "dogs")
    assert names_of_run({"classes": ["cats", "dogs"]}, "cifar10", 1) == ()


def test_a_run_goes_on_with_the_kind_of_images_it_began_with(tmp_path: Path) -> None:
    folder, arrays = {"files": "3 images, a"}, {"train": "b", "test": "c"}
    for began, now, kind in ((folder, arrays, "a folder of images"), (arrays, folder, "from Pyth")):
        workdir = tmp_path / kind[0]
        workdir.mkdir()
        save_origin(workdir, began)
        with pytest.raises(WorkdirError, match=f"began with .*{kind}.*: go on with what it began"):
            check_origin(workdir, now, "data set")
        check_origin(workdir, began, "data set")
        check_origin(workdir, folder | arrays, "data set")
        check_origin(workdir, {"crop": "none"}, "data set")
