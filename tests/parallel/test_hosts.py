"""What waits for other hosts must not stand where one of them may have refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ddpm_jax.errors import DataError, HostError
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


@pytest.mark.parametrize(
    "platforms, asked", [("tpu,cpu", 1), ("tpu", 1), ("cpu", 0), ("cuda,cpu", 0)]
)
def test_a_pod_is_asked_for_where_jax_uses_tpus(monkeypatch, platforms, asked):
    """JAX names "tpu,cpu" itself, on a machine with TPUs where the user named nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *triple, **rest: calls.append(triple))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        hosts.join()
    finally:
        jax.config.update("jax_platforms", before)
    assert calls == [(None, None, None)] * asked


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("coordinator_address should be defined."), ""),
        (
            ConnectionError("metadata.google.internal"),
            "is taken to be alone: --coordinator_address",
        ),
        (RuntimeError("the coordinator has gone"), None),
    ],
)
def test_tpus_of_no_pod_are_alone_and_a_pod_that_does_not_come_is_an_error(
    monkeypatch, capsys, error, said
):
    def fail(*triple, **rest):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(hosts, "_on_tpu", lambda: True)
    if said is None:
        with pytest.raises(HostError, match="cannot be joined: the coordinator has gone"):
            hosts.join()
    else:
        hosts.join()
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment, all_devices",
    [
        ({}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
    ],
)
def test_a_process_alone_on_its_machine_has_all_its_devices(monkeypatch, environment, all_devices):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._local_devices() == ([] if all_devices else None)
