"""The rate-distortion curve on paper: Table 4's rows, a CSV with every term, Figure 5's plot."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from ddpm_jax.evaluation.nll import Nll
from ddpm_jax.images import replacing

COLUMNS = ("t", "timesteps", "reverse_steps", "term", "term_standard_error", "rate", "rmse")


def table_4(nll: Nll) -> list[tuple[int, float, float]]:
    """(reverse steps T - t, rate in bits/dim, RMSE in 0..255) at a tenth, two tenths, ... of T, most steps first."""
    timesteps, curve = nll.strata.timesteps, nll.curve
    rows = []
    for tenth in range(10, 0, -1):
        i = int(np.argmin(np.abs(curve.t - (timesteps - timesteps * tenth / 10))))
        row = (round(timesteps - curve.t[i]), float(curve.rate[i]), float(curve.rmse[i]))
        if row not in rows:  # a chain shorter than ten steps
            rows.append(row)
    return rows


def format_table(nll: Nll) -> str:
    """The parts of the bound, then Table 4, as printed."""
    lines = [f"{'':24}{'bits/dim':>12}{'standard error':>18}"]
    parts = (("L_T  prior", nll.prior), ("L_t, t >= 1  rate", nll.middle), ("L_0  decoder", nll.decoder), ("total", nll.total))
    lines += [f"{name:24}{part.mean:12.5f}{part.standard_error:18.5f}" for name, part in parts]
    lines += ["", f"{'reverse steps':>14}{'rate (bits/dim)':>18}{'RMSE (0-255)':>15}"]
    lines += [f"{steps:14}{rate:18.5f}{rmse:15.5f}" for steps, rate, rmse in table_4(nll)]
    return "\n".join(lines)


def save_csv(path: Path, nll: Nll) -> None:
    """One row for each stratum, t falling.

    `term` is L_t in bits/dim; the sum of timesteps * term over all rows, and L_T, is the total. Where a stratum holds several
    timesteps, t is their mean and rate and rmse are those of Figure 5 on the mean.

    Raises:
      OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    curve, timesteps = nll.curve, nll.strata.timesteps
    columns = (curve.t, nll.strata.size[::-1], timesteps - curve.t, nll.term[::-1], nll.term_error[::-1], curve.rate, curve.rmse)
    for row in zip(*columns):
        writer.writerow([f"{float(value):.9g}" for value in row])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def save_plot(path: Path, nll: Nll, title: str) -> None:
    """Figure 5: distortion and rate against reverse steps, and distortion against rate.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only plots need
    from matplotlib.figure import Figure

    curve = nll.curve
    steps = nll.strata.timesteps - curve.t
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = {"steps": "reverse process steps (T - t)", "rmse": "distortion (RMSE, 0-255)", "rate": "rate (bits/dim)"}
    values = {"steps": steps, "rmse": curve.rmse, "rate": curve.rate}
    for axes, (x, y) in zip(figure.subplots(1, 3), (("steps", "rmse"), ("steps", "rate"), ("rate", "rmse"))):
        axes.plot(values[x], values[y], linewidth=1.5)
        axes.set(xlabel=names[x], ylabel=names[y], xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    with replacing(path) as file:
        file.write(buffer.getvalue())
