"""Images of one's own: what is chosen for them, and the road from a folder to pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.build import abstract_params
from ddpm_jax.config import Config, DataConfig, validate
from ddpm_jax.data.load import load_splits
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import ConfigError, WorkdirError
from ddpm_jax.evaluation.inputs import Inputs
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training import own_images
from ddpm_jax.training.own_images import (
    choose_config,
    choose_network,
    choose_optimizer,
    choose_training,
)
from tests.support.commands import command_module

# A network and a run so small that compiling is all they cost.
SMALL = (
    "--config.model.base_channels=8",
    "--config.model.channel_mult=(1,)",
    "--config.model.attention_resolutions=()",
    "--config.model.group_norm_groups=4",
    "--config.diffusion.timesteps=5",
    "--config.train.batch_size=8",
    "--config.train.sample_every=0",
    "--config.train.steps=1",
    "--config.sampling.steps=3",
)


def write(folder: Path, count: int, width: int, height: int, mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = (height, width, 3) if mode == "RGB" else (height, width)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{number:03d}.png")


def one_device() -> Devices:
    return Devices(jax.devices()[:1])


@pytest.mark.parametrize(
    "images, expected",
    [
        ((40, 60, "RGB"), {"image_size": 32, "crop": "center", "channels": 3, "flip": True}),
        ((28, 28, "L"), {"image_size": 32, "padding": 2, "crop": "none", "channels": 1}),
        ((28, 28, "L"), {"flip": False}),
        ((16, 16, "RGB"), {"image_size": 16, "padding": 0, "crop": "none"}),
        ((9, 9, "L"), {"image_size": 8, "crop": "center"}),
        ((20, 14, "L"), {"image_size": 8, "crop": "center"}),
        ((178, 218, "RGB"), {"image_size": 32, "crop": "celeba64"}),
    ],
)
def test_what_is_chosen_suits_the_images(tmp_path, images, expected):
    """Sizes, channels and flips by hand; and what was chosen reads them."""
    write(tmp_path / "in", 12, *images)
    config, choices = choose_config(tmp_path / "in", one_device())
    assert {name: getattr(config.data, name) for name in expected} == expected
    train, test = load_splits(config.data, tmp_path, SPLITS)
    assert (len(train), len(test), config.train.eval_images) == (11, 1, 1)
    assert train.image_shape == (config.data.image_size,) * 2 + (config.data.channels,)
    said = {choice.field: choice.value for choice in choices}
    assert said["image_size"] == str(config.data.image_size)
    assert (said["diffusion.schedule"], said["diffusion.prediction"]) == ("cosine", "v")
    assert (said["loss.weighting"], said["sampling.steps"]) == ("min_snr", "50")
    assert {"data.flip", "data.channels", "data.held_out_every", "train.steps"} <= set(said)


def test_what_one_says_wins_and_is_not_said_again(tmp_path):
    write(tmp_path / "in", 4, 50, 50)
    config, choices = choose_config(
        tmp_path / "in", one_device(), image_size=48, overrides=["data.flip=false", "seed=3"]
    )
    assert (config.data.image_size, config.data.flip, config.seed) == (48, False, 3)
    assert "data.flip" not in {choice.field for choice in choices}


@pytest.mark.parametrize("size", [16, 48])
def test_a_size_may_be_said_by_either_name(tmp_path, size):
    """All that goes by the size is chosen for the one that is said, and it is not said again."""
    write(tmp_path / "in", 4, 50, 50)
    by_flag, choices = choose_config(tmp_path / "in", one_device(), image_size=size)
    overrides = ["data.image_size=64", f"data.image_size={size}"]
    by_field, others = choose_config(tmp_path / "in", one_device(), overrides=overrides)
    assert by_field == by_flag and by_field.data.image_size == size
    assert others == [choice for choice in choices if choice.field != "image_size"]
    with pytest.raises(ConfigError, match=f"image_size=8, and config.data.image_size={size}: lea"):
        choose_config(tmp_path / "in", one_device(), image_size=8, overrides=overrides)
    with pytest.raises(ConfigError, match="config.data.image_size=large: must be int"):
        choose_config(tmp_path / "in", one_device(), overrides=["data.image_size=large"])


@pytest.mark.parametrize("fields", [("true", "true"), ("True", "1"), ("false", "no")])
def test_what_is_said_goes_by_its_value_and_the_last_counts(tmp_path, fields):
    """Whichever way it is written; one small image in two hundred is a thumbnail, if any may be."""
    write(tmp_path / "in" / "cat", 200, 64, 64)
    write(tmp_path / "in" / "dog", 1, 16, 16)
    classes, skip_bad = fields
    overrides = ["data.classes=false", f"data.classes={classes}", f"data.skip_bad={skip_bad}"]
    config, _ = choose_config(tmp_path / "in", one_device(), overrides=overrides)
    assert config.model.num_classes == (2 if config.data.classes else 0)
    assert (config.data.classes, config.data.image_size) == (
        (True, 32) if classes != "false" else (False, 16)
    )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size, crop", [((32, 64), "none"), ((64, 32), "center"), ((36, 40), None)])
def test_a_pair_of_sides_is_chosen_for_by_the_shorter_one(tmp_path, fast, size, crop):
    write(tmp_path / "in", 4, 64, 32)
    devices = one_device()
    if fast:
        devices = SimpleNamespace(devices=[SimpleNamespace(platform="gpu")])
    overrides = [f"data.image_size={size[0]},{size[1]}"]
    config, choices = choose_config(tmp_path / "in", devices, overrides=overrides)
    assert config.data.image_size == size and config.data.crop == crop or crop is None
    assert config.optimizer == choose_optimizer(min(size), fast)
    assert config.train.batch_size == choose_training(min(size), fast, 1).batch_size
    square = choose_network(min(size), fast)
    assert len(config.model.channel_mult) == len(square.channel_mult)
    scale = size[0] // min(size)
    expected = tuple(scale * side for side in square.attention_resolutions)
    assert config.model.attention_resolutions == expected
    abstract_params(config)


def test_what_is_measured_is_of_what_is_held_out(tmp_path):
    """Of every fourth image where one says so, and as many as one says."""
    write(tmp_path / "in", 40, 8, 8)
    for overrides, count in (([], 4), (["data.held_out_every=4"], 10)):
        config, choices = choose_config(tmp_path / "in", one_device(), overrides=overrides)
        said = {choice.field: (choice.value, choice.reason) for choice in choices}
        assert config.train.eval_images == count
        assert said["train.eval_images"] == (str(count), f"of {count} held out")
    overrides.append("train.eval_images=3")
    config, _ = choose_config(tmp_path / "in", one_device(), overrides=overrides)
    assert config.train.eval_images == 3


@pytest.mark.parametrize(
    "size, fast, batch_size, learning_rate",
    [(64, True, 129, 2e-4), (128, True, 66, 2e-5), (256, True, 66, 2e-5), (256, False, 33, 1e-3)],
)
def test_large_images_have_the_recipe_of_large_images(size, fast, batch_size, learning_rate):
    """On three devices; CelebA-HQ's batch of 64 and 2e-5, since 2e-4 is unstable there."""
    assert choose_training(size, fast, 3).batch_size == batch_size
    assert choose_optimizer(size, fast).learning_rate == learning_rate


