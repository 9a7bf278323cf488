"""A row on its way: commands of their own, and a parent that leaves the device to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.cli import flags, reproduce
from ddpm_jax.config import Config, load_config, override, save_json
from ddpm_jax.errors import LedgerError
from ddpm_jax.reproduction import ledger, provenance, rows
from ddpm_jax.reproduction.records import recorded
from ddpm_jax.reproduction.rows import ReproductionOptions
from ddpm_jax.weights.files import fingerprint

ROOT = Path(__file__).parents[2]
PAPER = ledger.read_json(ROOT / "benchmarks" / "paper.json")
ENVIRONMENT = {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
SAMPLING = {"sampler": "ancestral", "steps": 50, "spacing": "linspace", "clip": True}
OWN = [
    {"metric": "nll", "weights": "ema 0.99", "step": 3, "total": 5.0, "split": "test"}
    | {"num_images": 179, "num_timesteps": 20, "clip": True, "cdf": "tanh"}
    | {"curve": "evaluations/nll.csv", "timesteps": 1000},
    {"metric": "pixels", "weights": "ema 0.99", "step": 3, "value": 1.0, "num_images": 512}
    | {"samples": {"sampling": SAMPLING, "guidance": 1.0}}
    | {"reference": {"split": "train", "count": 1618}},
]
FOREIGN = {"metric": "FID", "value": 2.0, "data": "digits"}  # made with --samples: no step
OLD = OWN[0] | {"step": 2}

# A parent that runs a row. Its commands leave what the real ones would.
PARENT = """
import json, subprocess, sys
from pathlib import Path
from ddpm_jax.config import load_config, save_json
from ddpm_jax.reproduction import ledger, rows

folder, kept = Path(sys.argv[1]), json.loads(sys.argv[2])

def command(words, *limits, typed):
    if words[2] == "train":
        workdir = folder / "small" / "eps_simple"
        (workdir / "checkpoints" / "3").mkdir(parents=True)
        (workdir / "config.json").write_text(save_json(load_config("configs/digits.py")))
        (workdir / "evaluations").mkdir()
        (workdir / "evaluations" / "nll.csv").write_text("reverse_steps,rate,rmse\\n1000,3,1\\n")
    elif words[2] == "evaluate":
        with open(folder / "small" / "eps_simple" / "evaluations.jsonl", "a") as file:
            for record in kept:
                if f"--metrics={record['metric']}" in words:
                    file.write(json.dumps(record) + "\\n")
    print("ran", *words[:3], file=sys.stderr)
    print(*typed)

rows.call = command
subprocess.run = lambda words, **how: subprocess.CompletedProcess(words, 0, "8 x TPU v5 lite\\n", "")
options = rows.ReproductionOptions(runs=folder, results=folder / "results.jsonl")
rows.reproduce(ledger.read_json(rows.ROOT / "benchmarks/paper.json"), "eps_simple", options)
"""


def test_the_parent_opens_no_device(tmp_path):
    """It has a platform that does not exist: whatever asks JAX for devices ends it."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), json.dumps(OWN)]
    environment = os.environ | ENVIRONMENT
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ran = [line.split()[3] for line in process.stderr.splitlines() if "-m ddpm_jax.cli" in line]
    assert ran == ["train", "evaluate", "evaluate"]
    typed = [line.split()[:2] for line in process.stdout.splitlines()]
    assert typed == [["ddpm", name.replace("_", "-")] for name in ran]
    nll, pixels = ledger.read_records(tmp_path / "results.jsonl")
    for record in (nll, pixels):
        assert record["device"] == "8 x TPU v5 lite" and record["trained"] == "900 x 128"
        assert (record["row"], record["scale"], record["origin"]) == (
            "eps_simple",
            "small",
            "trained",
        )
    assert nll["curve_rows"]["1000"] == {"rate": 3.0, "rmse": 1.0}
    assert pixels["sampler"] == "ancestral" and pixels["steps"] == 50


