"""Output is never worth a run.

Whatever becomes of it, training ends as it should, with its checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.batches import TrainBatches
from ddpm_jax.errors import DataError, WorkdirError
from ddpm_jax.images import load_png
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Lenient
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.sampling.generate import Generator
from ddpm_jax.training import loop
from ddpm_jax.training.form import TreeForm
from tests.support.processes import (
    ROOT,
    final_state,
    finish,
    script,
    wait_for_step,
    write_config,
)
from tests.support.tiny import tiny_config

ONE = Devices(jax.devices()[:1])


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    config = write_config(
        tmp_path, tiny_config(train={"steps": 4, "log_every": 1, "eval_images": 0})
    )
    return [f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--data_dir={tmp_path}"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full disk", "closed", "reader left"])
def test_a_run_whose_output_cannot_be_written_ends_well(tmp_path, flags, how):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    options = {"env": environment, "cwd": ROOT}
    if how == "full disk":
        with open("/dev/full", "w") as full:
            code = subprocess.run(command(*flags), stdout=full, stderr=full, **options).returncode
    elif how == "closed":
        line = 'exec "$@" >&- 2>&-'
        code = subprocess.run(["sh", "-c", line, "sh", *command(*flags)], **options).returncode
    else:
        process = subprocess.Popen(
            command(*flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        process.stdout.close()
        code = process.wait(240)
    assert code == 0
    assert int(final_state(tiny_config(train={"steps": 4}), tmp_path / "run").step) == 4


@pytest.mark.slow
def test_a_closed_terminal_saves_like_sigterm(tmp_path):
    config = tiny_config(train={"steps": 10**6, "log_every": 1, "checkpoint_every": 10**6})
    flags = [f"--config={write_config(tmp_path, config)}", f"--workdir={tmp_path / 'run'}"]
    process = script("train.py", *flags)
    try:
        wait_for_step(tmp_path / "run", 3, process)
        process.send_signal(signal.SIGHUP)
        code, _, errors = finish(process)
    finally:
        process.kill()
    assert code == 128 + signal.SIGHUP, errors
    assert int(final_state(config, tmp_path / "run").step) >= 3


def test_a_lenient_stream_drops_what_it_cannot_write():
    assert Lenient(None).write("lost") == 4 and not Lenient(None).isatty()
    with open("/dev/full", "w") as full:
        stream = Lenient(full)
        print("lost", file=stream, flush=True)
        print("as well", file=stream, flush=True)
    closed = open(os.devnull, "w")
    closed.close()
    print("lost", file=Lenient(closed), flush=True)


@pytest.mark.parametrize("trouble", ["nan", "memory", "disk"])
def test_a_picture_that_fails_costs_nothing_but_itself(tmp_path, monkeypatch, capfd, trouble):
    config = tiny_config(train={"steps": 4, "sample_every": 2, "checkpoint_every": 2})

    def draw(self, params, **inputs) -> np.ndarray:
        if trouble == "memory":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        samples = np.full((4, 8, 8, 1), 0.5, np.float32)
        samples[1, 3] = np.nan
        return samples

    monkeypatch.setattr(Generator, "draw", draw)
    if trouble == "disk":
        (tmp_path / "samples").write_text("in the way of the folder")
    assert loop.train(config, tmp_path, data_dir=tmp_path, devices=ONE) == 0
    assert int(final_state(config, tmp_path).step) == 4
    errors = capfd.readouterr().err
    words = {"nan": "1 of 4 samples hold NaN", "memory": "out of memory", "disk": "samples"}
    assert errors.count("grid of step") >= 2 and words[trouble] in errors
    if trouble == "nan":
        grid = load_png(tmp_path / "samples" / "step_0000004.png")
        assert set(np.unique(grid)) == {128, 191, 255}  # grey, the rest, the gaps


def test_a_record_that_cannot_be_read_saves_what_was_done(tmp_path, monkeypatch):
    config = tiny_config(train={"steps": 6, "checkpoint_every": 6})
    batches = TrainBatches

    class Broken(batches):
        def __call__(self, step: int):
            if step == 3:
                raise DataError("record 17 of faces cannot be read: remove it")
            return super().__call__(step)

    monkeypatch.setattr(loop, "train_batches", Broken)
    with pytest.raises(DataError, match="record 17 of faces"):
        loop.train(config, tmp_path, data_dir=tmp_path, devices=ONE)
    assert int(final_state(config, tmp_path).step) == 3


class Failing:
    """Images from Python, of which `times` batches of 16 can be read."""

    image_shape, labelled = (8, 8, 1), False

    def __init__(self, times: int) -> None:
        self._left = times

    def __len__(self) -> int:
        return 40

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self._left -= len(indices) == 16
        if self._left < 0:
            raise ConnectionError("the disk of these images is away")
        return {"image": np.zeros((len(indices), *self.image_shape), np.uint8)}


NETWORK = Network(lambda key: {"x": jnp.ones(())}, lambda params, x_t, *_: params["x"] * x_t)


@pytest.mark.parametrize("source, held_out, kept", [(3, 9, 3), (9, 1, 4)])
def test_images_that_fail_save_what_was_done(tmp_path, source, held_out, kept):
    """Those of a step, and held-out ones at the second evaluation: whatever they raise."""
    fields = {"checkpoint_every": 6, "eval_every": 2, "eval_images": 16}
    config = tiny_config(train=fields)
    given = {"source": Failing(source), "held_out": Failing(held_out), "network": NETWORK}
    with pytest.raises(ConnectionError, match="the disk of these images is away"):
        loop.train(config, tmp_path, data_dir=tmp_path, devices=ONE, **given)
    with Checkpoints.reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == [kept]


def test_a_save_that_fails_as_well_hides_no_cause(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DataError, match="record 17"):
        with mock.patch.object(checkpoints, "save", side_effect=WorkdirError("the disk is full")):
            with loop.saving_if_it_fails(checkpoints, TreeForm(), None, 3):
                raise DataError("record 17 of faces cannot be read: remove it")
    assert capsys.readouterr().err == "step 3 is not saved: the disk is full\n"
