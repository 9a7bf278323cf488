"""The first hour on a device: its stages in their order, each once, whatever cuts a call off."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.cli import first_hour as command
from ddpm_jax.cli import flags
from ddpm_jax.config import load_config, save_json
from ddpm_jax.errors import DataError, LedgerError
from ddpm_jax.reproduction import agreement, first_hour, ledger, processes, provenance, rows
from ddpm_jax.reproduction.hour import STATE, HourOptions
from ddpm_jax.reproduction.processes import Stopped
from ddpm_jax.reproduction.speed_page import BEGIN, END, launches, speed_table, write_table
from tests.support.processes import ROOT, assert_bit_equal, final_state, finish, script

PAPER = ledger.read_json(rows.ROOT / "benchmarks" / "paper.json")
# What the commands of a whole hour are, in their order; agreement and speed have two each.
ORDER = ["agreement"] * 2 + ["benchmark"] * 2 + ["train", "sample", "evaluate", "evaluate"]


class Commands:
    """Stand in for the commands: leave the files that they would, and be cut off where one says.

    Args:
      cut: the number of the command, counted from 0 over all calls, that does not come to its end.
      how: None where its time is over, or the exception that ends the call.
    """

    def __init__(self, options: HourOptions, cut: int | None = None, how=None) -> None:
        self.options, self.cut, self.how = options, cut, how
        self.ran: list[str] = []

    def __call__(self, words, seconds, environment=None):
        name = "agreement" if "agreement" in words[1] else words[2]
        self.ran.append(name)
        cut = len(self.ran) - 1 == self.cut
        if cut and name != "train":
            if self.how:
                raise self.how
            return None
        flag = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        getattr(self, name)(words, flag)
        if cut and self.how:
            raise self.how
        return None if cut else 0

    def agreement(self, words, flag):
        path = Path(words[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{f"{dtype} losses": np.ones(3) for dtype in agreement.TOLERANCES})

    def benchmark(self, words, flag):
        timed = {"ours": {"median_ms": 12.5}, "images_per_s": 10240.0, "flop_utilisation": 0.48}
        timed["diffusers eager"] = {"median_ms": 25.0, "ratio": {"median": 0.5}}
        result = {"config": flag["config"], "dtype": "bfloat16", "batch_size": 128}
        result |= {"machine": {"devices": ["NVIDIA H100"]}, flag["what"].split(",")[0]: timed}
        path = Path(flag["output"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))

    def train(self, words, flag):
        workdir = Path(flag["workdir"])
        (workdir / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(save_json(load_config("configs/digits.py")))

    def sample(self, words, flag):
        assert flag["step"] == "3"

    def evaluate(self, words, flag):
        record = {"metric": flag["metrics"], "step": 3, "value": 1.5}
        other = {"metric": "coding", "step": 3}  # which the user had measured
        with (Path(flag["workdir"]) / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n" + json.dumps(other) + "\n")


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """(options, how to run a call with these commands) of a rehearsal."""
    monkeypatch.setattr(provenance, "device", lambda: "1 x NVIDIA H100")
    options = HourOptions(scale="small", runs=tmp_path, batch_sizes=(128,))

    def spend(commands: Commands) -> int:
        monkeypatch.setattr(processes, "call", commands)
        return first_hour.spend(PAPER, options)

    return options, spend


def test_an_hour_has_its_stages_in_their_order(hour, capsys):
    options, spend = hour
    commands = Commands(options)
    assert spend(commands) == 0
    assert commands.ran == ORDER
    records = ledger.read_records(options.results)
    assert [(r["row"], r["scale"], r["trained"]) for r in records] == [
        ("eps_simple", "hour", "step 3")
    ] * 2  # no cell of a table is of this scale
    assert "| 1 x NVIDIA H100 | cifar10, bfloat16 | 128 | train | 12.5 |" in (
        options.page.read_text()
    )
    assert "ddpm reproduce --row=eps_simple --scale=small" in capsys.readouterr().out
    assert spend(again := Commands(options)) == 0 and again.ran == []


@pytest.mark.parametrize("how", [None, Stopped(signal.SIGTERM), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("cut", range(len(ORDER)), ids=lambda n: f"{n}-{ORDER[n]}")
def test_what_is_cut_off_is_all_that_runs_again(hour, capsys, cut, how):
    """The second call begins with the command that was cut off, and ends as an uncut hour does."""
    options, spend = hour
    first, second = Commands(options, cut, how), Commands(options)
    if isinstance(how, KeyboardInterrupt):  # as anything that no stage expects
        with pytest.raises(KeyboardInterrupt):
            spend(first)
    else:
        assert spend(first) == (143 if how else 0)
        said = capsys.readouterr()
        assert ("the same command goes on") in said.out + said.err
    assert spend(second) == 0
    assert first.ran == ORDER[: cut + 1] and second.ran == ORDER[cut:]
    assert len(ledger.read_records(options.results)) == 2
    state = json.loads((options.runs / STATE).read_text())
    assert state["done"]["train"]["ended"] and state["done"]["evaluate"]["step"] == 3


def test_what_one_device_measured_is_not_said_of_the_next(hour, monkeypatch):
    """The call ends between two evaluations, and the next one finds itself on another device."""
    options, spend = hour
    assert spend(Commands(options, cut=7)) == 0
    monkeypatch.setattr(provenance, "device", lambda: "1 x NVIDIA H200")
    assert spend(Commands(options)) == 0
    records = ledger.read_records(options.results)
    assert [(record["metric"], record["device"]) for record in records] == [
        ("nll", "1 x NVIDIA H100"),
        ("pixels", "1 x NVIDIA H200"),
    ]


def test_a_device_that_computes_something_else_ends_the_hour(hour):
    options, spend = hour
    commands = Commands(options)

    def spoiled(words, flag):
        Commands.agreement(commands, words, flag)
        if words[2].endswith("device.npz"):
            np.savez(
                words[2], **{"float32 losses": np.ones(3) + 2e-4, "bfloat16 losses": np.ones(3)}
            )

    commands.agreement = spoiled
    for _ in range(2):  # computed anew
        with pytest.raises(LedgerError, match="NVIDIA H100 is not what a CPU computes: float32"):
            spend(commands)
    assert commands.ran == ["agreement"] * 4


@pytest.mark.parametrize("ours_too", [False, True])
def test_a_rival_that_fails_does_not_hold_up_the_training(hour, monkeypatch, capsys, ours_too):
    """PyTorch may lack a compiler or memory at every call: ours is timed alone, or not at all."""
    options, spend = hour
    monkeypatch.setattr(first_hour.importlib.util, "find_spec", lambda name: name)
    commands = Commands(options)

    def failing(words, flag):
        if ours_too or "--against=diffusers" in words:
            raise LedgerError("this command ended with code 1")
        Commands.benchmark(commands, words, flag)

    commands.benchmark = failing
    assert spend(commands) == 0
    assert commands.ran == ["agreement"] * 2 + ["benchmark"] * 4 + ORDER[4:]
    said = capsys.readouterr()
    assert "ended with code 1; timed alone" in said.err + said.out
    failed = "error the benchmark failed" in said.out
    assert failed == ours_too == ("ended with code 1; not timed" in said.err + said.out)
    assert spend(again := Commands(options)) == 0 and again.ran == []


def test_a_number_that_is_not_finite_is_far_off(tmp_path):
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, value in zip(paths, (np.nan, 1.0)):
        np.savez(path, **{"bfloat16 samples": np.full(2, value)})
    (difference,) = agreement.differences(*paths)
    assert difference.value == np.inf and not difference.within


def test_a_call_with_other_options_or_a_damaged_state_is_refused(hour):
    options, spend = hour
    spend(Commands(options, 0))
    (options.runs / STATE).write_text("{}")
    with pytest.raises(LedgerError, match="first_hour.json cannot be read"):
        spend(Commands(options))
    (options.runs / STATE).unlink()
    wrong = HourOptions(runs=options.runs, overrides=("train.batch_size=64",))
    with pytest.raises(LedgerError, match="train.batch_size: 128 -> 64: at scale=full a row is"):
        first_hour.spend(PAPER, wrong)
    spend(Commands(options, 2))
    others = HourOptions(scale="small", runs=options.runs, batch_sizes=(64,))
    with pytest.raises(LedgerError, match=r"batch_sizes=\[128\] in .*, now \[64\]"):
        first_hour.spend(PAPER, others)


@pytest.fixture
def full(tmp_path):
    """Options of an hour at full scale, whose data set is prepared."""
    info = tmp_path / "data" / "cifar10" / "3.0.2" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.write_text("{}")
    return HourOptions(runs=tmp_path / "runs", data_dir=tmp_path / "data")


def test_an_hour_on_the_cpu_alone_is_refused(full, monkeypatch):
    """JAX falls back to it by itself, and would then agree with itself."""
    monkeypatch.setattr(processes, "call", None)
    monkeypatch.setattr(provenance, "device", lambda: "1 x cpu")
    with pytest.raises(LedgerError, match=r"no accelerator: pip install .* -e '\.\[cuda\]'"):
        first_hour.spend(PAPER, full)
    assert not full.runs.exists()


def test_what_a_later_stage_needs_is_looked_for_first(full, monkeypatch):
    monkeypatch.setattr(processes, "call", None)
    missing = full.runs / "inception.npz"
    with pytest.raises(LedgerError, match=f"inception={missing}: no such file"):
        first_hour.spend(PAPER, dataclasses.replace(full, inception=missing))
    with pytest.raises(DataError, match="'cifar10' is not prepared in .*: run "):
        first_hour.spend(PAPER, dataclasses.replace(full, data_dir=full.runs))


@pytest.mark.parametrize(
    "config, devices, what, expected",
    [
        ("cifar10.py", 1, "train", 1181),
        ("cifar10.py", 8, "sample", None),  # of eight none was compiled
        ("improved_ddpm.py:4k_cosine_vlb", 1, "sample", 582),
        ("improved_ddpm.py:1k_linear_simple", 1, "sample", None),
    ],
)
def test_launches_are_those_of_the_variant_on_as_many_devices(
    config, devices, what, expected, tmp_path
):
    machine = {"devices": ["NVIDIA H100 80GB HBM3"] * devices}
    timed = {"ours": {"median_ms": 1.0}, "images_per_s": 128e3, "flop_utilisation": 0.5}
    result = {"config": str(rows.ROOT / "configs" / config), "machine": machine, what: timed}
    result |= {"batch_size": 128, "dtype": "bfloat16"}
    (tmp_path / f"128_{what}.json").write_text(json.dumps(result))
    row = speed_table(tmp_path).splitlines()[-1]
    assert f"| {config.replace('.py', '')}, bfloat16 |" in row
    assert f"| {expected:,} |" in row if expected else "| not compiled |" in row


def test_eight_devices_have_the_launches_of_eight():
    result = {"config": "configs/cifar10.py", "batch_size": 1024}
    for count, expected in ((1, "1,248"), (8, "1,185")):
        machine = {"devices": ["NVIDIA H100"] * count}
        found = launches(result | {"machine": machine}, "train", f"{count} x NVIDIA H100")
        assert found == expected


def test_a_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(page, "| new |")
    assert page.read_text() == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    page.write_text("before\n")
    with pytest.raises(LedgerError, match="page.md: the lines .* are gone"):
        write_table(page, "| new |")
    assert (ROOT / "docs" / "performance.md").read_text().count(BEGIN) == 1


def test_defaults_are_those_of_the_flags():
    assert flags.fill(HourOptions, command.parser().parse_args([])) == HourOptions()


@pytest.mark.parametrize("ignores", [False, True])
def test_a_command_that_is_out_of_time_is_asked_to_stop_once(tmp_path, monkeypatch, ignores):
    """It may take its time to save; one that does not end is killed."""
    monkeypatch.setattr(processes, "GRACE", 1.0 if ignores else 60.0)
    code = (
        "import signal, sys, time\n"
        f"file = open({str(tmp_path / 'log')!r}, 'w')\n"
        "def stop(number, frame):\n"
        "    file.write('asked '); file.flush()\n"
        f"    if not {ignores}: time.sleep(0.5); file.write('saved'); file.close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "file.write('ready '); file.flush()\n"
        "while True: time.sleep(0.01)\n"
    )

    class Process(subprocess.Popen):
        """Its time is over as soon as it is ready, however long a busy machine takes to start it."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout != 3:
                return super().wait(timeout)
            while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Process)
        assert processes.call(["-c", code], 3) is None
    assert (tmp_path / "log").read_text() == "ready asked " + "saved" * (not ignores)
    with pytest.raises(LedgerError, match="ended with code 3"):
        processes.call(["-c", "raise SystemExit(3)"], 30)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="Linux' util-linux is not here")