def test_the_platform_that_does_not_exist_would_end_a_parent_that_looks():
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-c", provenance.DEVICE]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode != 0 and "nowhere" in process.stderr


def test_the_device_is_that_of_a_child(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    provenance.device.cache_clear()
    assert provenance.device() == "3 x cpu"
    provenance.device.cache_clear()
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    with pytest.raises(LedgerError, match="no device could be asked for its kind: .*nowhere"):
        provenance.device()
    provenance.device.cache_clear()


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "unknown"


def test_records_of_other_images_and_other_steps_are_left_out(tmp_path):
    with pytest.raises(LedgerError, match="has no checkpoint"):
        recorded(tmp_path)
    (tmp_path / "config.json").write_text(save_json(load_config("configs/digits.py")))
    for step in ("2", "3", "4.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    lines = [json.dumps(record) for record in (OLD, FOREIGN, OWN[1])]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    (record,) = recorded(tmp_path)
    assert record == OWN[1] | SAMPLING | {"timesteps": 1000}


# ------------------------------------------------------------------------------------ provenance


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """(workdir, evaluations that are to come, how to reproduce on a machine) of a trained run."""
    workdir, to_come = tmp_path / "runs" / "small" / "eps_simple", []
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "config.json").write_text(save_json(load_config("configs/digits.py")))
    (workdir / "evaluations").mkdir()
    (workdir / "evaluations" / "nll.csv").write_text("reverse_steps,rate,rmse\n1000,3,1\n")

    def run(command: list[str], dry: bool) -> None:
        if command[0] == "evaluate":
            with (workdir / "evaluations.jsonl").open("a") as file:
                file.write(json.dumps(next_one := to_come.pop(0)) + "\n")
            assert f"--metrics={next_one['metric']}" in command

    def reproduce_on(device: str, commit: str) -> list[dict]:
        monkeypatch.setattr(rows, "run", run)
        monkeypatch.setattr(provenance, "device", lambda: device)
        monkeypatch.setattr(provenance, "commit", lambda: commit)
        results = tmp_path / "results.jsonl"
        options = ReproductionOptions(runs=tmp_path / "runs", results=results)
        rows.reproduce(PAPER, "eps_simple", options)
        return ledger.read_records(results)

    return workdir, to_come, reproduce_on


def test_records_keep_the_machine_that_measured_them(machine):
    """A laptop at another commit measures nothing anew, and says nothing of what it finds."""
    _, to_come, reproduce_on = machine
    to_come += OWN
    records = reproduce_on("1 x H100", "1a2b3c4")
    assert [(one["device"], one["commit"]) for one in records] == [("1 x H100", "1a2b3c4")] * 2
    assert reproduce_on("1 x cpu", "5d6e7f8") == records


def test_what_is_measured_anew_has_the_machine_of_its_own(machine):
    workdir, to_come, reproduce_on = machine
    to_come += OWN
    reproduce_on("1 x H100", "1a2b3c4")
    (workdir / "evaluations.jsonl").write_text(json.dumps(OWN[0]) + "\n")
    to_come.append(OWN[1] | {"value": 2.0})
    found = {one["metric"]: one for one in reproduce_on("1 x cpu", "5d6e7f8")}
    assert (found["nll"]["device"], found["pixels"]["device"]) == ("1 x H100", "1 x cpu")
    assert (found["nll"]["commit"], found["pixels"]["commit"]) == ("1a2b3c4", "5d6e7f8")
    assert found["pixels"]["value"] == 2.0


def test_a_call_that_ends_early_has_noted_what_it_measured(machine):
    _, to_come, reproduce_on = machine
    to_come.append(OWN[0])  # the second evaluation finds none, and ends the call
    with pytest.raises(IndexError):
        reproduce_on("1 x H100", "1a2b3c4")
    to_come.append(OWN[1])
    records = reproduce_on("1 x cpu", "5d6e7f8")
    assert [one["device"] for one in records] == ["1 x H100", "1 x cpu"]


def test_nobody_is_said_to_have_measured_what_is_found(machine):
    workdir, _, reproduce_on = machine
    lines = [json.dumps(record) + "\n" for record in OWN]
    (workdir / "evaluations.jsonl").write_text("".join(lines))
    records = reproduce_on("1 x cpu", "5d6e7f8")
    assert [(one["device"], one["commit"]) for one in records] == [("unknown", "unknown")] * 2
    assert [one["trained"] for one in records] == ["900 x 128"] * 2


def test_an_estimate_stands_in_for_no_evaluation(machine, capsys):
    """Estimates of a few images lie in the run directory: they are passed over and not kept."""
    workdir, to_come, reproduce_on = machine
    unclipped = {"sampling": SAMPLING | {"clip": False}, "guidance": 1.0}
    few = {"split": "train", "count": 50, "whole": False}
    estimates = [OWN[0] | {"num_images": 5, "total": 9.0}, OWN[1] | {"weights": "raw"}]
    estimates += [OWN[1] | {"samples": unclipped}, OWN[1] | {"reference": few}]
    lines = [json.dumps(record) + "\n" for record in estimates]
    (workdir / "evaluations.jsonl").write_text("".join(lines))
    to_come += OWN
    assert [one.get("total", one.get("value")) for one in reproduce_on("a", "b")] == [5.0, 1.0]
    assert "stays empty" not in capsys.readouterr().err


def test_an_evaluation_that_fills_no_cell_says_why(machine, capsys):
    _, to_come, reproduce_on = machine
    to_come += [OWN[0] | {"num_images": 100}, OWN[1]]
    assert [one["metric"] for one in reproduce_on("a", "b")] == ["pixels"]
    said = capsys.readouterr()
    assert "nll: its cell stays empty: num_images is 100, not 179" in said.out + said.err


def test_a_cell_that_stays_empty_keeps_what_it_had(machine):
    """A call whose evaluations fit no cell takes nothing away."""
    workdir, to_come, reproduce_on = machine
    to_come += OWN
    before = reproduce_on("1 x H100", "1a2b3c4")
    (workdir / "evaluations.jsonl").write_text("")
    to_come += [OWN[0] | {"num_images": 100}, OWN[1] | {"num_images": 100}]
    assert reproduce_on("a", "b") == before


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_import_is_made_once_and_has_averages(weights, tmp_path, monkeypatch):
    """Its run directory takes no second one, and raw weights fill no cell of the papers."""
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"weights")
    options = ReproductionOptions(
        scale="full", imported=file, runs=tmp_path, results=tmp_path / "results.jsonl"
    )
    workdir, ran = tmp_path / "full" / "eps_simple_imported", []

    def run(command: list[str], dry: bool) -> None:
        ran.append(command[0])
        if command[0] == "import_weights":
            (workdir / "checkpoints" / "0").mkdir(parents=True)
            (workdir / "config.json").write_text(save_json(load_config("configs/cifar10.py")))
            record = {"source": str(file), "files": [fingerprint(file)]}
            record |= {"params": weights, "ema": weights}
            (workdir / "weights.json").write_text(json.dumps(record))
        elif command[0] == "evaluate":
            raise KeyboardInterrupt

    monkeypatch.setattr(rows, "run", run)
    for there in (True, True, False):
        if not there:
            file.unlink()
        said = (LedgerError, "x.ckpt has raw weights alone") if weights == "raw" else None
        error, message = said or (KeyboardInterrupt, None)
        with pytest.raises(error, match=message):
            rows.reproduce(PAPER, "eps_simple", options)
    assert ran == ["import_weights"] + ["evaluate"] * 3 * (weights == "ema")
    file.write_bytes(b"others!")
    with pytest.raises(
        LedgerError, match="imported from another x.ckpt than .*: name another runs"
    ):
        rows.reproduce(PAPER, "eps_simple", options)


