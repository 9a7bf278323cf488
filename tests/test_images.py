"""The 256 levels survive the way to the network and back, files hold what was given, bad input is one clear line."""

import os

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import images
from ddpm_jax.errors import UserError
from ddpm_jax.files import naming, replacing
from ddpm_jax.images import ImageError

LEVELS = np.arange(256, dtype=np.uint8)


def pictures(n=5, h=3, w=4, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_level_survives_the_round_trip(dtype):
    x = (np.arange(256) / 127.5 - 1).astype(dtype)
    np.testing.assert_array_equal(images.to_uint8(x), LEVELS)
    np.testing.assert_array_equal(images.to_uint8(images.from_uint8(LEVELS)), LEVELS)


def test_the_ends_of_the_range_are_the_ends_of_the_levels():
    x = images.from_uint8(LEVELS)
    assert x.dtype == np.float32
    assert (x[0], x[255]) == (-1.0, 1.0)
    np.testing.assert_allclose(
        np.diff(x), 2 / 255, rtol=0, atol=2e-7
    )  # 256 levels share the range evenly


def test_levels_are_the_nearest_and_not_the_next_below():
    """A truncating cast, which public code ships, is 0.5 level too dark on average; the nearest level is not."""
    x = np.linspace(-1, 1, 100_001)
    error = images.to_uint8(x).astype(np.float64) - (x + 1) * 127.5
    assert np.abs(error).max() <= 0.5 + 1e-4
    assert abs(error.mean()) < 1e-3


def test_values_beyond_the_range_are_clipped_and_do_not_wrap_around():
    x = np.array([-np.inf, -1e30, -1.01, 1.01, 2.0, 1e30, np.inf])
    np.testing.assert_array_equal(images.to_uint8(x), [0, 0, 0, 255, 255, 255, 255])


def test_nan_and_integers_are_refused():
    with pytest.raises(ImageError, match="2 of 3 values are NaN"):
        images.to_uint8(np.array([0.0, np.nan, np.nan]))
    with pytest.raises(ImageError, match="expected floats"):
        images.to_uint8(LEVELS)
    with pytest.raises(ImageError, match="expected uint8"):
        images.from_uint8(np.zeros(3, np.int32))


def test_arrays_of_the_device_are_taken_as_they_are():
    import jax.numpy as jnp

    np.testing.assert_array_equal(images.to_uint8(jnp.array([-1.0, 1.0], jnp.bfloat16)), [0, 255])
    assert images.grid(jnp.zeros((4, 2, 2, 1), jnp.uint8)).shape == (6, 6, 1)


# ---------------------------------------------------------------------------------------------- tiles


def test_grid_puts_each_image_where_it_belongs():
    tiles = pictures(5, 3, 4, 3)
    picture = images.grid(tiles, columns=3, gap=2, background=17)
    assert picture.shape == (3 + 2 + 3, 4 + 2 + 4 + 2 + 4, 3)
    covered = np.zeros(picture.shape, bool)
    for i, (top, left) in enumerate([(0, 0), (0, 6), (0, 12), (5, 0), (5, 6)]):
        np.testing.assert_array_equal(picture[top : top + 3, left : left + 4], tiles[i])
        covered[top : top + 3, left : left + 4] = True
    assert (picture[~covered] == 17).all()


def test_grid_enlarges_each_pixel_into_a_square():
    tiles = pictures(2, 3, 4, 1)
    picture = images.grid(tiles, columns=2, gap=1, scale=5)
    assert picture.shape == (15, 41, 1)
    for y in range(15):
        for x in range(20):
            assert picture[y, x, 0] == tiles[0, y // 5, x // 5, 0]
            assert picture[y, 21 + x, 0] == tiles[1, y // 5, x // 5, 0]


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (64, 8)])
def test_grid_is_the_smallest_square_that_holds_all(n, columns):
    rows = -(-n // columns)
    assert images.grid(pictures(n, 2, 2, 1), gap=0).shape == (2 * rows, 2 * columns, 1)


@pytest.mark.parametrize("option", [{"columns": 0}, {"gap": -1}, {"scale": 0}, {"background": 256}])
def test_grid_names_the_option_at_fault(option):
    (name,) = option
    with pytest.raises(ImageError, match=f"grid: {name}="):
        images.grid(pictures(), **option)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 2), np.uint8),
        pictures(0),
    ],
)
def test_grid_says_what_it_expected_and_what_it_got(array):
    with pytest.raises(
        ImageError, match=r"grid: expected uint8 \[n, h, w, c\] with c = 1, 3 or 4, got \w+ \["
    ):
        images.grid(array)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("c", [1, 3, 4])
