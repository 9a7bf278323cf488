"""Reproduce one row of the papers' tables: train it (or import its published checkpoint), evaluate it, record it.

--scale=full   the row's own config and protocol, as REPRODUCTION.md prices them; what fills the papers' cells
--scale=small  the same road with a reduced network on 8x8 digits, in minutes on two cores: to see that it is whole, and what the
               objectives do to each other

Each step is a command of its own, printed before it runs (--dry_run: instead of running). What is done already is not repeated: a
training goes on where it was, an evaluation that the run directory has is taken from there. Results are appended to
benchmarks/results/reproduction.jsonl, and REPRODUCTION.md is written from them; --ledger does only that.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import cli, ledger
from ddpm_jax.checkpoints import Checkpoints, load_workdir_config
from ddpm_jax.config import Config, load_config
from ddpm_jax.evaluation.record import read_evaluations
from ddpm_jax.images import replacing

ROOT = Path(__file__).parents[1]
PAPER, RESULTS = Path("benchmarks/paper.json"), Path("benchmarks/results/reproduction.jsonl")

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


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    flags = cli.parser(__doc__, "python scripts/reproduce.py --row=eps_simple --scale=small")
    add = flags.add_argument
    add("--row", metavar="NAME", help="of benchmarks/paper.json, or all")
    add("--scale", choices=["small", "full"], default="small", help="(default: small)")
    add("--imported", type=Path, metavar="FILE", help="the row's published checkpoint, in place of a training; full scale only")
    cli.add_data_dir(flags)
    add("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="run directories (default: runs/reproduce)")
    add("--results", type=Path, default=ROOT / RESULTS, metavar="FILE", help=f"(default: {RESULTS})")
    add("--output", type=Path, default=ROOT / "REPRODUCTION.md", metavar="FILE", help="(default: REPRODUCTION.md)")
    add("--dry_run", action="store_true", help="print the commands and do nothing")
    add("--ledger", action="store_true", help="only write the ledger from the results that are there")
    flags.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD", metavar="VALUE", help="override one field of the row's config; repeatable"
    )
    return cli.parse_with_overrides(flags, argv)


def main(argv: list[str] | None = None) -> None:
    options, overrides = parse(argv)
    paper = ledger.read_json(ROOT / PAPER)
    if not options.ledger:
        check(options.row is not None, "--row=NAME says what to reproduce; --ledger writes REPRODUCTION.md")
        check(options.imported is None or options.scale == "full", "--imported is of the full network: add --scale=full")
        for row in list(paper["rows"]) if options.row == "all" else [options.row]:
            reproduce(paper, row, options, overrides)
    if not options.dry_run:
        text = ledger.document(ROOT, paper, ledger.read_records(options.results))
        with replacing(options.output) as file:
            file.write(text.encode())
        print(f"wrote {options.output}")


def reproduce(paper: ledger.Record, row: str, options: argparse.Namespace, overrides: list[str]) -> None:
    wanted = ledger.wanted(paper, row)
    if options.scale == "small":
        wanted = small_evaluations(load_config(ROOT / paper["rows"][row]["config"]))
    check(not options.imported or "import" in paper["rows"][row], f"--row={row}: no checkpoint of it has been published")
    origin = "imported" if options.imported else "trained"
    workdir = options.runs / options.scale / (row if origin == "trained" else f"{row}_imported")
    run(make(paper["rows"][row], workdir, options, overrides), options.dry_run)
    for metrics, match in grouped(wanted):
        known = [] if options.dry_run else recorded(workdir)
        if all(any(ledger.agrees(record, {"metric": metric, **match}) for record in known) for metric in metrics):
            continue
        run(evaluation(workdir, metrics, match, options), options.dry_run)
    if not options.dry_run:
        keep(options.results, [{"row": row, "scale": options.scale, "origin": origin} | record for record in recorded(workdir)])


def small_evaluations(config: Config) -> list[ledger.Record]:
    """A diagonal variance that is learned is that of single steps: with fewer steps the samples take the posterior's."""
    sampler = "ancestral_small" if config.diffusion.variance == "learned" else "ancestral"
    return [
        {"metric": "nll", "split": "test", "num_timesteps": 20},
        {"metric": "pixels", "sampler": sampler, "steps": 50, "num_images": 512},
    ]


