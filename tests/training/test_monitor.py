"""The lines of the log, from the metrics of single steps."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import images
from ddpm_jax import progress as progress_module
from ddpm_jax.data.source import ArraySource
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import waiting
from ddpm_jax.runs.metrics import MetricWriter
from ddpm_jax.training import monitor
from ddpm_jax.training.monitor import Diverged, Log
from tests.support.tiny import images as pictures
from tests.support.tiny import tiny_config


class Lines(list):
    """Stands in for the writer."""

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self.append((step, scalars))


class NoCheckpoints:
    def steps(self) -> list[int]:
        return []


def metrics(loss: float, streak: int = 0) -> dict[str, jnp.ndarray]:
    row = {"loss": loss, "skipped": float(streak > 0), "nonfinite_streak": streak}
    return {name: jnp.float32(value) for name, value in row.items()}


def test_a_line_has_the_means_of_finite_steps_and_counts_the_others() -> None:
    lines, config = Lines(), tiny_config(train={"max_nonfinite_steps": 3})
    with Log(config, lines, NoCheckpoints(), 0, enabled=False) as log:
        for step, (loss, streak) in enumerate(
            [(1.0, 0), (np.nan, 1), (np.inf, 2), (4.0, 0), (8.0, 0), (np.nan, 1)], 1
        ):
            log.add(step, metrics(loss, streak), flush=step in (4, 5, 6))
    assert [step for step, _ in lines] == [4, 5, 6]
    (_, first), (_, second), (_, third) = lines
    assert (first["loss"], first["skipped"], first["nonfinite_streak"]) == (2.5, 2, 2)
    assert (second["loss"], second["skipped"], second["nonfinite_streak"]) == (8.0, 0, 0)
    assert np.isnan(third["loss"]) and third["skipped"] == 1
    for line in (first, second, third):
        images = line["steps_per_second"] * config.train.batch_size
        np.testing.assert_allclose(line["images_per_second"], images)


@pytest.mark.parametrize("streak, ends", [(2, False), (3, True), (4, True)])
def test_a_run_diverges_at_so_many_steps_in_a_row(streak: int, ends: bool) -> None:
    lines, config = Lines(), tiny_config(train={"max_nonfinite_steps": 3})
    with Log(config, lines, NoCheckpoints(), 0, enabled=False) as log:
        if ends:
            with pytest.raises(Diverged, match=f"{streak} steps in a row up to step 9"):
                log.add(9, metrics(np.nan, streak), flush=True)
        else:
            log.add(9, metrics(np.nan, streak), flush=True)
    assert len(lines) == 1  # the line is written all the same


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclasses.dataclass
class Pending:
    """A number that a device has at the time `at`; who fetches it waits until then."""

    clock: Clock
    at: float
    value: float

    def is_ready(self) -> bool:
        return self.clock.now >= self.at

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.clock.now = max(self.clock.now, self.at)
        return np.asarray(self.value, dtype or np.float32)


class SlowDevice:
    """Takes `seconds` a step, one after the other; starting one costs its host a hundredth."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.free, self.ends = clock, seconds, clock.now, []

    def start(self) -> dict[str, Pending]:
        self.clock.now += 0.01
        self.free = max(self.free, self.clock.now) + self.seconds
        self.ends.append(self.free)
        row = {"loss": 0.5, "skipped": 0.0, "nonfinite_streak": 0.0}
        return {name: Pending(self.clock, self.free, value) for name, value in row.items()}

    def done(self) -> int:
        return sum(end <= self.clock.now for end in self.ends)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    monkeypatch.setattr(monitor, "time", clock)
    return clock


