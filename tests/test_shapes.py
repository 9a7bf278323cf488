"""Images that are not square, and images of four channels: what holds for squares holds for them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import ddpm_jax as ddpm
from ddpm_jax import images
from ddpm_jax.build import image_shape
from ddpm_jax.config import Config, DataConfig, from_dict, override, save_json, validate
from ddpm_jax.data import decoding
from ddpm_jax.data.load import as_source, load_source
from ddpm_jax.data.prepare import prepare_folder
from ddpm_jax.errors import ConfigError, DataError, EvaluationError
from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.figures.originals import hole
from ddpm_jax.weights.exporting import export_weights
from tests.support.commands import command_module
from tests.support.tiny import tiny_config

WIDE = {"base_channels": 8, "channel_mult": (1, 1), "attention_resolutions": (4,)}


def pixel_places(width: int, height: int) -> Image.Image:
    """An image whose red and green say where each pixel stands."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def write_pictures(folder: Path, count: int, height: int, width: int) -> np.ndarray:
    """RGBA pictures, partly transparent."""
    folder.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (count, height, width, 4), np.uint8)
    for number, picture in enumerate(levels):
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
    return levels


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[ddpm.Model, np.ndarray, Path]:
    """Two steps on RGBA pictures 16 wide and 8 high, all of them known."""
    folder = tmp_path_factory.mktemp("wide")
    levels = write_pictures(folder / "pictures", 20, 8, 16)
    data = {"name": "folder", "path": str(folder / "pictures"), "image_size": (8, 16)}
    short = {"steps": 1, "batch_size": 8, "eval_images": 0, "sample_every": 1}
    config = tiny_config(data=data | {"channels": 4}, train=short)
    return ddpm.train(config, folder / "run"), levels, folder


def test_training_samples_and_pictures_have_the_shape_of_the_data(run):
    model, levels, folder = run
    assert "8x16x4" in repr(model)
    samples = model.sample(3, steps=4, batch_size=8)
    assert samples.shape == (3, 8, 16, 4)
    picture = images.load_png(folder / "run" / "samples" / "step_0000001.png")
    assert picture.shape == (2 * 8 + 2, 2 * 16 + 2, 4)
    assert json.loads((folder / "run" / "config.json").read_text())["data"]["image_size"] == [8, 16]
    np.testing.assert_array_equal(
        load_source(model.config.data, "nowhere", "train").images, levels[:-1]
    )


def test_the_command_draws_them_too(run, tmp_path):
    _, _, folder = run
    picture = tmp_path / "grid.png"
    said = ["--mode=grid", "--num_images=2", "--scale=3", "--steps=2", f"--output={picture}"]
    command_module("sample").main([f"--workdir={folder / 'run'}", *said])
    assert images.load_png(picture).shape == (3 * 8, 2 * 3 * 16 + 2, 4)


def test_arrays_are_held_against_both_sides():
    data = DataConfig(image_size=(8, 16), channels=4)
    wide = np.zeros((3, 8, 16, 4), np.uint8)
    assert as_source(wide, data).image_shape == (8, 16, 4)
    with pytest.raises(DataError, match="source: images of 16x8x4, not 8x16x4: set config.data.im"):
        as_source(wide.swapaxes(1, 2), data)


def test_codes_and_likelihoods_have_it_too(run):
    model, levels, _ = run
    assert model.encode(levels[:2], steps=4, batch_size=8).shape == (2, 8, 16, 4)
    assert np.isfinite(model.bits_per_dim(levels[:2], num_timesteps=2, batch_size=8))


@pytest.mark.slow
def test_a_transposed_network_draws_transposed_pictures():
    """Height and width are not mixed up: kernels transposed, an image transposed, the same output."""
    config = tiny_config(data={"image_size": (8, 16)}, model=WIDE)
    turned = tiny_config(data={"image_size": (16, 8)}, model=WIDE | {"attention_resolutions": (8,)})
    from ddpm_jax.build import denoiser, init_params

    params = init_params(config)
    x = np.random.default_rng(0).normal(size=(2, *image_shape(config))).astype(np.float32)
    t = np.array([3, 11])
    # Near-zero last layers would hide the network.
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), params
    )
    swapped = jax.tree.map(lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w, params)
    one = denoiser(config)(params, None)(x, t)
    other = denoiser(turned)(swapped, None)(x.swapaxes(1, 2), t)
    assert one.shape == x.shape and np.std(one) > 0.01
    np.testing.assert_allclose(other.swapaxes(1, 2), one, atol=1e-4)


def test_weights_go_out_and_come_back(run):
    model, _, folder = run
    config, params = model.config, model.params
    file = export_weights("diffusers", config, params, "raw", folder / "diffusers")
    assert json.loads((file.parent / "config.json").read_text())["sample_size"] == [8, 16]
    back = ddpm.load(folder / "diffusers")
    assert image_shape(back.config) == (8, 16, 4)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_the_command_line_and_the_file_say_it_the_same_way():
    config = Config()
    for text, sides, kept in (
        ("32,64", (32, 64), (32, 64)),
        ("32", (32, 32), 32),
        ("(64,64)", (64, 64), 64),
    ):
        override(config, f"data.image_size={text}")
        assert config.data.sides == sides and config.data.image_size == kept
        assert from_dict(json.loads(save_json(config))) == config
    assert DataConfig(image_size=(32, 32)) == DataConfig(image_size=32)
    assert '"image_size": 32,' in save_json(Config())
    assert DataConfig(image_size=(32, 28), padding=2).inner_sides == (28, 24)


