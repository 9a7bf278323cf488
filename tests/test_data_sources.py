import io
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding, sources
from ddpm_jax.data.errors import DataError
from ddpm_jax.data.sources import load_source

DIGITS = DataConfig(name="digits", image_size=8, channels=1)


def folder_config(path: Path, **fields) -> DataConfig:
    return DataConfig(name="folder", path=str(path), **({"image_size": 8} | fields))


def write_images(folder: Path, count: int, size: int = 8) -> np.ndarray:
    """Random RGB images 000.png, 001.png, ... and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for i in reversed(range(count)):  # so that the order of creation is not the sorted one
        Image.fromarray(pixels[i]).save(folder / f"{i:03d}.png")
    return pixels


def where(width: int, height: int) -> Image.Image:
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], -1))


# ------------------------------------------------------------------------------------------------ digits


def test_digits_split_is_a_partition_with_levels_spread_over_uint8():
    train, test = load_source(DIGITS, "nowhere", "train"), load_source(DIGITS, "nowhere", "test")
    assert (len(train), len(test)) == (1618, 179)
    images = np.concatenate([train.images, test.images])
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    assert images.min() == 0 and images.max() == 255 and len(np.unique(images)) == 17
    originals = load_digits()
    brightness = np.sort(originals.data.mean(1)) / 16
    np.testing.assert_allclose(np.sort(images.mean((1, 2, 3))) / 255, brightness, atol=0.5 / 255)
    labels = np.concatenate([train.labels, test.labels])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(originals.target))


def test_digits_are_the_same_every_time():
    first, second = (load_source(DIGITS, "nowhere", "test") for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)


def test_padding_adds_a_black_border_and_counts_in_image_size():
    plain = load_source(DIGITS, "nowhere", "test").images
    padded = load_source(DataConfig(name="digits", image_size=16, channels=1, padding=4), "nowhere", "test").images
    assert padded.shape == (179, 16, 16, 1)
    np.testing.assert_array_equal(padded[:, 4:12, 4:12], plain)
    assert padded.astype(np.int64).sum() == plain.astype(np.int64).sum()


@pytest.mark.parametrize(
    "fields, remedy",
    [
        ({"image_size": 32, "channels": 1}, "set config.data.image_size=8 or config.data.padding=12"),
        ({"image_size": 8, "channels": 1, "padding": 2}, "set config.data.image_size=12"),
        ({"image_size": 8, "channels": 3}, "set config.data.channels=1"),
    ],
)
def test_config_that_does_not_fit_the_set_names_the_fix(fields, remedy):
    with pytest.raises(DataError, match=remedy) as caught:
        load_source(DataConfig(name="digits", **fields), "nowhere", "train")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ folders


def test_folder_is_sorted_by_path_at_any_depth_and_holds_out_every_fiftieth(tmp_path):
    pixels = write_images(tmp_path / "a", 60)
    more = write_images(tmp_path / "b" / "deeper", 60)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    everything = np.concatenate([pixels, more])
    train = load_source(folder_config(tmp_path), "nowhere", "train")
    test = load_source(folder_config(tmp_path), "nowhere", "test")
    np.testing.assert_array_equal(test.images, everything[[49, 99]])
    np.testing.assert_array_equal(train.images, np.delete(everything, [49, 99], axis=0))
    assert not train.labelled and set(train.read(np.arange(2))) == {"image"}


def test_small_folder_holds_out_its_last_image(tmp_path):
    pixels = write_images(tmp_path, 5)
    assert len(load_source(folder_config(tmp_path), "nowhere", "train")) == 4
    np.testing.assert_array_equal(load_source(folder_config(tmp_path), "nowhere", "test").images, pixels[4:])


def test_random_access_gives_the_pixels_of_memory_in_any_order(tmp_path):
    write_images(tmp_path, 30)
    memory = load_source(folder_config(tmp_path), "nowhere", "train")
    disk = load_source(folder_config(tmp_path, in_memory=False), "nowhere", "train")
    assert isinstance(memory, sources.ArraySource) and isinstance(disk, sources.RecordSource)
    indices = np.array([7, 0, 28, 7, 3])
    np.testing.assert_array_equal(disk.read(indices)["image"], memory.read(indices)["image"])
    assert len(disk) == len(memory) and disk.image_shape == memory.image_shape


def test_grey_files_become_rgb_but_colour_never_becomes_grey(tmp_path):
    write_images(tmp_path, 2)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "000.png")
    train = load_source(folder_config(tmp_path), "nowhere", "train")
    np.testing.assert_array_equal(train.images[0], np.repeat(np.arange(64).reshape(8, 8, 1), 3, -1))
    with pytest.raises(DataError, match="001.png is in colour, channels=1: set channels=3"):
        load_source(folder_config(tmp_path, channels=1), "nowhere", "test")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(b"not an image"), "does not decode as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "does not decode as an image"),
        (lambda path: path.write_bytes(b""), "does not decode as an image"),
        (lambda path: Image.new("RGB", (9, 8)).save(path), "is 9x8, not square: set crop=center"),
        (lambda path: Image.new("RGB", (6, 6)).save(path), "less than the 8x8 asked for"),
        (lambda path: Image.new("RGBA", (8, 8), (9, 9, 9, 128)).save(path), "partly transparent"),
        (lambda path: Image.new("I;16", (8, 8)).save(path), "more than 8 bits"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path, spoil, message):
    write_images(tmp_path, 20)
    spoil(tmp_path / "013.png")
    with pytest.raises(DataError, match=f"013.png.*{message}") as caught:
        load_source(folder_config(tmp_path), "nowhere", "train")
    assert "\n" not in str(caught.value)


def test_folder_without_images_and_missing_folder(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        load_source(folder_config(tmp_path), "nowhere", "train")
    with pytest.raises(DataError, match="no such folder"):
        load_source(folder_config(tmp_path / "missing"), "nowhere", "train")
    Image.new("RGB", (8, 8)).save(tmp_path / "only.png")
    with pytest.raises(DataError, match="single image"):
        load_source(folder_config(tmp_path), "nowhere", "train")


def test_unknown_split():
    with pytest.raises(DataError, match="one of train, test"):
        load_source(DIGITS, "nowhere", "validation")


def test_set_larger_than_memory_names_the_switch():
    huge = sources.RecordSource(10**9, lambda indices: indices, lambda record, index: (None, 0), (256, 256, 3), False)
    with pytest.raises(DataError, match="set config.data.in_memory=false"):
        sources.decode_into_memory(huge, "huge train")


def test_source_reads_through_a_grain_pipeline(tmp_path):
    """Random access is all that grain asks of a source."""
    pixels = write_images(tmp_path, 12)
    disk = load_source(folder_config(tmp_path, in_memory=False), "nowhere", "train")
    images = grain.MapDataset.range(len(disk)).map(lambda i: disk.read(np.array([i]))["image"][0])
    np.testing.assert_array_equal(images[5], pixels[5])


# ------------------------------------------------------------------------------------------------ decoding


def test_celeba64_is_the_square_around_x89_y121():
    crop = decoding.to_pixels(decoding.fit(where(178, 218), "celeba64", 128, "x"))
    assert tuple(crop[0, 0, :2]) == (25, 57) and tuple(crop[-1, -1, :2]) == (152, 184)
    assert tuple(crop[64, 64, :2]) == (89, 121)


def test_celeba64_scales_with_smaller_aligned_images():
    crop = decoding.to_pixels(decoding.fit(where(89, 109), "celeba64", 64, "x"))
    assert tuple(crop[0, 0, :2]) == (12, 28) and tuple(crop[-1, -1, :2]) == (75, 91)


def test_celeba64_refuses_other_proportions():
    with pytest.raises(DataError, match="x is 178x178; crop=celeba64 is for aligned CelebA"):
        decoding.fit(where(178, 178), "celeba64", 64, "x")


@pytest.mark.parametrize("width, height, corner", [(20, 10, (5, 0)), (10, 21, (0, 5))])
def test_center_crop_is_the_largest_square_in_the_middle(width, height, corner):
    crop = decoding.to_pixels(decoding.fit(where(width, height), "center", 10, "x"))
    assert tuple(crop[0, 0, :2]) == corner and tuple(crop[-1, -1, :2]) == (corner[0] + 9, corner[1] + 9)


def test_shrinking_is_antialiased():
    """A filter without antialiasing samples single pixels: it turns fine stripes black or white, or moves the mean."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = decoding.to_pixels(decoding.fit(Image.fromarray(stripes), "none", 16, "x"))
    assert np.abs(small.astype(float) - 127.5).max() < 20


def test_photos_are_turned_upright(tmp_path):
    write_images(tmp_path, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    where(8, 8).save(tmp_path / "000.png", exif=exif)
    upright = load_source(folder_config(tmp_path), "nowhere", "train").images[0]
    assert tuple(upright[0, 0, :2]) == (0, 7) and tuple(upright[0, 7, :2]) == (0, 0)


def test_opaque_alpha_and_palettes_are_no_obstacle():
    image = where(8, 8)
    expected = decoding.to_pixels(image)
    opaque = image.copy()
    opaque.putalpha(255)
    np.testing.assert_array_equal(decoding.to_pixels(decoding.to_channels(opaque, 3, "x")), expected)
    palette = image.quantize(64)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decoding.to_pixels(decoding.to_channels(palette, 3, "x")), expected)


def test_decoded_image_outlives_its_file():
    buffer = io.BytesIO()
    where(8, 8).save(buffer, "PNG")
    image = decoding.open_image(buffer, "x")
    buffer.close()
    np.testing.assert_array_equal(decoding.to_pixels(image), decoding.to_pixels(where(8, 8)))
