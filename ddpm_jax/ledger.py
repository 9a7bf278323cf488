"""The ledger of reproduction: which cell of which table of the papers has been measured here, how, and what filling it takes.

benchmarks/paper.json holds the published values: tables of cells, each with the record that would fill it, and rows, each with
its config and its published checkpoint. benchmarks/results/reproduction.jsonl holds what scripts/reproduce.py measured, a line a
record of evaluations.jsonl with its row, scale and origin. This module matches the two and writes REPRODUCTION.md.

A record fills a cell if it is of the cell's row, at full scale, and has every value that the cell's `match` names. Of several,
the last counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.build import abstract_params
from ddpm_jax.config import Config, load_config, to_dict
from ddpm_jax.errors import UserError
from ddpm_jax.flops import forward_flops

Record = dict[str, Any]

H100 = 0.4 * 798e12  # FLOP/s: 40 % of the bfloat16 peak that was measured on one elsewhere; an assumption, not a result


class LedgerError(UserError):
    """A ledger that cannot be read, or a row that it does not have."""


@dataclass(frozen=True)
class Cell:
    """paper: the value as printed; match: what a record must say to fill the cell; field: of the record, or of its curve `at`."""

    row: str | None
    paper: str
    match: Record
    field: str
    at: str | None

    def measured(self, records: Iterable[Record]) -> Record | None:
        """The last record that fills this cell."""
        fits = [record for record in records if self.row and record["row"] == self.row and agrees(record, self.match)]
        return fits[-1] if fits else None

    def value(self, record: Record) -> float | None:
        return record["curve_rows"][self.at][self.field] if self.at else record[self.field]


def agrees(record: Record, match: Record) -> bool:
    return all(record.get(name) == value for name, value in match.items())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path} cannot be read ({error}): restore it from the repository") from error


def read_records(path: Path) -> list[Record]:
    """The lines of a .jsonl; none where there is no file."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise LedgerError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def cells(table: Record) -> list[list[Cell]]:
    """[rows][columns] of a table of benchmarks/paper.json."""
    found = []
    for line in table["rows"]:
        match = line.get("match", {})
        found.append(
            [
                Cell(
                    line.get("row"),
                    value,
                    match | column["match"],
                    column["field"],
                    line.get("at"),
                )
                for column, value in zip(table["columns"], line["values"], strict=True)
            ]
        )
    return found


def wanted(paper: Record, row: str) -> list[Record]:
    """The different evaluations that fill the cells of a row, in their order."""
    if row not in paper["rows"]:
        raise LedgerError(f"--row={row}: one of {', '.join(paper['rows'])}")
    found: list[Record] = []
    for table in paper["tables"]:
        for cell in (cell for line in cells(table) for cell in line):
            if cell.row == row and cell.match not in found:
                found.append(cell.match)
    return found


# ---------------------------------------------------------------------------------------------- markdown


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *escaped))


def number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "not finite"
    text = f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return text if error is None else f"{text} ± {error:.2g}"


def paper_section(table: Record, records: Sequence[Record]) -> str:
    """One table of a paper, its value and ours side by side; "not run" where no record fills the cell."""
    head = ["", *(f"{column['name']}, {who}" for column in table["columns"] for who in ("paper", "ours"))]
    lines = []
    for line, row in zip(table["rows"], cells(table)):
        filled = [line["name"]]
        for cell in row:
            record = cell.measured(records)
            filled += [cell.paper, "not run" if record is None else number(cell.value(record))]
        lines.append(filled)
    return f"### {table['paper']}: {table['title']}\n\n{table['protocol']}.\n\n{markdown_table(head, lines)}\n"


def sources(paper: Record, records: Sequence[Record]) -> str:
    """How each of our values was obtained: a line for each record that fills a cell."""
    used: list[Record] = []
    for table in paper["tables"]:
        for cell in (cell for line in cells(table) for cell in line):
            record = cell.measured(records)
            if record is not None and record not in used:
                used.append(record)
    if not used:
        return "No cell of the papers' tables has been filled yet: their networks were neither trained nor at hand here.\n"
    return "\n".join(
        f"- `{record['row']}`, {record['metric']}: {record['origin']}, step {record['step']}, {record['weights']} weights, "
        f"on {record['device']}, code {record['commit']}"
        for record in used
    )


