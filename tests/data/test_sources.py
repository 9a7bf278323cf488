import dataclasses
import importlib.util
import io
import os
import struct
import zlib
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from sklearn.datasets import load_digits

from ddpm_jax import machine
from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding, source
from ddpm_jax.data.folder import scan
from ddpm_jax.data.load import load_source, load_splits
from ddpm_jax.data.source import SPLITS, ArraySource, RecordSource
from ddpm_jax.errors import BadImages, DataError

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


# ------------------------------------------------------------ digits


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


def test_digits_are_the_same_from_the_file_and_from_scikit_learn(monkeypatch):
    first = load_source(DIGITS, "nowhere", "test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    second = load_source(DIGITS, "nowhere", "test")
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_padding_adds_a_black_border_and_counts_in_image_size():
    plain = load_source(DIGITS, "nowhere", "test").images
    padded = load_source(
        DataConfig(name="digits", image_size=16, channels=1, padding=4), "nowhere", "test"
    ).images
    assert padded.shape == (179, 16, 16, 1)
    np.testing.assert_array_equal(padded[:, 4:12, 4:12], plain)
    assert padded.astype(np.int64).sum() == plain.astype(np.int64).sum()


@pytest.mark.parametrize(
    "fields, remedy",
    [
        (
            {"image_size": 32, "channels": 1},
            "set config.data.image_size=8 or config.data.padding=12",
        ),
        ({"image_size": 8, "channels": 1, "padding": 2}, "set config.data.image_size=12"),
        ({"image_size": 8, "channels": 3}, "set config.data.channels=1"),
    ],
)
def test_config_that_does_not_fit_the_set_names_the_fix(fields, remedy):
    with pytest.raises(DataError, match=remedy) as caught:
        load_source(DataConfig(name="digits", **fields), "nowhere", "train")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ folders


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
    np.testing.assert_array_equal(
        load_source(folder_config(tmp_path), "nowhere", "test").images, pixels[4:]
    )


def test_random_access_gives_the_pixels_of_memory_in_any_order(tmp_path):
    write_images(tmp_path, 30)
    memory = load_source(folder_config(tmp_path), "nowhere", "train")
    disk = load_source(folder_config(tmp_path, in_memory=False), "nowhere", "train")
    assert isinstance(memory, ArraySource) and isinstance(disk, RecordSource)
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
        (lambda path: Image.new("F", (8, 8)).save(path, "TIFF"), "more than 8 bits"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path, spoil, message):
    write_images(tmp_path, 20)
    spoil(tmp_path / "013.png")
    with pytest.raises(DataError, match=f"013.png.*{message}") as caught:
        load_source(folder_config(tmp_path), "nowhere", "train")
    assert "\n" not in str(caught.value)


def spoil_some(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(b"not an image")


def test_all_bad_images_of_both_splits_are_named_at_once(tmp_path):
    """The first twenty, not one a start."""
    write_images(tmp_path, 60)
    spoil_some(tmp_path, 3, 49)
    with pytest.raises(BadImages) as caught:
        load_splits(folder_config(tmp_path), "nowhere", SPLITS)
    said = str(caught.value)
    assert said.startswith("2 of 60 images cannot be used, which skip_bad=true leaves out: ")
    assert said.count("does not decode") == 2 and "003.png" in said and "049.png" in said
    spoil_some(tmp_path, *range(10, 33))
    with pytest.raises(BadImages, match="25 of 60 .*; and 5 more") as caught:
        load_splits(folder_config(tmp_path), "nowhere", SPLITS)
    assert str(caught.value).count("does not decode") == 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_skip_bad_leaves_out_the_bad_and_moves_no_image_to_the_other_split(
    tmp_path, capfd, in_memory
):
    pixels = write_images(tmp_path, 60)
    spoil_some(tmp_path, 3, 30)  # before number 49, which would move by two places
    data = dataclasses.replace(folder_config(tmp_path), skip_bad=True, in_memory=in_memory)
    train, test = load_splits(data, "nowhere", SPLITS)
    np.testing.assert_array_equal(test.read(np.array([0]))["image"], pixels[[49]])
    good = [i for i in range(60) if i not in (3, 30, 49)]
    assert len(train) == 57
    np.testing.assert_array_equal(train.read(np.arange(57))["image"], pixels[good])
    assert "folder train: 2 of 59 images cannot be used and are left out" in capfd.readouterr().err
    spoil_some(tmp_path, 49)
    with pytest.raises(DataError, match="049.png"):  # nothing would be left of the split
        load_splits(data, "nowhere", SPLITS)


def test_bad_records_of_a_set_of_many_blocks_leave_the_rest_as_it_is():
    """Two of 2,100 records, in the second and the third block of 1,024."""
    bad = [1050, 2077]

    def decode(record: str, index: int) -> tuple[np.ndarray, int]:
        if index in bad:
            raise DataError(f"record {index} does not decode")
        return np.full((1, 1, 1), int(record) % 251, np.uint8), index

    def fetch(indices: list[int]) -> list[str]:
        return [str(index) for index in indices]

    records = RecordSource(2100, fetch, decode, (1, 1, 1), labelled=True)
    left = np.delete(np.arange(2100), bad)
    memory = source.decode_into_memory(records, "a set", skip_bad=True)
    assert isinstance(memory, ArraySource)
    for part in (memory, source.without_bad(records, "a set")):
        assert len(part) == 2098
        batch = part.read(np.arange(2098))
        np.testing.assert_array_equal(batch["label"], left)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], left % 251)
    with pytest.raises(BadImages, match="2 of 2,100 .* record 1050 does .* record 2077 does"):
        source.decode_into_memory(records, "a set")


