"""What is read off the files of a run directory for its record."""

from __future__ import annotations

import pytest

from ddpm_jax.reproduction.records import curve_rows


@pytest.mark.parametrize("timesteps, rate", [(1000, 0.3), (4000, 1.2)])
def test_rows_of_the_curve_are_thousandths_of_all_steps(timesteps, rate, tmp_path):
    """After 300 of 1000 reverse steps, or 1200 of 4000, counted from where sending starts."""
    steps = [number * timesteps // 1000 for number in range(1, 1001)]
    lines = [f"{step},{step / 1000},{100 - step / 50}" for step in steps]
    (tmp_path / "nll.csv").write_text("\n".join(["reverse_steps,rate,rmse", *lines]))
    rows = curve_rows(tmp_path, {"curve": "nll.csv", "timesteps": timesteps})
    assert list(rows) == [str(row) for row in range(100, 1001, 100)]
    assert rows["300"] == {"rate": rate, "rmse": 100 - 20 * rate}
    assert rows["1000"] == {"rate": timesteps / 1000, "rmse": 100 - timesteps / 50}
