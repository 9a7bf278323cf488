"""The ledger: the papers' values as printed, cells that only the right record fills, and its page.

REPRODUCTION.md is what the ledger writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddpm_jax.cli import evaluate, reproduce
from ddpm_jax.config import load_config
from ddpm_jax.errors import LedgerError
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.page import (
    document,
    findings_section,
    number,
    paper_section,
)
from ddpm_jax.reproduction.records import keep
from ddpm_jax.reproduction.rows import evaluation_command, evaluation_passes, grouped

ROOT = Path(__file__).parents[2]
PAPER = ledger.read_json(ROOT / "benchmarks" / "paper.json")
# As `recorded` returns them: the evaluation of 1000 ancestral steps, and that of all terms.
FID = {
    **{"metric": "fid", "value": 3.31, "num_images": 50000, "timesteps": 1000},
    **{"sampler": "ancestral", "steps": 1000, "clip": True, "dynamic_threshold": 0.0},
    **{"samples": {"guidance": 1.0}, "resize": "tf"},
    "reference": {"whole": True, "provenance": {"images": {"split": "train"}, "count": 50000}},
}
NLL = {
    **{"metric": "nll", "total": 3.7, "split": "test", "num_images": 10000},
    **{"num_timesteps": 1000, "timesteps": 1000, "clip": True, "cdf": "tanh", "seed": 0},
}


def record(row: str = "eps_simple", scale: str = "full", **values) -> dict:
    common = {
        "origin": "trained",
        "step": 800000,
        "weights": "ema 0.9999",
        "device": "8 x TPU v5 lite",
        "commit": "1a2b3c4",
    }
    return common | {"row": row, "scale": scale} | values


def table(title: str) -> dict:
    (match,) = (table for table in PAPER["tables"] if table["title"].startswith(title))
    return match


@pytest.mark.parametrize(
    "title, row, column, value",
    [
        ("Table 1: CIFAR-10, uncond", "Ours (L_simple)", "FID", "3.17"),
        ("Table 1: CIFAR-10, uncond", "Ours (L_simple)", "NLL train", "3.72"),
        ("Table 2: objectives", "L, mu, learned diagonal variance", "FID", "23.69"),
        ("Table 3", "Church", "FID", "7.89"),
        ("Table 4", "900", "RMSE", "12.02277"),
        ("Table 1: CIFAR-10 by DDIM", "sigma-hat", "S=10", "367.43"),
        ("Table 1: CelebA", "eta = 0.5", "S=100", "8.09"),
        ("Table 2: CIFAR-10, recon", "CIFAR-10", "S=50", "0.0023"),
        ("CIFAR-10", "4k cosine vlb", "FID", "11.47"),
    ],
)
def test_values_stand_where_the_papers_have_them(title, row, column, value):
    printed = next(
        one
        for one in PAPER["tables"]
        if one["title"].startswith(title) and any(r["name"] == row for r in one["rows"])
    )
    columns = [one["name"] for one in printed["columns"]]
    (line,) = (one for one in printed["rows"] if one["name"] == row)
    assert line["values"][columns.index(column)] == value


@pytest.mark.parametrize(
    "better, worse, verdict",
    [
        (4.0, 4.3, "yes"),
        (4.3, 4.0, "no"),
        (4.0, 4.28, "undecided"),
        (4.0, None, "yes"),
        (None, 4.0, "no"),
    ],
)
def test_a_finding_is_seen_beyond_two_standard_errors(better, worse, verdict):
    """With 0.1 on both sides the difference is known to 0.141; not finite is the worst of all."""
    paper = {"findings": [{"finding": "this", "better": "a", "worse": "b", "metric": "nll"}]}
    common = {"scale": "small", "metric": "nll", "total_standard_error": 0.1}
    records = [common | {"row": "a", "total": better}, common | {"row": "b", "total": worse}]
    assert findings_section(paper, records).splitlines()[-1].endswith(f"| {verdict} |")
    assert findings_section(paper, records[:1]).splitlines()[-1].endswith("| not run |")


def test_every_row_has_a_config_and_commands_that_parse():
    named = {line["row"] for one in PAPER["tables"] for line in one["rows"] if "row" in line}
    assert named <= set(PAPER["rows"])
    for row, described in PAPER["rows"].items():
        load_config(ROOT / described["config"])
        for metrics, match in grouped(ledger.evaluations(PAPER, row)):
            name, *arguments = evaluation_command(Path("runs/x"), metrics, match)
            parsed = vars(evaluate.parser().parse_args(arguments))
            assert name == "evaluate" and set(metrics) <= set(evaluate.METRICS)
            assert parsed["metrics"] == ",".join(metrics)
            for name, value in match.items():
                assert parsed[name] == (
                    {True: "true", False: "false"}[value] if isinstance(value, bool) else value
                )


def test_a_record_fills_its_cell_and_no_other():
    def ours(records: list[dict]) -> list[str]:
        text = paper_section(
            PAPER, table("Table 2: objectives"), [r for r in records if r["scale"] == "full"]
        )
        return [
            cell.strip()
            for line in text.splitlines()
            if "L_simple" in line
            for cell in line.split("|")
        ]

    assert ours([record(**FID)]) == ["", "L_simple", "9.46 ± 0.11", "not run", "3.17", "3.310", ""]
    others = [
        record(**FID | {"num_images": 5000}),
        record(**FID | {"metric": "fid-768"}),
        record(**FID | {"sampler": "ddim"}),
        record("eps_l_fixed", **FID),
        record(scale="small", **FID),
    ]
    assert ours(others) == ["", "L_simple", "9.46 ± 0.11", "not run", "3.17", "not run", ""]
    assert "3.200" in ours([record(**FID), record(**FID | {"value": 3.2})])  # the last counts
    source = (
        "- `eps_simple`, fid: trained, step 800000, ema 0.9999 weights, "
        "on 8 x TPU v5 lite, code 1a2b3c4"
    )
    assert source in document(ROOT, PAPER, [record(**FID)])


def reference(split: str, whole: bool, count: int) -> dict:
    return {"whole": whole, "provenance": {"images": {"split": split}, "count": count}}


@pytest.mark.parametrize(
    "flag, made",
    [
        ("--weights=raw", FID | {"weights": "raw"}),
        ("--reference=test", FID | {"reference": reference("test", True, 10000)}),
        ("--reference_images=4000", FID | {"reference": reference("train", False, 4000)}),
        ("--guidance=2", FID | {"samples": {"guidance": 2.0}}),
        ("--resize=half_pixel", FID | {"resize": "half_pixel"}),
        ("--steps=100", FID | {"steps": 100}),
        ("--clip=false", FID | {"clip": False}),
        ("--dynamic_threshold=0.99", FID | {"dynamic_threshold": 0.99}),
        ("--num_images=100", NLL | {"num_images": 100}),
        ("--num_timesteps=20", NLL | {"num_timesteps": 20}),
        ("--cdf=erf", NLL | {"cdf": "erf"}),
        ("--clip=false", NLL | {"clip": False}),
        ("--weights=raw", NLL | {"weights": "raw, imported"}),
    ],
)
def test_another_protocol_than_the_papers_fills_no_cell(flag, made):
    """Each is a whole record but for one flag; without that the cell has its value."""
    ours = table("Table 1: CIFAR-10, uncond")
    as_asked = record(**(FID if made["metric"] == "fid" else NLL))
    (number_there,) = (x for x in ("3.310", "3.700") if x in paper_section(PAPER, ours, [as_asked]))
    assert number_there not in paper_section(PAPER, ours, [record() | made]), flag


def test_an_inception_score_compares_with_no_reference():
    made = FID | {"metric": "is", "value": 9.5, "reference": None}
    assert "9.500" in paper_section(PAPER, table("Table 1: CIFAR-10, uncond"), [record(**made)])


def test_all_steps_are_those_of_the_record_s_own_chain():
    """The rows of Nichol & Dhariwal have 1000 timesteps or 4000."""
    of_4000 = {"timesteps": 4000, "num_timesteps": 4000, "steps": 4000}
    for made, value in ((NLL | {"total": 2.95}, "2.950"), (FID | {"value": 11.6}, "11.6")):
        for change, there in ((of_4000, True), ({"timesteps": 4000}, False)):
            (nichol,) = (one for one in PAPER["tables"] if "Nichol" in one["paper"])
            text = paper_section(PAPER, nichol, [record("4k_cosine_vlb", **made | change)])
            assert (f"| {value} |" in text) == there


def test_table_4_is_read_off_the_curve():
    rows = {str(row): {"rate": row / 1000, "rmse": 50.0} for row in range(100, 1001, 100)}
    text = paper_section(PAPER, table("Table 4"), [record(**NLL, curve_rows=rows)])
    assert "| 300 | 0.00081 | 0.300 | 54.18826 | 50 |" in text
    assert "not run" not in text


def test_a_run_replaces_its_own_results_only(tmp_path):
    results = tmp_path / "deep" / "results.jsonl"
    of_run = {"row": "eps_simple", "scale": "full", "origin": "trained"}
    keep(results, of_run, [{"value": 1.0}, {"value": 2.0}], {})
    keep(results, of_run | {"row": "mu_l_fixed"}, [{"value": 3.0}], {})
    keep(results, of_run, [{"value": 4.0}], {})
    assert [(one["row"], one["value"]) for one in ledger.read_records(results)] == [
        ("mu_l_fixed", 3.0),
        ("eps_simple", 4.0),
    ]


@pytest.mark.parametrize(
    "row, passes",
    [
        # As counted by hand from the tables: samples of 1,000 steps, and bounds of 1,000 terms.
        ("mu_l_learned", 50_000 * 1000),
        ("celebahq256", 0),
        ("4k_cosine_vlb", (10_000 + 50_000) * 4000),
        # Five lines of five numbers of steps.
        ("celeba64", 5 * 50_000 * (10 + 20 + 50 + 100 + 1000)),
    ],
)
def test_passes_of_an_evaluation_are_counted(row, passes):
    timesteps = 4000 if row.startswith("4k") else 1000
    assert evaluation_passes(PAPER, row, timesteps) == passes


def test_reproduction_md_is_what_the_ledger_writes():
    results = ledger.read_records(ROOT / "benchmarks" / "results" / "reproduction.jsonl")
    written = document(ROOT, PAPER, results)
    assert (ROOT / "REPRODUCTION.md").read_text() == written, "python scripts/reproduce.py --ledger"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--row=NAME says what to reproduce"),
        (["--row=best"], "row=best: one of mu_l_learned"),
        (["--row=eps_simple", "--imported=x.ckpt"], "add scale=full"),
        (
            ["--row=mu_l_fixed", "--imported=x.ckpt", "--scale=full"],
            "no checkpoint of it has been published",
        ),
    ],
)
def test_bad_requests_are_told(arguments, message):
    with pytest.raises(LedgerError, match=message):
        reproduce.main([*arguments, "--dry_run"])


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(record()) + "\n{")
    with pytest.raises(LedgerError, match="results.jsonl: line 2 is not JSON"):
        ledger.read_records(tmp_path / "results.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["eps_simple", "4k_cosine_hybrid"])
def test_the_whole_road_at_small_scale(row, tmp_path):
    """Train, evaluate, record, as commands; the second time there is nothing left to do."""
    results = tmp_path / "results.jsonl"
    short = [
        *("train.steps=3", "train.eval_images=16", "model.base_channels=8"),
        *("model.channel_mult=(1,)", "model.blocks_per_level=1", "model.attention_resolutions=()"),
    ]
    arguments = [
        f"--row={row}",
        f"--runs={tmp_path / 'runs'}",
        f"--results={results}",
        f"--output={tmp_path / 'L.md'}",
        *(f"--config.{item}" for item in short),
    ]
    reproduce.main(arguments)
    records = ledger.read_records(results)
    assert [one["metric"] for one in records] == ["nll", "pixels"]
    assert all(
        one["row"] == row and one["scale"] == "small" and one["step"] == 3 for one in records
    )
    bound = number(records[0]["total"], records[0]["total_standard_error"])
    assert f"| `{row}` | 3 x 128 | {bound} |" in (tmp_path / "L.md").read_text()
    reproduce.main(arguments)
    assert ledger.read_records(results) == records
