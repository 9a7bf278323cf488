"""Write REPRODUCTION.md from the records of the ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from ddpm_jax.build import abstract_params, forward_flops
from ddpm_jax.config import Config, load_config
from ddpm_jax.files import replacing
from ddpm_jax.reproduction.ledger import Record, cells, read_json, read_records
from ddpm_jax.reproduction.rows import evaluation_passes

H100 = 798e12  # FLOP/s in bfloat16, the peak that was measured on one elsewhere
UTILISATION = 0.4, 0.1  # of that peak: what a network may reach, from the best to the usual


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *escaped)
    )


def number(value: float | None, error: float | None = None) -> str:
    """Write a number, with its standard error where there is one."""
    if value is None:
        return "not finite"
    text = f"{value:.3f}" if 0.1 <= abs(value) < 10 else f"{value:.{4 if abs(value) >= 10 else 3}g}"
    return text if error is None else f"{text} ± {error:.2g}"


def paper_section(paper: Record, table: Record, records: Sequence[Record]) -> str:
    """Write one table of a paper, its values and ours side by side.

    A cell of ours says "not run" where no record fills it.
    """
    head = [
        "",
        *(f"{column['name']}, {who}" for column in table["columns"] for who in ("paper", "ours")),
    ]
    lines = []
    for line, row in zip(table["rows"], cells(paper, table)):
        values = [line["name"]]
        for cell in row:
            record = cell.measured(records)
            values += [cell.paper, "not run" if record is None else number(cell.value(record))]
        lines.append(values)
    title = f"### {table['paper']}: {table['title']}"
    return f"{title}\n\n{table['protocol']}.\n\n{markdown_table(head, lines)}\n"


def sources(paper: Record, records: Sequence[Record]) -> str:
    """Write how each of our values was obtained, a line for each record that fills a cell."""
    used: list[Record] = []
    for table in paper["tables"]:
        for cell in (cell for line in cells(paper, table) for cell in line):
            record = cell.measured(records)
            if record is not None and record not in used:
                used.append(record)
    if not used:
        return (
            "No cell of the papers' tables has been filled yet: their networks were neither "
            "trained nor at hand here.\n"
        )
    return "\n".join(
        f"- `{record['row']}`, {record['metric']}: {record['origin']}, step {record['step']}, "
        f"{record['weights']} weights, on {record['device']}, code {record['commit']}"
        for record in used
    )


def costs(paper: Record, root: Path) -> str:
    """Write what each row takes: config, published checkpoint, parameters, arithmetic, hours."""
    lines = []
    for name, row in paper["rows"].items():
        config = load_config(root / row["config"])
        size, forward = network_size(config)
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
                _gpu_hours(flops * images),
                _gpu_hours(forward * evaluation_passes(paper, name, config.diffusion.timesteps)),
                _pod_hours(root, config, images),
            ]
        )
    head = ["row", "config", "published checkpoint", "parameters", "GFLOP an image", "images"]
    hours = ["H100 hours, training", "evaluation", "hours of 8 chips of v5e, training"]
    return markdown_table([*head, *hours], lines) + "\n"


def _gpu_hours(flops: float) -> str:
    """Reckon the hours of one H100 over the range of its utilisation."""
    hours = [flops / H100 / part / 3600 for part in UTILISATION]
    return " to ".join(f"{value:,.1f}" for value in hours) if flops else "nothing to fill"


def network_size(config: Config) -> tuple[int, int]:
    """Return the parameters of a network and the FLOPs of its forward pass for one image."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    return parameters, forward_flops(config)


def _pod_hours(root: Path, config: Config, images: int) -> str:
    """Reckon the hours from compile_for_tpu.py's report of this network and 8 chips, if any."""
    for path in sorted((root / "benchmarks" / "tpu").glob("*_v5e_008.json")):
        report = read_json(path)
        other = load_config(root / report["config"], report["overrides"])
        same = (other.model, other.data.image_size) == (config.model, config.data.image_size)
        if same and other.train.batch_size == config.train.batch_size:
            return f"{images / report['train']['estimate']['images_per_second'] / 3600:,.1f}"
    return "not compiled"


