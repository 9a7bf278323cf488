"""The jobs of code_images: a file goes out and comes back, and what is missing is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddpm_jax import images
from ddpm_jax.build import init_params
from ddpm_jax.cli import code_images, flags
from ddpm_jax.coding import jobs
from ddpm_jax.coding.container import Coded, Settings
from ddpm_jax.coding.files import decompress, identity
from ddpm_jax.coding.jobs import CodingOptions, code, measure, read_images
from ddpm_jax.coding.progressive import Received
from ddpm_jax.diffusion.bound import RateDistortion
from ddpm_jax.errors import CodingError
from ddpm_jax.evaluation.nll import Estimate, Protocol
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


def of_file(path: Path) -> CodingOptions:
    return CodingOptions("encode", images=path, output=path)


@pytest.mark.parametrize("method", ["lossless", "progressive"])
def test_images_go_out_and_come_back(trained: Trained, method: str, tmp_path: Path, capsys) -> None:
    devices, file = Devices(jax.devices()[:1]), tmp_path / "images.ddpm"
    encoding = CodingOptions("encode", num_images=3, output=file, method=method, lanes=4)
    code(trained, tmp_path, devices, encoding)
    back = tmp_path / "back.npz"
    code(trained, tmp_path, devices, CodingOptions("decode", input=file, output=back))
    levels = read_images(trained, of_file(back))
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
    """Of one image it is not known; a NaN would lose the record after all the work.

    The bound is that of the model that codes.
    """
    bound, asked = SimpleNamespace(total=Estimate.of(np.array([3.5])), images=1), []
    monkeypatch.setattr(
        jobs, "evaluate_nll", lambda *_, **options: asked.append(options["protocol"]) or bound
    )
    model = {"clip": False, "cdf": "erf", "seed": 3}
    options = CodingOptions("measure", num_images=1, lanes=4, **model)
    measure(trained, tmp_path, Devices(jax.devices()[:1]), options)
    (record,) = read_evaluations(tmp_path)
    assert asked == [Protocol(**model)] and record["settings"] | model == record["settings"]
    assert record["num_images"] == 1 and record["bound"] == 3.5 and record["coded"] > 0
    assert "bound_standard_error" not in record
    assert "nan" not in capsys.readouterr().out.lower()


def test_sizes_are_in_bits_for_each_dimension(capsys) -> None:
    """12 bytes of two images of 48 dimensions, and the 240 bits that a lossless file nets."""
    levels = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    bound = SimpleNamespace(total=Estimate.of(np.array([1.9, 2.1])), images=2)
    progressive = Coded({"settings": {"method": "progressive"}}, [bytes(5), bytes(7)])
    found = jobs.print_sizes(progressive, levels, bound)
    assert found == pytest.approx({"coded": 1.0, "over_bound": -0.5})
    lossless = {"settings": {"method": "lossless"}, "net_bits": 240, "initial_bits": 48}
    found = jobs.print_sizes(Coded(lossless, [bytes(5)]), levels, bound)
    assert found == pytest.approx({"coded": 2.5, "initial": 0.5, "over_bound": 0.25})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["coded", "12", "1.0000", "0.5000"] in rows
    assert ["not", "coded", "96", "8.0000", "4.0000"] in rows


def test_points_are_in_levels_beside_the_curve_at_as_many(monkeypatch) -> None:
    """A tenth of [-1, 1]'s half is 12.75 levels, and the curve has a rate between its own there."""
    levels = np.full((2, 4, 4, 3), 100, np.uint8)
    x0 = images.from_uint8(levels)
    steps = [
        (slice(0, 2), Received(t=t, bits=bits, x0=x0 + error, x=x0))
        for t, bits, error in ((19, 0, 0.1), (0, 96, 0.02))
    ]
    monkeypatch.setattr(jobs, "receive", lambda *_: steps)
    curve = RateDistortion(np.arange(3.0), np.array([0.0, 1.0, 3.0]), np.array([20.0, 10.0, 2.0]))
    first, last = jobs.print_points(None, None, levels, curve)
    assert first == pytest.approx({"rate": 0, "rmse": 12.75, "curve_rate": 0.725}, rel=1e-5)
    assert last == pytest.approx({"rate": 1, "rmse": 2.55, "curve_rate": 2.8625}, rel=1e-5)


def test_points_are_those_of_all_groups_read_once(monkeypatch) -> None:
    """Each group stops at the rate for itself: 2 of 3 images after 96 bits, the third after 24."""
    levels = np.full((3, 4, 4, 3), 100, np.uint8)
    x0 = images.from_uint8(levels)
    steps = [
        (rows, Received(t=t, bits=bits, x0=x0[rows] + error, x=x0[rows]))
        for rows, t, bits, error in (
            (slice(0, 2), 19, 0, 0.1),
            (slice(0, 2), 0, 96, 0.02),
            (slice(2, 3), 19, 0, 0.3),
            (slice(2, 3), 5, 24, 0.2),
            (slice(2, 3), 0, 72, 0.01),
        )
    ]
    monkeypatch.setattr(jobs, "receive", lambda *_: iter(steps))
    curve = RateDistortion(np.arange(2.0), np.array([0.0, 1.0]), np.array([40.0, 1.0]))
    points = jobs.print_points(None, None, levels, curve)
    expected = {  # the mean square of three images, at what they stop at
        0: (0.1, 0.1, 0.3),
        24 / 144: (0.1, 0.1, 0.2),
        120 / 144: (0.02, 0.02, 0.2),
        168 / 144: (0.02, 0.02, 0.01),
    }
    assert [point["rate"] for point in points] == pytest.approx(list(expected))
    for point, errors in zip(points, expected.values()):
        assert point["rmse"] == pytest.approx(127.5 * np.sqrt(np.mean(np.square(errors))), rel=1e-5)


@pytest.mark.parametrize(
    "method, count, group",
    [("progressive", 179, 179), ("progressive", 10_000, 200), ("lossless", 179, 20)],
)
def test_images_of_a_group_are_limited(method: str, count: int, group: int) -> None:
    """A progressive step of 10,000 images of CIFAR-10 would be one of 600,000 bits."""
    assert CodingOptions("measure", method=method).settings(count).group == group


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
        (
            {"mode": "measure", "images": Path("mine.npz")},
            "images=mine.npz: of no use with mode=measure, only with mode=encode",
        ),
        ({"mode": "measure", "rate": 0.5}, "rate=0.5: of no use with mode=measure, only with mode"),
        ({"mode": "encode", "output": Path("x"), "rate": 0.5}, "rate=0.5: of no use with mode=enc"),
        ({"mode": "measure", "method": "zip"}, "method=zip: one of lossless, progressive"),
        ({"mode": "measure", "group": 0}, "group=0: must be at least 1"),
        ({"mode": "measure", "cdf": "logistic"}, "cdf=logistic: one of tanh, erf"),
    ],
)
def test_what_cannot_be_coded_is_named(options: dict, message: str) -> None:
    with pytest.raises(CodingError, match=message):
        CodingOptions(**options)


def test_files_without_images_are_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CodingError, match="images=.*none.npz: no such file"):
        read_images(trained, of_file(tmp_path / "none.npz"))
    (tmp_path / "bad.npz").write_bytes(b"bad")
    with pytest.raises(CodingError, match="images=.*bad.npz is damaged .*: name an .npz with"):
        read_images(trained, of_file(tmp_path / "bad.npz"))
    np.savez(tmp_path / "other.npz", samples=np.zeros(3))
    with pytest.raises(CodingError, match="other.npz has no array arr_0, only samples: name an"):
        read_images(trained, of_file(tmp_path / "other.npz"))
