"""What waits for other hosts must not stand where one of them may have refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ddpm_jax.errors import DataError
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints

DEVICES = Devices(jax.devices()[:1])


def nested() -> None:
    with hosts.together():
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda _: hosts.barrier("end"),
        lambda _: hosts.from_main(np.zeros(1)),
        lambda _: hosts.same("the config", 1),
        lambda _: nested(),
        lambda _: DEVICES.meet(),
        lambda _: DEVICES.largest(1),
        lambda _: DEVICES.rows(np.zeros((1, 1))),
        lambda _: DEVICES.from_main(np.zeros(1)),
        lambda place: Checkpoints(place),
    ],
)
def test_a_call_that_waits_for_other_hosts_is_a_fault_inside_together(tmp_path, call):
    """On one host as well, where it would do no harm: so any test finds it."""
    call(tmp_path / "free")
    with pytest.raises(RuntimeError, match=r"waits for the other hosts inside hosts.together\(\)"):
        with hosts.together():
            call(tmp_path / "inside")
    call(tmp_path / "free again")


def test_reading_and_saving_a_checkpoint_wait_for_other_hosts(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for call in (lambda: checkpoints.save(1, {}), lambda: checkpoints.restore({})):
            with pytest.raises(RuntimeError, match="a checkpoint waits"), hosts.together():
                call()


def test_a_refusal_inside_together_is_over_with_it():
    with pytest.raises(DataError, match="^no such set$"), hosts.together():
        raise DataError("no such set")
    hosts.barrier("after it")