def costs(paper: Record, root: Path) -> str:
    """What a row takes: its config, its published checkpoint, parameters, arithmetic, hours."""
    lines, sizes = [], {}
    for name, row in paper["rows"].items():
        config = load_config(root / row["config"])
        network = json.dumps([to_dict(config)["model"], config.data.image_size, config.output_channels])
        if network not in sizes:  # many rows share theirs, and tracing takes a second
            sizes[network] = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))), forward_flops(config)
        size, forward = sizes[network]
        flops, images = 3 * forward, config.train.steps * config.train.batch_size
        published = row.get("import")
        lines.append(
            [
                f"`{name}`",
                f"`{row['config']}`",
                f"{published['file']}, {published['from']}" if published else "none",
                f"{size / 1e6:.1f} M",
                f"{flops / 1e9:,.0f}",
                f"{images / 1e6:,.0f} M",
                f"{flops * images / H100 / 3600:,.1f}",
                _pod_hours(root, config, images),
            ]
        )
    head = ["row", "config", "published checkpoint", "parameters", "GFLOP an image", "images"]
    return markdown_table([*head, "hours, one H100", "hours, 8 chips of v5e"], lines) + "\n"


def _pod_hours(root: Path, config: Config, images: int) -> str:
    """From the report of compile_for_tpu.py for this network and 8 chips, if there is one."""
    for path in sorted((root / "benchmarks" / "tpu").glob("*_v5e_008.json")):
        report = read_json(path)
        other = load_config(root / report["config"], report["overrides"])
        same = (other.model, other.data.image_size) == (config.model, config.data.image_size)
        if same and other.train.batch_size == config.train.batch_size:
            return f"{images / report['train']['estimate']['images_per_second'] / 3600:,.1f}"
    return "not compiled"


def small_section(paper: Record, records: Sequence[Record]) -> str:
    """What each row came to at small scale."""
    lines = []
    for row in paper["rows"]:
        found = {record["metric"]: record for record in records if record["row"] == row and record["scale"] == "small"}
        nll, distance = found.get("nll"), found.get("pixels")
        lines.append(
            [
                f"`{row}`",
                next(iter(found.values()))["trained"] if found else "not run",
                number(nll["total"], nll.get("total_standard_error")) if nll else "not run",
                number(distance["value"]) if distance else "not run",
            ]
        )
    return markdown_table(["row", "steps x images", "NLL, bits/dim", "distance of pixels"], lines) + "\n"


def findings_section(paper: Record, records: Sequence[Record]) -> str:
    """What the papers found, and whether the rows at small scale say so too; a difference within two standard errors does not."""
    field = {"nll": "total", "pixels": "value"}
    lines = []
    for finding in paper["findings"]:
        metric = finding["metric"]
        found = {record["row"]: record for record in records if record["scale"] == "small" and record["metric"] == metric}
        pair = [found.get(finding[side]) for side in ("better", "worse")]
        verdict, shown = "not run", ["not run", "not run"]
        if all(pair):
            values = [math.inf if record[field[metric]] is None else record[field[metric]] for record in pair]
            error = math.hypot(*(record.get("total_standard_error") or 0.0 for record in pair))
            shown = [number(record[field[metric]], record.get("total_standard_error")) for record in pair]
            verdict = "yes" if values[1] - values[0] > 2 * error else "no" if values[0] - values[1] > 2 * error else "undecided"
        sides = [f"`{finding[side]}` {text}" for side, text in zip(("better", "worse"), shown)]
        lines.append([finding["finding"], {"nll": "bits/dim", "pixels": "pixels"}[metric], *sides, verdict])
    return markdown_table(["finding", "by", "should be lower", "should be higher", "seen here"], lines) + "\n"


