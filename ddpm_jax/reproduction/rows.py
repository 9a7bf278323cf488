"""Run one row of the papers' tables: train it or import it, evaluate it, record it.

Each step is a command of its own, in a process of its own. This process never asks for a device
before the last of them is done: on a GPU it would take the memory that they need, and a TPU lets
one process in at a time.
"""

from __future__ import annotations

import csv
import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_jax.config import Config, load_config
from ddpm_jax.errors import LedgerError
from ddpm_jax.files import checkout, replacing, shipped
from ddpm_jax.reproduction import ledger
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import load_workdir_config

ROOT = shipped("")  # of configs/, benchmarks/ and pretrained/
HOME = checkout() or Path()  # of what is written
RESULTS = HOME / "benchmarks" / "results" / "reproduction.jsonl"

SMALL = {
    "data.name": "digits",
    "data.image_size": "8",
    "data.channels": "1",
    "data.flip": "false",
    "data.crop": "none",
    "data.in_memory": "true",
    "model.base_channels": "32",
    "model.channel_mult": "(1,2)",
    "model.blocks_per_level": "2",
    "model.attention_resolutions": "(4,)",
    "model.group_norm_groups": "8",
    "model.dropout": "0.0",
    "model.dtype": "float32",
    "optimizer.learning_rate": "1e-3",
    "optimizer.warmup_steps": "100",
    "train.steps": "300",
    "train.batch_size": "128",
    "train.ema_decays": "(0.99,)",
    "train.ema_warmup": "true",
    "train.log_every": "50",
    "train.eval_every": "150",
    "train.eval_images": "256",
    "train.checkpoint_every": "300",
    "train.sample_every": "0",
}

CURVE_ROWS = range(100, 1001, 100)  # of Table 4, in thousandths of the reverse steps
SCALES = ("small", "full")

DEVICE = """
from ddpm_jax.parallel.devices import Devices
devices = Devices().devices
print(len(devices), "x", devices[0].device_kind)
"""


@dataclass(frozen=True)
class ReproductionOptions:
    """How rows are reproduced.

    Attributes:
      scale: "full" is the row's own config and protocol; "small" a reduced network on the digits.
      imported: the row's published checkpoint, in place of a training.
      data_dir: the prepared data sets.
      runs: where the run directories go.
      results: the .jsonl that the records are added to.
      overrides: of the row's config, each "section.field=value".
      dry_run: print the commands and run none.

    Raises:
      LedgerError: an import at small scale, which has another network.
    """

    scale: str = "small"
    imported: Path | None = None
    data_dir: Path = Path("data")
    runs: Path = Path("runs/reproduce")
    results: Path = RESULTS
    overrides: Sequence[str] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        check(self.scale in SCALES, f"scale={self.scale}: one of {', '.join(SCALES)}")
        check(
            self.imported is None or self.scale == "full",
            f"imported={self.imported} is of the full network: add scale=full",
        )


def reproduce(paper: ledger.Record, row: str, options: ReproductionOptions) -> None:
    """Make the network of a row, evaluate it for each cell of the row, and record the results.

    What the run directory holds already is not repeated.

    Args:
      paper: the content of benchmarks/paper.json.

    Raises:
      LedgerError: no such row, no published checkpoint of it, or a command that failed.
    """
    evaluations = ledger.evaluations(paper, row)
    described = paper["rows"][row]
    if options.scale == "small":
        evaluations = small_evaluations(load_config(ROOT / described["config"]))
    check(
        not options.imported or "import" in described,
        f"row={row}: no checkpoint of it has been published",
    )
    origin = "imported" if options.imported else "trained"
    workdir = options.runs / options.scale / (row if origin == "trained" else f"{row}_imported")
    run(network_command(described, workdir, options), options.dry_run)
    for metrics, match in grouped(evaluations):
        records = [] if options.dry_run else recorded(workdir)
        if not all(
            any(ledger.agrees(record, {"metric": metric, **match}) for record in records)
            for metric in metrics
        ):
            run(evaluation_command(workdir, metrics, match, options.data_dir), options.dry_run)
    if not options.dry_run:
        run_of = {"row": row, "scale": options.scale, "origin": origin}
        about = provenance(workdir)
        keep(options.results, [run_of | record | about for record in recorded(workdir)])


def small_evaluations(config: Config) -> list[ledger.Record]:
    """Return the evaluations of a row at small scale.

    A diagonal variance that is learned is that of single steps: with fewer steps the samples take
    the posterior's.
    """
    sampler = "ancestral_small" if config.diffusion.variance == "learned" else "ancestral"
    return [
        {"metric": "nll", "split": "test", "num_timesteps": 20},
        {"metric": "pixels", "sampler": sampler, "steps": 50, "num_images": 512},
    ]


def grouped(evaluations: list[ledger.Record]) -> list[tuple[list[str], ledger.Record]]:
    """Put metrics of the same samples together, for one command: (metrics, the rest) of each."""
    groups: list[tuple[list[str], ledger.Record]] = []
    for match in evaluations:
        rest = {name: value for name, value in match.items() if name != "metric"}
        for metrics, other in groups:
            if other == rest:
                metrics.append(match["metric"])
                break
        else:
            groups.append(([match["metric"]], rest))
    return groups


