"""Lay the benchmark's files out as the table of speeds, and write it into a page."""

from __future__ import annotations

from pathlib import Path

from ddpm_jax.errors import LedgerError
from ddpm_jax.files import replacing
from ddpm_jax.reproduction.ledger import Record, read_json
from ddpm_jax.reproduction.page import markdown_table
from ddpm_jax.reproduction.rows import ROOT

BEGIN, END = "<!-- speeds: written by ddpm first-hour -->", "<!-- end of speeds -->"
HEAD = ("device", "config", "batch", "", "ms a step", "images/s", "of the peak", "launches")
RIVALS = {"diffusers eager": "by diffusers eager", "diffusers compiled": "by torch.compile"}


def speed_table(folder: Path) -> str:
    """Write a row for each training and sampling step that the files of a folder timed.

    A ratio is our time by theirs, the median over rounds: below 1 we are faster. Launches are
    those of the program that was compiled ahead for such a device.
    """
    lines = []
    paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem.partition("_")[0]))
    for path in paths:
        result = read_json(path)
        kinds = sorted(set(result["machine"]["devices"]))
        device = f"{len(result['machine']['devices'])} x {', '.join(kinds)}"
        config = f"{name_of(result['config'])}, {result['dtype']}"
        for what in ("train", "sample"):
            if timed := result.get(what):
                ratios = [timed.get(rival, {}).get("ratio") for rival in RIVALS]
                lines.append(
                    [
                        *(device, config, f"{result['batch_size']:,}", what),
                        f"{timed['ours']['median_ms']:.4g}",
                        f"{timed['images_per_s']:,.4g}",
                        f"{timed['flop_utilisation']:.0%}",
                        launches(result, what, device),
                        *(f"{ratio['median']:.2f}" if ratio else "not run" for ratio in ratios),
                    ]
                )
    return markdown_table([*HEAD, *RIVALS.values()], lines)


def launches(result: Record, what: str, device: str) -> str:
    """Return the launches of a step by the report of compile_ahead.py that fits, if any.

    It is of the same config and variant and as many devices. Launches of a sampling step hardly
    depend on how many are drawn.
    """
    for path in sorted((ROOT / "benchmarks" / "gpu").glob("*.json")):
        report = read_json(path)
        program = report.get(what)
        if (
            program
            and name_of(report["config"]) == name_of(result["config"])
            and program["chips"] == len(result["machine"]["devices"])
            and kind_of(program["target"]) in device.lower()
            and (what == "sample" or program["batch_size"] == result["batch_size"])
        ):
            return f"{program['launches']:,}"
    return "not compiled"


def name_of(config: str) -> str:
    """Return the name of a config with its variant, "improved_ddpm:4k_cosine_vlb"."""
    return Path(config).name.replace(".py", "")


def kind_of(target: str) -> str:
    """Return the kind of GPU of a target: "h100" of "h100:8" and of "2x8xh100"."""
    return target.partition(":")[0].rpartition("x")[2]


def write_table(page: Path, table: str) -> None:
    """Write a table between the marks of a page, which is made where there is none.

    Raises:
      LedgerError: the page has no marks, or they do not come once each.
    """
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise LedgerError(f"{page}: the lines {BEGIN} and {END} are gone: restore the file")
    with replacing(page) as file:
        file.write(f"{before}{BEGIN}\n{table}\n{END}{after}".encode())