def test_defaults_are_those_of_the_flags():
    parsed = reproduce.parser().parse_args([])
    assert flags.fill(ReproductionOptions, parsed) == ReproductionOptions()


@pytest.mark.parametrize("row", [name for name, row in PAPER["rows"].items() if "import" in row])
def test_an_import_is_told_the_images_of_its_row(row, tmp_path):
    """No file tells them, and not every name does: CelebA's is called ckpt.pth."""
    described = PAPER["rows"][row]
    options = ReproductionOptions(scale="full", imported=tmp_path / "ckpt.pth")
    _, *words = rows.network_command(described, tmp_path, options)
    told = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    config, expected = Config(), load_config(ROOT / described["config"])
    for item in told:
        override(config, item)
    for field in ("name", "crop", "in_memory"):
        assert getattr(config.data, field) == getattr(expected.data, field)


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows, "call", None)
    arguments = ["--row=eps_simple", "--scale=full", f"--runs={tmp_path}", "--dry_run"]
    reproduce.main([*arguments, "--imported=x.ckpt"])
    reproduce.main([*arguments, "--config.seed=2", "--config.train.keep_every=5"])
    lines = capsys.readouterr().out.splitlines()
    assert "ddpm import-weights --layout=pesser --input=x.ckpt" in lines[0]
    (training,) = (line for line in lines if line.startswith("ddpm train "))
    assert training.endswith("--data_dir=data --config.seed=2 --config.train.keep_every=5")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("imported", [[], ["--imported=x.ckpt"]], ids=["trained", "imported"])