# ---------------------------------------------------------------------------------------- commands


def network_command(
    described: ledger.Record, workdir: Path, options: ReproductionOptions
) -> list[str]:
    """Return the command that leaves a trained network in `workdir`: its name and its flags."""
    if options.imported:
        return [
            "import_weights",
            f"--layout={described['import']['layout']}",
            f"--input={options.imported}",
            f"--workdir={workdir}",
        ]
    small = [f"{name}={value}" for name, value in SMALL.items()] if options.scale == "small" else []
    return [
        "train",
        f"--config={described['config']}",
        f"--workdir={workdir}",
        f"--data_dir={options.data_dir}",
        *(f"--config.{item}" for item in (*small, *options.overrides)),
    ]


def evaluation_command(
    workdir: Path, metrics: list[str], match: ledger.Record, data_dir: Path = Path("data")
) -> list[str]:
    """Return the command that measures `metrics` as `match` says: its name and its flags."""
    values = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in match.items()
    }
    return [
        "evaluate",
        f"--workdir={workdir}",
        f"--metrics={','.join(metrics)}",
        f"--data_dir={data_dir}",
        *(f"--{name}={value}" for name, value in values.items()),
    ]


def run(command: list[str], dry: bool) -> None:
    """Print a command as one types it and, unless `dry`, run it in a process of its own.

    Raises:
      LedgerError: it ended with another code than 0.
    """
    name, *flags = command
    line = shlex.join(["ddpm", name.replace("_", "-"), *flags])
    print(line, flush=True)
    if not dry:
        process = [sys.executable, "-m", "ddpm_jax.cli", name.replace("_", "-"), *flags]
        code = subprocess.run(process, check=False).returncode
        check(code == 0, f"this command ended with code {code}: {line}")


# ----------------------------------------------------------------------------------------- records


def recorded(workdir: Path) -> list[ledger.Record]:
    """Return what evaluations.jsonl says of the newest checkpoint, as the ledger's cells match it.

    Records of images that the run did not draw have no step, and are left out.
    """
    newest = newest_step(workdir)
    records = []
    for record in read_evaluations(workdir):
        if record.get("step") == newest:
            sampling = record.get("samples", {}).get("sampling", {})
            curve = {"curve_rows": curve_rows(workdir, record)} if "curve" in record else {}
            records.append(record | sampling | {"metric": record["metric"].lower()} | curve)
    return records


def newest_step(workdir: Path) -> int:
    """Return the step of the newest checkpoint, by the names of the folders.

    Orbax, which could be asked, would open the accelerator for it.

    Raises:
      LedgerError: there is no checkpoint.
    """
    folders = (workdir / "checkpoints").glob("*")
    steps = [int(folder.name) for folder in folders if folder.name.isdecimal()]
    check(bool(steps), f"{workdir} has no checkpoint: delete it and start again")
    return max(steps)


def curve_rows(workdir: Path, record: ledger.Record) -> dict[str, dict[str, float]]:
    """Return Table 4: rate and RMSE after 100, 200, ... of 1000 reverse steps.

    Of a curve that lacks terms, the points that are nearest.
    """
    with (workdir / record["curve"]).open() as file:
        lines = list(csv.DictReader(file))
    steps = np.array([float(line["reverse_steps"]) for line in lines]) * 1000 / record["timesteps"]
    nearest = {str(row): lines[int(np.abs(steps - row).argmin())] for row in CURVE_ROWS}
    return {
        row: {name: float(line[name]) for name in ("rate", "rmse")} for row, line in nearest.items()
    }


def keep(results: Path, new: list[ledger.Record]) -> None:
    """Add `new` to the results, in place of what they held for the same run."""
    runs = [{name: record[name] for name in ("row", "scale", "origin")} for record in new]
    old = [
        record
        for record in ledger.read_records(results)
        if not any(ledger.agrees(record, run) for run in runs)
    ]
    results.parent.mkdir(parents=True, exist_ok=True)
    with replacing(results) as file:
        file.write("".join(json.dumps(record) + "\n" for record in [*old, *new]).encode())


def provenance(workdir: Path) -> ledger.Record:
    """Return how long the run was trained, by which code, and on what."""
    train = load_workdir_config(workdir).train
    return {
        "trained": f"{train.steps} x {train.batch_size}",
        "commit": commit(),
        "device": device(),
    }


def commit() -> str:
    """Return the commit of the code, with a + where files differ from it."""
    if checkout() is None:
        return "unknown"  # a folder around the installation may be another project's
    process = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.stdout.strip() or "unknown"


@functools.cache
def device() -> str:
    """Return the number and kind of the devices, "8 x TPU v5 lite".

    A process of its own looks, so that the devices stay free for the commands to come.

    Raises:
      LedgerError: it found none.
    """
    process = subprocess.run(
        [sys.executable, "-c", DEVICE], capture_output=True, text=True, check=False
    )
    last = process.stderr.strip().splitlines()[-1:]
    check(process.returncode == 0, f"no device could be asked for its kind: {' '.join(last)}")
    return process.stdout.strip()


def check(condition: bool, message: str) -> None:
    """Raise LedgerError with `message` unless `condition` holds."""
    if not condition:
        raise LedgerError(message)
