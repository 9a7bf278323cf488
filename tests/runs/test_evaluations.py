"""Lines of evaluations.jsonl outlive what a killed process left of the last one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpm_jax.errors import WorkdirError
from ddpm_jax.runs.evaluations import NAME, append_evaluation, read_evaluations


def totals(workdir: Path) -> list[float]:
    return [record["total"] for record in read_evaluations(workdir)]


@pytest.mark.parametrize("left", [1, 20, -2])
def test_a_torn_line_is_named_and_costs_no_other(tmp_path: Path, left: int) -> None:
    """`left` bytes of the second line, or all but so many, were written before the kill."""
    path = tmp_path / NAME
    append_evaluation(tmp_path, {"total": 1.0})
    first = path.stat().st_size
    append_evaluation(tmp_path, {"total": 2.0})
    os.truncate(path, (first if left > 0 else path.stat().st_size) + left)
    append_evaluation(tmp_path, {"total": 3.0})
    with pytest.raises(
        WorkdirError, match=f"{NAME}: its line 2 is damaged .*remove that line"
    ) as e:
        read_evaluations(tmp_path)
    assert "\n" not in str(e.value)
    one, _, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + three)  # the remedy
    assert totals(tmp_path) == [1.0, 3.0]


def test_a_record_that_lacks_only_its_end_of_line_counts(tmp_path: Path) -> None:
    """An editor may leave a file so."""
    append_evaluation(tmp_path, {"total": 1.0})
    path = tmp_path / NAME
    os.truncate(path, path.stat().st_size - 1)
    append_evaluation(tmp_path, {"total": 2.0})
    append_evaluation(tmp_path, {"total": 3.0})
    assert totals(tmp_path) == [1.0, 2.0, 3.0]
    assert len(path.read_text().splitlines()) == 3
