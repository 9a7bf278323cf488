"""What is refused at the edge of what is possible: numbers of hosts, devices and microbatches."""

from __future__ import annotations

import jax
import pytest

from ddpm_jax.errors import ConfigError, HostError
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices


@pytest.mark.parametrize("process_id", [-1, 2, 3])
def test_a_process_counts_below_their_number(process_id: int) -> None:
    with pytest.raises(HostError, match=rf"process_id={process_id}: must be in 0\.\.1"):
        hosts.join("127.0.0.1:1", 2, process_id, start_timeout=1)


@pytest.mark.parametrize("triple", [("a:1", 2, None), ("a:1", None, 0), (None, 2, 0)])
def test_the_three_numbers_of_hosts_come_together(triple: tuple) -> None:
    with pytest.raises(HostError, match="give all three, or none"):
        hosts.join(*triple, start_timeout=1)


@pytest.mark.parametrize("address", ["a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:b"])
def test_addresses_have_a_host_and_a_port(address: str) -> None:
    with pytest.raises(HostError, match="write HOST:PORT"):
        hosts.join(address, 2, 0, start_timeout=1)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_a_batch_divides_among_devices_times_microbatches(microbatches: int) -> None:
    devices = Devices(jax.devices()[:4])
    parts = 4 * microbatches
    for batch_size in range(1, 3 * parts + 1):
        if batch_size % parts == 0:
            devices.check_batch(batch_size, microbatches, "train.batch_size")
        else:
            with pytest.raises(ConfigError, match=f"batch_size={batch_size}: must be divisible"):
                devices.check_batch(batch_size, microbatches, "train.batch_size")
