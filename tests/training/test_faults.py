"""Faults, injected one by one, and what docs/running.md says that happens then."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.cli import train as train_script
from ddpm_jax.cli.run import outcome
from ddpm_jax.config import Config
from ddpm_jax.data.batches import TrainBatches
from ddpm_jax.data.source import ArraySource
from ddpm_jax.errors import ConfigError, ShardError, WorkdirError
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.storage import WHOLE, content_hashes, quiet_storage_threads
from ddpm_jax.runs.workdir import claim_workdir, load_workdir_config
from ddpm_jax.sampling import shards
from ddpm_jax.trained import open_trained
from ddpm_jax.training import loop
from ddpm_jax.training.loop import train
from ddpm_jax.training.monitor import Diverged
from ddpm_jax.training.state import init_state
from tests.support.kill_runs import kill_runs, saving
from tests.support.processes import (
    assert_bit_equal,
    final_state,
    finish,
    metrics,
    metrics_seen,
    script,
    wait_for_step,
    wait_until,
    write_config,
)
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": rng.normal(size=(40, 30)).astype(np.float32)},
        "step": np.int32(seed),
    }


def like() -> dict:
    return Devices(jax.devices()[:1]).abstract_replicated(jax.eval_shape(lambda: tree(0)))


def two_checkpoints(workdir: Path) -> None:
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step))


def train_here(config: Config, workdir: Path, **options) -> int:
    return train(config, workdir, data_dir=workdir, devices=Devices(jax.devices()[:1]), **options)


# ------------------------------------------------------------------------------ damaged checkpoints


def restored_or_named(workdir: Path) -> bool:
    """Return whether the newest checkpoint is refused, in the documented words.

    If it is not, it must be what was saved, to the bit.
    """
    with Checkpoints.reading(workdir) as checkpoints:
        try:
            state = checkpoints.restore(like())
        except WorkdirError as error:
            assert re.search(
                r"checkpoint 2 in .* cannot be read \(.+\); go on from the one before with step=1",
                str(error),
            )
            assert "\n" not in str(error) and error.step == 1
            return True
    assert_bit_equal(state, tree(2))
    return False


def test_truncated_checkpoint_files_are_refused_or_harmless(tmp_path):
    two_checkpoints(tmp_path)
    files = [path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file()]
    refused = 0
    for path in files:
        whole = path.read_bytes()
        for length in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            refused += restored_or_named(tmp_path)
        path.write_bytes(whole)
    assert refused >= 10, refused
    assert not restored_or_named(tmp_path)


def test_bit_flips_in_checkpoints_are_refused_or_harmless(tmp_path):
    """Anywhere in any file.

    Most of the bytes are weights, and the format has no checksum for them.
    """
    two_checkpoints(tmp_path)
    files = [
        path
        for path in (tmp_path / "checkpoints" / "2").rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    rng, refused = np.random.default_rng(0), 0
    for path in files:
        whole = path.read_bytes()
        for position in rng.integers(0, len(whole), 3 if len(whole) < 2000 else 20):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            refused += restored_or_named(tmp_path)
        path.write_bytes(whole)
    assert refused >= 20, refused
    assert not restored_or_named(tmp_path)


def test_only_failures_of_the_storage_librarys_threads_are_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(failure.exc_type))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    quiet_storage_threads.__wrapped__()

    def in_a_closed_loop():
        loop = asyncio.new_event_loop()
        loop.close()
        loop.call_soon_threadsafe(print)

    def elsewhere():
        raise LookupError

    for fails in (in_a_closed_loop, elsewhere):
        thread = threading.Thread(target=fails)
        thread.start()
        thread.join()
    assert told == [LookupError]


def test_the_hash_covers_every_bit_name_type_and_shape():
    def content_hash(state) -> str:
        return content_hashes(state)[WHOLE]

    whole = content_hash(tree(1))
    assert whole == content_hash(jax.tree.map(jax.numpy.asarray, tree(1)))
    changed = tree(1)
    changed["params"]["kernel"].view(np.int32)[17, 3] ^= 1
    others = [changed, {"params": {"kernal": tree(1)["params"]["kernel"]}, "step": np.int32(1)}]
    others += [{**tree(1), "step": np.int64(1)}, {**tree(1), "step": np.array([1], np.int32)}]
    assert len({whole, *map(content_hash, others)}) == 1 + len(others)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported_with_the_command_that_goes_on(
    tmp_path, monkeypatch, capsys
):
    """The one before it is damaged too: the command names the newest that is whole, and works."""
    config = tiny_config(train={"eval_images": 0})
    workdir, flags = (
        tmp_path / "run",
        [f"--config={write_config(tmp_path, config)}", f"--workdir={tmp_path / 'run'}"],
    )
    monkeypatch.setattr(
        loop,
        "train",
        lambda config, workdir, **rest: train_here(config, workdir, step=rest["step"]),
    )

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *flags])
        return outcome(train_script.main), capsys.readouterr().err

    assert run(*flags)[0] == 0
    straight = final_state(config, workdir)
    for step in ("6", "4"):
        for path in (workdir / "checkpoints" / step).rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:500])
    code, said = run(*flags)
    command = shlex.join(["python", "scripts/train.py", *flags, "--step=2"])
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 1 and "checkpoint 6" in line and "Traceback" not in said
    assert line.endswith(f"{command} # once: then leave --step out")
    assert run(*shlex.split(command)[2:])[0] == 0
    assert_bit_equal(final_state(config, workdir), straight)
    assert sorted(path.name for path in (workdir / "checkpoints.aside").iterdir()) == ["4", "6"]


def test_looking_at_a_run_leaves_a_save_under_way_alone(tmp_path):
    two_checkpoints(tmp_path)
    half = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", half)
    with Checkpoints.reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    assert half.exists()


def test_the_best_by_held_out_loss_is_kept(tmp_path):
    """And known again after a restart.

    A checkpoint without a loss, or with one that is no number, is never the best.
    """
    losses = {1: 0.9, 2: 0.2, 3: 0.5, 4: None, 5: float("nan"), 6: 0.7, 7: 0.6}
    for part in ((1, 2, 3), (4, 5), (6, 7)):
        with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
            for step in part:
                checkpoints.save(step, tree(step), losses[step])
                checkpoints.wait()
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
        assert checkpoints.steps() == [2, 3, 7]
        assert checkpoints.best() == 2
    assert not saving(tmp_path)  # nothing half deleted is left


def test_a_run_keeps_its_best(tmp_path):
    fields = {
        "steps": 6,
        "eval_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "keep_best": 1,
    }
    config = tiny_config(train=fields)
    assert train_here(config, tmp_path / "run") == 0
    losses = {
        row["step"]: row["held_out_loss"]
        for row in metrics(tmp_path / "run")
        if "held_out_loss" in row
    }
    best = min(losses, key=losses.get)
    with Checkpoints.reading(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == sorted({best, 6}) and checkpoints.best() == best
    assert open_trained(tmp_path / "run", Devices(jax.devices()[:1]), step="best").step == best


def test_a_run_keeps_every_so_many(tmp_path):
    """And its newest: whatever else is written goes."""
    fields = {"steps": 5, "eval_images": 0, "checkpoint_every": 1, "keep_checkpoints": 1}
    config = tiny_config(train=fields | {"keep_every": 2})
    small = Network(lambda key: {"x": jnp.ones(())}, lambda params, x_t, *_: params["x"] * x_t)
    assert train_here(config, tmp_path / "run", network=small) == 0
    with Checkpoints.reading(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]


# ---------------------------------------------------------------------------------------------- NaN


def with_nan(monkeypatch, first: int, count: int) -> None:
    """Batches number first, first + 1, ... hold a pixel that is no number."""
    load = loop.load_splits

    def load_splits(*arguments):
        return [
            ArraySource(source.images.astype(np.float32), source.labels)
            for source in load(*arguments)
        ]

    class Broken(TrainBatches):
        def __call__(self, step):
            batch = super().__call__(step)
            if first <= step < first + count:
                batch["image"][3, 2, 1, 0] = np.nan
            return batch

    monkeypatch.setattr(loop, "load_splits", load_splits)
    monkeypatch.setattr(loop, "train_batches", Broken)


def test_a_nan_batch_is_skipped_and_counted(tmp_path, monkeypatch):
    config = tiny_config(train={"log_every": 1, "eval_images": 0, "max_nonfinite_steps": 3})
    with_nan(monkeypatch, 2, 2)
    assert train_here(config, tmp_path / "run") == 0
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 0, 1, 1, 0, 0]
    assert [row["nonfinite_streak"] for row in metrics(tmp_path / "run")] == [0, 0, 1, 2, 0, 0]
    state = final_state(config, tmp_path / "run")
    assert (int(state.step), int(state.updates)) == (6, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_nan_batches_that_persist_end_the_run(tmp_path, monkeypatch, capsys):
    fields = {
        "log_every": 1,
        "eval_images": 0,
        "max_nonfinite_steps": 3,
        "steps": 50,
        "checkpoint_every": 2,
    }
    config = tiny_config(train=fields)
    with_nan(monkeypatch, 3, 50)
    with pytest.raises(
        Diverged,
        match="3 steps in a row up to step 6 were not finite; checkpoint 4 is the last one",
    ):
        train_here(config, tmp_path / "run")
    state = final_state(config, tmp_path / "run")
    assert (int(state.step), int(state.updates)) == (4, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# -------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own in RAM; skips where one may not mount."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"mounting a small disk needs root on Linux: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_workdir_is_named_and_can_still_be_sampled_from(tmp_path):
    config = tiny_config(train={"eval_images": 0})
    with mounted(tmp_path / "disk", "size=8m") as disk:
        assert train_here(config, disk / "run") == 0
        before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            WorkdirError, match="^workdir=.*/run cannot be written: Read-only file system"
        ):
            train_here(tiny_config(train={"eval_images": 0, "steps": 8}), disk / "run")
        with pytest.raises(
            WorkdirError, match="^workdir=.*/new cannot be written: Read-only file system"
        ):
            train_here(config, disk / "new")
        assert int(final_state(config, disk / "run").step) == 6
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before


# Runs train.py with a disk_usage that promises any room: what happens when the disk fills up behind
# its back.
PROMISING = """
import shutil, runpy, sys
usage = type(shutil.disk_usage("/"))
shutil.disk_usage = lambda path: usage(2**50, 0, 2**50)
sys.argv = sys.argv[2:]  # after -c and the interpreter
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path, foreseen):
    """Seen before the write, and hit in the middle of it.

    The checkpoints before it stay whole, and room lets it go on.
    """
    config = tiny_config(
        train={
            "steps": 200,
            "checkpoint_every": 4,
            "log_every": 1,
            "eval_images": 0,
            "keep_every": 4,
        }
    )
    config_file = write_config(tmp_path, config)
    with mounted(tmp_path / "disk", "size=3m" if foreseen else "size=2m") as disk:
        flags = [f"--config={config_file}", f"--workdir={disk / 'run'}"]
        before = [] if foreseen else [sys.executable, "-c", PROMISING]
        code, _, said = finish(script("train.py", *flags, before=before))
        progress = r"step \d+/200|compiling the training step: \d+ s"  # the latter where it is slow
        errors = [line for line in said.splitlines() if not re.match(progress, line)]
        assert code == 1 and "Traceback" not in said
        what = r"it takes .* are free on this disk" if foreseen else "No space left on device"
        assert len(errors) == 1 and re.search(
            f"{what}.*(last good checkpoint is|could not be written)|{what}", errors[0]
        ), said
        with Checkpoints.reading(disk / "run") as checkpoints:
            steps = checkpoints.steps()
        assert steps
        for step in steps:
            assert int(final_state(config, disk / "run", step).step) == step
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        further = f"--config.train.steps={steps[-1] + 8}"
        code, out, said = finish(script("train.py", *flags, further, "--config.train.keep_every=0"))
        assert code == 0 and f"going on from step {steps[-1]}," in out, said


