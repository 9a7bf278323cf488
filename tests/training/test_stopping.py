"""Which signals a training takes over."""

from __future__ import annotations

import concurrent.futures
import signal

import jax

from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.stopping import StopRequest


def handlers() -> list:
    return [signal.getsignal(number) for number in StopRequest.signals]


def test_signals_are_those_of_the_main_thread_alone() -> None:
    """A training in another thread goes on without them, and is never asked to stop."""
    before = handlers()

    def train() -> int:
        with StopRequest(Devices(jax.devices()[:1])) as stop:
            stop.listen()
            assert handlers() == before
            return stop.agreed()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(train).result() == 0
    with StopRequest(Devices(jax.devices()[:1])) as stop:
        stop.listen()
        assert handlers() != before
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert handlers() == before
