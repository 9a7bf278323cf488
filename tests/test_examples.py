"""The examples run, and what they draw is what they say."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax.images import load_png
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import claim_workdir
from ddpm_jax.training.state import init_state
from tests.support.inception import save_layers
from tests.support.layers import ROOT
from tests.support.tiny import tiny_config

SHORT = ["train.steps=1", "train.batch_size=8", "train.eval_images=0"]
SMALL = ["model.base_channels=8", "model.channel_mult=(1,)", "model.attention_resolutions=()"]


def run_example(monkeypatch, name: str, *arguments: object) -> dict[str, object]:
    path = ROOT / "examples" / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    monkeypatch.setattr(ddpm, "tune_cpu", list)  # the process is that of the tests
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
def test_the_sampler_on_one_screen_draws_a_grid(tmp_path, monkeypatch, compiled_in_full):
    path = ROOT / "examples" / "sampler_on_one_screen.py"
    assert len(path.read_text().splitlines()) <= 40
    few = functools.partial(ddpm.ancestral_table, steps=100)  # the network was trained for 1000
    monkeypatch.setattr(ddpm, "ancestral_table", few)
    run_example(monkeypatch, path.name, tmp_path / "digits.png")
    grid = load_png(tmp_path / "digits.png")
    assert grid.shape == (526, 526, 1)  # 8 x 8 pictures of 64 pixels, and gaps of 2
    inside = grid[2:66, 2:66]
    assert inside.max() > 150 and inside.min() < 60  # ink on paper, not noise around grey


@pytest.mark.slow
def test_networks_of_ones_own_train(tmp_path, monkeypatch, capsys):
    names = run_example(monkeypatch, "own_network.py", tmp_path, *SHORT)
    for name in ("linen", "nnx", "functions"):
        assert load_png(tmp_path / f"{name}.png").shape == (526, 526, 1)
        assert (tmp_path / name / "own_network.txt").exists()
    assert names["model"].params["kernel"].shape == (64, 64)
    assert capsys.readouterr().out.count("bits/dim") == 3


@pytest.mark.slow
def test_data_of_ones_own_train(tmp_path, monkeypatch):
    names = run_example(monkeypatch, "own_data.py", tmp_path, *SHORT, *SMALL)
    picture = load_png(tmp_path / "shapes.png")
    assert picture.shape == (4 * 34 - 2, 16 * 34 - 2, 1)
    shown = names["ddpm"].grid(names["shapes"](0, 32), columns=16, scale=2)
    np.testing.assert_array_equal(picture[: len(shown)], shown)


def teacher_and_student(folder: Path, **sampling: object) -> list[Path]:
    """Save two networks that sample in two steps."""
    runs = [folder / "run", folder / "student"]
    for seed, run in enumerate(runs):
        config = tiny_config(
            diffusion={"timesteps": 60},
            sampling={"sampler": "ddim", "steps": 2, "spacing": "trailing"} | sampling,
        )
        config.seed = seed
        claim_workdir(run, config)
        with Checkpoints(run) as checkpoints:
            checkpoints.save(0, init_state(config))
    return runs


def lines(run: Path) -> list[bytes]:
    return (run / "evaluations.jsonl").read_bytes().splitlines()


def with_strangers_first(run: Path) -> None:
    """Put records of other settings before those of a run: none of them is what a row asks for."""
    strangers = []
    for record in read_evaluations(run):
        samples, reference = record["samples"], record["reference"]
        sampling, provenance = samples["sampling"], reference["provenance"]
        others = [{"weights": "raw"}, {"weights": "ema 0.99"}, {"resize": "half_pixel"}]
        others += [
            {"samples": samples | change}
            for change in (
                {"sampling": sampling | {"eta": 1.0}},
                {"sampling": sampling | {"clip": False}},
                {"seeds": [1]},
                {"guidance": 3.0},
            )
        ]
        of_test = provenance | {"images": provenance["images"] | {"split": "test"}}
        others.append({"reference": reference | {"provenance": of_test}})
        strangers += [record | other | {"value": 999.0} for other in others]
    text = b"".join(json.dumps(record).encode() + b"\n" for record in strangers)
    (run / "evaluations.jsonl").write_bytes(text + b"\n".join(lines(run)) + b"\n")


@pytest.mark.slow
def test_samplers_are_compared_once_each(tmp_path, monkeypatch, capsys):
    """Two samplers and a student, by Inception's first layers with random weights."""
    save_layers(tmp_path / "three.npz")
    runs = teacher_and_student(tmp_path, eta=0.5)  # which is ddim's, and no sampler's of a row
    flags = [
        runs[0],
        "--students",
        runs[1],
        "--samplers",
        "ddim",
        "unipc 2, trailing",
        "--steps=3,5",
    ]
    flags += ["--num_images=4", "--reference_images=4", "--features=64"]
    flags += [f"--inception={tmp_path / 'three.npz'}", f"--data_dir={tmp_path}"]
    flags += [f"--output={tmp_path / 'fid.png'}"]

    def rows_of_the_table() -> list[str]:
        run_example(monkeypatch, "fid_by_steps.py", *flags)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]

    printed = rows_of_the_table()
    ours, student = ([f"{r['value']:.3f}" for r in read_evaluations(run)] for run in runs)
    assert printed == [
        f"| ddim | {ours[0]} | {ours[2]} |",
        f"| unipc 2, trailing | {ours[1]} | {ours[3]} |",
        f"| student, 2 steps | {student[0]} |",
    ]
    assert load_png(tmp_path / "fid.png").ndim == 3
    assert rows_of_the_table() == printed
    assert [len(read_evaluations(run)) for run in runs] == [4, 1]  # nothing was measured again
    with_strangers_first(runs[0])
    assert rows_of_the_table() == printed
    assert len(read_evaluations(runs[0])) == 4 * 9
    (runs[0] / "evaluations.jsonl").write_bytes(b"\n".join(lines(runs[0])[-4:]) + b"\n")
    flags[flags.index("--reference_images=4")] = "--reference_images=5"
    flags[flags.index("--steps=3,5")] = "--steps=3"
    assert rows_of_the_table() != printed
    assert [len(read_evaluations(run)) for run in runs] == [6, 2]
    flags[flags.index("--reference_images=5")] = "--reference_images=5000"  # all there are
    printed = rows_of_the_table()
    assert rows_of_the_table() == printed
    assert [len(read_evaluations(run)) for run in runs] == [8, 3]


@pytest.mark.slow
def test_a_student_stands_below_its_teacher(tmp_path, monkeypatch, capsys):
    """The three rows begin from the same noise, and are those that the runs draw."""
    runs = teacher_and_student(tmp_path)
    flags = [f"--teacher={runs[0]}", f"--student={runs[1]}", "--num_images=3", "--scale=1"]
    run_example(monkeypatch, "compare_students.py", *flags, f"--output={tmp_path / 'rows.png'}")
    assert "50 steps, 2 steps, the student's 2 steps" in capsys.readouterr().out
    teacher, student = map(ddpm.load, runs)
    few = {"steps": 2, "sampler": "ddim", "spacing": "trailing"}
    drawn = [model.sample(3, seed=0, **few) for model in (teacher, student)]
    many = teacher.sample(3, seed=0, sampler="ddim", steps=50)
    picture = load_png(tmp_path / "rows.png")
    np.testing.assert_array_equal(picture, ddpm.grid(np.concatenate([many, *drawn]), columns=3))
