"""Reproduce one row of the papers' tables: train it or import it, evaluate it, record it.

--scale=full   the row's own config and protocol, as REPRODUCTION.md prices them; what fills the
               papers' cells
--scale=small  the same road with a reduced network on 8x8 digits, in minutes on two cores: to see
               that it is whole, and what the objectives do to each other

Each step is a command of its own, printed before it runs (--dry_run: instead of running). What is
done already is not repeated: a training goes on where it was, an evaluation that the run directory
has is taken from there, if it is by the protocol of the row: an estimate of fewer images fills no
cell. Results are appended to benchmarks/results/reproduction.jsonl, with the commit and the device
of the call that measured them ("unknown" for what it found), and REPRODUCTION.md is written from
them; --ledger does only that.
"""

import argparse
from pathlib import Path

from ddpm_jax.cli import flags
from ddpm_jax.errors import LedgerError
from ddpm_jax.progress import say
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.page import write_page
from ddpm_jax.reproduction.processes import Stopped, stoppable
from ddpm_jax.reproduction.rows import (
    HOME,
    RESULTS,
    ROOT,
    SCALES,
    ReproductionOptions,
    reproduce,
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    command = flags.parser(__doc__, "python scripts/reproduce.py --row=eps_simple --scale=small")
    add = command.add_argument
    add("--row", metavar="NAME", help="of benchmarks/paper.json, or all")
    add("--scale", choices=SCALES, default="small", help="(default: small)")
    add(
        "--imported",
        type=Path,
        metavar="FILE",
        help="the row's published checkpoint, in place of a training; full scale only",
    )
    flags.add_data_dir(command)
    add(
        "--runs",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="run directories (default: runs/reproduce)",
    )
    add(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"(default: {RESULTS.relative_to(HOME)})",
    )
    add(
        "--output",
        type=Path,
        default=HOME / "REPRODUCTION.md",
        metavar="FILE",
        help="(default: REPRODUCTION.md)",
    )
    add("--dry_run", action="store_true", help="print the commands and do nothing")
    add(
        "--ledger",
        action="store_true",
        help="only write the ledger from the results that are there",
    )
    command.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="override one field of the row's config, at full scale one that the papers "
        "leave open, such as seed; repeatable",
    )
    return command


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 128 + the number of a signal that ended it."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    paper = ledger.read_json(ROOT / "benchmarks" / "paper.json")
    if not options.ledger:
        if options.row is None:
            raise LedgerError("--row=NAME says what to reproduce; --ledger writes REPRODUCTION.md")
        how = flags.fill(ReproductionOptions, options, overrides=tuple(overrides))
        try:
            with stoppable():
                for row in list(paper["rows"]) if options.row == "all" else [options.row]:
                    reproduce(paper, row, how)
        except Stopped as stop:
            say("stopped; the same command goes on")
            return 128 + stop.number
    if not options.dry_run:
        write_page(options.output, ROOT, paper, ledger.read_records(options.results))
        print(f"wrote {options.output}")
    return 0