def test_the_held_out_share_of_a_folder_can_be_chosen(tmp_path):
    pixels = write_images(tmp_path, 20)
    data = dataclasses.replace(folder_config(tmp_path), held_out_every=8)
    train, test = load_splits(data, "nowhere", SPLITS)
    np.testing.assert_array_equal(test.images, pixels[[7, 15]])
    np.testing.assert_array_equal(train.images, np.delete(pixels, [7, 15], axis=0))


def test_endings_in_capitals_are_those_of_images(tmp_path):
    for name in ("IMG_1.JPG", "b.Png", "c.png", "d.GIF"):
        (tmp_path / name).write_bytes(b"x")
    listing = scan(tmp_path)
    assert listing.names() == ["IMG_1.JPG", "b.Png", "c.png"] and listing.left_out == {".gif": 1}


def test_what_a_folder_leaves_out_is_counted_and_said(tmp_path, capfd):
    write_images(tmp_path / "in", 4)
    write_images(tmp_path / "in" / ".thumbnails", 2)
    (tmp_path / "in" / "._000.png").write_bytes(b"a resource fork")
    for name in ("a.gif", "b.GIF", "c.gif", "notes.txt", "README"):
        (tmp_path / "in" / name).write_bytes(b"x")
    listing = scan(tmp_path / "in")
    assert [path.name for path in listing.images] == ["000.png", "001.png", "002.png", "003.png"]
    assert listing.left_out == {".gif": 3, "hidden": 2, ".txt": 1, "no ending": 1}
    assert listing.describe() == (
        f"{tmp_path}/in: 4 images, 7 other files left out (.gif 3, hidden 2, no ending 1, .txt 1)"
    )
    for split in ("train", "test"):
        load_source(folder_config(tmp_path / "in"), "nowhere", split)
    assert capfd.readouterr().err == listing.describe() + "\n"  # once for both splits
    write_images(tmp_path / "clean", 2)
    assert scan(tmp_path / "clean").describe() == f"{tmp_path}/clean: 2 images"


@pytest.mark.parametrize(
    "joined, host, shown", [(True, 1, False), (True, 0, True), (False, 0, True)]
)
def test_the_first_host_alone_shows_how_far_it_is(
    tmp_path, monkeypatch, capfd, joined, host, shown
):
    write_images(tmp_path / "in", 4)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    monkeypatch.setattr(jax, "process_index", lambda: host)
    monkeypatch.setattr(source, "_QUICK", 0)
    load_source(folder_config(tmp_path / "in"), "nowhere", "train")
    said = capfd.readouterr().err
    assert (f"{tmp_path}/in: 4 images" in said) is shown
    assert ("image 3/3" in said) is shown


