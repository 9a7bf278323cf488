"""Remember what the first hour on a device is used for, and what of it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_jax.config import load_config
from ddpm_jax.errors import LedgerError
from ddpm_jax.files import read_json, replacing
from ddpm_jax.reproduction import rows
from ddpm_jax.reproduction.ledger import Record, check
from ddpm_jax.reproduction.rows import HOME, RESULTS, ROOT, SMALL

STATE = "first_hour.json"


@dataclass(frozen=True)
class HourOptions:
    """What the hour is used for.

    Attributes:
      row: of benchmarks/paper.json, whose network is trained.
      scale: "full", or "small" for a rehearsal with a reduced network on the digits, which writes
        below `runs` alone.
      runs: where everything goes.
      data_dir: the prepared data sets.
      minutes: of this call.
      train_minutes: of training in all calls together.
      batch_sizes: that are timed.
      rounds: timings of each.
      num_images: samples that the FID is of.
      inception: weights for it, those of the 768 features or all; without it there is no FID.
      overrides: of the row's config, each "section.field=value".

    Raises:
      LedgerError: a number that is not above 0, or no such scale.
    """

    row: str = "eps_simple"
    scale: str = "full"
    runs: Path = Path("runs/first_hour")
    data_dir: Path = Path("data")
    minutes: float = 10.0
    train_minutes: float = 30.0
    batch_sizes: Sequence[int] = (128, 1024)
    rounds: int = 20
    num_images: int = 10_000
    inception: Path | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self.scale in rows.SCALES, f"scale={self.scale}: one of {', '.join(rows.SCALES)}")
        for name in ("minutes", "train_minutes", "rounds", "num_images"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value}: must be above 0")

    @property
    def workdir(self) -> Path:
        """Return the run directory, where `reproduce` has it."""
        return self.runs / self.scale / self.row

    @property
    def fields(self) -> tuple[str, ...]:
        """Return all overrides of the row's config, those of the scale first."""
        small = SMALL if self.scale == "small" else {}
        return (*(f"{name}={value}" for name, value in small.items()), *self.overrides)

    @property
    def results(self) -> Path:
        """Return the .jsonl that records are added to."""
        return RESULTS if self.scale == "full" else self.runs / RESULTS.name

    @property
    def page(self) -> Path:
        """Return the page whose table of speeds is written."""
        name = Path("docs", "performance.md")
        return HOME / name if self.scale == "full" else self.runs / name.name


@dataclass
class Hour:
    """A call under way: its options, what the row is, what is done, and when it ends."""

    options: HourOptions
    config: str
    end: float
    done: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that are left of this call."""
        return self.end - time.monotonic()

    def keep(self, stage: str, **result: Any) -> None:
        """Remember a stage as done, with what it came to, on disk as well."""
        self.done[stage] = result
        state = {"options": settled(self.options), "done": self.done}
        with replacing(self.options.runs / STATE) as file:
            file.write((json.dumps(state, indent=1) + "\n").encode())


def settled(options: HourOptions) -> dict[str, Any]:
    """Return the options that all calls share: what is done would be another thing with others."""
    return {
        "row": options.row,
        "scale": options.scale,
        "overrides": list(options.overrides),
        "batch_sizes": list(options.batch_sizes),
        "num_images": options.num_images,
    }


def open_hour(paper: Record, options: HourOptions) -> Hour:
    """Read what earlier calls have done in `options.runs`.

    Raises:
      LedgerError: no such row, an override that makes another network of it at full scale, no
        file of that name for Inception, a state file that is damaged, or calls with other options.
      DataError: the data set is not prepared.
    """
    known = ", ".join(paper["rows"])
    check(options.row in paper["rows"], f"row={options.row}: one of {known}")
    config = paper["rows"][options.row]["config"]
    data = load_config(ROOT / config, options.fields).data  # ConfigError before anything runs
    how = rows.ReproductionOptions(scale=options.scale, overrides=options.overrides)
    rows.check_overrides(config, how)  # `reproduce` goes on from here
    inception = options.inception
    check(inception is None or inception.is_file(), f"inception={inception}: no such file")
    if options.scale == "full":
        # It imports TFDS and grain, which the digits of a rehearsal do not need.
        from ddpm_jax.data.prepared import find_prepared

        find_prepared(data.name, options.data_dir)
    hour = Hour(options, config, time.monotonic() + 60 * options.minutes)
    path = options.runs / STATE
    if path.exists():
        try:
            state = read_json(path)
            hour.done, before = dict(state["done"]), dict(state["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            again = "delete it, and the stages run anew; a training goes on where it was"
            raise LedgerError(f"{path} cannot be read ({error!r}): {again}") from error
        for name, value in settled(options).items():
            here = f"{name}={before.get(name)} in {options.runs}, now {value}"
            check(before.get(name) == value, f"{here}: name another runs=DIR")
    return hour
