"""Classes from folders: their order and names, what is no class, and labels by name."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.cli import prepare_data
from ddpm_jax.config import Config, DataConfig, UNetConfig, validate
from ddpm_jax.data.classes import classes_of, names_of_run, numbers_of
from ddpm_jax.data.folder import folder_classes, scan
from ddpm_jax.data.load import class_names, load_source, load_splits, origin_of
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import ConfigError, DataError
from ddpm_jax.evaluation import inputs
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import Trained
from ddpm_jax.training.own_images import choose_config

PETS = {"cats": 3, "Dogs": 4, "guinea pigs": 2}  # name -> images
IN_ORDER = ("Dogs", "cats", "guinea pigs")  # upper case first, as text is sorted


def write(folder: Path, classes: dict[str, int]) -> Path:
    """Write grey images whose level says their class: 10 times its place in `classes`."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name / "deeper").mkdir(parents=True)
        for i in range(count):
            place = folder / name / ("deeper" if i == 1 else "")
            Image.new("L", (8, 8), 10 * number).save(place / f"{i}.png")
    return folder


def data_of(folder: Path, **fields) -> DataConfig:
    return DataConfig(
        name="folder", path=str(folder), image_size=8, channels=1, classes=True, **fields
    )


def levels_by_label(source) -> dict[int, set[int]]:
    """The grey levels of the images of each label."""
    batch = source.read(np.arange(len(source)))
    there: dict[int, set[int]] = {}
    for image, label in zip(batch["image"], batch["label"]):
        there.setdefault(int(label), set()).update(np.unique(image).tolist())
    return there


@pytest.mark.parametrize("in_memory", [True, False])
def test_each_image_has_the_label_of_its_folder(tmp_path, in_memory):
    data = data_of(write(tmp_path / "pets", PETS), in_memory=in_memory)
    train, test = load_splits(data, tmp_path, SPLITS)
    assert class_names(data, tmp_path) == IN_ORDER
    assert levels_by_label(train) == {0: {10}, 1: {0}, 2: {20}}
    assert levels_by_label(test) == {2: {20}}  # the last one by name
    assert train.labelled and len(train) == 8
    origin = origin_of(data, tmp_path, {"train": train}, classes=True)
    assert origin["classes"] == list(IN_ORDER)
    assert "classes" not in origin_of(data, tmp_path, {"train": train})
    plain = load_source(DataConfig(**(vars(data) | {"classes": False})), tmp_path, "train")
    assert not plain.labelled and len(plain) == 8


def test_numbers_are_sorted_by_value(tmp_path):
    folder = write(tmp_path / "in", {"10": 2, "9": 2, "0": 2, "2": 2})
    assert folder_classes(scan(folder)) == ("0", "2", "9", "10")
    write(folder, {"a": 1})
    assert folder_classes(scan(folder)) == ("0", "10", "2", "9", "a")


def beside(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / "stray.png")


def without_images(folder: Path) -> None:
    (folder / "fish").mkdir()
    (folder / "fish" / "notes.txt").write_text("none")


def twice(folder: Path) -> None:
    (folder / "kittens").symlink_to(folder / "cats")


def unprintable(folder: Path) -> None:
    (folder / "cats").rename(folder / "ca\nts")