def test_an_odd_side_is_shrunk_and_says_so(tmp_path):
    write(tmp_path / "in", 4, 9, 9, "L")
    _, choices = choose_config(tmp_path / "in", one_device())
    said = {choice.field: choice.reason for choice in choices}
    assert said["image_size"] == "the images are 9x9, shrunk by one pixel"


def test_images_that_the_container_has_no_room_for_stay_on_disk(tmp_path, monkeypatch):
    write(tmp_path / "in", 4, 16, 16)
    pixels = 4 * 16 * 16 * 3
    for allowed, kept in ((4 * pixels, True), (4 * pixels - 1, False)):
        monkeypatch.setattr(own_images, "memory", lambda allowed=allowed: allowed)
        config, _ = choose_config(tmp_path / "in", one_device())
        assert config.data.in_memory is kept


@pytest.mark.parametrize("fast", [True, False])
def test_every_size_has_a_network(fast):
    """Even sizes from 8 to 256 make a config that can be run, and a network that can be traced."""
    for size in range(8, 257, 2):
        config = Config(data=DataConfig(image_size=size), model=choose_network(size, fast))
        validate(config)
    for size in (8, 36):
        data = DataConfig(image_size=size)
        abstract_params(validate(Config(data=data, model=choose_network(size, fast))))


def test_a_folder_is_enough_and_the_run_goes_on_by_its_workdir_alone(tmp_path, monkeypatch, capsys):
    """As a newcomer does it: train, go on, sample, evaluate, each with --workdir alone."""
    monkeypatch.chdir(tmp_path)
    train = command_module("train").main
    write(Path("photos"), 12, 10, 12)
    assert train(["--images=photos", "--workdir=run", "--image_size=8", *SMALL]) == 0
    said, progress = capsys.readouterr()
    assert re.search(r"^step 1: held-out loss [0-9.e-]+$", progress, re.MULTILINE)
    assert "--image_size=8 " in said and "--config.data.flip=true" in said
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"]["path"] == str(tmp_path / "photos")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = f"--workdir={tmp_path / 'run'}"
    assert train([run]) == 0
    assert f"{tmp_path / 'run'}: finished at step 1 of 1" in capsys.readouterr().out
    options = EvaluationOptions(metrics=("nll",), workdir=tmp_path / "run")
    assert len(Inputs(options, Devices()).source("train")) == 11
    # The folder may move, and is named once.
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    photos = f"--images={tmp_path / 'moved'}"
    assert train([run, photos]) == 0
    assert train([run]) == 0
    with pytest.raises(ConfigError, match="image_size=16: the run in .* has 8: leave it out"):
        train([run, photos, "--image_size=16"])
    # Another list of images would mix training and held-out ones.
    before = Path(tmp_path, "run/config.json").read_bytes()
    write(tmp_path / "moved" / "more", 2, 10, 12)
    with pytest.raises(WorkdirError, match=r"\(12 images, .*, now 14 images, .*held out might be"):
        train([run, "--config.train.steps=2"])
    assert Path(tmp_path, "run/config.json").read_bytes() == before


def test_a_run_that_begins_needs_a_config_or_images(tmp_path):
    train = command_module("train").main
    with pytest.raises(
        ConfigError, match="holds no run that could go on: name a config, or images"
    ):
        train([f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="images: of no use with config"):
        train([f"--workdir={tmp_path / 'run'}", "--config=digits", "--images=x"])
    assert not (tmp_path / "run").exists()