def test_a_command_ends_when_its_parent_is_killed(tmp_path):
    """A kill leaves the parent no time to say so: the kernel does."""
    log = tmp_path / "log"
    child = (
        "import pathlib, signal, sys, time\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "def stop(number, frame): log.write_text('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "log.write_text('ready')\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from ddpm_jax.reproduction import processes\n"
            "processes.call(['-c', sys.argv[1]], 60)",
            child,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    _wait_for(log, "ready")
    parent.kill()
    parent.wait()
    _wait_for(log, "saved")


def _wait_for(log: Path, text: str) -> None:
    """Return when a file has the text; fail after a minute."""
    end = time.monotonic() + 60
    while not log.exists() or log.read_text() != text:
        assert time.monotonic() < end, f"{text} was not written"
        time.sleep(0.01)


@pytest.mark.slow
def test_the_hour_rehearsed_and_interrupted_at_every_stage(tmp_path):
    """Real commands and real signals: SIGTERM and SIGKILL in turn when a stage has begun."""
    tiny = ["model.base_channels=8", "model.channel_mult=(1,)", "model.blocks_per_level=1"]
    tiny += ["model.attention_resolutions=()", "diffusion.timesteps=100", "train.steps=40"]
    tiny += ["train.checkpoint_every=10", "train.log_every=10", "train.eval_images=20"]
    options = ["--scale=small", f"--runs={tmp_path}", "--batch_sizes=8", "--rounds=1"]
    options += ["--minutes=60", "--train_minutes=10", *(f"--config.{item}" for item in tiny)]
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile takes minutes: PyTorch's to test
    environment["OMP_NUM_THREADS"] = "1"  # its threads spin, and another worker has a core
    numbers = itertools.cycle([signal.SIGTERM, signal.SIGKILL])
    for stage in ("agreement", "benchmark", "train", "sample", "evaluate"):
        process = script("first_hour.py", *options, environment=environment)
        for line in process.stdout:
            if line.startswith("python -m") and stage in line:
                break
        else:
            raise AssertionError(f"{stage} never came: {finish(process)[2][-2000:]}")
        time.sleep(1)
        process.send_signal(number := next(numbers))
        code, _, said = finish(process, 600)
        assert code == (143 if number == signal.SIGTERM else -9), said
    code, out, said = finish(script("first_hour.py", *options, environment=environment), 600)
    assert code == 0 and "next: the row's own evaluations" in out, said
    records = ledger.read_records(tmp_path / "reproduction.jsonl")
    assert {record["metric"] for record in records} == {"nll", "pixels"}
    workdir = tmp_path / "small" / "eps_simple"
    config = load_config(workdir / "config.json")
    flags_of = [f"--config={workdir / 'config.json'}", f"--workdir={tmp_path / 'whole'}"]
    code, _, said = finish(script("train.py", *flags_of, environment=environment), 600)
    assert code == 0, said
    assert_bit_equal(final_state(config, workdir), final_state(config, tmp_path / "whole"))


@pytest.mark.slow
def test_the_devices_compute_what_one_cpu_does(tmp_path):
    """Losses, gradients, updates and samples on four devices, in float32."""
    import jax

    from ddpm_jax.parallel.devices import Devices

    config = agreement.tiny_config("configs/cifar10.py", ("model.dropout=0.0",), "float32")
    one, four = (agreement.compute(config, Devices(jax.devices()[:count])) for count in (1, 4))
    assert set(one) == {"losses", "gradients", "updates", "metrics", "samples"}
    for name, values in one.items():
        assert np.linalg.norm(values) > 0, name
        distance = np.linalg.norm(four[name] - values) / np.linalg.norm(values)
        assert distance < agreement.TOLERANCES["float32"] / 10, name
    assert np.abs(one["samples"]).max() <= 1 and one["samples"].shape == (8, 8, 8, 1)
