"""Take the records of a run directory into the results that the ledger is written from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from ddpm_jax.files import replacing
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.ledger import check
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import load_workdir_config

CURVE_ROWS = range(100, 1001, 100)  # of Table 4, in thousandths of the reverse steps


def recorded(workdir: Path) -> list[ledger.Record]:
    """Return what evaluations.jsonl says of the newest checkpoint, as the ledger's cells match it.

    Records of images that the run did not draw have no step, and are left out.
    """
    newest, timesteps = newest_step(workdir), load_workdir_config(workdir).diffusion.timesteps
    records = []
    for record in read_evaluations(workdir):
        if record.get("step") == newest:
            sampling = record.get("samples", {}).get("sampling", {})
            curve = {"curve_rows": curve_rows(workdir, record)} if "curve" in record else {}
            about = {"metric": record["metric"].lower(), "timesteps": timesteps}
            records.append(record | sampling | about | curve)
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


def keep(
    results: Path,
    run: ledger.Record,
    records: list[ledger.Record],
    about: ledger.Record,
    *,
    whole: bool = True,
) -> None:
    """Put the records of a run into the results.

    A record that is there stays as it is: it has the commit and the device that measured it.

    Args:
      run: row, scale and origin.
      about: the provenance of the records that are not there yet.
      whole: `records` are all of the run, and others that the results hold of it go.
    """
    others, mine = [], []
    for old in ledger.read_records(results):
        (mine if ledger.agrees(old, run) else others).append(old)
    new = []
    for record in records:
        stored = next((old for old in mine if _same(old, record)), about)
        new.append(run | record | stored)
    left = [] if whole else [old for old in mine if not any(_same(old, one) for one in records)]
    results.parent.mkdir(parents=True, exist_ok=True)
    with replacing(results) as file:
        lines = (json.dumps(record) + "\n" for record in [*others, *left, *new])
        file.write("".join(lines).encode())


def _same(old: ledger.Record, record: ledger.Record) -> bool:
    """Say whether a stored record is of the same evaluation.

    One from before a field was added has not got it. The curve is in a file, which a later
    evaluation may have replaced.
    """
    return all(
        old.get(name, value) == value for name, value in record.items() if name != "curve_rows"
    )
