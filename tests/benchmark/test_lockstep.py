"""Two trainings in lock step: what is refused, and that nothing measured is lost (with stand-ins for both sides)."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.benchmark import apart, lockstep
from ddpm_jax.benchmark.apart import Record, distance, squares
from ddpm_jax.benchmark.lockstep import LockstepOptions
from ddpm_jax.cli import compare_with_diffusers, flags
from ddpm_jax.config import Config, validate
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.files import read_json
from tests.support.tiny import tiny_config

START = {"a": {"bias": np.zeros(2, np.float32)}, "b": np.ones(1, np.float32)}


class Stub:
    """A side whose loss at step n is losses(n), and whose parameters grow by `rate` a step."""

    def __init__(self, rate: float, losses=lambda n: 1 / n) -> None:
        self.rate, self.losses, self.steps = rate, losses, 0

    def step(self, batch: dict) -> float:
        self.steps += 1
        assert batch["image"] == self.steps - 1  # the batch of this step
        return self.losses(self.steps)

    def params(self) -> dict:
        return {"a": {"bias": START["a"]["bias"] + self.rate * self.steps}, "b": START["b"]}

    averaged = params


def walk(tmp_path: Path, steps: int, every: int, **sides: Stub) -> tuple[int, Path]:
    config = tiny_config(train={"steps": steps})
    record = Record(tmp_path / "out.json", sides, START, {"about": 1})
    options = LockstepOptions(record.output, every=every)
    code = lockstep.walk(config, sides, lambda step: {"image": step}, record, options)
    return code, record.output


@pytest.fixture
def unplotted(monkeypatch) -> None:
    """A plot takes half a second, and one test looks at it."""
    monkeypatch.setattr(apart, "plot", lambda values, output: output.touch())


def test_the_record_holds_every_loss_and_the_distances(tmp_path, capsys):
    code, output = walk(tmp_path, 5, 2, ddpm_jax=Stub(1.0), diffusers=Stub(1.5), third=Stub(1.0))
    values = read_json(output)
    assert code == 0 and values["about"] == 1
    assert values["losses"]["diffusers"] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert [row["step"] for row in values["apart"]] == [2, 4, 5]
    # ours is at (2, 2, 1) after two steps, theirs at (3, 3, 1), and both were at (0, 0, 1)
    first = values["apart"][0]["diffusers"]
    assert first["distance"] == pytest.approx(2**0.5)
    assert first["of_way"] == pytest.approx(0.5)
    assert first["of_norm"] == pytest.approx((2 / 9) ** 0.5)
    assert values["apart"][0]["third"] == {"distance": 0, "of_way": 0, "of_norm": 0}
    leaves = values["leaves"]["diffusers"]
    assert leaves["a/bias"]["of_way"] == 0.5 and leaves["b"]["of_way"] is None  # it never moved
    assert set(values["seconds"]) == {"ddpm_jax", "diffusers", "third"}
    said = capsys.readouterr().out
    assert "worst leaf  0.5 of its way: a/bias" in said
    assert f"wrote {output} and {tmp_path / 'out.png'}: 5 of 5 steps" in said
    with Image.open(tmp_path / "out.png") as picture:
        assert min(picture.size) > 300


def test_a_step_that_goes_no_way_has_no_share_of_it():
    assert distance(np.zeros(3)) == {"distance": 0, "of_way": None, "of_norm": None}
    assert squares(START, START, START)["b"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_with_everything_written(
    tmp_path, capsys, unplotted, number
):
    def losses(step: int) -> float:
        if step == 3:
            os.kill(os.getpid(), number)
        return 0.5

    code, output = walk(tmp_path, 9, 100, ddpm_jax=Stub(1.0, losses), diffusers=Stub(1.5))
    values = read_json(output)
    assert code == 128 + number
    assert {len(losses) for losses in values["losses"].values()} == {3}
    assert values["apart"][-1]["step"] == 3
    assert f"wrote {output} and {tmp_path / 'out.png'}: 3 of 9 steps" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_with_the_steps_before_it(tmp_path, unplotted, bad):
    diverging = Stub(1.0, lambda step: bad if step == 4 else 0.5)
    with pytest.raises(UserError, match="step 4: the loss of diffusers is not finite"):
        walk(tmp_path, 9, 2, ddpm_jax=Stub(1.0), diffusers=diverging)
    assert {len(losses) for losses in read_json(tmp_path / "out.json")["losses"].values()} == {3}


def test_an_end_before_the_first_step_leaves_no_files(tmp_path, unplotted):
    def broken(step: int) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        walk(tmp_path, 9, 2, ddpm_jax=Stub(1.0), diffusers=Stub(1.0, broken))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- refusals


def in_lock_step(config: Config, **options) -> None:
    lockstep.train_in_lock_step(validate(config), LockstepOptions(Path("x.json"), **options))


def test_a_config_that_cannot_go_in_lock_step_is_refused(monkeypatch):
    monkeypatch.setattr(lockstep, "load_source", lambda *_: pytest.fail("not refused"))
    plain = tiny_config(model={"dropout": 0.0})
    with pytest.raises(ConfigError, match=r"^model.dropout=0.3: .*: --config.model.dropout=0.0$"):
        in_lock_step(tiny_config())
    with pytest.raises(ConfigError, match=r"^loss.kind=vlb: .*: --config.loss.kind=simple$"):
        in_lock_step(dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, kind="vlb")))
    with pytest.raises(ConfigError, match="^every=0: must be at least 1$"):
        in_lock_step(plain, every=0)
    plain.train.batch_size = 15
    with pytest.raises(ConfigError, match="^train.batch_size=15: .*--config.train.batch_size=16$"):
        in_lock_step(plain, rounding=True)


@pytest.mark.parametrize("rounding", [False, True])
def test_rounding_adds_ours_in_two_halves(tmp_path, monkeypatch, unplotted, rounding):
    configs = []

    def side(config: Config, start: dict) -> Stub:
        configs.append(config)
        return Stub(1.0)

    monkeypatch.setattr(lockstep, "Ours", side)
    monkeypatch.setattr(lockstep, "Theirs", side)
    for name in ("check_comparable", "load_source", "versions"):
        monkeypatch.setattr(lockstep, name, lambda *_: {})
    monkeypatch.setattr(lockstep, "init_params", lambda config: START)
    monkeypatch.setattr(lockstep, "train_batches", lambda *_: lambda step: {"image": step})
    config = tiny_config(model={"dropout": 0.0}, train={"steps": 2})
    options = LockstepOptions(tmp_path / "x.json", rounding=rounding)
    assert lockstep.train_in_lock_step(config, options) == 0
    names = list(read_json(options.output)["losses"])
    assert names == [lockstep.OURS, lockstep.THEIRS, *[lockstep.HALVES] * rounding]
    assert configs[:2] == [config, config]
    assert [other.train.accumulation for other in configs[2:]] == [2] * rounding


def test_lock_step_needs_pytorch(monkeypatch):
    monkeypatch.setattr(lockstep, "load_source", lambda *_: pytest.fail("not refused"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed: pip install 'ddpm_jax.torch.'"):
        in_lock_step(tiny_config(model={"dropout": 0.0}))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lockstep --workdir=w", "--workdir: of no use with --lockstep"),
        ("--lockstep --seeds=0 --num_images=1000", "--seeds, --num_images: of no use with --lock"),
        ("--lockstep --num_timesteps=50", "--num_timesteps: of no use with --lockstep"),
        ("--workdir=w --every=50", "--every: of no use without --lockstep"),
        ("--workdir=w --rounding", "--rounding: of no use without --lockstep"),
        ("", "--workdir: say which, or --lockstep"),
        ("--lockstep --output=x.png", "--output=x.png: must end in .json with --lockstep"),
    ],
)
def test_flags_of_the_other_comparison_are_refused(words, message):
    """Also with the values that they have by default."""
    command = ["--config=digits", "--output=x.json", *words.split()]
    with pytest.raises(ConfigError, match=f"^{message}"):
        compare_with_diffusers.main(command)


def test_a_folder_in_the_place_of_the_plot_is_known_before_the_work(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ConfigError, match="x.png, the plot, is a folder"):
        compare_with_diffusers.main(
            ["--config=digits", "--lockstep", f"--output={tmp_path / 'x.json'}"]
        )


def test_the_flags_arrive_and_the_code_comes_back(monkeypatch):
    calls = []
    monkeypatch.setattr(
        compare_with_diffusers, "train_in_lock_step", lambda *given: calls.append(given) or 143
    )
    command = ["--config=digits", "--lockstep", "--output=x.json", "--data_dir=d"]
    assert compare_with_diffusers.main(command) == 143
    assert compare_with_diffusers.main([*command, "--every=7", "--rounding"]) == 143
    options = [options for _, options in calls]
    assert options[0] == LockstepOptions(Path("x.json"), Path("d"))
    assert options[1] == LockstepOptions(Path("x.json"), Path("d"), every=7, rounding=True)
    parsed = compare_with_diffusers.parser().parse_args(command)
    assert flags.fill(LockstepOptions, parsed) == options[0]
