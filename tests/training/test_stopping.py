"""Which signals a training takes over."""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.stopping import StopRequest

ONE = Devices(jax.devices()[:1])


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    before = handlers()
    yield
    for number, handler in zip(StopRequest.signals, before):
        signal.signal(number, handler)


def handlers() -> list:
    return [signal.getsignal(number) for number in StopRequest.signals]


def test_signals_are_those_of_the_main_thread_alone() -> None:
    """A training in another thread goes on without them, and is never asked to stop."""
    before = handlers()

    def train() -> int:
        with StopRequest(ONE) as stop:
            stop.listen()
            assert handlers() == before
            return stop.agreed()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(train).result() == 0
    with StopRequest(ONE) as stop:
        stop.listen()
        assert handlers() != before
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert handlers() == before


def test_under_nohup_a_run_goes_on_when_its_terminal_closes() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = handlers()
    with StopRequest(ONE) as stop:
        stop.listen()
        signal.raise_signal(signal.SIGHUP)
        assert stop.agreed() == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
    assert handlers() == before


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_second_signal_acts_at_once(number: int) -> None:
    acted: list[int] = []
    signal.signal(number, lambda number, frame: acted.append(number))
    with StopRequest(ONE) as stop:
        stop.listen()
        signal.raise_signal(number)
        assert acted == [] and stop.agreed() == number
        signal.raise_signal(number)
        assert acted == [number]


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_signal_may_come_the_moment_it_is_taken_over(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are not taken over yet, and its own handler is known."""
    take_over, came = signal.signal, []

    def at_once(taken: int, handler: Callable | int) -> Any:
        before = take_over(taken, handler)
        if taken == number and not came:
            came.append(taken)
            signal.raise_signal(number)
        return before

    before = handlers()
    with StopRequest(ONE) as stop:
        monkeypatch.setattr(signal, "signal", at_once)
        stop.listen()
        monkeypatch.undo()
        assert came == [number] and stop.agreed() == number
    assert handlers() == before
