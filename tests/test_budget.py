"""The tests' own machinery: programs are shared only where they are equal, and the budget holds."""

from __future__ import annotations

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddpm_jax.config import Config
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.training.state import abstract_state
from ddpm_jax.training.step import build_train_step
from tests.support import budget
from tests.support.sharing import OF_THE_LOOP, Unknown, identity
from tests.support.tiny import images, tiny_config

LOOP = {
    "steps": 9,
    "log_every": 1,
    "eval_every": 5,
    "eval_images": 7,
    "checkpoint_every": 5,
    "keep_checkpoints": 1,
    "keep_every": 3,
    "keep_best": 1,
    "sample_every": 2,
    "sample_images": 9,
    "max_nonfinite_steps": 2,
}


def step_identity(config: Config):
    return identity(build_train_step(config))


def test_what_the_loop_alone_reads_is_in_no_program():
    assert set(LOOP) == set(OF_THE_LOOP)
    programs = []
    for config in (tiny_config(), tiny_config(train=LOOP)):
        batch = {"image": images(config, 16)}
        programs.append(
            str(jax.make_jaxpr(build_train_step(config))(abstract_state(config), batch))
        )
    addresses = [" at 0x", "0x"]  # of functions, in the text
    one, other = (
        [line for line in text.splitlines() if not any(a in line for a in addresses)]
        for text in programs
    )
    assert one == other and len(one) > 1000


@pytest.mark.parametrize(
    "sections",
    [
        {"seed": 3},
        {"data": {"flip": False}},
        {"model": {"dropout": 0.2}},
        {"diffusion": {"beta_end": 0.3}},
        {"loss": {"kind": "vlb"}},
        {"optimizer": {"learning_rate": 2e-3}},
        {"train": {"ema_decays": (0.9,)}},
        {"train": {"accumulation": 2}},
    ],
    ids=str,
)
def test_another_step_is_another_program(sections):
    config = tiny_config(**{k: v for k, v in sections.items() if k != "seed"})
    config.seed = sections.get("seed", config.seed)
    assert step_identity(config) != step_identity(tiny_config())
    assert step_identity(tiny_config(train=LOOP)) == step_identity(tiny_config())


def test_values_of_a_closure_count_and_unknown_ones_are_never_equal():
    def function(value):
        return lambda: value

    alike = [1, 1.0, True, "1", np.float32(1), np.ones(1), (1,), [1], {"a": 1}, function(1)]
    assert len({identity(function(value)) for value in alike}) == len(alike)
    assert identity(function(np.arange(3))) == identity(function(np.arange(3)))
    with pytest.raises(Unknown):
        identity(function(object()))


def test_a_program_that_reports_to_its_owner_is_its_own():
    config, devices = tiny_config(), Devices(jax.devices()[:2])
    quiet = [build_generator(config, devices, batch_size=4) for _ in range(2)]
    loud = [build_generator(config, devices, batch_size=4, progress=True) for _ in range(2)]
    assert quiet[0]._chain is quiet[1]._chain
    assert len({id(generator._chain) for generator in (quiet[0], *loud)}) == 3


@pytest.mark.parametrize("marker", [None, "slow"])
@pytest.mark.parametrize("enforced", [True, False])
def test_a_default_test_over_the_budget_fails(monkeypatch, marker, enforced):
    plugin = budget.Budget(enforced=enforced)
    item = SimpleNamespace(nodeid="x", get_closest_marker=lambda name: name == marker)
    plugin.pytest_runtest_logstart()
    started = time.process_time()
    while time.process_time() < started + 0.03:
        pass
    hook = plugin.pytest_runtest_makereport(item)
    next(hook)
    report = SimpleNamespace(passed=True, outcome="passed", when="call", longrepr=None)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(budget, "BUDGET", 0.0)  # undone before this test is measured itself
        hook.send(report)
    over = enforced and marker is None
    assert report.outcome == ("failed" if over else "passed")
    assert over == ("processor seconds" in str(report.longrepr))