@pytest.mark.parametrize(
    "items, said",
    [
        (["data.image_size=32,36"], r"data.image_size=\(32, 36\): must be divisible by 8"),
        (["data.image_size=0,32"], r"image_size=\(0, 32\): must be at least 1"),
        (["data.image_size=1,2,3"], "one side, or two as HEIGHT,WIDTH"),
        (["data.image_size=32,x"], "image_size=32,x: must be int"),
        (["data.image_size=32,64.5"], "image_size=64.5: must be int"),
        (["data.image_size=32,64", "data.padding=16"], "data.padding=16: must"),
        (["data.image_size=64,32", "model.attention_resolutions=4,"], "heights of this network's"),
        (
            ["data.image_size=32,64", "data.crop=celeba64"],
            "data.crop=celeba64: celeba64 is a square",
        ),
        (["data.channels=2"], r"data.channels=2: must be 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)"),
    ],
)
def test_impossible_shapes_are_refused_by_name(items, said):
    config = Config()
    with pytest.raises(ConfigError, match=said):
        for item in items:
            override(config, item)
        validate(config)


@pytest.mark.parametrize(
    "width, height, shape, box",
    [
        (40, 20, (1, 1), (10, 0, 30, 20)),
        (40, 20, (1, 4), (0, 5, 40, 15)),
        (40, 21, (2, 1), (15, 0, 25, 21)),
        (10, 40, (8, 16), (0, 17, 10, 22)),
    ],
)
def test_the_centre_crop_is_the_largest_of_its_shape(width, height, shape, box):
    left, top, right, bottom = decoding.crop_box("center", width, height, "x", shape)
    assert (left, top, right, bottom) == box
    assert 0 <= left and right <= width and 0 <= top and bottom <= height
    # A pixel more in both directions leaves the image.
    larger = (bottom - top + 1, (bottom - top + 1) * shape[1] / shape[0])
    assert larger[0] > height or larger[1] > width


def test_pictures_are_cropped_and_shrunk_to_the_shape():
    crop = decoding.to_pixels(decoding.fit(pixel_places(40, 20), "center", (20, 10), "x"))
    assert crop.shape == (20, 10, 3)
    assert tuple(crop[0, 0, :2]) == (15, 0) and tuple(crop[-1, -1, :2]) == (24, 19)
    whole = decoding.to_pixels(decoding.fit(pixel_places(40, 20), "none", (10, 20), "x"))
    assert whole.shape == (10, 20, 3) and abs(int(whole[5, 15, 0]) - 30) <= 1
    with pytest.raises(DataError, match="x is 40x20, not in the proportions of 10x20: set crop=ce"):
        decoding.fit(pixel_places(40, 20), "none", (20, 10), "x")
    with pytest.raises(DataError, match="leaves 40x20 .*less than the 80x40 asked for"):
        decoding.fit(pixel_places(40, 20), "center", (40, 80), "x")


def test_a_prepared_set_keeps_shape_and_opacity(tmp_path):
    levels = write_pictures(tmp_path / "pictures", 4, 4, 6)
    prepare_folder(tmp_path / "pictures", tmp_path, "wide", (4, 6), 4)
    data = DataConfig(name="wide", image_size=(4, 6), channels=4)
    stored = load_source(data, tmp_path, "train").images  # in an order of their own
    np.testing.assert_array_equal(np.sort(stored, axis=0), np.sort(levels[:-1], axis=0))
    for other, said in (
        ({"image_size": 4}, "not square: set .* or config.data.image_size=4,6"),
        ({"image_size": (6, 8)}, "image_size=6,8: set config.data.image_size=4,6 or config.data.p"),
        ({"image_size": (6, 4)}, "but config.data.image_size=6,4: set config.data.image_size=4,6$"),
        ({"channels": 3}, "has 4 channel"),
    ):
        wrong = DataConfig(**{"name": "wide", "image_size": (4, 6), "channels": 4} | other)
        with pytest.raises(DataError, match=said):
            load_source(wrong, tmp_path, "train")


def test_a_hole_lies_within_both_sides():
    mask = hole((4, 8), (1, 5, 2, 3))
    assert mask.shape == (4, 8, 1) and mask.sum() == 32 - 6
    for box in ((1, 6, 2, 3), (3, 0, 2, 3)):
        with pytest.raises(ConfigError, match="within 8x4"):
            hole((4, 8), box)


def test_inception_refuses_what_it_cannot_see():
    four = of_array(np.full((2, 8, 8, 4), 9, np.uint8), {})
    extractor = object.__new__(Extractor)
    with pytest.raises(EvaluationError, match="samples: 4 channels; Inception sees grey and RGB"):
        next(Extractor.blocks(extractor, four, (), "samples"))