def comparison_section(results: Path) -> str:
    """The files that compare_with_diffusers.py wrote."""
    parts = []
    for path in sorted(results.glob("compare_*.json")):
        found = read_json(path)
        data, train = found["config"]["data"], found["config"]["train"]
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in found["runs"]}))
        lines = [
            [
                line["figure"],
                *(number(line[side], line.get(f"{side}_error")) for side in ("ddpm_jax", "diffusers")),
                number(line["difference"], line.get("difference_error")),
            ]
            for line in found["summary"]
        ]
        title = f"**{data['name']}**, {train['steps']:,} steps of {train['batch_size']} images, seeds {seeds}"
        parts.append(f"{title}\n\n{markdown_table(['', 'ddpm_jax', 'diffusers', 'difference'], lines)}\n")
    return "\n".join(parts) or "Not run.\n"


def shipped_section(shipped: Path) -> str:
    """The networks of pretrained/."""
    lines = []
    for folder in sorted(path.parent for path in shipped.glob("*/evaluations.jsonl")):
        size = sum(file.stat().st_size for file in (folder / "unet").iterdir())
        records = {record["metric"].lower(): record for record in read_records(folder / "evaluations.jsonl")}
        nll, fid = records.get("nll"), records.get("fid-768")
        lines.append(
            [
                f"`--pretrained={folder.name}`",
                f"{size / 1e6:.1f} MB",
                number(nll["total"], nll.get("total_standard_error")) if nll else "not run",
                f"{number(fid['value'])} ({fid['num_images']:,} samples)" if fid else "not run",
            ]
        )
    return markdown_table(["", "size", "NLL, bits/dim", "FID-768"], lines) + "\n" if lines else "None yet.\n"


def figures_section(paper: Record) -> str:
    lines = [[figure["figure"], figure["what"], f"`{figure['command']}`", figure["ours"]] for figure in paper["figures"]]
    return markdown_table(["figure", "what", "command, with --workdir", "from our small networks"], lines) + "\n"


def document(root: Path, paper: Record, records: Sequence[Record]) -> str:
    """REPRODUCTION.md."""
    full = [record for record in records if record["scale"] == "full"]
    sections = "\n".join(paper_section(table, full) for table in paper["tables"])
    return f"""# What of the papers has been reproduced

Written by `python scripts/reproduce.py --ledger` from benchmarks/paper.json (the papers' values) and benchmarks/results/, not by
hand. A cell of ours is filled when its row has been run at full scale, and only then.

## The papers' tables

{sections}
How our values were obtained:

{sources(paper, full)}
## The road to each row

(a) Training it here: `python scripts/reproduce.py --row=ROW --scale=full`. (b) From its published checkpoint:
`python scripts/reproduce.py --row=ROW --scale=full --imported=FILE`. Both then draw the samples, evaluate, and write this file;
`--dry_run` prints the single commands instead. Training takes three times the arithmetic of a forward pass. Hours on one H100 are
an estimate, at 40 % of 798 TFLOP/s in bfloat16; hours on 8 chips of TPU v5e are the estimate of `compile_for_tpu.py` for the
compiled step. Neither was measured. The paper itself took 10.6 hours for CIFAR-10 on a TPU v3-8.

{costs(paper, root)}
## The papers' figures

{figures_section(paper)}
## The same road at small scale

`python scripts/reproduce.py --row=ROW`: each row's objective, schedule, variances and conditioning, on a network of a million
parameters and scikit-learn's 8x8 digits. The NLL is the bound on the 179 held-out digits with 20 terms each. The distance is
Fréchet's between Gaussians fitted to the 64 pixels of 512 samples and of the training images: a stand-in for a FID, comparable
with nothing but the lines of this table. Samples take 50 ancestral steps, with the posterior's variance where a diagonal one
was learned, which is one of single steps.

{small_section(paper, records)}
What the papers found, looked for in these lines, one seed each; "undecided" is a difference within two standard errors (the
distances have none):

{findings_section(paper, records)}
## The same recipe in PyTorch

`scripts/compare_with_diffusers.py` trains a config with this code and with diffusers' UNet2DModel and DDPMScheduler in a plain
loop, and judges both by one evaluation on held-out images: the bound, and the mean squared error of eps at fixed timesteps.
Errors are standard errors over seeds.

{comparison_section(root / "benchmarks" / "results")}
## Weights that ship

{shipped_section(root / "pretrained")}"""
