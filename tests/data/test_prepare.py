import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.cli.run import outcome
from ddpm_jax.config import DataConfig
from ddpm_jax.data import builders, prepare, sets
from ddpm_jax.data.load import load_source
from ddpm_jax.data.originals import formats
from ddpm_jax.data.originals.download import download
from ddpm_jax.data.prepared import find_prepared
from ddpm_jax.errors import DataError
from tests.support.commands import command_module

ROOT = Path(__file__).resolve().parents[2]
UNPACK = (
    ROOT.parent / "shared" / "data" / "unpack.py"
)  # the real sets; where they are missing, synthetic ones must do
FACES = DataConfig(name="faces", image_size=8)


@pytest.fixture(scope="session")
def unpack():
    if not UNPACK.exists():
        pytest.skip("no real data beside this checkout")
    spec = importlib.util.spec_from_file_location("unpack", UNPACK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faces(tmp_path) -> np.ndarray:
    """A folder of 60 images, tmp_path/originals, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    (tmp_path / "originals").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "originals" / f"{i:03d}.png")
    return pixels


@pytest.fixture
def prepared(tmp_path, faces) -> Path:
    """The folder prepared as the set "faces" in tmp_path/data."""
    return prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)


def tiny_cifar(monkeypatch, count: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes six random batches the published ones, and returns name -> (images, labels)."""
    rng = np.random.default_rng(1)
    batches = {
        name: (
            rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
            rng.integers(0, 10, count, np.uint8),
        )
        for name in formats.CIFAR10_PICKLES
    }
    pickles = {name: hashlib.md5(as_pickle(*batch)).hexdigest() for name, batch in batches.items()}
    records = {
        f"{name}.bin": hashlib.md5(as_records(*batch)).hexdigest()
        for name, batch in batches.items()
    }
    monkeypatch.setattr(formats, "CIFAR10_PICKLES", pickles)
    monkeypatch.setattr(formats, "CIFAR10_RECORDS", records)
    return batches


def as_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({b"data": planes, b"labels": labels.tolist()}, protocol=3)


def as_records(images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], 1).tobytes()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, blob in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    return path


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------ CIFAR-10


@pytest.mark.parametrize(
    "form", ["tar of pickles", "tar of records", "folder of pickles", "folder above records"]
)
def test_cifar10_reads_every_published_form(tmp_path, monkeypatch, form):
    batches = tiny_cifar(monkeypatch)
    encode, suffix = (as_pickle, "") if "pickles" in form else (as_records, ".bin")
    blobs = {f"{name}{suffix}": encode(*batch) for name, batch in batches.items()}
    if form.startswith("tar"):
        source = write_tar(
            tmp_path / "cifar.tar.gz", {f"cifar-10/{name}": blob for name, blob in blobs.items()}
        )
    else:
        source = tmp_path / "cifar"
        folder = source / "inside" if "above" in form else source
        folder.mkdir(parents=True)
        for name, blob in blobs.items():
            (folder / name).write_bytes(blob)
    splits = formats.read_cifar10(source)
    *train, test = batches.values()
    np.testing.assert_array_equal(
        splits["train"][0], np.concatenate([images for images, _ in train])
    )
    np.testing.assert_array_equal(
        splits["train"][1], np.concatenate([labels for _, labels in train])
    )
    np.testing.assert_array_equal(splits["test"][0], test[0])
    np.testing.assert_array_equal(splits["test"][1], test[1])


def test_prepared_cifar10_is_what_stock_tfds_reads(tmp_path, monkeypatch):
    batches = tiny_cifar(monkeypatch)
    source = write_tar(
        tmp_path / "cifar.tar.gz", {name: as_pickle(*batch) for name, batch in batches.items()}
    )
    prepare.prepare("cifar10", tmp_path / "data", source)
    images, labels = (np.concatenate(parts) for parts in zip(*list(batches.values())[:5]))
    stock = tfds.data_source("cifar10", split="train", data_dir=tmp_path / "data")
    ours = load_source(DataConfig(), tmp_path / "data", "train")
    assert len(stock) == len(ours) == 20
    numbers = []
    for i, example in enumerate(stock):
        number = int(example["id"].decode().removeprefix("train_"))
        numbers.append(number)
        for found in (example["image"], ours.images[i]):
            np.testing.assert_array_equal(found, images[number])
        assert example["label"] == ours.labels[i] == labels[number]
    assert sorted(numbers) == list(range(20))
    names = tfds.builder("cifar10", data_dir=tmp_path / "data").info.features["label"].names
    assert names[0] == "airplane" and names[-1] == "truck"