def make(described: ledger.Record, workdir: Path, options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The command that leaves a trained network in `workdir`."""
    if options.imported:
        layout = described["import"]["layout"]
        return ["import_weights.py", f"--layout={layout}", f"--input={options.imported}", f"--workdir={workdir}"]
    small = [f"{name}={value}" for name, value in SMALL.items()] if options.scale == "small" else []
    fields = [f"--config.{item}" for item in (*small, *overrides)]
    return ["train.py", f"--config={described['config']}", f"--workdir={workdir}", f"--data_dir={options.data_dir}", *fields]


def evaluation(workdir: Path, metrics: list[str], match: ledger.Record, options: argparse.Namespace) -> list[str]:
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in match.items()}
    flags = [f"--{name}={value}" for name, value in values.items()]
    return ["evaluate.py", f"--workdir={workdir}", f"--metrics={','.join(metrics)}", f"--data_dir={options.data_dir}", *flags]


def grouped(wanted: list[ledger.Record]) -> list[tuple[list[str], ledger.Record]]:
    """Metrics of the same samples go into one command."""
    groups: list[tuple[list[str], ledger.Record]] = []
    for match in wanted:
        rest = {name: value for name, value in match.items() if name != "metric"}
        for metrics, other in groups:
            if other == rest:
                metrics.append(match["metric"])
                break
        else:
            groups.append(([match["metric"]], rest))
    return groups


def run(command: list[str], dry: bool) -> None:
    script, *flags = command
    shown = shlex.join(["python", f"scripts/{script}", *flags])
    print(shown, flush=True)
    if not dry:
        code = subprocess.run([sys.executable, ROOT / "scripts" / script, *flags], check=False).returncode
        check(code == 0, f"this command ended with code {code}: {shown}")


# ---------------------------------------------------------------------------------------------- records


def recorded(workdir: Path) -> list[ledger.Record]:
    """What evaluations.jsonl says of the newest checkpoint, with what the ledger adds."""
    with Checkpoints.reading(workdir) as checkpoints:
        newest = checkpoints.steps()[-1]
    config = load_workdir_config(workdir)
    found = []
    for record in read_evaluations(workdir):
        if record["step"] == newest:
            record |= record.get("samples", {}).get("sampling", {}) | {"metric": record["metric"].lower()}
            added = {"trained": f"{config.train.steps} x {config.train.batch_size}", "commit": commit(), "device": device()}
            found.append(record | added | ({"curve_rows": curve_rows(workdir, record)} if "curve" in record else {}))
    return found


def curve_rows(workdir: Path, record: ledger.Record) -> dict[str, dict[str, float]]:
    """Table 4: rate and RMSE after 100, 200, ... of 1000 reverse steps; without all terms, those nearest."""
    with (workdir / record["curve"]).open() as file:
        lines = list(csv.DictReader(file))
    steps = np.array([float(line["reverse_steps"]) for line in lines]) * 1000 / record["timesteps"]
    nearest = {str(row): lines[int(np.abs(steps - row).argmin())] for row in CURVE_ROWS}
    return {row: {name: float(line[name]) for name in ("rate", "rmse")} for row, line in nearest.items()}


def keep(results: Path, new: list[ledger.Record]) -> None:
    """Adds `new` to the results, in place of what they held for the same run."""
    runs = [{name: record[name] for name in ("row", "scale", "origin")} for record in new]
    old = [record for record in ledger.read_records(results) if not any(ledger.agrees(record, run) for run in runs)]
    results.parent.mkdir(parents=True, exist_ok=True)
    with replacing(results) as file:
        file.write("".join(json.dumps(record) + "\n" for record in [*old, *new]).encode())


def commit() -> str:
    """Of the code, with a + where files differ from it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def device() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ledger.LedgerError(message)


if __name__ == "__main__":
    cli.run(main)
