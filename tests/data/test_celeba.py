"""CelebA from the files that people have: the official split, the crop, what is missing."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.cli import prepare_data
from ddpm_jax.config import DataConfig
from ddpm_jax.data.load import load_source
from ddpm_jax.data.originals import celeba
from ddpm_jax.data.prepare import prepare
from ddpm_jax.errors import DataError, UserError

SPLIT = {"000001.jpg": 0, "000002.jpg": 0, "000003.jpg": 1, "000004.jpg": 2, "000005.jpg": 0}
CX, CY = 89, 121  # the centre of the crop in the code of the DDIM paper, datasets/__init__.py


def coordinates() -> np.ndarray:
    """An image of 178x218 whose red and green are twice x and y, counted from the crop's corner."""
    y, x = np.mgrid[:218, :178]
    ramps = np.stack([2 * (x - CX + 64), 2 * (y - CY + 64), 0 * x], -1)
    return np.clip(ramps, 0, 255).astype(np.uint8)


def write_faces(folder: Path, names=tuple(SPLIT)) -> Path:
    """Write faces as JPEG: the first the coordinates, the others grey by their number."""
    place = folder / celeba.FACES
    place.mkdir(parents=True)
    for number, name in enumerate(names):
        grey = np.full((218, 178, 3), 40 * number, np.uint8)
        image = Image.fromarray(grey if number else coordinates())
        image.save(place / name, "JPEG", quality=95, subsampling=0)
    return folder


def partition(separator: str = " ", split=SPLIT) -> str:
    return "".join(f"{name}{separator}{number}\n" for name, number in split.items())


def official(folder: Path) -> Path:
    """The layout of the publisher, unpacked."""
    (write_faces(folder) / "list_eval_partition.txt").write_text(partition())
    return folder


