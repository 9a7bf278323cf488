"""Small files of weights that claim to be large ones, and files that are no files."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights import files
from tests.support.torch_files import Global, write_torch


class Call:
    """Pickles as the call of a global."""

    def __init__(self, function: Global, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_that_repeat_one_number_are_not_written_out(legacy, tmp_path):
    path = tmp_path / "model.pt"
    write_torch(path, {"w": np.ones(1, np.float32)}, legacy=legacy)
    raw = path.read_bytes()
    if legacy:
        path.write_bytes(spoil(raw))
    else:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, blob in members.items():
                archive.writestr(name, spoil(blob) if name.endswith("data.pkl") else blob)
    assert path.stat().st_size < 2000
    with pytest.raises(WeightsError, match="bytes that claim 8,589,934,588 of tensors"):
        files.read(path)


def spoil(blob: bytes) -> bytes:
    """Put the shape (2**31 - 1,) and the stride (0,) in the place of (1,) and (1,)."""
    one = b"K\x01\x85"  # the tuple (1,), memorised behind it
    start = blob.index(one)
    shape = b"J\xff\xff\xff\x7f\x85"
    rest = blob[start + len(one) :]
    assert one in rest or b"h" in rest
    stride = rest.replace(one, b"K\x00\x85", 1)
    return blob[:start] + shape + stride


def test_dicts_that_hold_each_other_are_counted(tmp_path):
    """Sixty lines of a pickle are 2^60 items."""
    contents: list = []
    for _ in range(60):
        contents = [contents, contents]
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(contents, 2))
    with pytest.raises(WeightsError, match="more than 1,000,000 items"):
        files.read(tmp_path / "model.pt")
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(deep, 2))
    with pytest.raises(WeightsError, match="more than 100 levels"):
        files.read(tmp_path / "model.pt")


def test_members_that_unfold_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
    with pytest.raises(WeightsError, match="that unfold to 134,217,728"):
        files.read(tmp_path / "model.pt")


def test_a_legacy_file_does_not_ask_for_more_bytes_than_it_has(tmp_path):
    path = write_torch(tmp_path / "model.pt", {"w": np.ones(3, np.float32)}, legacy=True)
    count = (3).to_bytes(8, "little")
    blob = path.read_bytes()
    at = blob.rindex(count)
    path.write_bytes(blob[:at] + (2**40).to_bytes(8, "little") + blob[at + 8 :])
    with pytest.raises(WeightsError, match="bytes of numbers in a file of"):
        files.read(path)


def test_an_npz_that_claims_more_than_it_holds(tmp_path):
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    head += b" " * (117 - len(head)) + b"\n"
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00v\x00" + head + bytes(64))
    with pytest.raises(WeightsError, match="array w of shape"):
        files.read(tmp_path / "model.npz")


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("model.pt", "model.npz", "model.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(WeightsError, match="no such file"):
            files.read(tmp_path / name)


def test_settings_beside_weights_are_passed_over(tmp_path):
    """Lightning's hyper-parameters: dicts of its own class, a namespace, a path, OmegaConf."""
    state = {"lr": 1e-4}
    attributes = Call(Global("pytorch_lightning.utilities.parsing", "AttributeDict"), state=state)
    contents = {
        "state_dict": {"w": np.ones(2, np.float32)},
        "hyper_parameters": attributes,
        "args": Call(Global("argparse", "Namespace"), state=state),
        "root": Call(Global("pathlib", "PosixPath"), "/", "data"),
        "config": Call(Global("omegaconf.dictconfig", "DictConfig"), state={"_content": {}}),
        "epoch": 3,
    }
    loaded = files.read(write_torch(tmp_path / "model.ckpt", contents)).contents
    assert loaded["state_dict"]["w"].tolist() == [1, 1] and loaded["epoch"] == 3
