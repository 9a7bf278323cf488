"""Students are run directories: trained in turn, resumed to the bit, sampled in their own steps."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from ddpm_jax.config import Config
from ddpm_jax.distillation import stages
from ddpm_jax.distillation.stages import check_steps, distill, stage, student_config
from ddpm_jax.errors import ConfigError, UserError, WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.workdir import load_workdir_config
from ddpm_jax.training.loop import train
from ddpm_jax.training.origin import Origin
from tests.support.processes import assert_bit_equal, final_state, metrics
from tests.support.tiny import tiny_config

SHORT = ["train.steps=4", "optimizer.warmup_steps=0", "train.checkpoint_every=2"]


def halve(teacher: Path, workdir: Path, steps: list[int], *overrides: str) -> int:
    one = Devices(jax.devices()[:1])
    options = {"data_dir": workdir, "steps": steps, "devices": one}
    return distill(Origin(teacher), workdir, overrides=[*SHORT, *overrides], **options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Config, Path]:
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    process = {"timesteps": 20, "schedule": "cosine", "prediction": "v"}
    config = tiny_config(diffusion=process, train={"steps": 2, "eval_images": 0})
    train(config, workdir, data_dir=workdir, devices=Devices(jax.devices()[:1]))
    return config, workdir


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    """Of four steps and then of two."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    assert halve(teacher[1], workdir, [4, 2]) == 0
    return workdir


def test_students_are_runs_that_say_of_which_teacher(teacher, student):
    first = stage(student, 4)
    for workdir, steps, whose in ((first, 4, teacher[1]), (student, 2, first)):
        config = load_workdir_config(workdir)
        assert config.distillation.teacher == str(whose.resolve())
        assert (config.distillation.steps, config.sampling.steps) == (steps, steps)
        record = json.loads((workdir / "origin.json").read_text())
        assert record["run"] == str(whose.resolve()) and record["averaged"]
        own = final_state(load_workdir_config(whose), whose).ema["0.9"]
        begin = final_state(config, workdir, 0)
        assert_bit_equal(begin.params, own)
        assert int(begin.opt_state[1][0].count) == 0
        assert metrics(workdir)[-1]["skipped"] == 0


def test_an_interrupted_student_goes_on_to_the_bit(teacher, student, tmp_path):
    assert halve(teacher[1], tmp_path / "run", [4], "train.steps=2") == 0
    assert halve(teacher[1], tmp_path / "run", [4]) == 0
    first = stage(student, 4)
    config = load_workdir_config(first)
    assert_bit_equal(final_state(config, tmp_path / "run"), final_state(config, first))


def test_the_data_is_where_the_teacher_had_it(teacher, tmp_path, monkeypatch):
    """And where the student had it, once there is one."""
    _, run = teacher
    asked = []

    def seen(config, workdir, *, data_dir, **rest):
        asked.append(data_dir)
        return 143

    monkeypatch.setattr(stages, "train", seen)
    for folder in (None, tmp_path):
        assert distill(Origin(run), tmp_path / "new", data_dir=folder, steps=[4]) == 143
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_bytes((run / "config.json").read_bytes())
    (student / "data.json").write_text(json.dumps({"data_dir": str(tmp_path)}))
    assert distill(Origin(run), student, steps=[4]) == 143
    assert asked == [run, tmp_path, tmp_path]


def test_what_cannot_be_distilled_is_refused(teacher, student, tmp_path):
    with pytest.raises(ConfigError, match="distillation.steps=2: a student goes on with ddpm dis"):
        train(load_workdir_config(student), student, data_dir=student)
    with pytest.raises(UserError, match="steps=3: the teacher is a student of 2 steps"):
        check_steps(load_workdir_config(student), [3])
    with pytest.raises(UserError, match="steps=8,3: at least 1, and each half of the one before"):
        check_steps(teacher[0], [8, 3])
    assert check_steps(teacher[0], None) == [10]
    assert check_steps(tiny_config(sampling={"spacing": "sections:3,5"}), None) == [4]
    assert check_steps(load_workdir_config(student), None) == [1]
    with pytest.raises(ConfigError, match="steps=11: the teacher takes twice as many"):
        student_config(teacher[1], 11, [])
    with pytest.raises(WorkdirError, match="teacher=.*none: not a run directory"):
        halve(tmp_path / "none", tmp_path / "run", [2])
    with pytest.raises(ConfigError, match="prediction=mu: a student predicts x0, v or eps"):
        student_config(teacher[1], 4, ["diffusion.prediction=mu"])