def test_linked_folders_are_followed_once(tmp_path):
    """A link into another tree adds its images; loops, and links to what is listed, add nothing."""
    write_images(tmp_path / "set" / "a", 2)
    write_images(tmp_path / "elsewhere" / "deep", 3)
    (tmp_path / "set" / "0_more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "0_again").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "circle").symlink_to(tmp_path / "set" / "circle")
    listing = scan(tmp_path / "set")
    names = [path.relative_to(tmp_path / "set").as_posix() for path in listing.images]
    assert names == [
        *(f"0_more/deep/{i:03d}.png" for i in range(3)),
        *(f"a/{i:03d}.png" for i in range(2)),
    ]
    assert listing.left_out == {"links to folders listed already": 3, "no ending": 1}
    # A link as the folder itself, and the linked folder trained on.
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(scan(tmp_path / "link").images) == 5
    assert len(load_source(folder_config(tmp_path / "link"), "nowhere", "train")) == 4


def test_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "locked", 2)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":  # as root, permissions hold nobody back
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{tmp_path}/locked cannot be listed .Permission denied"):
        load_source(folder_config(tmp_path), "nowhere", "train")


@pytest.mark.parametrize("kind", ["pipe", "broken link", "circle"])
def test_what_is_called_an_image_and_is_no_file_is_named_at_once(tmp_path, kind):
    write_images(tmp_path, 3)
    path = tmp_path / "p.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "circle" else tmp_path / "nothing")
    with pytest.raises(DataError, match="p.png is no file that can be read"):
        load_source(folder_config(tmp_path, in_memory=False), "nowhere", "train")
    with pytest.raises(DataError, match="p.png (is no regular file|cannot be read)") as caught:
        decoding.open_image(path, str(path))
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


def test_a_set_larger_than_memory_is_read_from_disk(tmp_path, monkeypatch, capsys):
    """The limit is that of the container, and the pixels are the same."""
    write_images(tmp_path, 12)
    whole = load_source(folder_config(tmp_path), "nowhere", "train")
    assert isinstance(whole, ArraySource) and "from disk" not in capsys.readouterr().err
    monkeypatch.setattr(machine, "_container_limits", lambda root: iter([whole.images.nbytes]))
    disk = load_source(folder_config(tmp_path), "nowhere", "train")
    assert isinstance(disk, RecordSource)
    assert "it is read from disk at every step" in capsys.readouterr().err
    np.testing.assert_array_equal(disk.read(np.arange(len(disk)))["image"], whole.images)
    monkeypatch.setattr(machine, "_container_limits", lambda root: iter([2 * whole.images.nbytes]))
    assert isinstance(load_source(folder_config(tmp_path), "nowhere", "train"), ArraySource)


def test_source_reads_through_a_grain_pipeline(tmp_path):
    """Random access is all that grain asks of a source."""
    pixels = write_images(tmp_path, 12)
    disk = load_source(folder_config(tmp_path, in_memory=False), "nowhere", "train")
    images = grain.MapDataset.range(len(disk)).map(lambda i: disk.read(np.array([i]))["image"][0])
    np.testing.assert_array_equal(images[5], pixels[5])


# ------------------------------------------------------------ decoding


def test_celeba64_is_the_square_around_x89_y121():
    crop = decoding.to_pixels(decoding.fit(where(178, 218), "celeba64", (128, 128), "x"))
    assert tuple(crop[0, 0, :2]) == (25, 57) and tuple(crop[-1, -1, :2]) == (152, 184)
    assert tuple(crop[64, 64, :2]) == (89, 121)


def test_celeba64_scales_with_smaller_aligned_images():
    crop = decoding.to_pixels(decoding.fit(where(89, 109), "celeba64", (64, 64), "x"))
    assert tuple(crop[0, 0, :2]) == (12, 28) and tuple(crop[-1, -1, :2]) == (75, 91)


def test_celeba64_refuses_other_proportions():
    with pytest.raises(DataError, match="x is 178x178; crop=celeba64 is for aligned CelebA"):
        decoding.fit(where(178, 178), "celeba64", (64, 64), "x")


