"""How the rows of a batch are dealt out to devices and hosts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ddpm_jax.parallel.devices import Devices


@pytest.mark.parametrize("first, count", [(0, 2), (2, 4), (6, 2), (0, 8)])
def test_a_host_takes_the_rows_of_its_own_devices(first: int, count: int) -> None:
    """Of 24 rows on 8 devices each has 3, in the order of the devices."""
    devices = Devices(jax.devices()[:8])
    devices.local = devices.devices[first : first + count]
    rows = devices.own_rows({"x": np.arange(24)})["x"]
    np.testing.assert_array_equal(rows, np.arange(3 * first, 3 * (first + count)))


def test_each_device_has_its_rows_and_they_come_back_in_order() -> None:
    devices = Devices(jax.devices()[:4])
    placed = devices.place({"x": np.arange(12)})["x"]
    assert placed.shape == (4, 3)
    for device, shard in zip(devices.devices, placed.addressable_shards):
        assert shard.device == device
    doubled = devices.map_batch(lambda factor, batch: factor * batch["x"])(2, {"x": placed})
    np.testing.assert_array_equal(devices.rows(doubled), 2 * np.arange(12))
