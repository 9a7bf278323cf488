"""Run directories: whole or absent, on any number of devices, and honest about what is damaged."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.errors import WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.storage import await_hash, check_written
from ddpm_jax.runs.workdir import claim_workdir, load_workdir_config, sole_trainer
from ddpm_jax.training.state import abstract_state, init_state
from tests.support.tiny import tiny_config


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": rng.normal(size=(40, 30)).astype(np.float32)},
        "step": np.int32(seed),
    }


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
        with pytest.raises(
            WorkdirError, match="checkpoint 30 .* cannot be read .* with step=20"
        ) as caught:
            checkpoints.restore(like(Devices()))
        assert "\n" not in str(caught.value)
        jax.tree.map(
            np.testing.assert_array_equal, checkpoints.restore(like(Devices()), 20), tree(20)
        )
        assert checkpoints.steps() == [10, 20, 30]  # nothing was deleted


PIECES = [
    "",
    "default",
    "default/manifest.ocdbt",
    "default/_METADATA",
    "default/d",
    "default/ocdbt.process_0",
    "_CHECKPOINT_METADATA",
]


@pytest.mark.parametrize("piece", PIECES)
def test_whatever_piece_is_missing_the_one_before_is_offered(workdir, piece):
    """A checkpoint without the piece is refused with a step that can be read, or is read whole."""
    path = workdir / "checkpoints" / "30" / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not piece:
        path.mkdir()  # a folder that was emptied
    with Checkpoints.reading(workdir) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        try:
            state, step = checkpoints.restore(like(Devices())), 30
        except WorkdirError as error:
            assert error.step == 20 and str(error).endswith("with step=20")
            state, step = checkpoints.restore(like(Devices()), error.step), 20
    assert step == 20 or piece not in ("", "default", "default/manifest.ocdbt")
    jax.tree.map(np.testing.assert_array_equal, state, tree(step))


def test_where_none_can_be_read_none_is_offered(workdir):
    for step in (10, 20, 30):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "default")
    with Checkpoints.reading(workdir) as checkpoints:
        with pytest.raises(WorkdirError, match="no other before it can be read") as caught:
            checkpoints.restore(like(Devices()))
        assert caught.value.step is None


@pytest.mark.parametrize("name", ["lr=[1e-4]", "a*b", "what?", "back\\slash", "plain"])
@pytest.mark.parametrize("depth", ["run", "parent/run"])
def test_a_path_that_cannot_be_read_back_is_refused_before_anything_is_written(
    tmp_path, name, depth
):
    workdir = tmp_path / depth.replace("parent", name) if "/" in depth else tmp_path / name
    if name == "plain":
        claim_workdir(workdir, tiny_config())
        return
    for use in (
        lambda: claim_workdir(workdir, tiny_config()),
        lambda: Checkpoints(workdir),
    ):
        with pytest.raises(WorkdirError, match="name another workdir") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_relative_path_is_judged_by_where_it_leads(tmp_path, monkeypatch):
    (tmp_path / "[x]").mkdir()
    monkeypatch.chdir(tmp_path / "[x]")
    with pytest.raises(WorkdirError, match=r"workdir=run: .* with \[ in it"):
        claim_workdir(Path("run"), tiny_config())
    (tmp_path / "moved" / "[y]" / "checkpoints").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="name another workdir"):
        Checkpoints.reading(tmp_path / "moved" / "[y]")


@pytest.mark.parametrize("harm", ["manifest", "array", "metadata"])
def test_no_checkpoint_goes_before_the_next_one_is_known_to_be_whole(tmp_path, monkeypatch, harm):
    """The next is damaged while it is written, in silence as the storage library once did it."""

    def damage(folder: Path, leaves: int | None = None) -> None:
        if folder.name.startswith("2.") and harm != "array":
            names = {"manifest": "manifest.ocdbt", "metadata": "_METADATA"}
            (folder / "default" / names[harm]).unlink()
        check_written(folder, leaves + 1 if harm == "array" and leaves else leaves)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tree(1))
        checkpoints.wait()
        monkeypatch.setattr("ddpm_jax.runs.checkpoints.check_written", damage)
        with pytest.raises(WorkdirError, match="its (manifest|metadata) .*good checkpoint is 1:"):
            checkpoints.save(2, tree(2))
            checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(like(Devices())), tree(1))
        checkpoints.save(2, tree(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_the_hash_may_come_after_the_arrays(tmp_path):
    """Orbax writes its metadata in a thread that a busy machine holds up."""
    path = tmp_path / "_CHECKPOINT_METADATA"
    path.write_text('{"custom_metadata": {}}')
    late = threading.Timer(0.2, path.write_text, ['{"custom_metadata": {"sha256": "0"}}'])
    late.start()
    await_hash(tmp_path)
    assert "sha256" in path.read_text()
    await_hash(tmp_path / "nowhere", seconds=0.05)


def test_files_that_the_storage_library_cannot_find_again_are_no_checkpoint(tmp_path, monkeypatch):
    """The fault that the refusal of such paths is about: found out at the save, not at the read."""
    monkeypatch.setattr("ddpm_jax.runs.checkpoints.check_path", lambda workdir: None)
    with Checkpoints(tmp_path / "[x]") as checkpoints:
        with pytest.raises(WorkdirError, match="lists 0 of 2 arrays.*there is no checkpoint yet"):
            checkpoints.save(1, tree(1))
            checkpoints.wait()


@pytest.mark.parametrize("through", ["dots", "link", "dots after a link"])
def test_a_run_may_be_named_in_a_roundabout_way(tmp_path, through):
    """The storage library takes no path with ".." in it; after a link, only the disk knows where it leads."""
    (tmp_path / "far" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "runs")
    (tmp_path / "code").mkdir()
    name, place = {
        "dots": ("code/../run", "run"),
        "link": ("link/run", "far/runs/run"),
        "dots after a link": ("link/../run", "far/run"),
    }[through]
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(1, tree(1))
    with Checkpoints.reading(tmp_path / place) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(like(Devices())), tree(1))


def test_no_good_checkpoint_is_named_where_none_is(workdir, monkeypatch):
    for step in (10, 20, 30):
        (workdir / "checkpoints" / str(step) / "default" / "manifest.ocdbt").unlink()
    with Checkpoints(workdir) as checkpoints:
        usage = type(shutil.disk_usage(workdir))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000, 50_000))
        with pytest.raises(WorkdirError, match="no checkpoint before it is known to be whole"):
            checkpoints.save(40, tree(40))


def test_the_best_step_is_that_of_the_lowest_held_out_loss_kept(tmp_path):
    """A better one that is no longer there does not count, nor one that was not measured."""
    losses = {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.6, 5: None}
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, tree(step), loss)
            checkpoints.wait()
    with Checkpoints.reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4, 5]
        assert checkpoints.best() == 3
        assert int(checkpoints.restore(like(Devices()), "best")["step"]) == 3
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with Checkpoints.reading(tmp_path) as checkpoints:
        assert checkpoints.best() == 4


def test_without_a_held_out_loss_there_is_no_best(workdir):
    with (
        Checkpoints.reading(workdir) as checkpoints,
        pytest.raises(WorkdirError, match="no checkpoint has a held-out loss.*10, 20, 30"),
    ):
        checkpoints.restore(like(Devices()), "best")


def test_going_on_from_an_older_one_sets_the_newer_aside(workdir):
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.set_aside_after(10) == [20, 30]
        assert checkpoints.steps() == [10]
        checkpoints.save(20, Devices().replicate(tree(99)))
    with Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(like(Devices()))["step"]) == 99
    assert sorted(path.name for path in (workdir / "checkpoints.aside").iterdir()) == ["20", "30"]


def test_what_was_set_aside_before_stays(workdir):
    """Three times back to step 10: three checkpoints 20, and none is lost."""
    for seed in (98, 99):
        with Checkpoints(workdir) as checkpoints:
            checkpoints.set_aside_after(10)
            checkpoints.save(20, Devices().replicate(tree(seed)))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.set_aside_after(10) == [20]
    aside = workdir / "checkpoints.aside"
    assert sorted(path.name for path in aside.iterdir()) == ["20", "20.1", "20.2", "30"]
    for name, seed in (("20", 20), ("20.1", 98), ("20.2", 99)):
        (aside / name).rename(workdir / "checkpoints" / "20")
        with Checkpoints.reading(workdir) as checkpoints:
            assert int(checkpoints.restore(like(Devices()))["step"]) == seed
        (workdir / "checkpoints" / "20").rename(aside / name)


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
        with pytest.raises(
            WorkdirError,
            match=r"takes 1.0 MB, 0.1 MB are free .* last good checkpoint is 30: make room",
        ):
            checkpoints.save(40, tree(40))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]


def test_what_failed_first_is_told_where_a_save_fails_too(workdir, monkeypatch):
    """A full disk is full for the metrics and for the checkpoint that is being written."""
    with pytest.raises(OSError, match="metrics"), Checkpoints(workdir) as checkpoints:
        close = checkpoints._manager.close
        monkeypatch.setattr(
            checkpoints._manager,
            "close",
            lambda: close() or [][0],  # IndexError
        )
        raise OSError("metrics")
    with pytest.raises(IndexError), Checkpoints(workdir) as checkpoints:
        close = checkpoints._manager.close
        monkeypatch.setattr(checkpoints._manager, "close", lambda: close() or [][0])


def test_a_deleted_folder_is_not_a_full_disk(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(WorkdirError, match="the folder was moved or deleted during") as caught:
            checkpoints.save(1, tree(1))
            checkpoints.wait()
    assert "make room" not in str(caught.value)


def test_an_edited_config_is_not_a_damaged_checkpoint(tmp_path):
    """Its network has other shapes, or other parts; the checkpoint is as it was saved."""
    config = tiny_config()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(init_state(config)))
    one = Devices(jax.devices()[:1])

    def asked(**sections):
        return one.abstract_replicated(abstract_state(tiny_config(**sections)))

    with Checkpoints.reading(tmp_path) as checkpoints:
        assert int(checkpoints.restore(asked()).step) == 0
        for sections, said in (
            ({"model": {"base_channels": 16}}, r"conv_in.bias is \[8\], and would be \[16\]"),
            ({"train": {"ema_decays": (0.9,)}}, r"ema.0.99.* is \[8\], and would be absent"),
            (
                {"model": {"num_classes": 3}},
                r"label_embedding is not there, and would be \[3, 32\]",
            ),
        ):
            with pytest.raises(WorkdirError, match=said) as caught:
                checkpoints.restore(asked(**sections))
            assert "another network than config.json" in str(caught.value)
            assert "cannot be read" not in str(caught.value) and caught.value.step is None


def test_the_newest_and_every_kth_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in range(5, 61, 5):
            checkpoints.save(step, tree(step))
            checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 55, 60]


def test_missing_checkpoints_are_named(workdir, tmp_path):
    with (
        Checkpoints.reading(workdir) as checkpoints,
        pytest.raises(WorkdirError, match="no checkpoint of step 7.*10, 20, 30"),
    ):
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
    with pytest.raises(
        WorkdirError,
        match=r"another config \(optimizer.learning_rate: 0.001 -> 0.5\): name another workdir",
    ):
        claim_workdir(tmp_path / "run", tiny_config(optimizer={"learning_rate": 0.5}))
    assert load_workdir_config(tmp_path / "run") == longer


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(WorkdirError, match="it has no config.json; make one with ddpm train"):
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
        with (
            pytest.raises(WorkdirError, match="another process is training there"),
            sole_trainer(tmp_path),
        ):
            pass
    with sole_trainer(tmp_path):  # free again
        pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkdirError, match="cannot be written"), sole_trainer(tmp_path / "file/x"):
        pass
    with pytest.raises(WorkdirError, match="cannot be written"):
        claim_workdir(tmp_path / "file" / "run", tiny_config())