@pytest.mark.parametrize(
    "damage, message",
    [("missing", "lacks data_batch_3"), ("altered", "MD5 of data_batch_3 differs")],
)
def test_cifar10_with_a_bad_batch_names_it(tmp_path, monkeypatch, damage, message):
    blobs = {name: as_pickle(*batch) for name, batch in tiny_cifar(monkeypatch).items()}
    if damage == "missing":
        del blobs["data_batch_3"]
    else:
        blobs["data_batch_3"] = blobs["data_batch_3"][:-1] + b"!"
    with pytest.raises(DataError, match=message) as caught:
        prepare.prepare("cifar10", tmp_path / "data", write_tar(tmp_path / "cifar.tar.gz", blobs))
    one_line(caught)
    assert not prepare.is_prepared("cifar10", tmp_path / "data")


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.9])
def test_truncated_archive(tmp_path, monkeypatch, keep):
    blobs = {name: as_pickle(*batch) for name, batch in tiny_cifar(monkeypatch).items()}
    whole = write_tar(tmp_path / "cifar.tar.gz", blobs).read_bytes()
    (tmp_path / "cifar.tar.gz").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match="truncated or damaged") as caught:
        formats.read_cifar10(tmp_path / "cifar.tar.gz")
    one_line(caught)


def test_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    blobs = {name: as_pickle(*batch) for name, batch in tiny_cifar(monkeypatch).items()}
    inside = tmp_path / "inside"
    inside.mkdir()
    members = {"../escaped": b"x", str(tmp_path / "absolute"): b"x"}
    members |= {f"../{name}": blob for name, blob in blobs.items()}
    prepare.prepare("cifar10", inside / "data", write_tar(inside / "cifar.tar.gz", members))
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}


def test_archive_of_something_else(tmp_path):
    with pytest.raises(DataError, match="holds no CIFAR-10"):
        formats.read_cifar10(write_tar(tmp_path / "other.tar.gz", {"readme": b"x"}))
    with pytest.raises(DataError, match="no such file or folder"):
        prepare.prepare("cifar10", tmp_path / "data", tmp_path / "missing.tar.gz")


def test_pickle_that_calls_anything_else_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    for callable_ in (Evil(), {b"data": Evil()}, [getattr], eval, np.load):
        with pytest.raises(DataError, match="it was not run"):
            formats.unpickle_arrays(pickle.dumps(callable_, protocol=2))
    assert not (tmp_path / "executed").exists()


