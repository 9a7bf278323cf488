"""Files that anybody may have written: JSON, arrays, and what is no file at all."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.files import (
    NpzError,
    check_writable,
    open_file,
    open_npz,
    parse_json,
    read_json,
    replacing,
)
from tests.support.layers import ROOT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "levels"),
        ("[" * 65 + "]" * 65, "levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "levels"),
        ("9" * 5000, "5000 digits"),
        ("1" * 21, "21 digits"),
        ("1e999", "1e999, which is not finite"),
        ("[NaN]", "NaN, which is not finite"),
        ("-Infinity", "not finite"),
        ("", "Expecting value"),
        ("{", "Expecting"),
    ],
)
def test_json_of_strangers_is_refused_by_value_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_fine_is_read():
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json('\ufeff{"a": 1}') == parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_json(str(2**63 - 1)) == 2**63 - 1 and parse_json(str(-(2**63))) == -(2**63)
    assert parse_json("[1e308, -0.5]") == [1e308, -0.5]
    assert parse_json("1e999", nan=True) == float("inf") and np.isnan(parse_json("NaN", nan=True))
    with pytest.raises(UnicodeDecodeError):
        parse_json(b"\xff\xfe")


def test_a_pipe_a_folder_and_a_device_are_no_files(tmp_path):
    """A pipe without a writer would be waited for; a device might never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "pipe or a device"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "pipe or a device"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(OSError, match=words):
            with open_file(path):
                pass
        with pytest.raises(OSError, match=words):
            read_json(path)


def archive_of(path, header: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.npy", header)


def npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def test_arrays_larger_than_their_file_are_not_allocated(tmp_path):
    path = tmp_path / "a.npz"
    archive_of(path, npy_header((2**40,)) + bytes(100))
    with pytest.raises(ValueError, match="array a of shape"):
        with open_npz(path):
            pass
    archive_of(path, npy_header((2**25,)) + bytes(2**27), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match="that unfold to 134,"):
        with open_npz(path):
            pass
    # A header that claims to be as long as what follows it would be quoted in full.
    header = npy_header((8,))
    archive_of(path, header[:8] + (9000).to_bytes(2, "little") + header[10:] + bytes(9000))
    with pytest.raises(ValueError, match="array a: Cannot parse header") as caught:
        with open_npz(path):
            pass
    assert len(str(caught.value)) - len(str(path)) < 200
    np.savez(path, a=np.arange(3), b=np.float32(2))
    with open_npz(path) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"] == 2


def damaged_in_the_middle(path: Path, compression: int) -> None:
    """An .npz with one byte of its array a changed, which only reading the array finds."""
    np.savez(path, a=np.arange(1000))
    with zipfile.ZipFile(path) as whole:
        member = whole.read("a.npy")
    archive_of(path, member, compression=compression)
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 255
    path.write_bytes(blob)


@pytest.mark.parametrize("kind", ["none", "folder", "pipe", "text", "cut", "other member"])
def test_whatever_is_wrong_with_an_npz_is_one_error_that_names_it(kind, tmp_path):
    path = tmp_path / "a.npz"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "text":
        path.write_text("no archive")
    if kind == "cut":
        np.savez(path, a=np.arange(1000))
        path.write_bytes(path.read_bytes()[:-50])
    if kind == "other member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "no array")
    with pytest.raises(NpzError, match="^.*a.npz (is damaged or no .npz file|holds a)") as caught:
        with open_npz(path) as arrays:
            arrays["a"]
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_an_array_that_is_damaged_is_that_error_too(compression, tmp_path):
    damaged_in_the_middle(tmp_path / "a.npz", compression)
    with pytest.raises(NpzError, match="a.npz is damaged or no .npz file"):
        with open_npz(tmp_path / "a.npz") as arrays:
            arrays["a"]


def test_an_array_that_is_not_there_is_named_and_errors_of_the_block_pass(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.arange(2))
    with pytest.raises(NpzError, match="a.npz has no array c, only a, b"):
        with open_npz(tmp_path / "a.npz") as arrays:
            arrays["c"]
    with pytest.raises(KeyError, match="of the block"):
        with open_npz(tmp_path / "a.npz") as arrays:
            assert arrays.files == ["a", "b"]
            raise KeyError("of the block")


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, not a file"):
        check_writable(tmp_path)
    check_writable(tmp_path, folder=True)
    check_writable(tmp_path / "new" / "file")
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file")
    for folder in (False, True):
        with pytest.raises(NotADirectoryError):
            check_writable(tmp_path / "file" / "more", folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_is_no_place_for_a_file_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a pipe or a device, not a file"):
        check_writable(tmp_path / "pipe")
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"


def test_a_python_without_lzma_is_enough():
    code = "import sys; sys.modules['_lzma'] = None; import ddpm_jax.files"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_all_json_is_read_by_one_function():
    """But for what goes through JSON in memory, to have its lists and strings."""
    for path in (ROOT / "ddpm_jax").rglob("*.py"):
        if path.name != "files.py" or path.parent.name != "ddpm_jax":
            for line in path.read_text().splitlines():
                assert "json.load(" not in line, path
                assert "json.loads(" not in line or "json.loads(json.dumps(" in line, (path, line)
