"""Students are run directories: trained in turn, resumed to the bit, sampled in their own steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.build import build_process
from ddpm_jax.config import Config
from ddpm_jax.distillation import stages
from ddpm_jax.distillation.stages import check_steps, distill, stage, student_config
from ddpm_jax.errors import ConfigError, UserError, WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.workdir import load_workdir_config
from ddpm_jax.training import loop
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
        assert (config.sampling.sampler, config.sampling.spacing) == ("ddim", "trailing")
        assert config.model.dropout == 0 < teacher[0].model.dropout
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


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one"])
def test_the_loss_is_that_of_two_steps_of_the_teacher(weighting):
    """At the noise of the student's step, with the labels. The teacher sees a tenth of the class."""
    process = {"timesteps": 20, "schedule": "cosine", "prediction": "x0"}
    config = tiny_config(diffusion=process, model={"num_classes": 10})
    config.distillation.steps, config.distillation.weighting = 5, weighting
    ab = build_process(config).schedule.alphas_cumprod[3::4]  # of the timesteps it ever sees
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 5, 8, 8, 1)).astype(np.float32)
    labels, seen = np.arange(5), {}

    def bind(params, labels):
        x0_hat = params * labels[:, None, None, None].astype(jnp.float32)
        return lambda x, t: jnp.broadcast_to(x0_hat, x.shape)

    def student(z, t):
        seen.update(z=np.asarray(z), t=np.asarray(t))
        return jnp.zeros_like(z)

    with mock.patch.object(stages, "denoiser", lambda config: bind):
        loss = stages.student_objective(config)
        steps = np.arange(5)
        got = loss(student, x0, steps, eps, jnp.asarray(labels), jnp.float32(0.3))["loss"]
    np.testing.assert_array_equal(seen["t"], [3, 7, 11, 15, 19])
    a, s = (np.sqrt(v)[:, None, None, None] for v in (ab, 1 - ab))
    np.testing.assert_allclose(seen["z"], a * x0 + s * eps, atol=1e-5)
    target, ratio = np.minimum(0.3 * labels, 1), ab / (1 - ab)  # its sampler clips
    weight = {"truncated_snr": np.maximum(ratio, 1), "snr_plus_one": ratio + 1}[weighting]
    np.testing.assert_allclose(got, weight * target**2, rtol=2e-4, atol=1e-9)


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


def test_a_student_learns_from_the_checkpoint_that_it_starts_from(teacher, tmp_path):
    """The teacher saves a newer one between the choice and the step that learns from it."""
    run = tmp_path / "teacher"
    shutil.copytree(teacher[1], run)
    opened = []

    def start_from(*arguments) -> None:
        shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "4")

    def open_trained(where, devices, *, step) -> None:
        opened.append((where, step))
        raise WorkdirError("enough was seen")

    with (
        mock.patch.object(loop, "start_from", start_from),
        mock.patch.object(stages, "open_trained", open_trained),
        pytest.raises(WorkdirError, match="enough was seen"),
    ):
        halve(run, tmp_path / "run", [4])
    assert opened == [(run.resolve(), 2)]


def test_images_from_python_are_named_anew_for_a_student(teacher, tmp_path):
    shutil.copy(teacher[1] / "config.json", tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({"train": "40 images, abc"}))
    with pytest.raises(UserError, match=f"^teacher={tmp_path}: it was given its images from Pyth"):
        halve(tmp_path, tmp_path / "run", [4])
    assert student_config(tmp_path, 4, ["data.name=digits"]).data.name == "digits"
    (tmp_path / "data.json").write_text(json.dumps({"train": "40 images, abc", "data_dir": "x"}))
    student_config(tmp_path, 4, [])


def test_students_on_the_way_lie_beside_the_last(tmp_path, monkeypatch):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert stage(Path("faces_4"), 8) == Path("faces_4.stages/8")
    assert stage(Path("."), 8) == tmp_path.resolve() / "run.stages" / "8"
    assert stage(Path("deep/.."), 8) == tmp_path.resolve() / "run.stages" / "8"


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
    for field, said in (
        ("diffusion.prediction=x0", "prediction: 'v' -> 'x0'"),
        ("diffusion.schedule=linear", "schedule: 'cosine' -> 'linear'"),
        ("model.timestep_scale=4", "timestep_scale: 1.0 -> 4.0"),
    ):
        with pytest.raises(ConfigError, match=f"{said}: a student has that of its teacher"):
            student_config(teacher[1], 4, [field])
    with pytest.raises(ConfigError, match="prediction=mu: a student predicts x0, v or eps"):
        student_config(teacher[1], 4, ["diffusion.prediction=mu"])
