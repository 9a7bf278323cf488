"""A run that starts from another one has what that one learned, and nothing else of it."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import pytest

from ddpm_jax.config import Config
from ddpm_jax.errors import WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.trained import find_origin, unpack
from ddpm_jax.training import loop
from ddpm_jax.training.loop import train
from ddpm_jax.training.origin import Origin, carry_over, check_fits, look_up, start_from
from ddpm_jax.training.state import TrainState, init_state
from tests.support.commands import command_module
from tests.support.processes import assert_bit_equal, final_state, metrics, write_config
from tests.support.tiny import tiny_config

CHANGED = {"learning_rate": 2e-3, "warmup_steps": 0, "schedule": "linear", "weight_decay": 0.1}


def train_on_one(config: Config, workdir: Path, **options) -> int:
    one = Devices(jax.devices()[:1])
    return train(config, workdir, data_dir=workdir.parent, devices=one, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Config, Path]:
    """Four steps, with a checkpoint after two and after four."""
    config, workdir = tiny_config(train={"steps": 4}), tmp_path_factory.mktemp("source") / "run"
    assert train_on_one(config, workdir) == 0
    return config, workdir


@pytest.fixture(scope="module")
def new(source, tmp_path_factory) -> tuple[Config, Path]:
    """A run from its step 2 with another learning rate, decay, batch, dropout and averages."""
    config = tiny_config(
        optimizer=CHANGED,
        model={"dropout": 0.1},
        train={"batch_size": 8, "ema_decays": (0.99, 0.5), "steps": 4, "checkpoint_every": 1},
    )
    config.train.keep_checkpoints = 9
    workdir = tmp_path_factory.mktemp("new") / "run"
    assert train_on_one(config, workdir, parent=Origin(source[1], 2)) == 0
    return config, workdir


def test_it_begins_with_what_the_other_had(source, new):
    (theirs, workdir), (config, here) = source, new
    old, first = final_state(theirs, workdir, 2), final_state(config, here, 0)
    assert_bit_equal(first.params, old.params)
    assert_bit_equal(first.ema["0.99"], old.ema["0.99"])
    assert_bit_equal(first.ema["0.5"], old.ema["0.9"])  # no average of this name: the first one
    adam, before = first.opt_state[1][0], old.opt_state[1][0]
    assert int(adam.count) == 2
    assert_bit_equal((adam.mu, adam.nu, adam.count), (before.mu, before.nu, before.count))
    assert (int(first.step), int(first.updates)) == (0, 0)


def test_its_record_says_where_it_came_from(source, new):
    _, workdir = source
    record = json.loads((new[1] / "origin.json").read_text())
    about = json.loads((workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").read_text())
    assert record["run"] == str(workdir.resolve()) and record["step"] == 2
    assert record["sha256"] == about["custom_metadata"]["sha256"]
    assert "optimizer.learning_rate: 0.001 -> 0.002" in record["changed"]
    assert not any(line.startswith("data.") for line in record["changed"])


def test_its_learning_rate_begins_anew(new):
    config, workdir = new
    rows = metrics(workdir)
    got = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    # The mean of two updates: 2e-3 (1 - n/4) at n = 0, 1 and at n = 2, 3.
    assert got == pytest.approx({2: 1.75e-3, 4: 0.75e-3})


def test_from_a_first_step_it_is_the_plain_run(source, tmp_path):
    """Nothing changed and nothing learned: bit for bit what the run without an origin is."""
    config, straight = source
    with Checkpoints(tmp_path / "zero") as checkpoints:
        checkpoints.save(0, init_state(config))
    shutil.copy(straight / "config.json", tmp_path / "zero")
    assert train_on_one(config, tmp_path / "new", parent=Origin(tmp_path / "zero")) == 0
    assert_bit_equal(final_state(config, tmp_path / "new"), final_state(config, straight))
    assert metrics(tmp_path / "new") == metrics(straight)


def test_it_resumes_to_the_bit_without_the_other(source, new, tmp_path):
    """The learning rate decays, the weights decay, and the source is gone."""
    config, straight = new
    shutil.copytree(source[1], tmp_path / "source")
    shutil.copytree(straight, tmp_path / "new")
    workdir = tmp_path / "new"
    record = json.loads((workdir / "origin.json").read_text())
    record["run"] = str(tmp_path / "source")
    (workdir / "origin.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "source")
    assert train_on_one(config, workdir, step=1, parent=Origin(tmp_path / "source")) == 0
    assert_bit_equal(final_state(config, workdir), final_state(config, straight))
    with pytest.raises(WorkdirError, match="train.steps: 4 -> 5"):  # the rate depends on it
        longer = tiny_config(train={"steps": 5})
        longer.__dict__.update(config.__dict__ | {"train": longer.train})
        train_on_one(longer, workdir)


class Stop(Exception):
    """Ends a run at its first step."""


def test_the_device_holds_what_it_began_with_once(source, tmp_path):
    """What was read of the other run is gone by the first step, which has a copy in buckets."""
    config, run = source
    leaves: list[weakref.ref] = []

    def read(*arguments) -> TrainState:
        state = start_from(*arguments)
        leaves.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(state))
        return state

    def held() -> bool:
        return any(leaf() is not None for leaf in leaves)

    def soon(true: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end:
            time.sleep(0.02)
        return true()

    def step(state, batch) -> None:
        assert leaves and soon((tmp_path / "new" / "checkpoints" / "0").exists, 60)
        assert soon(lambda: not held(), 3)  # the thread that saved it may still end
        raise Stop

    with mock.patch.object(loop, "start_from", read), pytest.raises(Stop):
        build = {"build_step": lambda *_: step}
        train_on_one(config, tmp_path / "new", parent=Origin(run), **build)


@pytest.mark.slow
def test_a_start_cut_off_is_made_again(source, new, tmp_path, monkeypatch):
    """Killed between the record and checkpoint 0: also without the flag it is no new run."""
    config, workdir = new[0], tmp_path / "run"

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "restore_or_init", killed)
    with pytest.raises(KeyboardInterrupt):
        train_on_one(config, workdir, parent=Origin(source[1], 2))
    assert (workdir / "origin.json").is_file()
    assert not list((workdir / "checkpoints").glob("*"))
    monkeypatch.undo()
    assert train_on_one(config, workdir) == 0
    assert_bit_equal(final_state(config, workdir), final_state(config, new[1]))


def test_what_does_not_fit_is_refused_and_leaves_nothing(source, new, tmp_path):
    config, run = source
    workdir = tmp_path / "run"
    wide = tiny_config(model={"base_channels": 16})
    heads = tiny_config(model={"heads": 2})
    deep = tiny_config(model={"channel_mult": (1, 1)})
    for origin_, other, said in (
        (Origin(run), wide, r"parameter conv_in/bias is 8 there and 16 .*base_channels: 8 -> 16"),
        (Origin(run), deep, r"parameter down_0_downsample/bias is absent there and 8 by this"),
        (Origin(run), heads, r"would not compute what they were trained to: config.model.heads: 1"),
        (Origin(run, 3), config, r"no checkpoint of step 3; there are: 2, 4"),
        (Origin(tmp_path / "none"), config, r"from=.*none: not a run directory"),
    ):
        with pytest.raises(WorkdirError, match=said):
            train_on_one(other, workdir, parent=origin_)
        assert not workdir.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(WorkdirError, match="is not empty: take another"):
        train_on_one(config, tmp_path / "full", parent=Origin(run))
    with pytest.raises(WorkdirError, match="is not empty"):  # a run, but of no origin
        train_on_one(config, run, parent=Origin(new[1]))
    with pytest.raises(WorkdirError, match=r"holds a run from .*:2: take another"):
        train_on_one(new[0], new[1], parent=Origin(run, 4))


def test_a_damaged_source_names_the_checkpoint_that_serves(source, tmp_path):
    shutil.copytree(source[1], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "4" / "default" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(WorkdirError, match=r"run:4 cannot be read: from=.*run:2 can"):
        train_on_one(source[0], tmp_path / "new", parent=Origin(tmp_path / "run"))
    assert not (tmp_path / "new").exists()


def test_the_record_of_losses_goes_on_where_both_have_one():
    importance, plain = tiny_config(loss={"timestep_sampling": "importance"}), tiny_config()
    old = init_state(importance)
    old = old.replace(loss_history=jax.tree.map(lambda leaf: leaf + 1, old.loss_history))
    assert_bit_equal(carry_over(importance, old, importance).loss_history, old.loss_history)
    assert carry_over(importance, old, plain).loss_history is None
    empty = init_state(importance).loss_history
    assert_bit_equal(carry_over(plain, init_state(plain), importance).loss_history, empty)
    other = tiny_config(
        loss={"timestep_sampling": "importance"}, diffusion={"timesteps": 10, "beta_end": 0.2}
    )
    shorter = carry_over(importance, old, other).loss_history
    assert_bit_equal(shorter, init_state(other).loss_history)


@pytest.mark.slow
def test_the_command_starts_from_a_run_and_a_step(source, tmp_path, capsys):
    config, run = source
    path = write_config(tmp_path, config)
    flags = [f"--config={path}", f"--from={run}:2", f"--workdir={tmp_path / 'new'}"]
    command_module("train").main([*flags, "--config.train.steps=1"])
    assert f"a new run from {run}, step 2" in capsys.readouterr().out
    assert int(final_state(config, tmp_path / "new", 1).opt_state[1][0].count) == 3


def test_what_ships_is_an_origin_too(tmp_path, monkeypatch):
    from ddpm_jax.config import load_config

    monkeypatch.chdir(tmp_path)
    one = Devices(jax.devices()[:1])
    found = look_up(find_origin("digits", one))
    assert found.run == unpack("digits", one).resolve() and found.step == 0
    check_fits(found, load_config("digits", ["model.dropout=0.2"]))
    assert find_origin("runs/x:best", one) == Origin(Path("runs/x"), "best")
    digits = "9" * 5000  # more than Python turns into a number
    assert find_origin(f"runs/x:{digits}", one) == Origin(Path(f"runs/x:{digits}"))
    assert find_origin("runs/x:1e3", one) == Origin(Path("runs/x:1e3"))