def test_png_keeps_every_pixel(tmp_path, c):
    image = pictures(1, 7, 5, c)[0]
    path = tmp_path / "deep" / "down" / "image.png"
    images.save_png(path, image)
    np.testing.assert_array_equal(images.load_png(path), image)
    with Image.open(path) as other:  # as any other program sees it
        assert (other.mode, other.size) == ({1: "L", 3: "RGB", 4: "RGBA"}[c], (5, 7))
    assert os.listdir(path.parent) == ["image.png"]


def test_load_png_refuses_what_is_no_plain_png(tmp_path):
    path = tmp_path / "image.png"
    with pytest.raises(ImageError, match="no such file"):
        images.load_png(path)
    Image.new("LA", (2, 2)).save(path)
    with pytest.raises(ImageError, match="mode LA"):
        images.load_png(path)
    Image.new("RGB", (2, 2)).save(path, format="JPEG")
    with pytest.raises(ImageError, match="not a readable PNG"):
        images.load_png(path)


def test_a_damaged_png_is_named_wherever_it_was_cut(tmp_path):
    whole = images.encode_png(pictures(1, 16, 16, 3)[0])
    path = tmp_path / "image.png"
    for length in (0, 5, 20, 40, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match="image.png: not a readable PNG"):
            images.load_png(path)


@pytest.mark.parametrize("name, milliseconds", [("a.gif", 100), ("a.webp", 70)])
@pytest.mark.parametrize("c", [1, 3])
def test_animation_holds_the_frames_and_their_time(tmp_path, name, milliseconds, c):
    frames = np.repeat(pictures(4, 1, 1, c), 8, axis=1).repeat(
        8, axis=2
    )  # one colour each: GIF palettes are exact
    images.save_animation(tmp_path / name, frames, milliseconds)
    with Image.open(tmp_path / name) as animation:
        assert animation.n_frames == 4
        assert animation.info["loop"] == 0
        for i, frame in enumerate(frames):
            animation.seek(i)
            np.testing.assert_array_equal(
                np.array(animation.convert("RGB")), np.broadcast_to(frame, (8, 8, 3))
            )
            assert animation.info["duration"] == milliseconds


def test_animation_refuses_a_speed_no_viewer_has(tmp_path):
    with pytest.raises(ImageError, match="milliseconds=10"):
        images.save_animation(tmp_path / "a.gif", pictures(), 10)


def test_npz_has_the_keys_of_public_evaluators(tmp_path):
    samples = pictures(5)
    images.save_npz(tmp_path / "samples.npz", samples, np.array([3, 1, 4, 1, 5]))
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], samples)
        np.testing.assert_array_equal(file["arr_1"], [3, 1, 4, 1, 5])
    images.save_npz(tmp_path / "samples.npz", samples)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
    for labels in (np.zeros(4, int), np.zeros(5), np.zeros((5, 1), int)):
        with pytest.raises(ImageError, match="expected 5 integer labels"):
            images.save_npz(tmp_path / "samples.npz", samples, labels)


@pytest.mark.parametrize(
    "save, name, accepted",
    [
        (lambda path: images.save_png(path, pictures()[0]), "image.jpg", ".png"),
        (lambda path: images.save_animation(path, pictures()), "image.mp4", ".gif or .webp"),
        (lambda path: images.save_npz(path, pictures()), "image", ".npz"),
    ],
)
def test_a_suffix_that_is_not_written_names_those_that_are(tmp_path, save, name, accepted):
    with pytest.raises(UserError, match=f"{name}: the name must end in {accepted}"):
        save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="no room") as caught:
        with replacing(path) as file:
            file.write(b"half of the new")
            raise OSError(28, "no room")
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["image.png"]


def test_a_full_disk_is_an_error_that_names_the_file():
    """/dev/full takes nothing; `naming` stands around every write of this module and of writers.py."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="could not be written: No space left on device: 'metrics'"):
        with naming("metrics"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="could not be written: .*image.png"):
        images.save_png(tmp_path / "taken" / "image.png", pictures()[0])
