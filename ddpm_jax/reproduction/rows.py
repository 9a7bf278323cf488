"""Run one row of the papers' tables: train it or import it, evaluate it, record it.

Each step is a command of its own, in a process of its own. This process never asks for a device
before the last of them is done: on a GPU it would take the memory that they need, and a TPU lets
one process in at a time.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_jax.config import Config, differences, load_config
from ddpm_jax.files import checkout, shipped
from ddpm_jax.progress import say
from ddpm_jax.reproduction import ledger, provenance
from ddpm_jax.reproduction.ledger import check
from ddpm_jax.reproduction.processes import call
from ddpm_jax.reproduction.records import keep, recorded
from ddpm_jax.runs.workdir import FREE_TO_CHANGE, RECORD, imported_weights
from ddpm_jax.weights.files import fingerprint

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

# Fields that a row at full scale may have otherwise: the papers do not say them.
FREE = (
    *(name for name in FREE_TO_CHANGE if name != "train.steps"),
    "model.dtype",
    "seed",
)

HELD_OUT = 179  # digits of the test split
SCALES = ("small", "full")


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
    check_overrides(described["config"], options)
    origin = "imported" if options.imported else "trained"
    workdir = options.runs / options.scale / (row if origin == "trained" else f"{row}_imported")
    network = network_command(described, workdir, options)
    if options.dry_run:
        run(network, dry=True)
        for metrics, match in grouped(evaluations):
            run(evaluation_command(workdir, metrics, match, options.data_dir), dry=True)
        return

    of_run = {"row": row, "scale": options.scale, "origin": origin}

    def store(about: ledger.Record, *, whole: bool = False) -> None:
        fitting = [
            record
            for record in recorded(workdir)
            if any(ledger.agrees(record, match) for match in evaluations)
        ]
        keep(options.results, of_run, fitting, about, whole=whole)

    if not _is_imported(workdir, options.imported):  # which cannot be done a second time
        run(network, dry=False)
    weights = imported_weights(workdir, "ema") or ""
    check(
        not weights.startswith("raw"),
        f"imported={options.imported} has raw weights alone, where the papers have averages: "
        "name a file with averages",
    )
    store(provenance.unknown(workdir))  # nobody noted who measured what is there already
    empty = []
    for metrics, match in grouped(evaluations):
        if _missing(recorded(workdir), metrics, match):
            run(evaluation_command(workdir, metrics, match, options.data_dir), dry=False)
            store(provenance.of_run(workdir))  # at once: the next call may be on another machine
            measured = recorded(workdir)
            for metric in _missing(measured, metrics, match):
                say(_why_not(measured, {"metric": metric, **match}))
                empty.append(metric)
    store(provenance.unknown(workdir), whole=not empty)  # an empty cell keeps what it had


def check_overrides(config: str, options: ReproductionOptions) -> None:
    """Check that the run of a row is what its cells say that it is.

    Raises:
      LedgerError: a field that makes another network of a row at full scale, or any but the name
        of the images where one is imported.
    """
    if options.scale != "full" or not options.overrides:
        return
    own, asked = load_config(ROOT / config), load_config(ROOT / config, options.overrides)
    # Images of such a set are exported and prepared as a folder, under a name of its own.
    named = ("data.name",) if "/" in own.data.name else ()
    for item in options.overrides:
        check(
            not options.imported or item.startswith(named),
            f"config.{item}: an imported network is not trained: leave it out",
        )
    other = [line for line in differences(own, asked) if not line.startswith(FREE + named)]
    check(
        not other,
        f"config.{''.join(other[:1])}: at scale=full a row is trained as the paper says: "
        "leave it out, or train by itself with ddpm train",
    )


def _is_imported(workdir: Path, file: Path | None) -> bool:
    """Say whether a run directory was imported from this file, or folder of files.

    Raises:
      LedgerError: it was imported from others.
    """
    record = workdir / RECORD
    if file is None or not record.is_file():
        return False
    imported = ledger.read_json(record)
    if not file.exists():  # nor is it needed: what it held is here
        return imported.get("source") == str(file)
    for known in imported.get("files", []):
        name = known["name"]
        places = file.rglob(name) if file.is_dir() else [file.with_name(name)]
        check(
            any(place.is_file() and fingerprint(place) == known for place in places),
            f"{workdir} was imported from another {name} than imported={file}: name another runs",
        )
    return True


def _missing(records: list[ledger.Record], metrics: list[str], match: ledger.Record) -> list[str]:
    """Return those of `metrics` that no record has as `match` asks."""
    return [
        metric
        for metric in metrics
        if not any(ledger.agrees(record, {"metric": metric, **match}) for record in records)
    ]


def _why_not(records: list[ledger.Record], match: ledger.Record) -> str:
    """Return why the newest record of a metric does not fill the cell that it was made for."""
    newest = [record for record in records if record["metric"] == match["metric"]][-1:]
    wrong = ", ".join(ledger.mismatch(newest[0], match)) if newest else "no record"
    return f"{match['metric']}: its cell stays empty: {wrong}"


def small_evaluations(config: Config) -> list[ledger.Record]:
    """Return the evaluations of a row at small scale.

    A diagonal variance that is learned is that of single steps: with fewer steps the samples take
    the posterior's.
    """
    sampler = "ancestral_small" if config.diffusion.variance == "learned" else "ancestral"
    return [
        {"metric": "nll", "weights": "ema", "split": "test", "num_images": HELD_OUT}
        | {"num_timesteps": 20, "clip": True, "cdf": "tanh"},
        {"metric": "pixels", "weights": "ema", "sampler": sampler, "steps": 50}
        | {"num_images": 512, "reference": "train", "reference_images": None}
        | {"clip": True, "spacing": "linspace", "guidance": 1.0},
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


def evaluation_passes(paper: ledger.Record, row: str, timesteps: int) -> int:
    """Count the forward passes, each of one image, that fill the cells of a row.

    Samples take one a step, reconstructions one there and one back, the bound one a term.
    """
    passes = 0
    for metrics, match in grouped(ledger.evaluations(paper, row)):
        steps = match["num_timesteps" if "nll" in metrics else "steps"] or timesteps
        passes += match["num_images"] * steps * (2 if "reconstruction" in metrics else 1)
    return passes


# ---------------------------------------------------------------------------------------- commands


def network_command(
    described: ledger.Record, workdir: Path, options: ReproductionOptions
) -> list[str]:
    """Return the command that leaves a trained network in `workdir`: its name and its flags."""
    if options.imported:
        # Which a file does not tell.
        data = load_config(ROOT / described["config"], options.overrides).data
        return [
            "import_weights",
            f"--layout={described['import']['layout']}",
            f"--input={options.imported}",
            f"--workdir={workdir}",
            f"--config.data.name={data.name}",
            f"--config.data.crop={data.crop}",
            f"--config.data.in_memory={str(data.in_memory).lower()}",
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
        if value is not None
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
    typed = ["ddpm", command[0].replace("_", "-"), *command[1:]]
    if dry:
        print(shlex.join(typed), flush=True)
    else:
        call(["-m", "ddpm_jax.cli", *typed[1:]], None, typed=typed)
