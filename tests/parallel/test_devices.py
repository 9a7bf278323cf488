"""How the rows of a batch are dealt out to devices and hosts."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddpm_jax.errors import HostError
from ddpm_jax.parallel.devices import AXIS, Devices, by_pmap, by_shard_map
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import build_train_step
from tests.support.processes import assert_bit_equal
from tests.support.tiny import images, tiny_config


@pytest.mark.parametrize("first, count", [(0, 2), (2, 4), (6, 2), (0, 8)])
def test_a_host_takes_the_rows_of_its_own_devices(first: int, count: int) -> None:
    """Of 24 rows on 8 devices each has 3, in the order of the devices."""
    devices = Devices(jax.devices()[:8])
    devices.local = devices.devices[first : first + count]
    rows = devices.own_rows({"x": np.arange(24)})["x"]
    np.testing.assert_array_equal(rows, np.arange(3 * first, 3 * (first + count)))


def test_hosts_with_unlike_numbers_of_devices_are_refused() -> None:
    """Their shares of a batch are alike: rows would go to the devices of other rows."""
    devices = Devices(jax.devices()[:1])
    devices.devices = tuple(SimpleNamespace(process_index=host) for host in (0, 0, 1, 1))
    devices.check_batch(16, 1, "train.batch_size")
    devices.devices = tuple(SimpleNamespace(process_index=host) for host in (0, 0, 0, 1))
    with pytest.raises(HostError, match="the hosts have 3, 1 devices: start each with as many"):
        devices.check_batch(16, 1, "train.batch_size")


@pytest.mark.parametrize("way", [by_pmap, by_shard_map])
def test_each_device_has_its_rows_and_they_come_back_in_order(way) -> None:
    devices = Devices(jax.devices()[:4])
    placed = devices.place({"x": np.arange(12)})["x"]
    assert placed.shape == (4, 3)
    for device, shard in zip(devices.devices, placed.addressable_shards):
        assert shard.device == device
    mapped = way(lambda by, batch: by * batch["x"], devices.devices, out=0, donate=False)
    doubled = mapped(2, {"x": placed})
    assert doubled.shape == (4, 3)
    np.testing.assert_array_equal(devices.rows(doubled), 2 * np.arange(12))


def test_several_hosts_take_the_very_steps_of_one() -> None:
    """They map in another way: the same bits on every device, and the old state is given up."""
    config = tiny_config()
    devices = Devices(jax.devices()[:2])
    form = state_form(config, devices)
    step = build_train_step(config, form)
    several = by_shard_map(
        functools.partial(step, axis_name=AXIS), devices.devices, out=None, donate=True
    )
    ends = []
    for mapped in (devices.map_step(step), several):
        state = form.pack(devices.replicate(init_state(config)))
        for number in range(3):
            before = jax.tree.leaves(state)
            state, metrics = mapped(state, devices.place({"image": images(config, 16, number)}))
            assert all(leaf.is_deleted() for leaf in before)
        ends.append((state, metrics))
    assert_bit_equal(*ends)
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert_bit_equal(*([shard.data for shard in x.addressable_shards] for x in (one, other)))