def test_pickle_of_numpy_before_2_raises_no_warning():
    """numpy.dtype('u1', 0, 1), with the integers that NumPy 2 no longer likes for booleans."""
    assert formats.unpickle_arrays(b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R.") == np.uint8
    with pytest.raises(DataError, match="damaged pickle"):
        formats.unpickle_arrays(b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00")


def test_real_cifar10_batch(unpack):
    """Pixels from an independent lossless codec, in the bytes whose MD5 is the published one."""
    pixels = unpack.decode_images((unpack.PACKED / "cifar10_test.medx").read_bytes())
    meta = json.loads(
        unpack.lzma.decompress((unpack.PACKED / "cifar10_meta.json.xz").read_bytes())
    )["test_batch"]
    blob = unpack.cifar_pickle("testing batch 1 of 1", pixels, meta["labels"], meta["filenames"])
    assert hashlib.md5(blob).hexdigest() == formats.CIFAR10_PICKLES["test_batch"]
    images, labels = formats._parse_pickle(blob)
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, meta["labels"])
    records = as_records(images, labels)
    assert hashlib.md5(records).hexdigest() == formats.CIFAR10_RECORDS["test_batch.bin"]


@pytest.mark.slow
def test_real_cifar10_whole(unpack, tmp_path):
    unpack.cifar10(tmp_path)
    prepare.prepare("cifar10", tmp_path / "data", tmp_path / "cifar-10-batches-py")
    splits = formats.read_cifar10(tmp_path / "cifar-10-batches-py")

    def examples(images, labels):
        return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels))

    for split, count in (("train", 50_000), ("test", 10_000)):
        images, labels = splits[split]
        stock = tfds.data_source("cifar10", split=split, data_dir=tmp_path / "data")
        ours = load_source(DataConfig(), tmp_path / "data", split)
        assert len(ours) == len(stock) == count
        assert examples(ours.images, ours.labels) == examples(images, labels)
        for number in [*range(0, count, count // 50), count - 1]:
            example = stock[number]
            np.testing.assert_array_equal(ours.images[number], example["image"])
            assert ours.labels[number] == example["label"]
            original = int(example["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(example["image"], images[original])


# ------------------------------------------------------------ the MNIST family


@pytest.mark.parametrize("naming", ["{}-idx{}-ubyte.gz", "{}-idx{}-ubyte", "{}.idx{}-ubyte"])
def test_mnist_reads_idx_files_gzipped_or_not(tmp_path, monkeypatch, naming):
    monkeypatch.setattr(formats, "MNIST_EXAMPLES", {"train": ("train", 6), "test": ("t10k", 3)})
    rng, written = np.random.default_rng(0), {}
    for split, (prefix, count) in formats.MNIST_EXAMPLES.items():
        written[split] = (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            rng.integers(0, 10, count, np.uint8),
        )
        for kind, array in zip(("images", "labels"), written[split]):
            name = naming.format(f"{prefix}-{kind}", array.ndim)
            (tmp_path / name).write_bytes(
                gzip.compress(idx(array)) if name.endswith(".gz") else idx(array)
            )
    prepare.prepare("mnist", tmp_path / "data", tmp_path)
    config = DataConfig(name="mnist", image_size=32, channels=1, padding=2)
    for split, (images, labels) in written.items():
        found = load_source(config, tmp_path / "data", split)
        stock = tfds.data_source("mnist", split=split, data_dir=tmp_path / "data")
        order = [
            int(np.flatnonzero((images == example["image"][..., 0]).all((1, 2)))[0])
            for example in stock
        ]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(found.images[:, 2:-2, 2:-2, 0], images[order])
        np.testing.assert_array_equal(found.labels, labels[order])


@pytest.mark.parametrize(
    "blob, message",
    [
        (b"\0\0\x08\x01\0\0\0\x05abc", "truncated or damaged"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an idx file"),
        (b"\0\0\x08", "not an idx file"),
        (b"<html>", "not an idx file"),
    ],
)
def test_damaged_idx(blob, message):
    with pytest.raises(DataError, match=message):
        formats.parse_idx(blob)


def test_mnist_folder_with_a_bad_file_names_it(tmp_path):
    with pytest.raises(DataError, match="lacks train-images-idx3-ubyte"):
        formats.read_mnist(tmp_path)
    whole = gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole)
    with pytest.raises(DataError, match=r"holds an array \(2, 28, 28\), not \(60000, 28, 28\)"):
        formats.read_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz is truncated or damaged"):
        formats.read_mnist(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        formats.read_mnist(tmp_path / "train-images-idx3-ubyte.gz")


def test_real_fashion_mnist(unpack, tmp_path, monkeypatch):
    """The 10,000 test images and labels from the published files to stock TFDS."""
    monkeypatch.setattr(formats, "MNIST_EXAMPLES", {"test": ("t10k", 10_000)})
    raw = {}
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        raw[kind] = unpack.lzma.decompress(
            (unpack.PACKED / f"fashion_mnist_t10k-{kind}.xz").read_bytes()
        )
        (tmp_path / f"t10k-{kind}.gz").write_bytes(gzip.compress(raw[kind], 1))
    prepare.prepare("fashion_mnist", tmp_path / "data", tmp_path)
    pixels = np.frombuffer(raw["images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28, 1)
    labels = np.frombuffer(raw["labels-idx1-ubyte"], np.uint8, offset=8)
    stock = tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path / "data")
    assert len(stock) == 10_000

    def digest(images, labels):
        return sorted(
            hashlib.sha1(image.tobytes() + bytes([label])).digest()
            for image, label in zip(images, labels)
        )

    assert digest(*zip(*[(example["image"], example["label"]) for example in stock])) == digest(
        pixels, labels
    )


# ------------------------------------------------------------ folders


def test_prepared_folder_holds_the_images_and_how_they_were_made(tmp_path, faces, prepared):
    recipe = json.loads((prepared / "metadata.json").read_text())
    assert recipe["crop"] == "none" and "antialiased" in recipe["resize"] and recipe["images"] == 60
    test = load_source(FACES, tmp_path / "data", "test")
    np.testing.assert_array_equal(test.images, faces[[49]])
    train = load_source(FACES, tmp_path / "data", "train")
    as_set = {image.tobytes() for image in train.images}
    assert (
        as_set == {image.tobytes() for image in np.delete(faces, 49, axis=0)} and not train.labelled
    )


def test_prepared_set_reads_the_same_from_disk_as_from_memory(tmp_path, prepared):
    memory = load_source(FACES, tmp_path / "data", "train")
    disk = load_source(
        DataConfig(name="faces", image_size=8, in_memory=False), tmp_path / "data", "train"
    )
    indices = np.array([40, 3, 3, 58, 0])
    np.testing.assert_array_equal(disk.read(indices)["image"], memory.read(indices)["image"])


def test_second_preparation_says_it_is_there(tmp_path, prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare.is_prepared("faces", tmp_path / "data")
    assert prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_a_set_made_in_another_way_is_not_taken_for_this_one(tmp_path, faces, prepared, capsys):
    """By source, size, crop, channels, or a file: each is named, and nothing is touched."""
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "originals", tmp_path / "others")
    shutil.copytree(tmp_path / "originals", tmp_path / "b" / "originals")
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(tmp_path / "b" / "originals" / "017.png")  # smaller than noise: another file size
    here, size = tmp_path / "originals", "antialiased bilinear (Pillow) to"
    for arguments, expected in [
        ((tmp_path / "others", 8), "source=originals, not others"),
        ((here, 4), f"resize={size} 8x8, not {size} 4x4"),
        ((here, 8, 3, "center"), "crop=none, not center"),
        ((here, 8, 1), "channels=3, not 1"),
        ((tmp_path / "b" / "originals", 8), "the names or sizes of the files"),
    ]:
        source, *rest = arguments
        with pytest.raises(DataError) as caught:
            prepare.prepare_folder(source, tmp_path / "data", "faces", *rest)
        assert one_line(caught) == (
            f"name=faces: this set is prepared in {prepared} already, and differs in {expected}: "
            f"take another name, or delete {prepared} to prepare it anew"
        )
    image.save(here / "060.png")
    with pytest.raises(DataError, match="images=60, not 61; the names or sizes of the files"):
        prepare.prepare_folder(here, tmp_path / "data", "faces", 8)
    flags = ["--dataset=folder", f"--source={here}", f"--data_dir={tmp_path / 'data'}"]
    with pytest.raises(DataError, match="images=60, not 61"):
        command_module("prepare_data").main([*flags, "--name=faces", "--image_size=8"])
    assert "was already" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_a_set_whose_originals_are_gone_is_still_there(tmp_path, faces, prepared):
    shutil.rmtree(tmp_path / "originals")
    assert prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8) == prepared
    with pytest.raises(DataError, match="crop=none, not center"):
        prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8, 3, "center")


def test_a_set_prepared_before_files_were_recorded_is_still_there(tmp_path, faces, prepared):
    recipe = json.loads((prepared / "metadata.json").read_text())
    del recipe["files"]
    (prepared / "metadata.json").write_text(json.dumps(recipe))
    assert prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8) == prepared


def test_preparing_says_what_a_folder_leaves_out(tmp_path, faces, capfd):
    (tmp_path / "originals" / "anim.gif").write_bytes(b"x")
    prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    line = f"{tmp_path}/originals: 60 images, 1 other file left out (.gif 1)\n"
    assert line in capfd.readouterr().err


def test_preparing_leaves_nothing_in_the_temporary_folder(tmp_path, faces):
    """Neither a folder, nor a standard set, nor a stock builder that is only constructed."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (5, 28, 28), np.uint8)),
            ("labels-idx1", rng.integers(0, 10, 5, np.uint8)),
        ):
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(idx(array))
    program = (
        "import tempfile\nfrom pathlib import Path\n"
        "from ddpm_jax.data import builders, prepare\n"
        "from ddpm_jax.data.originals import formats\n"
        "formats.MNIST_EXAMPLES = {'train': ('train', 5), 'test': ('t10k', 5)}\n"
        f"here, data = Path('{tmp_path}'), Path('{tmp_path}/data')\n"
        "prepare.prepare_folder(here / 'originals', data, 'faces', 8)\n"
        "prepare.prepare('mnist', data, here)\n"
        "builders.stock_builder('celeb_a_hq/256', data)\n"
        "print(tempfile.gettempdir())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == str(temporary), result.stderr
    assert prepare.is_prepared("faces", tmp_path / "data")
    assert prepare.is_prepared("mnist", tmp_path / "data")
    assert list(temporary.iterdir()) == []


def test_image_that_does_not_decode_stops_the_preparation_and_leaves_nothing(tmp_path, faces):
    (tmp_path / "originals" / "031.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="031.png does not decode"):
        prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    assert not list((tmp_path / "data" / "faces").glob("*"))


def test_preparing_names_all_bad_images_at_once_or_leaves_them_out(tmp_path, faces, capfd):
    here, data = tmp_path / "originals", tmp_path / "new" / "data"
    for number in (0, 31):
        (here / f"{number:03d}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="2 of 60 images") as caught:
        prepare.prepare_folder(here, data, "faces", 8)
    assert "000.png does not decode" in one_line(caught) and "031.png" in one_line(caught)
    assert not (tmp_path / "new").exists()
    prepare.prepare_folder(here, data, "faces", 8, skip_bad=True)
    assert f"{here}: 2 images cannot be used, left out" in capfd.readouterr().err
    assert len(load_source(FACES, data, "train")) == 57
    np.testing.assert_array_equal(load_source(FACES, data, "test").images, faces[[49]])


def test_a_refused_preparation_leaves_no_folder(tmp_path):
    """Of a source that is not there, and of a data directory that others use as well."""
    for data in (tmp_path / "a" / "b", tmp_path / "shared"):
        if data.name == "shared":
            data.mkdir()
            (data / "mine").mkdir()
        with pytest.raises(DataError, match="no such folder"):
            prepare.prepare_folder(tmp_path / "nowhere", data, "faces", 8)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "shared"]
    assert [path.name for path in (tmp_path / "shared").glob("[!.]*")] == ["mine"]


def test_a_cropped_set_is_not_cropped_again(tmp_path):
    """The set knows what was done to it: the same crop is done, another comes too late."""
    rng = np.random.default_rng(0)
    (tmp_path / "aligned").mkdir()
    for number in range(4):
        image = Image.fromarray(rng.integers(0, 256, (218, 178, 3), np.uint8))
        image.save(tmp_path / "aligned" / f"{number}.png")
    data = tmp_path / "data"
    prepare.prepare_folder(tmp_path / "aligned", data, "celeba16", 16, crop="celeba64")
    first = Image.open(tmp_path / "aligned" / "3.png").crop((25, 57, 153, 185))
    expected = np.asarray(first.resize((16, 16), Image.Resampling.BILINEAR))

    def load(**fields):
        return load_source(DataConfig(name="celeba16", **fields), data, "test").images[0]

    for crop in ("none", "celeba64", "center"):
        np.testing.assert_array_equal(load(image_size=16, crop=crop), expected)
    half = np.asarray(Image.fromarray(expected).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(load(image_size=8, crop="celeba64"), half)
    prepare.prepare_folder(tmp_path / "aligned", data, "middle", 16, crop="center")
    with pytest.raises(
        DataError, match="prepared with crop=center, .*crop=celeba64 comes too late"
    ):
        load_source(DataConfig(name="middle", image_size=16, crop="celeba64"), data, "test")


@pytest.mark.parametrize("name", ["cifar10", "digits", "../escaped", "Upper", ""])
def test_folder_needs_a_free_name(tmp_path, faces, name):
    with pytest.raises(DataError, match="name="):
        prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", name, 8)


# ------------------------------------------------------------ interruptions, faults


def test_killed_preparation_leaves_nothing_that_looks_prepared(tmp_path, faces):
    program = (
        "import os, signal\nfrom ddpm_jax.data import prepare\ncalls = []\n"
        "def decode(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return decode_file(*arguments)\n"
        "decode_file, prepare.decode_file = prepare.decode_file, decode\n"
        f"prepare.prepare_folder('{tmp_path}/originals', '{tmp_path}/data', 'faces', 8)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list((tmp_path / "data" / "faces").glob("incomplete.*"))
    with pytest.raises(DataError, match="'faces' is only half prepared") as caught:
        load_source(FACES, tmp_path / "data", "train")
    one_line(caught)
    prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    assert len(load_source(FACES, tmp_path / "data", "train")) == 59
    assert not list((tmp_path / "data" / "faces").glob("incomplete.*"))


def test_two_preparations_of_a_set_do_not_meet(tmp_path, faces):
    with (
        sets.exclusive("faces", tmp_path / "data"),
        pytest.raises(DataError, match="another process is preparing"),
    ):
        prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_prepared_on(tmp_path, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sets.fcntl, "flock", refuse)
    with sets.exclusive("faces", tmp_path / "data"):
        pass


def test_full_disk_is_told_before_and_during(tmp_path, faces, monkeypatch):
    with pytest.raises(DataError, match="MiB free, the set takes about 1000000000: make room"):
        sets.check_disk(tmp_path, 10**9)

    def refuse(*arguments, **named):
        raise RuntimeError("write() failed: No space left on device;\nwriting x")

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "_download_and_prepare", refuse)
    with pytest.raises(DataError, match="No space left on device") as caught:
        prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    one_line(caught)
    assert not prepare.is_prepared("faces", tmp_path / "data")


def test_missing_set_names_the_command():
    with pytest.raises(DataError) as caught:
        load_source(DataConfig(), "nowhere", "train")
    assert str(caught.value) == (
        "data set 'cifar10' is not prepared in nowhere/: "
        "run ddpm prepare-data --dataset=cifar10 --data_dir=nowhere"
    )


def test_misspelt_set_gets_a_hint(tmp_path, prepared):
    with pytest.raises(DataError, match="did you mean cifar10"):
        find_prepared("cifr10", tmp_path / "data")
    with pytest.raises(DataError, match="did you mean faces"):
        find_prepared("face", tmp_path / "data")
    with pytest.raises(DataError, match="NAME/CONFIGURATION"):
        find_prepared("../data/faces", tmp_path / "data")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder, shard: (folder / "dataset_info.json").unlink(), "only half prepared"),
        (lambda folder, shard: (folder / "features.json").unlink(), "is damaged"),
        (lambda folder, shard: (folder / "dataset_info.json").write_text("{"), "is damaged"),
        (lambda folder, shard: shard.unlink(), "is missing"),
        (lambda folder, shard: os.truncate(shard, shard.stat().st_size // 2), "is damaged"),
        (lambda folder, shard: shard.write_bytes(b"\0" * shard.stat().st_size), "is damaged"),
    ],
)
def test_damaged_set_names_the_remedy(tmp_path, prepared, damage, message):
    (shard,) = prepared.glob("*train*")
    damage(prepared, shard)
    remedy = "run ddpm prepare-data --dataset=folder --name=faces"
    with pytest.raises(DataError, match=f"'faces'.*{message}.*{remedy}") as caught:
        load_source(FACES, tmp_path / "data", "train")
    one_line(caught)


def test_set_in_another_format_is_refused(tmp_path, prepared):
    info = prepared / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="is prepared as tfrecord, not as array_record"):
        load_source(FACES, tmp_path / "data", "train")


def test_record_that_does_not_decode_is_named(tmp_path, faces, monkeypatch):
    encode = builders.png
    monkeypatch.setattr(builders, "png", lambda image: encode(image)[:60])
    prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    with pytest.raises(DataError, match=r"'faces', train record \d+ does not decode") as caught:
        load_source(FACES, tmp_path / "data", "train")
    one_line(caught)


@pytest.mark.parametrize(
    "fields, remedy",
    [
        ({"image_size": 32}, "set config.data.image_size=8 or config.data.padding=12"),
        ({"image_size": 8, "channels": 1}, "set config.data.channels=3"),
        ({"image_size": 16, "crop": "center"}, "less than the 16x16 asked for"),
    ],
)
def test_prepared_set_that_does_not_fit_the_config(tmp_path, prepared, fields, remedy):
    with pytest.raises(DataError, match=remedy):
        load_source(DataConfig(name="faces", **fields), tmp_path / "data", "train")


# ------------------------------------------------------------ other sets of TFDS


def write_set(data_dir: Path, name: str, shape: tuple, splits: dict[str, list[np.ndarray]]) -> None:
    stock = builders.folder_builder(name, shape, {})

    def features(image: np.ndarray) -> dict:
        return {"image": builders.png(Image.fromarray(image)), "filename": ""}

    examples = {
        split: [(str(i), features(x)) for i, x in enumerate(images)]
        for split, images in splits.items()
    }
    builders.write(builders.local_builder(stock, examples, data_dir))


def test_set_without_a_test_split_holds_out_its_tail(tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (101, 8, 8, 3), np.uint8))
    write_set(tmp_path, "hq", (8, 8, 3), {"train": images})
    config = DataConfig(name="hq", image_size=8)
    train, test = (load_source(config, tmp_path, split).images for split in ("train", "test"))
    assert len(test) == 3  # a fiftieth, rounded up
    stored = np.stack(
        [example["image"] for example in tfds.data_source("hq", split="train", data_dir=tmp_path)]
    )
    np.testing.assert_array_equal(np.concatenate([train, test]), stored)
    disk = load_source(DataConfig(name="hq", image_size=8, in_memory=False), tmp_path, "test")
    np.testing.assert_array_equal(disk.read(np.array([2]))["image"][0], stored[100])


def test_validation_split_stands_in_for_a_missing_test_split(tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    write_set(tmp_path, "scenes", (8, 8, 3), {"train": images[:10], "validation": images[10:]})
    config = DataConfig(name="scenes", image_size=8)
    assert (
        len(load_source(config, tmp_path, "train")) == 10
        and len(load_source(config, tmp_path, "test")) == 2
    )


def test_set_of_various_sizes_needs_a_crop(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8 + i, 3), np.uint8) for i in range(4)]
    write_set(tmp_path, "scenes", (None, None, 3), {"train": images, "test": images})
    with pytest.raises(DataError, match="various sizes: set config.data.crop=center"):
        load_source(DataConfig(name="scenes", image_size=8), tmp_path, "test")
    source = load_source(DataConfig(name="scenes", image_size=8, crop="center"), tmp_path, "test")
    expected = {image[:, i // 2 : i // 2 + 8].tobytes() for i, image in enumerate(images)}
    assert {image.tobytes() for image in source.images} == expected


def test_name_without_its_configuration(tmp_path):
    with pytest.raises(DataError, match="celeb_a_hq/256"):
        prepare.prepare("celeb_a_hq", tmp_path)
    (tmp_path / "celeb_a_hq" / "64" / "2.0.0").mkdir(parents=True)
    (tmp_path / "celeb_a_hq" / "64" / "2.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="set config.data.name=celeb_a_hq/64"):
        find_prepared("celeb_a_hq", tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)
def test_sets_that_need_tensorflow_say_what_to_install(tmp_path):
    for dataset in ("celeb_a", "celeb_a_hq/256"):
        with pytest.raises(DataError, match=r"pip install 'ddpm_jax\[tensorflow\]'") as caught:
            prepare.prepare(dataset, tmp_path)
        one_line(caught)


@pytest.mark.parametrize("there", [False, True])
def test_lsun_is_refused_before_it_is_downloaded(tmp_path, monkeypatch, there):
    """tensorflow_io is missing, or built for another TensorFlow, which shows when it is used."""

    def __getattr__(name: str):
        raise NotImplementedError("unable to open file: libtensorflow_io.so")

    names = ("tensorflow_io", "tensorflow_io.python", "tensorflow_io.python.ops")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].core_ops = types.ModuleType("core_ops")
    modules[names[-1]].core_ops.__getattr__ = __getattr__
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module if there else None)
    monkeypatch.setattr(builders, "stock_builder", pytest.fail)
    with pytest.raises(DataError, match="lsun/bedroom is published as an lmdb") as caught:
        prepare.prepare("lsun/bedroom", tmp_path)
    assert one_line(caught).endswith("export its images, and prepare them with dataset=folder")


@pytest.mark.interop
def test_celeb_a_hq_through_its_stock_builder(tmp_path):
    pytest.importorskip("tensorflow")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    members = {f"{i}.png": builders.png(Image.fromarray(image)) for i, image in enumerate(pixels)}
    write_tar(tmp_path / "packed.tar.gz", members)
    (tmp_path / "data8x8.tar").write_bytes(
        gzip.decompress((tmp_path / "packed.tar.gz").read_bytes())
    )
    with pytest.raises(DataError, match="source=DIR must be the folder with data16x16.tar"):
        prepare.prepare("celeb_a_hq/16", tmp_path / "data", tmp_path)
    with pytest.raises(
        DataError, match="TFDS cannot prepare celeb_a_hq/17.*BuilderConfig 17 not found"
    ):
        prepare.prepare("celeb_a_hq/17", tmp_path / "data", tmp_path)
    prepare.prepare("celeb_a_hq/8", tmp_path / "data", tmp_path / "data8x8.tar")
    config = DataConfig(name="celeb_a_hq/8", image_size=8)
    found = np.concatenate(
        [load_source(config, tmp_path / "data", split).images for split in ("train", "test")]
    )
    assert {image.tobytes() for image in found} == {image.tobytes() for image in pixels}


# ------------------------------------------------------------ downloads


@pytest.fixture
def publisher(monkeypatch):
    """A web server that counts requests; /short.bin has fewer bytes than it announces."""
    monkeypatch.setenv("no_proxy", "*")
    body = bytes(range(256)) * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.path not in ("/whole.bin", "/short.bin"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.path == "/whole.bin" else body[:1000])

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.body = 0, body
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def checksum(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def test_download_is_checked_and_not_repeated(tmp_path, publisher):
    for _ in range(2):
        path = download(f"{publisher.url}/whole.bin", tmp_path, checksum(publisher.body))
        assert path.read_bytes() == publisher.body
    assert publisher.requests == 1 and [file.name for file in tmp_path.iterdir()] == ["whole.bin"]


def test_file_cut_short_earlier_is_downloaded_again(tmp_path, publisher):
    (tmp_path / "whole.bin").write_bytes(publisher.body[:100])
    (tmp_path / "whole.bin.part").write_bytes(publisher.body[:100])
    assert (
        download(f"{publisher.url}/whole.bin", tmp_path, checksum(publisher.body)).read_bytes()
        == publisher.body
    )


@pytest.mark.parametrize(
    "path, message",
    [
        ("whole.bin", "is not the published file"),
        ("short.bin", "broke off after 1,000 of 256,000 bytes"),
        ("gone.bin", "cannot be downloaded .404 Not Found"),
    ],
)
def test_failed_download_leaves_no_file_of_that_name(tmp_path, publisher, path, message):
    with pytest.raises(DataError, match=message) as caught:
        download(f"{publisher.url}/{path}", tmp_path, checksum(b"something else"))
    assert "source=FILE" in one_line(caught)
    assert not (tmp_path / path).exists()


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unheard:  # bound, so that nobody else has the port, but not listening
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/whole.bin"
        with pytest.raises(DataError, match="cannot be downloaded .*refused.*source=FILE"):
            download(url, tmp_path, checksum(b""), timeout=5)


def test_preparing_without_source_downloads(tmp_path, monkeypatch):
    blobs = {name: as_pickle(*batch) for name, batch in tiny_cifar(monkeypatch).items()}
    archive = write_tar(tmp_path / "cifar.tar.gz", blobs)
    read, _, mebibytes = prepare._ORIGINALS["cifar10"]
    files = {archive.as_uri(): checksum(archive.read_bytes())}
    monkeypatch.setitem(prepare._ORIGINALS, "cifar10", (read, files, mebibytes))
    prepare.prepare("cifar10", tmp_path / "data")
    assert (tmp_path / "data" / "downloads" / "cifar10" / "cifar.tar.gz").is_file()
    assert len(load_source(DataConfig(), tmp_path / "data", "train")) == 20


# ------------------------------------------------------------ the script


def run_script(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *flags]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_script_prepares_a_folder(tmp_path, faces):
    flags = ("--dataset=folder", "--source=originals", "--name=faces", "--image_size=8")
    result = run_script(*flags, cwd=tmp_path)
    assert (
        result.returncode == 0
        and "data set 'faces' is prepared in data/faces/1.0.0" in result.stdout
    ), result.stderr
    assert len(load_source(FACES, tmp_path / "data", "test")) == 1


def test_script_ends_on_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset=cifar10", "--source=nowhere.tar.gz"]
    code = outcome(lambda: command_module("prepare_data").main(flags))
    assert (code, capsys.readouterr().err) == (
        1,
        "error: --source=nowhere.tar.gz: no such file or folder\n",
    )


def test_script_refuses_what_it_cannot_prepare(tmp_path, capsys):
    script = command_module("prepare_data")
    with pytest.raises(DataError, match="^dataset=cifr10: one of cifar10, "):
        script.main(["--dataset=cifr10", f"--data_dir={tmp_path}"])
    with pytest.raises(DataError, match="--dataset=folder needs --source"):
        script.main(["--dataset=folder", f"--data_dir={tmp_path}"])
    script.main(["--dataset=digits", f"--data_dir={tmp_path}"])
    assert "nothing to prepare" in capsys.readouterr().out


def test_script_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        command_module("prepare_data").main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--data_dir" in out and "example" in out