def small_section(paper: Record, records: Sequence[Record]) -> str:
    """Write what each row came to at small scale."""
    lines = []
    for row in paper["rows"]:
        by_metric = {
            record["metric"]: record
            for record in records
            if record["row"] == row and record["scale"] == "small"
        }
        nll, distance = by_metric.get("nll"), by_metric.get("pixels")
        lines.append(
            [
                f"`{row}`",
                next(iter(by_metric.values()))["trained"] if by_metric else "not run",
                number(nll["total"], nll.get("total_standard_error")) if nll else "not run",
                number(distance["value"]) if distance else "not run",
            ]
        )
    return (
        markdown_table(["row", "steps x images", "NLL, bits/dim", "distance of pixels"], lines)
        + "\n"
    )


def findings_section(paper: Record, records: Sequence[Record]) -> str:
    """Write what the papers found, and whether the rows at small scale say so too.

    A difference within two standard errors says nothing.
    """
    field = {"nll": "total", "pixels": "value"}
    lines = []
    for finding in paper["findings"]:
        metric = finding["metric"]
        by_row = {
            record["row"]: record
            for record in records
            if record["scale"] == "small" and record["metric"] == metric
        }
        pair = [by_row.get(finding[side]) for side in ("better", "worse")]
        verdict, texts = "not run", ["not run", "not run"]
        if all(pair):
            values = [
                math.inf if record[field[metric]] is None else record[field[metric]]
                for record in pair
            ]
            error = math.hypot(*(record.get("total_standard_error") or 0.0 for record in pair))
            texts = [
                number(record[field[metric]], record.get("total_standard_error")) for record in pair
            ]
            verdict = (
                "yes"
                if values[1] - values[0] > 2 * error
                else "no"
                if values[0] - values[1] > 2 * error
                else "undecided"
            )
        sides = [f"`{finding[side]}` {text}" for side, text in zip(("better", "worse"), texts)]
        lines.append(
            [finding["finding"], {"nll": "bits/dim", "pixels": "pixels"}[metric], *sides, verdict]
        )
    return (
        markdown_table(["finding", "by", "should be lower", "should be higher", "seen here"], lines)
        + "\n"
    )


def comparison_section(results: Path) -> str:
    """Write the figures of the files that compare_with_diffusers.py wrote."""
    parts = []
    for path in sorted(results.glob("compare_*.json")):
        comparison = read_json(path)
        data, train, diffusion = (
            comparison["config"][name] for name in ("data", "train", "diffusion")
        )
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in comparison["runs"]}))
        lines = [
            [
                line["figure"],
                *(
                    number(line[side], line.get(f"{side}_error"))
                    for side in ("ddpm_jax", "diffusers")
                ),
                number(line["difference"], line.get("difference_error")),
            ]
            for line in comparison["summary"]
        ]
        title = (
            f"**{data['name']}**, {diffusion['prediction']}, {diffusion['schedule']} schedule, "
            f"{train['steps']:,} steps of {train['batch_size']} images, seeds {seeds}"
        )
        head = ["", "ddpm_jax", "diffusers", "difference"]
        parts.append(f"{title}\n\n{markdown_table(head, lines)}\n")
    return "\n".join(parts) or "Not run.\n"


def shipped_section(shipped: Path) -> str:
    """Write what the networks of pretrained/ are worth."""
    lines = []
    for folder in sorted(path.parent for path in shipped.glob("*/evaluations.jsonl")):
        size = sum(file.stat().st_size for file in (folder / "unet").iterdir())
        records = {
            record["metric"].lower(): record
            for record in read_records(folder / "evaluations.jsonl")
        }
        nll, fid = records.get("nll"), records.get("fid-768")
        lines.append(
            [
                f"`--pretrained={folder.name}`",
                f"{size / 1e6:.1f} MB",
                number(nll["total"], nll.get("total_standard_error")) if nll else "not run",
                f"{number(fid['value'])} ({fid['num_images']:,} samples)" if fid else "not run",
            ]
        )
    return (
        markdown_table(["", "size", "NLL, bits/dim", "FID-768"], lines) + "\n"
        if lines
        else "None yet.\n"
    )


