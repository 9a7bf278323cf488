"""The jobs of code_images: a file goes out and comes back, and what is missing is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddpm_jax.build import init_params
from ddpm_jax.cli import code_images, flags
from ddpm_jax.coding import jobs
from ddpm_jax.coding.container import Coded, Settings
from ddpm_jax.coding.files import decompress, identity
from ddpm_jax.coding.jobs import CodingOptions, code, measure, read_images
from ddpm_jax.errors import CodingError
from ddpm_jax.evaluation.nll import Estimate
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.trained import Trained
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def trained() -> Trained:
    config = tiny_config(diffusion={"timesteps": 20, "beta_end": 0.3})
    return Trained(config, init_params(config), "raw", 0)


def test_defaults_are_those_of_the_flags() -> None:
    command = ["--workdir=x", "--mode=measure"]
    parsed = code_images.parser().parse_args(command)
    given = {"clip": parsed.clip == "true", "data_dir": Path("data")}  # the run's, where it has one
    assert flags.fill(CodingOptions, parsed, **given) == CodingOptions("measure")


@pytest.mark.parametrize("method", ["lossless", "progressive"])
def test_images_go_out_and_come_back(trained: Trained, method: str, tmp_path: Path, capsys) -> None:
    devices, file = Devices(jax.devices()[:1]), tmp_path / "images.ddpm"
    encoding = CodingOptions("encode", num_images=3, output=file, method=method, lanes=4)
    code(trained, tmp_path, devices, encoding)
    back = tmp_path / "back.npz"
    code(trained, tmp_path, devices, CodingOptions("decode", input=file, output=back))
    levels = read_images(trained, CodingOptions("measure", images=back))
    np.testing.assert_array_equal(levels, read_images(trained, encoding))
    told = capsys.readouterr().out
    assert f"wrote {file}: 3 images" in told and f"wrote {back}: 3 images, bit for bit" in told
    if method == "progressive":
        lossy = CodingOptions("decode", input=file, output=tmp_path / "lossy.png", rate=0.5)
        code(trained, tmp_path, devices, lossy)
        assert "3 images, lossy, from 0." in capsys.readouterr().out


def test_a_measurement_is_recorded_with_its_settings(trained: Trained, tmp_path: Path) -> None:
    devices = Devices(jax.devices()[:1])
    measure(
        trained, tmp_path, devices, CodingOptions("measure", num_images=2, method="progressive")
    )
    (record,) = read_evaluations(tmp_path)
    assert record["metric"] == "coding" and record["num_images"] == 2
    assert record["settings"]["group"] == 2 and record["settings"]["method"] == "progressive"
    assert record["coded"] == pytest.approx((1 + record["over_bound"]) * record["bound"])
    assert [point["rate"] for point in record["points"]][0] == 0


def test_one_image_is_measured_without_an_error_of_the_bound(
    trained: Trained, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Of one image it is not known; a NaN would lose the record after all the work."""
    bound = SimpleNamespace(total=Estimate.of(np.array([3.5])), images=1)
    monkeypatch.setattr(jobs, "evaluate_nll", lambda *arguments, **options: bound)
    options = CodingOptions("measure", num_images=1, lanes=4)
    measure(trained, tmp_path, Devices(jax.devices()[:1]), options)
    (record,) = read_evaluations(tmp_path)
    assert record["num_images"] == 1 and record["bound"] == 3.5 and record["coded"] > 0
    assert "bound_standard_error" not in record
    assert "nan" not in capsys.readouterr().out.lower()


def test_a_file_of_other_images_or_of_no_known_network_is_refused(trained: Trained) -> None:
    settings = asdict(Settings(lanes=1))
    header = {"shape": [1, 16, 8, 1], "settings": settings, "borrowed": 0}
    sections = [bytes(8), b""]
    with pytest.raises(CodingError, match=r"images of \[16, 8, 1\], this run's are \[8, 8, 1\]"):
        decompress(trained, Coded(header | {"model": identity(trained)}, sections))
    with pytest.raises(CodingError, match="coded with weights None, not 'raw': decode with the"):
        decompress(trained, Coded(header | {"model": {}}, sections))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "print"}, "mode=print: one of encode, decode, measure"),
        ({"mode": "encode"}, "mode=encode needs output=FILE"),
        ({"mode": "decode", "output": Path("x.png")}, "mode=decode needs input=FILE"),
        ({"mode": "decode", "input": Path("x"), "output": Path("x.gif")}, "must end in .npz"),
        ({"mode": "measure", "num_images": 0}, "num_images=0: must be at least 1"),
        ({"mode": "measure", "seed": -1}, "seed=-1: must be in"),
        ({"mode": "measure", "rate": -1.0}, "rate=-1.0: must be at least 0"),
    ],
)
def test_what_cannot_be_coded_is_named(options: dict, message: str) -> None:
    with pytest.raises(CodingError, match=message):
        CodingOptions(**options)


def test_files_without_images_are_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CodingError, match="images=.*none.npz: no such file"):
        read_images(trained, CodingOptions("measure", images=tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"bad")
    with pytest.raises(CodingError, match="images=.*bad.npz is damaged .*: name an .npz with"):
        read_images(trained, CodingOptions("measure", images=tmp_path / "bad.npz"))
    np.savez(tmp_path / "other.npz", samples=np.zeros(3))
    with pytest.raises(CodingError, match="other.npz has no array arr_0, only samples: name an"):
        read_images(trained, CodingOptions("measure", images=tmp_path / "other.npz"))
