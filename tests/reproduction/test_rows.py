"""A row on its way: commands of their own, and a parent that leaves the device to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.cli import flags, reproduce
from ddpm_jax.errors import LedgerError
from ddpm_jax.reproduction import ledger, rows
from ddpm_jax.reproduction.rows import ReproductionOptions, recorded

ROOT = Path(__file__).parents[2]
SAMPLING = {"sampler": "ancestral", "steps": 50}
OWN = [
    {"metric": "nll", "weights": "ema 0.99", "step": 3, "total": 5.0, "split": "test"}
    | {"num_timesteps": 20, "curve": "evaluations/nll.csv", "timesteps": 1000},
    {"metric": "pixels", "weights": "ema 0.99", "step": 3, "value": 1.0, "num_images": 512}
    | {"samples": {"sampling": SAMPLING}},
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

def command(words, **how):
    told = subprocess.CompletedProcess(words, 0, "8 x TPU v5 lite\\n", "")
    if words[1:4] == ["-m", "ddpm_jax.cli", "train"]:
        workdir = folder / "small" / "eps_simple"
        (workdir / "checkpoints" / "3").mkdir(parents=True)
        (workdir / "config.json").write_text(save_json(load_config("configs/digits.py")))
        (workdir / "evaluations").mkdir()
        (workdir / "evaluations" / "nll.csv").write_text("reverse_steps,rate,rmse\\n1000,3,1\\n")
    elif words[1:4] == ["-m", "ddpm_jax.cli", "evaluate"]:
        with open(folder / "small" / "eps_simple" / "evaluations.jsonl", "a") as file:
            for record in kept:
                if f"--metrics={record['metric']}" in words:
                    file.write(json.dumps(record) + "\\n")
    print("ran", *words[1:4], file=sys.stderr)
    return told

subprocess.run = command
options = rows.ReproductionOptions(runs=folder, results=folder / "results.jsonl")
rows.reproduce(ledger.read_json(rows.ROOT / "benchmarks/paper.json"), "eps_simple", options)
"""


def test_the_parent_opens_no_device(tmp_path):
    """It has a platform that does not exist: whatever asks JAX for devices ends it."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), json.dumps(OWN)]
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
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
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", rows.DEVICE]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode != 0 and "nowhere" in process.stderr


def test_the_device_is_that_of_a_child(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    rows.device.cache_clear()
    assert rows.device() == "3 x cpu"
    rows.device.cache_clear()
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    with pytest.raises(LedgerError, match="no device could be asked for its kind: .*nowhere"):
        rows.device()
    rows.device.cache_clear()


def test_records_of_other_images_and_other_steps_are_left_out(tmp_path):
    with pytest.raises(LedgerError, match="has no checkpoint"):
        recorded(tmp_path)
    for step in ("2", "3", "4.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    lines = [json.dumps(record) for record in (OLD, FOREIGN, OWN[1])]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    (record,) = recorded(tmp_path)
    assert record == OWN[1] | SAMPLING


def test_defaults_are_those_of_the_flags():
    parsed = reproduce.parser().parse_args([])
    assert flags.fill(ReproductionOptions, parsed) == ReproductionOptions()


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    arguments = ["--row=eps_simple", "--scale=full", f"--runs={tmp_path}", "--dry_run"]
    reproduce.main([*arguments, "--config.train.steps=3", "--imported=x.ckpt"])
    reproduce.main([*arguments, "--config.train.steps=3"])
    lines = capsys.readouterr().out.splitlines()
    assert "ddpm import-weights --layout=pesser --input=x.ckpt" in lines[0]
    (training,) = (line for line in lines if line.startswith("ddpm train "))
    assert training.endswith("--data_dir=data --config.train.steps=3")
    assert not any(tmp_path.iterdir())


def test_a_command_that_fails_ends_the_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LedgerError, match="ended with code .*: ddpm train --config=x"):
        rows.run(["train", "--config=x"], dry=False)