@pytest.mark.parametrize("width, height, corner", [(20, 10, (5, 0)), (10, 21, (0, 5))])
def test_center_crop_is_the_largest_square_in_the_middle(width, height, corner):
    crop = decoding.to_pixels(decoding.fit(where(width, height), "center", (10, 10), "x"))
    assert tuple(crop[0, 0, :2]) == corner and tuple(crop[-1, -1, :2]) == (
        corner[0] + 9,
        corner[1] + 9,
    )


def test_shrinking_is_antialiased():
    """Without antialiasing, fine stripes would turn black or white, or the mean would move."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = decoding.to_pixels(decoding.fit(Image.fromarray(stripes), "none", (16, 16), "x"))
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
    np.testing.assert_array_equal(
        decoding.to_pixels(decoding.to_channels(opaque, 3, "x")), expected
    )
    palette = image.quantize(64)
    assert palette.mode == "P"
    np.testing.assert_array_equal(
        decoding.to_pixels(decoding.to_channels(palette, 3, "x")), expected
    )


def test_decoded_image_outlives_its_file():
    buffer = io.BytesIO()
    where(8, 8).save(buffer, "PNG")
    image = decoding.open_image(buffer, "x")
    buffer.close()
    np.testing.assert_array_equal(decoding.to_pixels(image), decoding.to_pixels(where(8, 8)))


# ------------------------------------------------------------ files as they come


def png(samples: np.ndarray, kind: int, *chunks: tuple[bytes, bytes], depth: int = 16) -> bytes:
    """A PNG file written by hand, of the colour type `kind` and unfiltered rows."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2" if depth == 16 else np.uint8)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def exif(*entries: tuple[int, int], count: int | None = None) -> bytes:
    """EXIF data by hand: a TIFF header and one directory of SHORTs, (tag, value)."""
    body = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries) if count is None else count)
    return head + body + b"\0\0\0\0"


@pytest.mark.parametrize(
    "kind, channels", [(0, 1), (4, 2), (2, 3), (6, 4)], ids=["L", "LA", "RGB", "RGBA"]
)
def test_sixteen_bits_are_scaled_to_eight_in_grey_and_colour(tmp_path, kind, channels):
    """To the nearest x / 257: 0x00ff is 1 (0.99), where its upper byte is 0; 0xff80 is 255."""
    samples = np.random.default_rng(0).integers(0, 2**16, (8, 8, channels))
    samples[0, :4, 0] = [0, 0x00FF, 0xFF80, 0xFFFF]
    if channels in (2, 4):
        samples[..., -1] = 0xFFFF
    blob = png(samples, kind)
    expected = np.floor(samples * (255 / 65535) + 0.5).astype(np.uint8)
    expected = expected[..., : 3 if channels > 2 else 1]
    assert expected[0, :4, 0].tolist() == [0, 1, 255, 255]
    image = decoding.open_image(io.BytesIO(blob), "x")
    wanted = channels - 1 if channels in (2, 4) else channels
    pixels = decoding.to_pixels(decoding.to_channels(image, wanted, "x"))
    np.testing.assert_array_equal(pixels, expected)
    turned = png(samples, kind, (b"eXIf", exif((0x112, 3))))
    image = decoding.open_image(io.BytesIO(turned), "x")
    pixels = decoding.to_pixels(decoding.to_channels(image, wanted, "x"))
    np.testing.assert_array_equal(pixels, expected[::-1, ::-1])


def test_sixteen_bits_that_are_transparent_or_not_in_a_png_are_refused(tmp_path):
    samples = np.full((4, 4, 3), 0x1234)
    clear = png(samples, 2, (b"tRNS", struct.pack(">3H", 0x1234, 0x1234, 0x1234)))
    with pytest.raises(DataError, match="x is partly transparent"):
        decoding.to_channels(decoding.open_image(io.BytesIO(clear), "x"), 3, "x")
    # Another colour of the same upper bytes is transparent: nothing here is.
    opaque = png(samples, 2, (b"tRNS", struct.pack(">3H", 0x1235, 0x1234, 0x1234)))
    image = decoding.to_channels(decoding.open_image(io.BytesIO(opaque), "x"), 3, "x")
    assert image.getextrema() == ((18, 18),) * 3  # 0x1234 / 257 = 18.1
    # A TIFF of 16-bit colour by hand, one strip, whose upper bytes Pillow would take.
    tags = [
        (256, 4, 2), (257, 4, 1), (258, 3, 3), (259, 3, 1), (262, 3, 2),
        (273, 4, 8), (277, 3, 3), (278, 4, 1), (279, 4, 12),
    ]  # fmt: skip
    offset = 8 + 12 + 2 + 12 * len(tags) + 4
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        count, value = (3, offset) if tag == 258 else (1, value)
        directory += struct.pack("<HHII", tag, kind, count, value)
    tiff = b"II*\0" + struct.pack("<I", 20) + bytes(range(12)) + directory + bytes(4)
    tiff += struct.pack("<3H", 16, 16, 16)
    with pytest.raises(DataError, match="x has more than 8 bits a channel .RGB;16L"):
        decoding.open_image(io.BytesIO(tiff), "x")


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(suffix, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    buffer = io.BytesIO()
    options = {"lossless": True} if suffix == "webp" else {}
    where(6, 8).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix), exif=tag, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    upright = decoding.open_image(buffer, "x")
    assert upright.size == ((6, 8) if orientation < 5 else (8, 6))
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(expected))


