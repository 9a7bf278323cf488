"""In lock step with PyTorch losses and parameters are the same but for rounding, and a fault in one side is noticed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddpm_jax.benchmark import lockstep
from ddpm_jax.benchmark.apart import UNSEEN, distance, squares
from ddpm_jax.benchmark.lockstep import OURS, THEIRS, LockstepOptions, Theirs, train_in_lock_step
from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.data.source import ArraySource
from ddpm_jax.files import read_json
from tests.support.tiny import images, tiny_config

pytestmark = pytest.mark.interop
STEPS = 12
# Of the way from the start. It is 8e-6 with float32 on a CPU, most of it from 1 - beta2^n of Optax
# (docs/weights.md); the least of the faults below makes 1e-3.
MOST = 5e-5


@pytest.fixture(scope="module")
def config() -> Config:
    """Every part of the recipe is at work: flips, a clip of every gradient, warm-up of both kinds."""
    return tiny_config(
        model={"dropout": 0.0},
        optimizer={"gradient_clip": 0.3, "warmup_steps": 2},
        train={"steps": STEPS, "ema_decays": (0.5,), "ema_warmup": True},
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> SimpleNamespace:
    """A comparison from its options to its files, and the sides as they are at its end."""
    walk, kept = lockstep.walk, SimpleNamespace(output=tmp_path_factory.mktemp("lock") / "x.json")

    def walk_and_keep(config, sides, batches, record, options):
        code = walk(config, sides, batches, record, options)
        kept.batches, kept.start = batches, record.start
        kept.ours, kept.averaged = sides[OURS].params(), sides[OURS].averaged()
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockstep, "load_source", lambda *_: ArraySource(images(config, 40)))
        patch.setattr(lockstep, "walk", walk_and_keep)
        assert train_in_lock_step(config, LockstepOptions(kept.output, every=5)) == 0
    return kept


def of_way(ours: Params, theirs: Params, start: Params) -> float:
    share = distance(sum(squares(ours, theirs, start).values()))["of_way"]
    assert share is not None
    return share


def test_losses_and_parameters_are_the_same_but_for_rounding(done):
    record = read_json(done.output)
    ours, theirs = (np.array(record["losses"][side]) for side in (OURS, THEIRS))
    assert len(ours) == STEPS and len(set(ours)) == STEPS
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    np.testing.assert_allclose(theirs[:3], ours[:3], rtol=1e-6)
    assert [row["step"] for row in record["apart"]] == [5, 10, STEPS]
    assert 0 < record["apart"][-1][THEIRS]["of_way"] < MOST
    assert 0 < record["averages"][THEIRS]["of_way"] < MOST
    for name, leaf in record["leaves"][THEIRS].items():
        assert leaf["of_way"] < 10 * MOST or name.endswith(UNSEEN), name
    assert done.output.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    "fault",
    [
        {"data": {"flip": False}},
        {"diffusion": {"beta_end": 0.201}},
        {"optimizer": {"warmup_steps": 0}},
        {"optimizer": {"gradient_clip": 0.0}},
        {"optimizer": {"epsilon": 1e-7}},
        {"train": {"ema_decays": (0.51,)}},
        {"train": {"ema_warmup": False}},
    ],
    ids=str,
)
def test_another_recipe_on_their_side_is_noticed(config, done, fault: dict[str, Any]):
    """That of the averages alone leaves the parameters as they are."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **fields) for name, fields in fault.items()
    }
    params, averaged = trained(dataclasses.replace(config, **sections), done)
    of_averages = "ema" in str(fault)
    assert (of_way(done.ours, params, done.start) > 10 * MOST) != of_averages
    assert of_way(done.averaged, averaged, done.start) > 10 * MOST


def test_the_noise_of_another_step_is_noticed(config, done, monkeypatch):
    draw = lockstep.draw

    def late(config, step, image):
        x0, t, _ = draw(config, step, image)
        return x0, t, draw(config, step + 1, image)[2]

    monkeypatch.setattr(lockstep, "draw", late)
    params, _ = trained(config, done)
    assert of_way(done.ours, params, done.start) > 10 * MOST


def trained(config: Config, done: SimpleNamespace) -> tuple[Params, Params]:
    """The parameters and averages of their side, trained by `config` on the same batches."""
    side = Theirs(config, done.start)
    for step in range(STEPS):
        side.step(done.batches(step))
    return side.params(), side.averaged()
