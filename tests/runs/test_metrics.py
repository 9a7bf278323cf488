"""The logs and the progress of a run.

The logs hold each step once, whatever happened to the run, and progress counts what was done.

TensorBoard events are read back with TensorBoard's own reader.
"""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ddpm_jax import progress as progress_module
from ddpm_jax.images import encode_png
from ddpm_jax.progress import Progress
from ddpm_jax.runs.metrics import MetricWriter, read_metrics


def strict_lines(workdir):
    """metrics.jsonl as a parser reads it that knows the JSON standard only."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def curve(workdir, tag):
    """{step: value} as TensorBoard shows it; a step shown twice fails."""
    events = EventAccumulator(str(workdir)).Reload()
    points = [
        (point.step, make_ndarray(point.tensor_proto).item()) for point in events.Tensors(tag)
    ]
    assert len(points) == len(dict(points)), points
    return dict(points)


# ------------------------------------------------------------------------------------ metrics.jsonl


def test_one_line_a_call_in_strict_json(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write_scalars(1, {"loss": 0.25, "skipped": 3})
        assert len(strict_lines(tmp_path / "run")) == 1  # there before the file is closed
        writer.write_scalars(
            np.int64(2),
            {"loss": jnp.float32(0.5), "rate": np.float64(1e-4), "half": jnp.bfloat16(2)},
        )
    assert strict_lines(tmp_path / "run") == [
        {"step": 1, "loss": 0.25, "skipped": 3},
        {"step": 2, "loss": 0.5, "rate": 1e-4, "half": 2.0},
    ]


def test_nan_and_infinities_are_strict_json_and_come_back(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(7, {name: np.float32(value) for name, value in values.items()})
    (line,) = strict_lines(tmp_path)
    (row,) = read_metrics(tmp_path)
    for name, value in values.items():
        np.testing.assert_equal(float(line[name]), value)
        np.testing.assert_equal(row[name], value)


@pytest.mark.parametrize("value", [np.zeros(8), "fast", None, 1j, np.zeros(0)])
def test_a_value_that_is_not_one_number_is_named(tmp_path, value):
    with (
        MetricWriter(tmp_path) as writer,
        pytest.raises(ValueError, match="write_scalars: grads must be one number"),
    ):
        writer.write_scalars(1, {"loss": 1.0, "grads": value})
    assert strict_lines(tmp_path) == []


def test_the_name_step_is_taken(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="name step is taken"):
        writer.write_scalars(1, {"step": 2})


def test_a_process_that_is_not_the_first_touches_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_images(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
        writer.truncate_after(0)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_back_all_that_was_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": 1 / step, "skipped": 0})
        writer.write_images(20, {"samples": image, "grey": image[:, :, :1]})
    assert curve(tmp_path, "loss") == {
        step: pytest.approx(1 / step, rel=1e-6) for step in (10, 20, 30)
    }
    events = EventAccumulator(str(tmp_path)).Reload()
    (shown,) = events.Tensors("samples")
    assert shown.step == 20
    assert list(make_ndarray(shown.tensor_proto)) == [
        b"4",
        b"5",
        encode_png(image),
    ]  # width, height, file


# ----------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_has_each_step_once(tmp_path):
    """Killed at step 10, resumed from the checkpoint of step 6, twice.

    Every log shows one curve, of the last run.
    """
    for attempt, (start, end) in enumerate([(0, 10), (6, 10), (6, 12)]):
        with MetricWriter(tmp_path) as writer:
            writer.truncate_after(start)
            for step in range(start + 1, end + 1):
                writer.write_scalars(step, {"loss": float(attempt)})
    expected = {step: 0.0 for step in range(1, 7)} | {step: 2.0 for step in range(7, 13)}
    assert {row["step"]: row["loss"] for row in strict_lines(tmp_path)} == expected
    assert len(strict_lines(tmp_path)) == 12
    assert curve(tmp_path, "loss") == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_a_writer_that_has_written_can_still_go_back(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write_scalars(step, {"loss": 0.0})
        writer.truncate_after(1)
        writer.write_scalars(2, {"loss": 1.0})
    assert curve(tmp_path, "loss") == {1: 0.0, 2: 1.0}
    assert strict_lines(tmp_path) == [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 1.0}]


def test_a_torn_last_line_is_dropped_and_not_appended_to(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(2, {"loss": 2.0})
    assert strict_lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_damaged_lines_are_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 1.0}\n\0\0\0\0\n[3]\n{"step": 2, "loss": 2.0}\n'
    )
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(5)
    assert [row["step"] for row in strict_lines(tmp_path)] == [1, 2]
    assert "metrics.jsonl: 2 damaged lines left out" in caplog.text


def test_a_run_that_wrote_nothing_yet_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(0)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # no event file before the first event


def test_kill_9_loses_no_line(tmp_path):
    """Whatever the writer had returned from is on disk; the next run reads it and goes on."""
    code = (
        "import sys; from ddpm_jax.runs.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(10**9):\n"
        "    writer.write_scalars(step, {'loss': step / 7}); print(step, flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        seen = [int(child.stdout.readline()) for _ in range(200)]
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().splitlines()
        child.stdout.close()
        child.wait()
    returned = len(seen) + len([line for line in rest if line.isdigit()])
    MetricWriter(tmp_path).close()
    steps = [row["step"] for row in strict_lines(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= returned - 1  # the last number printed may itself be torn


@pytest.fixture
def limit_file_size():
    """Makes writes beyond a size fail as on a full disk.

    The write that crosses it is cut short, the next refused.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_one_line_naming_the_file(tmp_path, limit_file_size):
    old = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1000))
    (tmp_path / "metrics.jsonl").write_text(old)
    with MetricWriter(tmp_path) as writer:
        limit_file_size(len(old) + 100)
        with pytest.raises(OSError, match="could not be written: .*metrics.jsonl") as caught:
            for step in range(1000, 1100):
                writer.write_scalars(step, {"loss": 0.5})
        limit_file_size(resource.RLIM_INFINITY)
    assert "\n" not in str(caught.value)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert (
        not (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    )  # the test is about a line cut short
    with MetricWriter(tmp_path) as writer:
        writer.write_scalars(step, {"loss": 0.5})
    assert [row["step"] for row in strict_lines(tmp_path)] == list(range(step + 1))


def test_an_event_file_that_cannot_grow_is_named(tmp_path, limit_file_size):
    writer = MetricWriter(tmp_path)
    limit_file_size(5000)
    with pytest.raises(OSError, match="could not be written: .*events.out.tfevents"):
        for step in range(100):
            writer.write_images(step, {"samples": np.zeros((8, 8, 3), np.uint8)})
    limit_file_size(resource.RLIM_INFINITY)
    writer.close()


# ----------------------------------------------------------------------------------------- progress


class Clock:
    """Time that passes only when the test says so."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_plain_lines_come_at_intervals_with_rates_of_this_run(capsys, clock):
    """5000 steps came from an earlier run: they count as done, and not as fast."""
    with Progress(20_000, initial=5_000, scale=128, every=20) as progress:
        for _ in range(100):
            clock.now += 0.5
            progress.update(loss=0.03125)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "step 5,040/20,000  2 steps/s  256 images/s  loss 0.03125  2:04:40 left",
            "step 5,080/20,000  2 steps/s  256 images/s  loss 0.03125  2:04:20 left",
        ]
    assert (
        capsys.readouterr().err
        == "step 5,100/20,000  2 steps/s  256 images/s  loss 0.03125  2:04:10 left\n"
    )


def test_a_slow_first_step_does_not_spoil_the_time_left(capsys, clock):
    """Five minutes of compilation, then 2 steps a second with a pause.

    The pause counts, the compilation does not.
    """
    with Progress(1000, every=20) as progress:
        clock.now += 300
        progress.update()
        assert capsys.readouterr().err == "step 1/1,000\n"
        for _ in range(40):
            clock.now += 0.5
            progress.update()
        assert capsys.readouterr().err == "step 41/1,000  2 steps/s  08:00 left\n"
        clock.now += 20
        progress.update(40)
        assert capsys.readouterr().err == "step 81/1,000  2 steps/s  07:40 left\n"
        clock.now += 40
        progress.update(20)
        assert (
            capsys.readouterr().err == "step 101/1,000  0.5 steps/s  11:59 left\n"
        )  # 100 steps in 80 s so far


def test_the_end_is_told_once_and_has_no_time_left(capsys, clock):
    with Progress(10, unit="file") as progress:
        clock.now += 4
        progress.update(10)
        progress.close()
    assert capsys.readouterr().err == "file 10/10  2.5 files/s\n"


def test_without_a_total_there_is_a_count_and_a_rate(capsys, clock):
    with Progress(None, unit="image") as progress:
        clock.now += 2
        progress.update(5000, source="folder")
    assert capsys.readouterr().err == "image 5,000  2,500 images/s  source folder\n"


def test_a_silent_process_and_an_idle_loop_print_nothing(capsys):
    with Progress(10, enabled=False) as progress:
        progress.update(5)
        progress.write("a line")
    with Progress(10):
        pass
    assert capsys.readouterr().err == ""


def test_values_are_formatted_only_when_a_line_is_due(capsys, clock):
    """A loss still on the device must not be waited for at every step."""

    class Pending:
        asked = 0

        def __float__(self):
            Pending.asked += 1
            return 0.5

    with Progress(1000, every=10) as progress:
        for _ in range(99):
            clock.now += 0.1
            progress.update(loss=Pending())
        assert Pending.asked == 0
    assert Pending.asked == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_one_bar_redraws_itself(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(30, initial=10, scale=4) as progress:
        for _ in range(20):
            time.sleep(0.06)
            progress.update(loss=0.25)
        progress.write("a line of its own")
    text = terminal.getvalue()
    assert "\r" in text and "\na line of its own\n" in text.replace("\r", "\n")
    last = text.rstrip().rsplit("\r", 1)[-1]
    assert (
        last.startswith("100%|")
        and "step 30/30" in last
        and "loss 0.25" in last
        and "left" not in last
    )
    rate = float(last.split("step 30/30")[1].split()[0])
    assert 8 < rate < 17  # 20 steps of 60 ms; with the 10 steps of before it would be 25
    assert 4 * rate == pytest.approx(float(last.split(" steps/s")[1].split()[0]), abs=3)
