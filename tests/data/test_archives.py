"""Zip and tar files of images as the source of a set: what is in them, and what they may not do."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.cli import prepare_data
from ddpm_jax.config import DataConfig
from ddpm_jax.data import archives
from ddpm_jax.data.archives import unpacked
from ddpm_jax.data.load import load_source
from ddpm_jax.errors import DataError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    """Write an archive of the kind that the name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, blob in members.items():
                archive.writestr(zipfile.ZipInfo(name), blob, zipfile.ZIP_DEFLATED)
    else:
        mode = {"gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(path.suffix[1:], "w")
        with tarfile.open(path, mode) as archive:
            for name, blob in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))
    return path


KINDS = ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"]
GOOD = {f"faces/{i}.png": png(i) for i in range(3)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_prepared_from_an_archive(kind, tmp_path, capsys):
    others = {"faces/._1.png": b"macOS", "__MACOSX/.x.png": b"", "read.me": b"text"}
    source = write(tmp_path / kind, GOOD | others)
    flags = ["--dataset=folder", f"--source={source}", "--name=faces", "--image_size=8"]
    prepare_data.main([*flags, f"--data_dir={tmp_path / 'data'}"])
    assert "3 other files in it left out" in capsys.readouterr().err
    data = DataConfig(name="faces", image_size=8)
    levels = [
        load_source(data, tmp_path / "data", split).read(np.arange(count))["image"][:, 0, 0, 0]
        for split, count in (("train", 2), ("test", 1))
    ]
    assert sorted(np.concatenate(levels)) == [0, 1, 2]
    assert not list((tmp_path / "data").glob(".unpacked*"))
    (metadata,) = (tmp_path / "data").rglob("metadata.json")
    assert f'"source": "{kind}"' in metadata.read_text()
    prepare_data.main([*flags, f"--data_dir={tmp_path / 'data'}"])
    assert "was already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, image",
    [
        ("DCIM/IMG_1.JPG", True),
        ("DCIM\\IMG_1.Png", True),
        ("IMG_1.GIF", False),
        ("DCIM/._IMG_1.JPG", False),
    ],
)
def test_endings_in_capitals_are_those_of_images(name, image):
    assert archives.is_image(name) is image


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/tmp/x.png", "..\\x.png", "C:\\x.png", "\\x.png"]
)
def test_no_member_leads_out_of_the_folder(kind, name, tmp_path):
    source = write(tmp_path / kind, GOOD | {name: png(0)})
    with pytest.raises(DataError, match="a path that leads out of it: refused"):
        with unpacked(source, tmp_path / "new" / "data"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_links_and_devices_stay_in_the_archive(tmp_path):
    source = tmp_path / "a.tar"
    with tarfile.open(source, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("real.png")
        member.size = len(png(1))
        archive.addfile(member, io.BytesIO(png(1)))
    with unpacked(source, tmp_path / "data") as folder:
        assert [path.name for path in folder.rglob("*")] == ["real.png"]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("name", ["x.png", "x.txt"])
def test_bombs_are_not_unpacked(kind, name, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_UNFOLDING", 2**18)
    source = write(tmp_path / kind, {name: bytes(2**22)})
    assert source.stat().st_size < 2**14
    if (kind, name) == ("a.zip", "x.txt"):  # stays in the archive, and costs nothing
        with unpacked(source, tmp_path / "data") as folder:
            assert not list(folder.iterdir())
        return
    with pytest.raises(DataError, match="that unfold to more than 64 times as many"):
        with unpacked(source, tmp_path / "data"):
            pass
    assert not (tmp_path / "data").exists()


def test_what_is_no_archive_or_a_damaged_one_is_one_line(tmp_path):
    whole = {kind: write(tmp_path / kind, GOOD).read_bytes() for kind in KINDS}
    cases = {"x.png": png(0), "x.rar": b"Rar!\x1a\x07" + bytes(900), "empty.zip": b""}
    # A tar begins with 512 bytes of header and as many of image, three times, and has 10,240.
    cases |= {
        f"cut.{kind}": blob[: 1700 if kind == "a.tar" else len(blob) // 2]
        for kind, blob in whole.items()
    }
    for name, blob in cases.items():
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(DataError, match="neither a folder of images nor|is damaged") as caught:
            with unpacked(tmp_path / name, tmp_path / "data"):
                pass
        assert "\n" not in str(caught.value)
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("1.png")
            archive.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match="holds 1.png twice"):
        with unpacked(twice, tmp_path / "data"):
            pass


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    source = write(tmp_path / "a.zip", GOOD)
    data = DataConfig(name="folder", path=str(source), image_size=8)
    with pytest.raises(DataError, match="a.zip is a file, not a folder: prepare-data makes a set"):
        load_source(data, tmp_path, "train")


def test_all_missing_flags_are_named_at_once(tmp_path):
    with pytest.raises(DataError, match="needs --source, --name, --image_size"):
        prepare_data.main(["--dataset=folder"])
