"""Show the bound and its rate-distortion curve: Table 4's rows, a CSV with every term, Figure 5.

`report` does all of it for one measurement, and returns its record.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.evaluation.nll import Nll, Protocol
from ddpm_jax.files import replacing
from ddpm_jax.trained import Trained

COLUMNS = ("t", "timesteps", "reverse_steps", "term", "term_standard_error", "rate", "rmse")


def table_4(nll: Nll) -> list[tuple[int, float, float]]:
    """Return the rows of Table 4 at a tenth, two tenths, ... of T, most steps first.

    Returns:
      (reverse steps T - t, rate in bits/dim, RMSE in 0..255) a row.
    """
    timesteps, curve = nll.strata.timesteps, nll.curve
    rows = []
    for tenth in range(10, 0, -1):
        i = int(np.argmin(np.abs(curve.t - (timesteps - timesteps * tenth / 10))))
        row = (round(timesteps - curve.t[i]), float(curve.rate[i]), float(curve.rmse[i]))
        if row not in rows:  # a chain shorter than ten steps
            rows.append(row)
    return rows


def format_table(nll: Nll) -> str:
    """Format the parts of the bound, then Table 4."""
    lines = [f"{'':24}{'bits/dim':>12}{'standard error':>18}"]
    parts = (
        ("L_T  prior", nll.prior),
        ("L_t, t >= 1  rate", nll.middle),
        ("L_0  decoder", nll.decoder),
        ("total", nll.total),
    )
    lines += [f"{name:24}{part.mean:12.5f}{part.standard_error:18.5f}" for name, part in parts]
    lines += ["", f"{'reverse steps':>14}{'rate (bits/dim)':>18}{'RMSE (0-255)':>15}"]
    lines += [f"{steps:14}{rate:18.5f}{rmse:15.5f}" for steps, rate, rmse in table_4(nll)]
    return "\n".join(lines)


def save_csv(path: Path, nll: Nll) -> None:
    """Write one row for each stratum, t falling.

    `term` is L_t in bits/dim; the sum of timesteps * term over all rows, and L_T, is the total.
    Where a stratum holds several timesteps, t is their mean, and rate and rmse are those of
    Figure 5 on the mean.

    Raises:
      OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    curve, timesteps = nll.curve, nll.strata.timesteps
    columns = (
        curve.t,
        nll.strata.size[::-1],
        timesteps - curve.t,
        nll.term[::-1],
        nll.term_error[::-1],
        curve.rate,
        curve.rmse,
    )
    for row in zip(*columns):
        writer.writerow([f"{float(value):.9g}" for value in row])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def save_plot(path: Path, nll: Nll, title: str) -> None:
    """Plot Figure 5: distortion and rate against reverse steps, and distortion against rate.

    Raises:
      OSError: the file cannot be written.
    """
    # Importing these takes half a second that only plots need.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = nll.curve
    steps = nll.strata.timesteps - curve.t
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = {
        "steps": "reverse process steps (T - t)",
        "rmse": "distortion (RMSE, 0-255)",
        "rate": "rate (bits/dim)",
    }
    values = {"steps": steps, "rmse": curve.rmse, "rate": curve.rate}
    for axes, (x, y) in zip(
        figure.subplots(1, 3), (("steps", "rmse"), ("steps", "rate"), ("rate", "rmse"))
    ):
        axes.plot(values[x], values[y], linewidth=1.5)
        axes.set(xlabel=names[x], ylabel=names[y], xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def file_name(nll: Nll, protocol: Protocol, trained: Trained, split: str) -> str:
    """Name the files of a measurement by all that tells it from others, which they must outlast.

    An example is nll_test_step800000_ema0.9999_10000x1000_clip_tanh_seed0.
    """
    clip = "clip" if protocol.clip else "unclipped"
    return (
        f"nll_{split}_{trained.tag}_{nll.images}x{len(nll.strata)}_"
        f"{clip}_{protocol.cdf}_seed{protocol.seed}"
    )


def report(
    nll: Nll, protocol: Protocol, trained: Trained, split: str, workdir: Path
) -> dict[str, Any]:
    """Print the table, write the CSV and the plot to `workdir`/evaluations, and return the record.

    Raises:
      OSError: a file cannot be written.
    """
    data, terms = trained.config.data, len(nll.strata)
    title = (
        f"{data.name} {split}, {nll.images} images, {terms} of {nll.strata.timesteps} terms, "
        f"weights {trained.weights}, step {trained.step}, clip {str(protocol.clip).lower()}, "
        f"cdf {protocol.cdf}, seed {protocol.seed}"
    )
    print(title, format_table(nll), sep="\n")
    if data.padding:
        print(f"dimensions counted: all of the image, with its border of {data.padding} pixels")
    print(
        f"{nll.seconds:.0f} s for {nll.images} x {terms} forward passes, "
        "one for each image and term"
    )
    name = file_name(nll, protocol, trained, split)
    path = workdir / "evaluations" / name
    save_csv(path.with_name(f"{name}.csv"), nll)
    save_plot(path.with_name(f"{name}.png"), nll, title)
    print(f"wrote {path}.csv and .png")
    parts = {"prior": nll.prior, "middle": nll.middle, "decoder": nll.decoder, "total": nll.total}
    errors = {f"{part}_standard_error": value.standard_error for part, value in parts.items()}
    return {
        **{part: value.mean for part, value in parts.items()},
        **(errors if nll.images > 1 else {}),
        "rate": nll.rate,
        "rmse": float(nll.curve.rmse[-1]),
        "unit": "bits/dim",
        "split": split,
        "num_images": nll.images,
        "num_timesteps": terms,
        "timesteps": nll.strata.timesteps,
        "clip": protocol.clip,
        "cdf": protocol.cdf,
        "seed": protocol.seed,
        "forward_passes": nll.images * terms,
        "seconds": round(nll.seconds, 3),
        "curve": f"evaluations/{name}.csv",
    }