@pytest.mark.parametrize(
    "data",
    [
        exif((0x112, 6), count=3),
        exif((0x112, 6))[:12],
        b"MM\0*" + struct.pack(">I", 5000),
        b"anything",
        b"II",
    ],
    ids=["entries missing", "cut off", "elsewhere", "no header", "two bytes"],
)
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_damaged_exif_is_one_line(tmp_path, form, data):
    if form == "png":
        blob = png(np.zeros((8, 8, 3)), 2, (b"eXIf", data), depth=8)
    else:
        buffer = io.BytesIO()
        where(8, 8).save(buffer, "JPEG")
        segment = b"Exif\0\0" + data
        blob = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
        blob += buffer.getvalue()[2:]
    write_images(tmp_path, 3)
    (tmp_path / "000.png").write_bytes(blob)
    with pytest.raises(DataError, match="000.png does not decode as an image .*EXIF") as caught:
        load_source(folder_config(tmp_path), "nowhere", "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width, height", [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 1)])
def test_files_that_unfold_to_too_much_are_one_line(tmp_path, width, height):
    """Of all three, the header alone is there: nothing may be allocated before it is judged."""
    blob = bytearray(png(np.zeros((8, 8, 3)), 2, depth=8))
    blob[16:24] = struct.pack(">II", width, height)
    blob[29:33] = struct.pack(">I", zlib.crc32(blob[12:29]))
    (tmp_path / "bomb.png").write_bytes(blob)
    with pytest.raises(DataError, match="bomb.png (has 10000x9000|does not decode)") as caught:
        decoding.open_image(tmp_path / "bomb.png", "bomb.png")
    assert "\n" not in str(caught.value)


def test_formats_that_are_not_on_the_list_are_not_opened_whatever_they_are_called(
    tmp_path, monkeypatch
):
    """Pillow hands PostScript to Ghostscript: a program that runs programs."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it was run"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    write_images(tmp_path, 3)
    gif = io.BytesIO()
    where(8, 8).save(gif, "GIF")
    for blob in (postscript, gif.getvalue()):
        (tmp_path / "000.png").write_bytes(blob)
        with pytest.raises(DataError, match="000.png does not decode as an image .none of PNG, "):
            load_source(folder_config(tmp_path), "nowhere", "train")
    with (tmp_path / "000.png").open("wb") as file:
        where(8, 8).save(file, "BMP")  # on the list, under another's name
    source = load_source(folder_config(tmp_path), "nowhere", "train")
    np.testing.assert_array_equal(source.images[0], np.asarray(where(8, 8)))


def test_grey_in_the_form_of_colour_is_grey():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = Image.fromarray(levels)
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    palette.putpalette([4 * (i // 3) % 256 for i in range(768)])
    opaque = grey.convert("RGBA")
    for image in (grey, grey.convert("RGB"), palette, opaque):
        pixels = decoding.to_pixels(decoding.to_channels(image, 1, "x"))
        np.testing.assert_array_equal(pixels, levels[..., None])
    nearly = grey.convert("RGB")
    nearly.putpixel((7, 7), (252, 252, 251))
    with pytest.raises(DataError, match="x is in colour, channels=1"):
        decoding.to_channels(nearly, 1, "x")