@pytest.mark.parametrize("ahead", [0.0, 0.9, 3.0])
def test_rates_are_those_of_a_device_that_the_loop_runs_ahead_of(clock, capsys, ahead) -> None:
    """Two seconds a step, whatever the host does meanwhile: no step counts before its end.

    The host takes `ahead` seconds between two starts: it hands over a hundred steps at once, or
    more slowly, or it is what makes the run slow.
    """
    device, lines = SlowDevice(clock, 2.0), Lines()
    config = tiny_config(train={"steps": 400, "batch_size": 16})
    seen = []
    with Log(config, lines, NoCheckpoints(), 0, enabled=True) as log:
        clock.now += 60  # a compiler
        device.free = clock.now
        for step in range(1, 401):
            clock.now += ahead
            metrics = device.start()
            log.add(step, metrics, flush=step % 100 == 0)
            for line in capsys.readouterr().err.splitlines():
                seen.append((device.done(), line))
    period = max(2.0, ahead + 0.01)
    assert len(seen) >= 4
    for done, line in seen[1:]:
        words = line.split()
        assert words[1] == f"{done:,}/400"
        rate, left = float(words[2]), words[-2]
        # Of the 20 seconds between two lines, one step more or less.
        assert rate == pytest.approx(1 / period, abs=0.051)
        assert float(words[4]) == pytest.approx(16 / period, abs=16 * 0.051 + 0.5)
        if done < 400:
            *_, minutes, seconds = (int(part) for part in left.split(":"))
            assert 60 * minutes + seconds == pytest.approx((400 - done) * period, rel=0.03, abs=3)
    for _, scalars in lines[1:]:
        assert scalars["steps_per_second"] == pytest.approx(1 / period, rel=0.02)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_of_a_terminal_shows_steps_that_are_done(clock, monkeypatch) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    device = SlowDevice(clock, 2.0)
    bars = []
    with Log(tiny_config(train={"steps": 300}), Lines(), NoCheckpoints(), 0, enabled=True) as log:
        bar = log._progress._bar
        bar._time = clock.monotonic
        bar.start_t = bar.last_print_t = clock.now
        clock.now += 60
        device.free = clock.now
        for step in range(1, 301):
            clock.now += 0.9
            log.add(step, device.start(), flush=step % 100 == 0)
            bars.append((device.done(), bar.format_dict["line"]))
    for number, (done, line) in enumerate(bars):
        assert line.startswith(f"step {done:,}/300")
        if number > 10:
            assert float(line.split()[2]) == pytest.approx(0.5, rel=0.25)


def test_what_jax_hands_out_can_be_asked_whether_it_is_there() -> None:
    """The log asks real arrays, which say yes once they have been waited for."""
    value = jnp.ones(3) * 2
    value.block_until_ready()
    assert value.is_ready() is True


def test_a_grid_that_takes_its_time_says_so(monkeypatch, tmp_path, capsys) -> None:
    """The last step of a run draws one, and all steps of a chain take a CPU minutes."""

    class Slow:
        def draw(self, params, **inputs) -> np.ndarray:
            time.sleep(0.2)
            return np.zeros((4, 8, 8, 1), np.float32)

    monkeypatch.setattr(monitor, "build_generator", lambda *args, **options: Slow())
    monkeypatch.setattr(monitor, "waiting", functools.partial(waiting, every=0.05))
    with MetricWriter(tmp_path) as writer:
        grids = monitor.SampleGrids(tiny_config(), Devices(jax.devices()[:1]), tmp_path, writer)
        grids(250, {})
    assert re.search(
        r"^drawing the grid of step 250: \d+ s$", capsys.readouterr().err, re.MULTILINE
    )
    assert (tmp_path / "samples" / "step_0000250.png").is_file()


def test_a_grid_of_a_network_with_classes_has_all_of_them(tmp_path) -> None:
    """The network takes label k of three for an image of level k - 1, and none for an error."""

    def apply(params, x_t, t, labels, dropout) -> jnp.ndarray:
        return jnp.broadcast_to(labels[:, None, None, None] - 1.0, x_t.shape)

    class Shown:
        def write_images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
            self.grid = pictures["samples"]

    config = tiny_config(
        model={"num_classes": 3}, diffusion={"prediction": "x0"}, train={"sample_images": 5}
    )
    network, shown = Network(lambda key: {}, apply), Shown()
    devices = Devices(jax.devices()[:1])
    monitor.SampleGrids(config, devices, tmp_path, shown, network)(2, {})
    levels = np.array([0, 128, 255, 0, 128], np.uint8)[:, None, None, None]
    expected = images.grid(np.broadcast_to(levels, (5, 8, 8, 1)))
    assert np.abs(shown.grid.astype(int) - expected).max() <= 1


def test_the_held_out_loss_takes_a_microbatch_at_a_time() -> None:
    """What fits into memory in a step does so in between; the loss is that of whole batches."""

    class Spy:
        def __init__(self) -> None:
            self.source, self.sizes = ArraySource(pictures(tiny_config(), 20)), set()

        def __len__(self) -> int:
            return len(self.source)

        def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            self.sizes.add(len(indices))
            return self.source.read(indices)

    network = Network(lambda key: {}, lambda params, x_t, t, labels, dropout: 0.5 * x_t)
    devices, losses = Devices(jax.devices()[:2]), []
    for accumulation, size in ((1, 16), (4, 4)):
        config, spy = tiny_config(train={"accumulation": accumulation}), Spy()
        losses.append(monitor.HeldOut(config, devices, spy, network)({}))
        assert spy.sizes == {size}
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
