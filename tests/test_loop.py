"""A run from end to end: trained, logged, saved, resumed to the bit, sampled, refused where it must be."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT, assert_bit_equal, final_state, finish, metrics, metrics_seen, script, wait_for_step, write_config
from tiny import tiny_config

from ddpm_jax import config as configs
from ddpm_jax import images
from ddpm_jax.checkpoints import Checkpoints, WorkdirError
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.data.errors import DataError
from ddpm_jax.devices import Devices
from ddpm_jax.generate import Generator
from ddpm_jax.loop import Diverged, train
from ddpm_jax.trained import open_trained


def train_on(devices: int, config: Config, workdir: Path, **options) -> int:
    return train(config, workdir, data_dir=workdir, devices=Devices(jax.devices()[:devices]), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    """Six uninterrupted steps on two devices."""
    workdir = tmp_path_factory.mktemp("run") / "straight"
    config = tiny_config(train={"sample_every": 6})
    assert train_on(2, config, workdir) == 0
    return config, workdir


def test_a_run_directory_describes_the_run(run):
    config, workdir = run
    assert configs.from_dict(json.loads((workdir / "config.json").read_text())) == config
    rows = metrics(workdir)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [3, 6]
    for name in ("loss", "gradient_norm", "update_norm", "parameter_norm", "learning_rate", "skipped"):
        assert all(np.isfinite(row[name]) for row in rows if "loss" in row)
    assert 0.5 < rows[0]["loss"] < 1.5  # the untrained network predicts 0, and the noise has variance 1
    assert "conv_in/kernel" in (workdir / "parameters.txt").read_text()
    assert images.load_png(workdir / "samples" / "step_0000006.png").shape == (18, 18, 1)
    assert list(workdir.glob("events.out.tfevents*"))


@pytest.mark.parametrize("cut", [2, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, tmp_path, cut):
    """Parameters, moments, averages and the log; stopped at a checkpoint, and one step past it."""
    config, straight = run
    workdir = tmp_path / "resumed"
    stopped = tiny_config(train={"sample_every": 6, "steps": cut, "checkpoint_every": 2})
    train_on(2, stopped, workdir)
    train_on(2, config, workdir)
    assert_bit_equal(final_state(config, workdir), final_state(config, straight))
    wanted = {row["step"]: row for row in metrics(straight) if "loss" in row}
    got = {row["step"]: row for row in metrics(workdir) if "loss" in row}
    assert got[6]["learning_rate"] == wanted[6]["learning_rate"]
    if cut == 2:
        assert got == wanted


def test_a_run_goes_on_with_another_number_of_devices(run, tmp_path):
    config, straight = run
    workdir = tmp_path / "moved"
    train_on(8, tiny_config(train={"sample_every": 6, "steps": 4}), workdir)
    train_on(1, config, workdir)
    one, other = final_state(config, workdir), final_state(config, straight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, other.params)


def test_going_on_from_an_older_checkpoint_drops_what_came_after(run, tmp_path):
    config, straight = run
    workdir = tmp_path / "back"
    train_on(2, config, workdir)
    train_on(2, config, workdir, step=2)
    assert_bit_equal(final_state(config, workdir), final_state(config, straight))
    assert [row["step"] for row in metrics(workdir) if "loss" in row] == [2, 4, 6]
    assert metrics(workdir) == metrics(straight)
    assert sorted(path.name for path in (workdir / "checkpoints.aside").iterdir()) == ["4", "6"]


def test_a_finished_run_is_left_alone(run):
    config, workdir = run
    before = final_state(config, workdir)
    assert train_on(2, config, workdir) == 0
    assert_bit_equal(final_state(config, workdir), before)
    assert [row["step"] for row in metrics(workdir) if "loss" in row] == [2, 4, 6]


def test_samples_depend_on_seed_and_index_alone(run):
    """Whatever the batch size, the order and the number of devices."""
    _, workdir = run
    drawn = {}
    for devices, batch_size in ((1, 5), (2, 4), (8, 8)):
        place = Devices(jax.devices()[:devices])
        trained = open_trained(workdir, place)
        generator = Generator(trained.config, place, batch_size=batch_size)
        drawn[devices] = np.concatenate(list(generator(trained.params, seed=3, indices=np.arange(5))))
        assert drawn[devices].shape == (5, 8, 8, 1)
        if devices == 8:
            others = np.concatenate(list(generator(trained.params, seed=4, indices=np.arange(5))))
            reversed_ = np.concatenate(list(generator(trained.params, seed=3, indices=np.arange(5)[::-1])))
    np.testing.assert_allclose(drawn[2], drawn[1], atol=1e-5)
    np.testing.assert_allclose(drawn[8], drawn[1], atol=1e-5)
    np.testing.assert_allclose(reversed_[::-1], drawn[1], atol=1e-5)
    assert np.abs(others - drawn[1]).max() > 0.1


def test_weights_are_what_they_are_called(run):
    config, workdir = run
    state, devices = final_state(config, workdir), Devices(jax.devices()[:1])
    for name, want in (("ema", state.ema["0.9"]), ("0.99", state.ema["0.99"]), ("raw", state.params)):
        assert_bit_equal(open_trained(workdir, devices, weights=name).params, want)
    assert open_trained(workdir, devices).weights == "ema 0.9"
    with pytest.raises(WorkdirError, match="--weights=0.5: this run has ema, raw, 0.9, 0.99"):
        open_trained(workdir, devices, weights="0.5")


def test_what_cannot_run_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "run"
    for config, error, said in (
        (tiny_config(train={"batch_size": 12}), ConfigError, "batch_size=12: must be divisible by 8 devices; try 8 or 16"),
        (tiny_config(data={"name": "cifar10", "image_size": 32}), DataError, "run scripts/prepare_data.py --dataset=cifar10"),
        (tiny_config(data={"image_size": 16}), DataError, "set config.data.image_size=8"),
        (tiny_config(model={"num_classes": 5}), ConfigError, "num_classes=5: data set 'digits' has labels up to 9"),
    ):
        with pytest.raises(error, match=said):
            train_on(8, config, workdir)
        assert not workdir.exists()


def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(tmp_path):
    """A learning rate that overflows: the steps are skipped, and the run ends instead of going on in vain."""
    config = tiny_config(
        optimizer={"learning_rate": 1e30, "warmup_steps": 2, "gradient_clip": 0.0},
        train={"steps": 40, "log_every": 1, "max_nonfinite_steps": 3, "checkpoint_every": 1, "eval_images": 0},
    )
    with pytest.raises(Diverged, match="3 steps in a row .* checkpoint [0-9]+ is the last one"):
        train_on(1, config, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows][-3:] == [1, 1, 1] and rows[0]["skipped"] == 0
    assert rows[-1]["loss"] == "NaN"
    state = final_state(config, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))


# ---------------------------------------------------------------------------------------------- as a process


def endless(tmp_path: Path, **train_fields) -> tuple[Config, Path, list[str]]:
    fields = {"steps": 100_000, "log_every": 1, "checkpoint_every": 100_000, "eval_images": 0} | train_fields
    config = tiny_config(train=fields)
    workdir = tmp_path / "run"
    return config, workdir, [f"--config={write_config(tmp_path, config)}", f"--workdir={workdir}"]


def test_sigterm_saves_and_ends_with_143(tmp_path):
    config, workdir, flags = endless(tmp_path)
    process = script("train.py", *flags)
    wait_for_step(workdir, 3, process)
    process.send_signal(signal.SIGTERM)
    code, _, said = finish(process)
    assert code == 143, said
    state = final_state(config, workdir)
    assert int(state.step) == metrics_seen(workdir / "metrics.jsonl") >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file sizes stands in for a disk that fails")
def test_a_write_that_fails_ends_the_run_and_leaves_nothing_half_written(tmp_path):
    _, workdir, flags = endless(tmp_path, steps=3, checkpoint_every=2)
    code, _, said = finish(script("train.py", *flags, before=["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"]))
    assert code == 1
    assert "a checkpoint cannot be written (File too large); there is no checkpoint yet" in said.splitlines()[-1]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "name, flags, code, said",
    [
        ("train.py", ["--config=configs/digits.py", "--workdir=x", "--config.train.stps=3"], 1, "did you mean steps?"),
        ("train.py", ["--config=configs/none.py", "--workdir=x"], 1, "no such file; the ready ones are in configs/"),
        ("train.py", ["--workdir=x"], 2, "the following arguments are required: --config"),
        ("sample.py", ["--workdir=nowhere", "--output=grid.png"], 1, "--workdir=nowhere: not a run directory"),
        ("sample.py", ["--workdir=nowhere", "--output=grid.jpg"], 1, "must end in .png or .npz"),
    ],
)
def test_bad_flags_are_one_line_and_a_code(name, flags, code, said):
    got, _, errors = finish(script(name, *flags))
    assert got == code and "Traceback" not in errors
    assert said in errors.splitlines()[-1]
    assert not (ROOT / "x").exists()


def test_sample_py_draws_grids_and_arrays(run, tmp_path):
    _, workdir = run
    for output in ("grid.png", "samples.npz"):
        flags = [f"--workdir={workdir}", f"--output={tmp_path / output}", "--num_images=3", "--seed=7"]
        code, out, errors = finish(script("sample.py", *flags))
        assert code == 0, errors
        assert "3 samples of ema 0.9, step 6: 20 reverse steps" in out
    arrays = np.load(tmp_path / "samples.npz")["arr_0"]
    assert arrays.shape == (3, 8, 8, 1) and arrays.dtype == np.uint8
    np.testing.assert_array_equal(images.load_png(tmp_path / "grid.png"), images.grid(arrays))


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_data.py"])
def test_help_has_flags_and_an_example(name):
    code, out, _ = finish(script(name, "--help"))
    assert code == 0 and "example:" in out and f"scripts/{name}" in out