def pack(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("__MACOSX/img_align_celeba/._000001.jpg", b"no image")


def layouts(folder: Path, kind: str) -> Path:
    """The same faces as they are found in the wild."""
    if kind == "publisher's":
        return official(folder)
    if kind == "publisher's, packed":  # Img/img_align_celeba.zip and Eval/
        write_faces(folder / "unpacked")
        (folder / "celeba" / "Img").mkdir(parents=True)
        pack(folder / "unpacked", folder / "celeba" / "Img" / "img_align_celeba.zip")
        (folder / "celeba" / "Eval").mkdir()
        (folder / "celeba" / "Eval" / "list_eval_partition.txt").write_text(partition())
        return folder / "celeba"
    write_faces(folder / celeba.FACES)  # Kaggle: a folder in a folder of the same name
    table = "image_id,partition\n" + partition(",")
    (folder / "list_eval_partition.csv").write_text(table)
    if kind == "Kaggle's":
        return folder
    pack(folder, folder.with_suffix(".zip"))
    return folder.with_suffix(".zip")


def pixels(data: DataConfig, data_dir: Path, split: str) -> np.ndarray:
    source = load_source(data, data_dir, split)
    return source.read(np.arange(len(source)))["image"]


@pytest.mark.parametrize(
    "kind", ["publisher's", "publisher's, packed", "Kaggle's", "Kaggle's, packed"]
)
def test_every_layout_gives_the_official_split(tmp_path, kind, capfd):
    source = layouts(tmp_path / "in", kind)
    flags = ["--dataset=celeb_a", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]
    prepare_data.main([*flags, "--image_size=64"])
    said = capfd.readouterr()
    assert f"{source}: 3 train, 1 validation, 1 test faces\n" in said.err
    assert "config.data.name=celeba64\n" in said.out
    data = DataConfig(name="celeba64", image_size=64, crop="celeba64")
    train, test = (pixels(data, tmp_path / "data", split) for split in ("train", "test"))
    assert sorted(train[:, 32, 32, 2].tolist()) == [0, 40, 160]  # faces 1, 2 and 5
    assert test[:, 32, 32, 2].tolist() == [120]  # face 4
    prepare_data.main([*flags, "--image_size=64"])
    assert "was already prepared" in capfd.readouterr().out


def test_the_crop_is_that_of_the_ddim_paper(tmp_path):
    """Red and green are linear in x and y, so a bilinear shrinking by two has values by hand.

    The centre of pixel i of the 64 lies between pixels 2i and 2i+1 of the 128 that are cropped,
    whose values are 4i and 4i+2. A crop that is off by one pixel differs by 2 everywhere.
    """
    source = official(tmp_path / "in")
    image = Image.fromarray(coordinates())
    image.save(source / celeba.FACES / "000001.jpg", "PNG")  # exact, whatever it is called
    flags = ["--dataset=celeb_a", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]
    prepare_data.main([*flags, "--image_size=64"])
    train = pixels(DataConfig(name="celeba64", image_size=64), tmp_path / "data", "train")
    (face,) = train[train[:, 0, 0, 2] == 0][train[train[:, 0, 0, 2] == 0][:, 32, 32, 0] > 100]
    inside = 4 * np.arange(64) + 1
    np.testing.assert_array_equal(face[5, 1:-1, 0], inside[1:-1])
    np.testing.assert_array_equal(face[1:-1, 5, 1], inside[1:-1])
    # Without shrinking, the rows and columns as that code has them.
    prepare_data.main([*flags, "--image_size=128", "--name=large"])
    large = pixels(DataConfig(name="large", image_size=128), tmp_path / "data", "train")
    (face,) = [image for image in large if image[64, 64, 0] > 100 and image[64, 64, 2] == 0]
    np.testing.assert_array_equal(face, coordinates()[CY - 64 : CY + 64, CX - 64 : CX + 64])


def test_whole_faces_are_the_files_themselves_and_a_config_crops_them(tmp_path):
    """configs/celeba64.py and celeba32.py read one set, without a loss on the way."""
    source = official(tmp_path / "in")
    folder = prepare("celeb_a", tmp_path / "data", source)
    assert folder == tmp_path / "data" / "celeb_a" / "1.0.0"
    recipe = json.loads((folder / "metadata.json").read_text())
    assert (recipe["crop"], recipe["resize"], recipe["images"]) == ("none", "none", 5)
    data = DataConfig(name="celeb_a", image_size=32, crop="celeba64")
    whole = {image.tobytes() for image in pixels(data, tmp_path / "data", "train")}
    expected = set()
    for name in ("000001.jpg", "000002.jpg", "000005.jpg"):
        face = Image.open(source / celeba.FACES / name)
        box = CX - 64, CY - 64, CX + 64, CY + 64
        expected.add(face.crop(box).resize((32, 32), Image.Resampling.BILINEAR).tobytes())
    assert whole == expected
    undecoded = {"image": tfds.decode.SkipDecoding()}
    builder = tfds.builder_from_directory(folder)
    for face in builder.as_data_source(split="train", decoders=undecoded):
        assert face["image"] == (source / celeba.FACES / face["filename"].decode()).read_bytes()
    shutil.rmtree(source)
    assert prepare("celeb_a", tmp_path / "data", source) == folder  # the originals may be gone


def test_a_selection_of_faces_is_not_taken_for_another(tmp_path):
    source = official(tmp_path / "in")
    prepare("celeb_a", tmp_path / "data", source)
    some = {name: number for name, number in SPLIT.items() if name != "000005.jpg"}
    (source / "list_eval_partition.txt").write_text(partition(split=some))
    with pytest.raises(DataError, match="name=celeb_a: .* differs in images=5, not 4"):
        prepare("celeb_a", tmp_path / "data", source)


def test_missing_and_damaged_faces_are_told_or_left_out(tmp_path, capfd):
    source = official(tmp_path / "in")
    (source / celeba.FACES / "000002.jpg").unlink()
    (source / celeba.FACES / "extra.jpg").write_bytes(b"x")
    flags = ["--dataset=celeb_a", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]
    flags += ["--image_size=64"]
    with pytest.raises(
        DataError, match=r"lacks 1 of the 5 faces .* \(000002.jpg\), which skip_bad"
    ):
        prepare_data.main(flags)
    shutil.copy(source / celeba.FACES / "000001.jpg", source / celeba.FACES / "000002.jpg")
    (source / celeba.FACES / "000005.jpg").write_bytes(b"damaged")
    with pytest.raises(DataError, match="000005.jpg does not decode as an image"):
        prepare_data.main(flags)
    (source / celeba.FACES / "000002.jpg").unlink()
    prepare_data.main([*flags, "--skip_bad=true"])
    said = capfd.readouterr().err
    assert "1 images that list_eval_partition.txt does not name, left out" in said
    assert "1 images cannot be used, left out" in said
    data = DataConfig(name="celeba64", image_size=64)
    assert len(load_source(data, tmp_path / "data", "train")) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("000001.jpg 0\n000001.jpg 1\n", "line 2 has a name twice"),
        ("000001.jpg 0\n\n000002.jpg 3\n", r"line 3 is no name with 0, 1 or 2 \('000002.jpg 3'\)"),
        ("000001.jpg\n", "line 1 is no name with 0, 1 or 2"),
        ("\0\xff", "line 1 is no name with 0, 1 or 2"),
        ("", "none of the faces .* has for training is there: it names files such as none"),
        ("000001.png 0\n", "names files such as 000001.png"),
    ],
)
def test_a_partition_that_is_none_is_one_line(tmp_path, text, message):
    source = official(tmp_path / "in")
    (source / "list_eval_partition.txt").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        prepare("celeb_a", tmp_path / "data", source)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_sources_that_hold_no_celeba_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path / "empty", "has neither img_align_celeba/ nor img_align_celeba.zip"),
        (write_faces(tmp_path / "faces"), "has no list_eval_partition.txt, which says what is"),
    ):
        with pytest.raises(DataError, match=f"source={source}.*{message}"):
            prepare("celeb_a", tmp_path / "data", source)
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="a.zip is damaged or no zip file"):
        prepare("celeb_a", tmp_path / "data", tmp_path / "a.zip")


def test_a_member_that_unfolds_to_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(celeba, "_LARGEST_MEMBER", 1000)
    blob = io.BytesIO()
    Image.new("RGB", (178, 218)).save(blob, "JPEG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("list_eval_partition.txt", "000001.jpg 0\n")
        archive.writestr("img_align_celeba/000001.jpg", blob.getvalue())
    with pytest.raises(DataError, match="000001.jpg unfolds to .* bytes: not read"):
        prepare("celeb_a", tmp_path / "data", tmp_path / "a.zip")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset=celeb_a", "--source=in", "--crop=celeba64"], "crop=celeba64: to which size"),
        (["--dataset=celeb_a", "--source=in", "--classes"], "--classes: of no use with"),
        (["--dataset=celeb_a", "--image_size=64"], "--image_size: .*celeb_a without --source"),
        (["--dataset=cifar10", "--crop=center"], "--crop: of no use with --dataset=cifar10"),
        (["--dataset=celeb_a", "--source=in", "--name=mnist"], "name=mnist: .* standard set"),
    ],
)
def test_flags_of_no_use_are_told(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    official(Path("in"))
    with pytest.raises(UserError, match=message):
        prepare_data.main(flags)
