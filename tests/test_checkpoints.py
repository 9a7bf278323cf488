"""Run directories: whole or absent, on any number of devices, and honest about what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ddpm_jax.checkpoints import Checkpoints, WorkdirError, claim_workdir, load_workdir_config, sole_trainer
from ddpm_jax.devices import Devices


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"params": {"kernel": rng.normal(size=(40, 30)).astype(np.float32)}, "step": np.int32(seed)}


def like(devices: Devices) -> dict:
    return devices.abstract_replicated(jax.eval_shape(lambda: tree(0)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run directory with checkpoints 10, 20 and 30, written from eight devices."""
    workdir, devices = tmp_path_factory.mktemp("run"), Devices()
    with Checkpoints(workdir) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, devices.replicate(tree(step)))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_what_eight_devices_saved_any_number_reads(saved, devices):
    place = Devices(jax.devices()[:devices])
    with Checkpoints.reading(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        newest, older = checkpoints.restore(like(place)), checkpoints.restore(like(place), 10)
    for got, step in ((newest, 30), (older, 10)):
        jax.tree.map(np.testing.assert_array_equal, got, tree(step))
    assert len(newest["params"]["kernel"].sharding.device_set) == devices


def test_a_damaged_checkpoint_is_named_with_the_way_round_it(workdir):
    for path in sorted((workdir / "checkpoints" / "30").rglob("*")):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    with Checkpoints.reading(workdir) as checkpoints:
        with pytest.raises(WorkdirError, match="checkpoint 30 .* cannot be read .* with --step=20") as caught:
            checkpoints.restore(like(Devices()))
        assert "\n" not in str(caught.value)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(like(Devices()), 20), tree(20))
        assert checkpoints.steps() == [10, 20, 30]  # nothing was deleted


def test_going_on_from_an_older_one_sets_the_newer_aside(workdir):
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.set_aside_after(10) == [20, 30]
        assert checkpoints.steps() == [10]
        checkpoints.save(20, Devices().replicate(tree(99)))
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(like(Devices()))["step"]) == 99
    assert sorted(path.name for path in (workdir / "checkpoints.aside").iterdir()) == ["20", "30"]


def test_a_save_that_was_cut_off_is_no_checkpoint(workdir):
    half = workdir / "checkpoints" / "40.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "30", half)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        assert int(checkpoints.restore(like(Devices()))["step"]) == 30
    assert not half.exists()


def test_a_full_disk_is_told_before_anything_is_written(workdir, monkeypatch):
    with Checkpoints(workdir) as checkpoints:
        usage = type(shutil.disk_usage(workdir))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
        with pytest.raises(WorkdirError, match=r"takes 1.0 MB, 0.1 MB are free .* last good checkpoint is 30: make room"):
            checkpoints.save(40, tree(40))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]


def test_the_newest_and_every_kth_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in range(5, 61, 5):
            checkpoints.save(step, tree(step))
            checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 55, 60]


def test_missing_checkpoints_are_named(workdir, tmp_path):
    with Checkpoints.reading(workdir) as checkpoints, pytest.raises(WorkdirError, match="no checkpoint of step 7.*10, 20, 30"):
        checkpoints.restore(like(Devices()), 7)
    with pytest.raises(WorkdirError, match="no checkpoint yet"):
        Checkpoints.reading(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_workdir_keeps_its_config(tmp_path):
    config = tiny_config()
    claim_workdir(tmp_path / "run", config)
    assert load_workdir_config(tmp_path / "run") == config
    longer = tiny_config(train={"steps": 99})
    claim_workdir(tmp_path / "run", longer)
    assert load_workdir_config(tmp_path / "run") == longer
    with pytest.raises(WorkdirError, match=r"another config \(optimizer.learning_rate: 0.001 -> 0.5\): take another --workdir"):
        claim_workdir(tmp_path / "run", tiny_config(optimizer={"learning_rate": 0.5}))
    assert load_workdir_config(tmp_path / "run") == longer


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(WorkdirError, match="it has no config.json; make one with scripts/train.py"):
        load_workdir_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(WorkdirError, match="config.json is damaged"):
        load_workdir_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"sead": 1}))
    with pytest.raises(ValueError, match="no field 'sead': did you mean seed"):
        load_workdir_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WorkdirError, match="has checkpoints but no config.json"):
        claim_workdir(tmp_path, tiny_config())


def test_two_runs_cannot_share_a_workdir(tmp_path):
    with sole_trainer(tmp_path):
        with pytest.raises(WorkdirError, match="another process is training there"), sole_trainer(tmp_path):
            pass
    with sole_trainer(tmp_path):  # free again
        pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match="cannot be written"):
        claim_workdir(tmp_path / "file" / "run", tiny_config())