def held_out(folder: Path) -> None:
    write(folder, {"zebras": 1})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (beside, r"classes are the folders in it, but 1 images lie beside them \('stray.png'\)"),
        (without_images, r"a class needs images, and there are none in 'fish' .*fill or remove"),
        (twice, "a class needs images, and there are none in 'kittens'"),
        (unprintable, r"a class is called 'ca\\nts': rename it"),
        (held_out, "of 'zebras' all images are held out, none would be trained on"),
    ],
)
def test_what_is_no_class_is_told(tmp_path, spoil, message):
    folder = write(tmp_path / "pets", PETS)
    (folder / ".thumbnails").mkdir()  # hidden, and so no class
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_source(data_of(folder), tmp_path, "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):
        prepare_data.main(
            [
                *("--dataset=folder", f"--source={folder}", "--name=pets", "--image_size=8"),
                *("--channels=1", "--classes", f"--data_dir={tmp_path / 'data'}"),
            ]
        )


def test_a_single_folder_is_no_class(tmp_path):
    write(tmp_path / "in" / "pets", PETS)
    with pytest.raises(DataError, match=f"a single folder, 'pets', .* name {tmp_path}/in/pets"):
        load_source(data_of(tmp_path / "in"), tmp_path, "train")


@pytest.mark.parametrize("name, classes", [("folder", 0), ("digits", 10)])
def test_classes_are_for_a_folder_and_a_network_that_has_them(name, classes):
    data = DataConfig(name=name, path="in" if name == "folder" else "", classes=True)
    with pytest.raises(ConfigError, match="config.data.classes=True: needs data.name=folder, and"):
        validate(Config(data=data, model=UNetConfig(num_classes=classes)))


def test_what_is_chosen_for_classes(tmp_path):
    write(tmp_path / "pets", PETS)
    one = Devices(jax.devices()[:1])
    config, choices = choose_config(tmp_path / "pets", one, overrides=["data.classes=true"])
    assert (config.model.num_classes, config.model.label_dropout) == (3, 0.1)
    chosen = {choice.field: choice for choice in choices}
    assert chosen["model.num_classes"].reason == "'Dogs', 'cats', 'guinea pigs'"
    plain, choices = choose_config(tmp_path / "pets", one)
    assert (plain.model.num_classes, plain.data.classes) == (0, False)
    assert not any("num_classes" in choice.field for choice in choices)


@pytest.mark.parametrize("kind", ["folder", "zip", "zip around a folder"])
def test_a_prepared_set_keeps_labels_and_names(tmp_path, kind, capsys):
    import shutil

    source = write(tmp_path / "pets", PETS)
    if kind != "folder":
        root, base = (source, None) if kind == "zip" else (tmp_path, "pets")
        source = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", root, base))
    flags = ["--dataset=folder", f"--source={source}", "--name=pets", "--image_size=8"]
    flags += ["--channels=1", f"--data_dir={tmp_path / 'data'}"]
    prepare_data.main([*flags, "--classes"])
    data = DataConfig(name="pets", image_size=8, channels=1)
    train, test = load_splits(data, tmp_path / "data", SPLITS)
    assert levels_by_label(train) == {0: {10}, 1: {0}, 2: {20}}
    assert levels_by_label(test) == {2: {20}}
    assert class_names(data, tmp_path / "data") == IN_ORDER
    prepare_data.main([*flags, "--classes"])
    assert "was already prepared" in capsys.readouterr().out
    with pytest.raises(DataError, match="differs in classes=True, not False"):
        prepare_data.main(flags)


def test_a_set_without_classes_is_not_taken_for_one_with(tmp_path):
    source = write(tmp_path / "pets", PETS)
    flags = ["--dataset=folder", f"--source={source}", "--name=pets", "--image_size=8"]
    flags += ["--channels=1", f"--data_dir={tmp_path / 'data'}"]
    prepare_data.main(flags)
    (metadata,) = (tmp_path / "data").rglob("metadata.json")
    assert "classes" not in json.loads(metadata.read_text())
    assert class_names(DataConfig(name="pets"), tmp_path / "data") == ()
    with pytest.raises(DataError, match="differs in classes=False, not True"):
        prepare_data.main([*flags, "--classes"])


# ------------------------------------------------------------ labels by name


def test_labels_by_name_or_number():
    names = ("cats", "Dogs", "dogs", "T-shirt/top")
    assert numbers_of(["dogs", "Dogs", "0", 3, "CATS", "t-shirt/top"], names, 4) == [
        *(2, 1, 0, 3, 0, 3)
    ]
    assert numbers_of(["2", 0], (), 3) == [2, 0]  # names that nobody knows
    # Where numbers are what classes are called, a number is a name.
    assert numbers_of(["10", "2"], ("0", "2", "10"), 3) == [2, 1]


@pytest.mark.parametrize(
    "label, names, count, message",
    [
        ("dog", ("cats", "dogs", "owls"), 3, "label=dog: no such class; there are 'dogs', "),
        ("DOGS", ("Dogs", "dogs"), 2, "label=DOGS: no such class; there are 'Dogs', 'dogs'"),
        ("3", ("cats", "dogs", "owls"), 3, r"label=3: must be in 0\.\.2; there are "),
        ("1", ("0", "2", "10"), 3, "label=1: no such class; there are '10', '0', '2'"),
        ("cats", (), 3, r"label=cats: the names .* are not known: a number in 0\.\.2"),
        ("-1", (), 3, r"label=-1: .* a number in 0\.\.2"),
        ("cats", ("cats",), 0, "label=cats: this run has no classes"),
    ],
)
def test_a_class_that_is_not_there_is_told_with_the_nearest(label, names, count, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        numbers_of([label], names, count)


@pytest.mark.parametrize("labels", [-1, [3, -1], 10, np.array([0, 10])])
def test_numbers_from_python_are_those_of_classes(labels):
    """One below 0 would take a class from the end."""
    with pytest.raises(ConfigError, match=r"labels=.*: must be in 0\.\.9"):
        classes_of(labels, (), 10)


def test_an_evaluation_takes_the_names_of_its_run(tmp_path, monkeypatch):
    config = Config(data=DataConfig(name="cifar10"), model=UNetConfig(num_classes=10))
    trained = Trained(config, {}, "raw", 7)
    monkeypatch.setattr(inputs, "open_trained", lambda *_, **__: trained)
    options = EvaluationOptions(metrics=("pixels",), workdir=tmp_path, label=("truck", "3"))
    assert inputs.Inputs(options, Devices(jax.devices()[:1])).options.label == (9, 3)


def test_a_run_knows_the_names_it_remembers_or_its_publisher_gave():
    own = {"classes": ["cats", "dogs"]}
    assert names_of_run(own, "folder", 2) == ("cats", "dogs")
    assert names_of_run({}, "folder", 2) == ()
    assert names_of_run({}, "cifar10", 10)[3] == "cat"
    assert names_of_run({}, "fashion_mnist", 10)[9] == "Ankle boot"
    assert names_of_run({}, "cifar10", 2) == ()  # of a network that has not all of them