def figures_section(paper: Record) -> str:
    """Write which command draws each figure of the papers, and what it drew here."""
    lines = [
        [figure["figure"], figure["what"], f"`{figure['command']}`", figure["ours"]]
        for figure in paper["figures"]
    ]
    return (
        markdown_table(
            ["figure", "what", "command, with --workdir", "from our small networks"], lines
        )
        + "\n"
    )


def document(root: Path, paper: Record, records: Sequence[Record]) -> str:
    """Write REPRODUCTION.md, with the reports and results below `root`."""
    full = [record for record in records if record["scale"] == "full"]
    sections = "\n".join(paper_section(paper, table, full) for table in paper["tables"])
    return f"""# What of the papers has been reproduced

Written by `python scripts/reproduce.py --ledger` from benchmarks/paper.json (the papers' values)
and benchmarks/results/, not by hand. A cell of ours is filled when its row has been run at full
scale, and only then.

## The papers' tables

{sections}
How our values were obtained:

{sources(paper, full)}
## The road to each row

(a) Training it here: `python scripts/reproduce.py --row=ROW --scale=full`. (b) From its published
checkpoint: `python scripts/reproduce.py --row=ROW --scale=full --imported=FILE`. Both then draw the
samples and evaluate for the cells of the row, of which `celebahq256` has none, and write this file;
`--dry_run` prints the single commands instead. Rows of LSUN and CelebA-HQ take images that were
prepared from a folder with `--config.data.name=NAME` as well. Training takes three times the
arithmetic of a forward pass; evaluation is the samples, bounds and reconstructions of all its
cells, without Inception. Hours on one H100 are an estimate, from 40 % to
10 % of 798 TFLOP/s in bfloat16: for CIFAR-10 3.3, 6.6 and 13 hours at 40, 20 and 10 %. What others
report for networks of its size (34 to 60 M parameters) is at the slow end: 145 to 236 images/s on
a V100, 306 to 750 on an RTX 4090, 385 on an A100, where 102 M images take 74 hours at 385. Hours
on 8 chips of TPU v5e are the estimate of `compile_for_tpu.py` for the compiled step. Neither was
measured here. The paper itself took 10.6 hours for CIFAR-10 on a TPU v3-8.

{costs(paper, root)}
## The papers' figures

{figures_section(paper)}
## The same road at small scale

`python scripts/reproduce.py --row=ROW`: each row's objective, schedule, variances and conditioning,
on a network of a million parameters and scikit-learn's 8x8 digits. The NLL is the bound on the 179
held-out digits with 20 terms each. The distance is Fréchet's between Gaussians fitted to the 64
pixels of 512 samples and of the training images: a stand-in for a FID, comparable with nothing but
the lines of this table. Samples take 50 ancestral steps, with the posterior's variance where a
diagonal one was learned, which is one of single steps.

{small_section(paper, records)}
What the papers found, looked for in these lines, one seed each; "undecided" is a difference within
two standard errors (the distances have none):

{findings_section(paper, records)}
## The same recipe in PyTorch

`scripts/compare_with_diffusers.py` trains a config with this code and with diffusers' UNet2DModel
and DDPMScheduler in a plain loop, and judges both by one evaluation on held-out images: the bound,
and the mean squared error of eps at fixed timesteps. Errors are standard errors over seeds. Its
`--lockstep` compares the two step by step (docs/weights.md).

{comparison_section(root / "benchmarks" / "results")}
## Weights that ship

{shipped_section(root / "pretrained")}"""


def write_page(path: Path, root: Path, paper: Record, records: Sequence[Record]) -> None:
    """Write REPRODUCTION.md to `path`."""
    with replacing(path) as file:
        file.write(document(root, paper, records).encode())
