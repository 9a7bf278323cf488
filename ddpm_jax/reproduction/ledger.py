"""Read the ledger of reproduction: each cell of the papers' tables, and what has filled it.

benchmarks/paper.json holds the published values: tables of cells, each with the record that would
fill it, and rows, each with its config and its published checkpoint.
benchmarks/results/reproduction.jsonl holds what scripts/reproduce.py measured, a line a record of
evaluations.jsonl with its row, scale and origin. This module matches the two; `page` writes
REPRODUCTION.md.

A record fills a cell if it is of the cell's row, at full scale, and was made as the cell asks: its
`match` has flags of evaluate.py, those that any published number of the metric needs (`protocols`)
and the cell's own. Of several records, the last counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax import files
from ddpm_jax.errors import LedgerError

Record = dict[str, Any]

COUNTED = ("steps", "num_timesteps")  # flags whose 0 asks for all timesteps


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
      row: of benchmarks/paper.json; None where nothing here would fill the cell.
      paper: the value as printed.
      match: the flags of the evaluation that fills the cell; None leaves one at its default.
      field: of the record, the value.
      at: where the value is one of the record's curve, the point of the curve.
    """

    row: str | None
    paper: str
    match: Record
    field: str
    at: str | None

    def measured(self, records: Iterable[Record]) -> Record | None:
        """Return the last record that fills this cell, or None."""
        fitting = [
            record
            for record in records
            if self.row and record["row"] == self.row and agrees(record, self.match)
        ]
        return fitting[-1] if fitting else None

    def value(self, record: Record) -> float | None:
        """Return the number of `record` that belongs into this cell."""
        return record["curve_rows"][self.at][self.field] if self.at else record[self.field]


def agrees(record: Record, match: Record) -> bool:
    """Say whether `record` was made with every flag of `match`."""
    return not mismatch(record, match)


def mismatch(record: Record, match: Record) -> list[str]:
    """List the flags that `record` was made with otherwise than `match` asks, both values each."""
    made, wrong = asked(record), []
    for name, value in match.items():
        if made.get("metric") == "is" and name.startswith("reference"):
            continue  # it compares with no images; cells name them since FID is measured with it
        if name in COUNTED and value == 0:
            value = record.get("timesteps", 0)
        if made.get(name) != value:
            wrong.append(f"{name} is {made.get(name)}, not {value}")
    return wrong


def asked(record: Record) -> Record:
    """Return what `record` says, by the names of the flags that ask for it."""
    made = dict(record)
    if "weights" in record:
        # Imported weights may not say what they are: then they are what was published.
        made["weights"] = "raw" if record["weights"].startswith("raw") else "ema"
    if "guidance" in record.get("samples", {}):
        made["guidance"] = record["samples"]["guidance"]
    if reference := record.get("reference"):
        known = reference.get("provenance", {})
        # The record of `pixels` has no file of statistics, and names the split itself.
        made["reference"] = known.get("images", reference).get("split")
        count = known.get("count", reference.get("count"))
        whole = reference.get("whole", not known)  # which `pixels` did not say at first
        made["reference_images"] = None if whole else count
    return made


def check(condition: bool, message: str) -> None:
    """Raise LedgerError with `message` unless `condition` holds."""
    if not condition:
        raise LedgerError(message)


def read_json(path: Path) -> Any:
    """Read a file of the repository.

    Raises:
      LedgerError: it is missing or damaged.
    """
    try:
        return files.read_json(path, nan=True)
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"{path} cannot be read ({error}): restore it from the repository"
        ) from error


def read_records(path: Path) -> list[Record]:
    """Read the lines of a .jsonl; none where there is no file.

    Raises:
      LedgerError: a line is no JSON.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(files.parse_json(line, nan=True))
        except ValueError as error:
            raise LedgerError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def cells(paper: Record, table: Record) -> list[list[Cell]]:
    """Return the cells `[rows][columns]` of a table of `paper`, which is benchmarks/paper.json."""
    rows = []
    for line in table["rows"]:
        cells_of_line = []
        for column, value in zip(table["columns"], line["values"], strict=True):
            shared = paper["protocols"][column["match"]["metric"]]
            match = shared | line.get("match", {}) | column["match"]
            cells_of_line.append(
                Cell(line.get("row"), value, match, column["field"], line.get("at"))
            )
        rows.append(cells_of_line)
    return rows


def evaluations(paper: Record, row: str) -> list[Record]:
    """Return the different evaluations that fill the cells of a row, in their order.

    Raises:
      LedgerError: there is no such row.
    """
    check(row in paper["rows"], f"row={row}: one of {', '.join(paper['rows'])}")
    matches: list[Record] = []
    for table in paper["tables"]:
        for cell in (cell for line in cells(paper, table) for cell in line):
            if cell.row == row and cell.match not in matches:
                matches.append(cell.match)
    return matches