# ------------------------------------------------------------------------------------------ signals


def endless(tmp_path: Path, **train_fields) -> tuple[Config, Path, list[str]]:
    fields = {
        "steps": 100_000,
        "log_every": 1,
        "checkpoint_every": 100_000,
        "eval_images": 0,
    } | train_fields
    config = tiny_config(train=fields)
    return (
        config,
        tmp_path / "run",
        [f"--config={write_config(tmp_path, config)}", f"--workdir={tmp_path / 'run'}"],
    )


@pytest.mark.slow
def test_sigterm_while_compiling_ends_at_once_and_loses_nothing(tmp_path):
    """The cache of compiled programs is empty, so that the first step takes seconds to come."""
    config, workdir, flags = endless(tmp_path)
    process = script(
        "train.py", *flags, environment={"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    )
    wait_until(lambda: "parameters on" in process.stdout.readline(), process, "the start")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, _, said = finish(process, 20)
    assert code == -signal.SIGTERM and "Traceback" not in said
    assert metrics_seen(workdir / "metrics.jsonl") == 0
    with Checkpoints.reading(workdir) as checkpoints:
        assert checkpoints.steps() == []
    code, out, said = finish(script("train.py", *flags, "--config.train.steps=2"))
    assert code == 0 and "a new run" in out, said


@pytest.mark.slow
def test_sigterm_during_a_save_finishes_it_and_saves_the_last_step(tmp_path):
    config, workdir, flags = endless(tmp_path, checkpoint_every=3)
    process = script("train.py", *flags)
    wait_for_step(workdir, 5, process)
    wait_until(lambda: saving(workdir), process, "a save", every=0.0005)
    process.send_signal(signal.SIGTERM)
    code, _, said = finish(process)
    assert code == 143 and "Traceback" not in said
    last = metrics_seen(workdir / "metrics.jsonl")
    with Checkpoints.reading(workdir) as checkpoints:
        steps = checkpoints.steps()
    assert steps[-1] == last and steps[-2] == (last - 1) // 3 * 3
    for step in steps:
        assert int(final_state(config, workdir, step).step) == step
    assert not saving(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_sampling_keeps_the_blocks_that_are_done(tmp_path, number):
    config, workdir, _ = endless(tmp_path)
    claim_workdir(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, init_state(config))
    place = tmp_path / "samples.npz"
    flags = [f"--workdir={workdir}", f"--output={place}", "--batch_size=16", "--num_images=2000"]
    process = script("sample.py", *flags)
    parts = place.with_name("samples.npz.parts")
    wait_until(lambda: len(list(parts.glob("*.npy"))) >= 1, process, "a block")
    process.send_signal(number)
    code, _, said = finish(process, 60)
    assert code == (130 if number == signal.SIGINT else -signal.SIGTERM) and "Traceback" not in said
    done = {path: path.read_bytes() for path in parts.glob("*.npy")}
    assert not place.exists() and 1 <= len(done) < 4
    code, out, said = finish(script("sample.py", *flags))
    drawn, were_there = map(int, re.search(r"(\d+) drawn, (\d+) were there", out).groups())
    assert code == 0 and drawn + were_there == 2000 and were_there >= 512 * len(done), said
    samples = np.load(place)["arr_0"]
    assert samples.shape == (2000, 8, 8, 1) and not list(parts.glob("*.npy"))
    for path, content in done.items():
        first, last = map(int, path.stem.split("-"))
        block = np.load(io.BytesIO(content))
        np.testing.assert_array_equal(samples[first : last + 1], block)


@pytest.mark.slow
def test_killed_runs_lose_nothing(tmp_path):
    """The short form of `python -m tests.support.kill_runs --kills=100`."""
    hit = kill_runs(tmp_path, kills=4, steps=56)
    assert hit["in a save"] >= 1


# ------------------------------------------------------------------------------------------- safety


class Bomb:
    """An object whose pickle, once loaded, leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_no_pickle_in_samples_is_loaded(tmp_path):
    protocol = {"seed": 0}
    store = shards.NpzFile(tmp_path / "s.npz", protocol)
    indices = np.arange(2)
    with open(tmp_path / "s.npz.parts" / "000000-000001.npy", "wb") as file:
        np.save(file, np.array([Bomb(tmp_path / "trace")], dtype=object), allow_pickle=True)
    assert store.has(indices)
    with pytest.raises(
        ShardError, match=r"000000-000001.npy is damaged \(.*allow_pickle=False\): remove it"
    ):
        store.finish([indices], None)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "s.npz").exists()


def test_no_pickle_is_loaded_anywhere():
    """Wherever the package reads arrays or pickles, by its source.

    NumPy's are refused, and an unpickler is a restricted one.
    """
    for path in (*(ROOT / "ddpm_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")):
        text = path.read_text()
        where = path.relative_to(ROOT)
        assert not re.search(
            r"\bpickle\.loads?\(|\bcloudpickle\b|\bjoblib\.load\(|\bshelve\b|allow_pickle=True",
            text,
        ), where
        assert "torch.load(" not in text or "weights_only=True" in text, where
        for made in re.finditer(
            r"class \w+\((?:pickle\.)?Unpickler\)(.*?)(?=\nclass |\n\S|\Z)", text, re.DOTALL
        ):
            assert "def find_class" in made[1], (
                f"{where}: an unpickler that calls whatever the file names"
            )
        assert not re.search(
            r"(?<!class )\bpickle\.Unpickler\([^)]", text.replace("(pickle.Unpickler)", "")
        ), where
        assert "extractall(" not in text and "archive.extract(" not in text, (
            f"{where}: members of archives are read, not written"
        )


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc", "a/../../b", "..", "a//b", "a/b/c", "a\nb", "a b", "~"]
)
def test_a_config_cannot_name_a_path(tmp_path, name):
    """Neither on a command line nor in the config.json of a run directory from elsewhere."""
    with pytest.raises(ConfigError, match="(?s)config.data.name=.*: NAME or NAME/CONFIGURATION"):
        tiny_config(data={"name": name})
    claim_workdir(tmp_path, tiny_config())
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["data"]["name"] = name
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="(?s)config.data.name=.*: NAME or NAME/CONFIGURATION"):
        load_workdir_config(tmp_path)
