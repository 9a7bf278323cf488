"""Curves: drawn from what runs wrote, or refused by name."""

from __future__ import annotations

from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.runs.curves import plot_curves
from ddpm_jax.runs.metrics import MetricWriter
from tests.support.commands import command_module


@pytest.fixture
def run(tmp_path) -> Path:
    with MetricWriter(tmp_path / "run") as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": 1 / step})
    return tmp_path / "run"


def test_the_curve_is_in_the_picture(run, tmp_path, monkeypatch):
    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, *a, **k: (drawn.append(a), plot(self, *a, **k))[1],
    )
    plot_curves([run], ["loss"], tmp_path / "curve.png", log=True)
    assert drawn == [((10, 20, 30), (0.1, 0.05, pytest.approx(1 / 30)))]
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.array(image)
    assert (
        pixels.shape[0] > 100 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    )


@pytest.mark.parametrize("points, marked", [(1, True), (19, True), (20, False)])
def test_few_points_are_marked_since_one_has_no_line(tmp_path, monkeypatch, points, marked):
    (tmp_path / "run").mkdir()
    rows = [f'{{"step": {step}, "loss": 1.0}}\n' for step in range(points)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows))
    lines = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *a, **k: lines.extend(plot(self, *a, **k))
    )
    plot_curves([tmp_path / "run"], ["loss"], tmp_path / "curve.png", log=False)
    (line,) = lines
    assert (line.get_marker() == ".") == marked


@pytest.mark.parametrize(
    "workdir, names, output, said",
    [
        ("run", ["los"], "curve.png", "has no 'los'; it has loss"),
        ("elsewhere", ["loss"], "curve.png", "no metrics.jsonl; make one with ddpm train"),
        ("run", ["loss"], "curve.pdf", "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_named(run, tmp_path, workdir, names, output, said):
    with pytest.raises(UserError, match=said):
        plot_curves([tmp_path / workdir], names, tmp_path / output)
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize("names", [["loss"], ["held_out_loss"], ["held_out_loss", "loss"]])
def test_without_names_the_losses_that_are_there_are_drawn(tmp_path, monkeypatch, names):
    """A young run has no held-out loss yet, a student never has one."""
    with MetricWriter(tmp_path / "run") as writer:
        for name in names:
            writer.write_scalars(5, {name: 0.5})
    labels = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, *a, **k: (labels.append(k["label"]), plot(self, *a, **k))[1],
    )
    output = f"--output={tmp_path / 'curve.png'}"
    command_module("plot_metrics").main([f"--workdir={tmp_path / 'run'}", output])
    assert labels == [f"run: {name}" for name in sorted(names, reverse=True)]
    with pytest.raises(UserError, match="has no 'grad_norm'"):
        plot_curves([tmp_path / "run"], [*names, "grad_norm"], tmp_path / "curve.png")


def test_a_run_without_any_loss_is_named(tmp_path):
    with MetricWriter(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="has no 'loss'; it has nothing yet"):
        plot_curves([tmp_path / "run"], None, tmp_path / "curve.png")
