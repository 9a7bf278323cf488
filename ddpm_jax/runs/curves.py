"""Draw curves of runs from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from ddpm_jax.errors import UserError
from ddpm_jax.files import replacing
from ddpm_jax.runs.metrics import read_metrics

LOSSES = ("loss", "held_out_loss")


def plot_curves(
    workdirs: Sequence[Path], names: Sequence[str] | None, output: Path, *, log: bool = False
) -> None:
    """Draw one curve for each run and metric, against the step, as a PNG.

    Args:
      names: of the metrics, which each run must have; None takes those of LOSSES that a run has.

    Raises:
      UserError: a directory without metrics, a metric that a run never wrote, or another suffix
        than .png.
    """
    if output.suffix != ".png":
        raise UserError(f"output={output}: must end in .png")
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot(
        xlabel="step", ylabel=", ".join(names or ["loss"]), yscale="log" if log else "linear"
    )
    for workdir in workdirs:
        if not (workdir / "metrics.jsonl").is_file():
            raise UserError(f"workdir={workdir}: no metrics.jsonl; make one with ddpm train")
        rows = read_metrics(workdir)
        for name in _losses(rows) if names is None else names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if not points:
                have = ", ".join(sorted({key for row in rows for key in row} - {"step"}))
                have = have or "nothing yet"
                raise UserError(f"{workdir}/metrics.jsonl has no {name!r}; it has {have}")
            marker = "." if len(points) < 20 else ""  # a single point has no line
            axes.plot(*zip(*points), marker=marker, label=f"{workdir.name}: {name}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, output)


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
    """Return an empty figure, in inches."""
    # Without pyplot, its global state and its search for a screen.
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: matplotlib.figure.Figure, output: Path) -> None:
    """Write a figure to `output` as a PNG, whole or not at all."""
    with replacing(output) as file:
        figure.savefig(file, format="png", dpi=110)


def _losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """List the losses that a run has: a young one has no held-out loss, a student has none at all.

    Without any it is the first one, which a message then asks for.
    """
    return [name for name in LOSSES if any(name in row for row in rows)] or [LOSSES[0]]
