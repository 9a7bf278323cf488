"""Record how far trainings in lock step come apart, their losses and parameters, and plot it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax.build import Params
from ddpm_jax.data.source import Batch
from ddpm_jax.files import replacing
from ddpm_jax.runs.curves import new_figure, save_figure

# The bias of the keys shifts all logits of a query alike, which softmax does not see: its gradient
# is rounding, and Adam makes steps of it.
UNSEEN = "/k/bias"


class Side(Protocol):
    """A training that is given batch after batch, and holds the rest of what it needs."""

    def step(self, batch: Batch) -> float:
        """Take a step and return the loss before it."""

    def params(self) -> Params:
        """Return a copy of the parameters by our names, as NumPy arrays."""

    def averaged(self) -> Params:
        """Return a copy of their first average, likewise."""


def squares(ours: Params, theirs: Params, start: Params) -> dict[str, np.ndarray]:
    """Return, leaf by leaf, the squared norms of ours - theirs, ours - start and ours, [3]."""
    a, b, c = (flatten_dict(tree, sep="/") for tree in (ours, theirs, start))

    def square(x: np.ndarray) -> float:
        return float(np.sum(np.square(x, dtype=np.float64)))

    return {
        name: np.array([square(leaf - b[name]), square(leaf - c[name]), square(leaf)])
        for name, leaf in a.items()
    }


def distance(squared: np.ndarray) -> dict[str, float | None]:
    """Return a distance, and its share of the way from the start and of the norm.

    A share of nothing is None: with warm-up the first step goes no way.

    Args:
      squared: [3], one of `squares` or a sum of several.
    """
    apart, way, norm = np.sqrt(squared).tolist()
    return {
        "distance": apart,
        "of_way": apart / way if way else None,
        "of_norm": apart / norm if norm else None,
    }


class Record:
    """What has been measured so far, and its two files.

    Attributes:
      start: the parameters that all sides began with.
      values: ready for JSON. `losses` of each side, by step. `apart`: a row for each measurement,
        with the distance of the other sides from the first. `leaves` and `averages`: the same at
        the last of them, of each parameter, and of the averages.
    """

    def __init__(
        self, output: Path, sides: Mapping[str, Side], start: Params, about: dict[str, Any]
    ) -> None:
        self.output, self.picture = output, output.with_suffix(".png")
        self.start, self._sides = start, sides
        self._first, *self._others = sides
        self._seconds: dict[str, list[float]] = {name: [] for name in sides}
        self._unsaved = False
        self.values = about | {
            "losses": {name: [] for name in sides},
            "apart": [],
            "leaves": {},
            "averages": {},
        }

    @property
    def steps(self) -> int:
        """Return how many steps all sides have done."""
        return len(self.values["losses"][self._first])

    def add(self, losses: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Add a step that all sides have done."""
        for name, loss in losses.items():
            self.values["losses"][name].append(loss)
            self._seconds[name].append(seconds[name])
        self._unsaved = True

    def measure(self) -> str:
        """Add the distances from the first side, as they are now; return them in one line."""
        ours, averaged = (side := self._sides[self._first]).params(), side.averaged()
        row: dict[str, Any] = {"step": self.steps}
        for name in self._others:
            leaves = squares(ours, self._sides[name].params(), self.start)
            average = squares(averaged, self._sides[name].averaged(), self.start)
            row[name] = distance(sum(leaves.values()))
            self.values["averages"][name] = distance(sum(average.values()))
            self.values["leaves"][name] = {leaf: distance(s) for leaf, s in leaves.items()}
        self.values["apart"].append(row)
        self._unsaved = True
        shares = [f"{name} {digits(row[name]['of_way'])}" for name in self._others]
        return f"step {self.steps:,}: apart, of the way so far: {', '.join(shares)}"

    def save(self) -> None:
        """Write both files, unless they hold all there is."""
        if self._unsaved:
            seconds = {name: float(np.median(all_)) for name, all_ in self._seconds.items()}
            with replacing(self.output) as file:
                file.write((json.dumps(self.values | {"seconds": seconds}) + "\n").encode())
            plot(self.values, self.picture)
            self._unsaved = False

    def summary(self) -> str:
        """Say in a few lines how far the sides are apart at the last measurement."""
        lines, ours = [], np.array(self.values["losses"][self._first])
        for name in self._others:
            row, leaves = self.values["apart"][-1][name], self.values["leaves"][name]
            off = np.abs(np.array(self.values["losses"][name]) / ours - 1)
            seen = {leaf: d["of_way"] or 0 for leaf, d in leaves.items() if UNSEEN not in leaf}
            worst = max(seen, key=lambda leaf: seen[leaf])
            lines += [
                f"{name} beside {self._first}, after {self.steps:,} steps",
                f"  losses      {digits(off[0])} of ours apart at the first step, "
                f"{digits(off.max())} at most, {digits(off[-1])} at the last",
                f"  parameters  {digits(row['of_way'])} of the way from the start, "
                f"{digits(row['of_norm'])} of their norm",
                f"  averages    {digits(self.values['averages'][name]['of_way'])} of their way",
                f"  worst leaf  {digits(seen[worst])} of its way: {worst}",
            ]
        return "\n".join(lines)


def digits(value: float | None) -> str:
    """Write a share in two digits."""
    return "-" if value is None else f"{value:.2g}"


def plot(values: Mapping[str, Any], output: Path) -> None:
    """Draw the losses of all sides, and below how far the others are from the first, as a PNG."""
    figure = new_figure(6.4, 6.0)
    above, below = figure.subplots(2, sharex=True)
    names = list(values["losses"])
    window = max(1, len(values["losses"][names[0]]) // 20)
    for number, name in enumerate(names):
        losses = values["losses"][name]
        # Curves that lie on one another are seen through each other's gaps.
        style = {"color": f"C{number}", "linestyle": ("-", "--", ":")[number]}
        means = np.convolve(losses, np.full(window, 1 / window), "valid")
        above.plot(range(1, len(losses) + 1), losses, **style, alpha=0.35, linewidth=0.7)
        above.plot(range(window, len(losses) + 1), means, **style, linewidth=2, label=name)
    above.set(ylabel="loss", yscale="log")
    above.set_title(f"thin: each step; thick: the mean of the last {window:,}", fontsize="medium")
    for number, name in enumerate(names[1:], 1):
        for key, line, what in (("of_way", "-", "way"), ("of_norm", ":", "norm")):
            points = [(row["step"], row[name][key]) for row in values["apart"] if row[name][key]]
            if points:
                label = f"{name}, of the {what}"
                below.plot(*zip(*points), line, marker=".", color=f"C{number}", label=label)
    below.set(xlabel="step", ylabel=f"parameters, from {names[0]}", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    save_figure(figure, output)