def test_images_that_are_exported_have_a_name_of_their_own(imported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows, "call", None)
    run = ["--scale=full", f"--runs={tmp_path}", "--dry_run", *imported]
    reproduce.main(["--row=lsun_church", "--config.data.name=churches", *run])
    network, *_ = capsys.readouterr().out.splitlines()
    assert "--config.data.name=churches" in network and "lsun/" not in network
    with pytest.raises(LedgerError, match="config.data.name(=churches: an|: 'cifar10' -> )"):
        reproduce.main(["--row=eps_simple", "--config.data.name=churches", *run])


@pytest.mark.parametrize(
    "given, said",
    [
        (["--config.train.steps=3"], "config.train.steps: 800000 -> 3: at scale=full a row is"),
        (["--config.data.flip=false", "--config.train.keep_every=5"], "config.data.flip: True -> "),
        (["--config.train.keep_every=5", "--imported=x.ckpt"], "config.train.keep_every=5: an imp"),
    ],
)
def test_a_row_at_full_scale_is_what_its_cells_say(tmp_path, given, said):
    """With fewer steps it would fill the papers' cells all the same."""
    with pytest.raises(LedgerError, match=said):
        reproduce.main(["--row=eps_simple", "--scale=full", f"--runs={tmp_path}", *given])
    assert not any(tmp_path.iterdir())


def test_a_command_that_fails_ends_the_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LedgerError, match="ended with code .*: ddpm train --config=x"):
        rows.run(["train", "--config=x"], dry=False)


STOPPED = """
import sys
from ddpm_jax.cli import reproduce
from ddpm_jax.cli.run import run
from ddpm_jax.reproduction import processes, rows

def saving(command, *limits, typed):
    processes.call(["-c", sys.argv[1], sys.argv[2]], None, typed=typed)

rows.call = saving
run(lambda: reproduce.main(["--row=eps_simple", f"--runs={sys.argv[2]}"]))
"""
SAVING = """
import signal, sys, time

def save(number, frame):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_the_training_save(number, tmp_path):
    """It takes as long as it takes; a child that is killed at once has lost its steps."""
    command = [sys.executable, "-c", STOPPED, SAVING, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, **pipes) as process:
        assert process.stdout.readline().startswith("ddpm train ")
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert out == "saved\n" and errors == "stopped; the same command goes on\n"
