"""Which fields of a config may change when a run goes on, and that all others may not."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from ddpm_jax.config import Config, to_dict
from ddpm_jax.errors import WorkdirError
from ddpm_jax.runs.workdir import claim_workdir, with_full_path
from tests.support.tiny import tiny_config

# None of these has a part in what a training step computes, but for rounding.
FREE = {
    "model.remat",
    "train.accumulation",
    "data.in_memory",
    "data.skip_bad",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_images",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.sample_every",
    "train.sample_images",
    "train.max_nonfinite_steps",
}


def changed(value: typing.Any) -> typing.Any:
    """Return another value of the same type; no run is made of it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + type(value)(1)
    return value + value[:1] if value else value + type(value)("1")


def fields(holder: typing.Any, prefix: str = "") -> typing.Iterator[str]:
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        inner = dataclasses.is_dataclass(value)
        yield from fields(value, f"{prefix}{field.name}.") if inner else [prefix + field.name]


def with_other(path: str) -> Config:
    config = Config()
    *sections, name = path.split(".")
    holder = config
    for section in sections:
        holder = getattr(holder, section)
    setattr(holder, name, changed(getattr(holder, name)))
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    claim_workdir(workdir, Config())
    return workdir


@pytest.mark.parametrize("path", list(fields(Config())))
def test_a_run_goes_on_with_the_fields_that_its_steps_do_not_see(workdir: Path, path: str) -> None:
    config = with_other(path)
    assert to_dict(config) != to_dict(Config())
    before = (workdir / "config.json").read_text()
    if path in FREE or path.startswith("sampling."):
        claim_workdir(workdir, config)
        (workdir / "config.json").write_text(before)
    else:
        with pytest.raises(WorkdirError, match=f"another config .{path}: "):
            claim_workdir(workdir, config)
        assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize("name", ["clip", "steps", "eta"])
def test_a_student_goes_on_with_the_clip_that_its_loss_reads(tmp_path: Path, name: str) -> None:
    config = Config()
    config.distillation.steps, config.distillation.teacher = 4, "runs/teacher"
    claim_workdir(tmp_path, config)
    setattr(config.sampling, name, changed(getattr(config.sampling, name)))
    if name != "clip":
        claim_workdir(tmp_path, config)
        return
    with pytest.raises(WorkdirError, match="another config .sampling.clip: True -> False"):
        claim_workdir(tmp_path, config)


def test_the_path_of_images_is_that_of_the_disk(tmp_path, monkeypatch):
    """link/.. is the folder above what the link leads to; a link by itself stays one."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, place in {
        "photos": "here/photos",
        "./photos": "here/photos",
        "../here/photos": "here/photos",
        "link": "here/link",
        "link/../photos": "far/photos",
        "~/far": "far",
    }.items():
        config = tiny_config(data={"name": "folder", "path": name})
        assert with_full_path(config).data.path == str(tmp_path / place)
