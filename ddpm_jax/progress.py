"""Progress of anything longer than a few seconds: how far, how fast, how long still.

On a terminal it is a bar that redraws itself; anywhere else (a log file, a batch system) it is a plain line every few
seconds, because carriage returns make such files unreadable.
"""

from __future__ import annotations

import contextlib
import numbers
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

from tqdm import tqdm


class Progress:
    """Counts steps and shows them on stderr.

        with Progress(20_000, initial=5_000, scale=128, scale_unit="images") as progress:
            progress.update(loss=0.031)

    shows `step 5,100/20,000  3.42 steps/s  438 images/s  loss 0.031  1:12:35 left`. Rates are those of the steps made
    here: a resumed run starts at `initial` without counting it as work done, and the time left is reckoned without the
    first update, which may have waited for a compiler. Values are turned into text only when a line is due, so that one
    still being computed on a device does not hold up the loop at every step.

    Args:
      total: steps in all, those before `initial` included; None where nobody knows.
      unit: what one step is, singular.
      initial: steps made before this run.
      enabled: False is silent, for every process but the first.
      scale: how many of `scale_unit` one step holds, such as the batch size; 0 shows no second rate.
      every: seconds between plain lines.
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "step",
        initial: int = 0,
        enabled: bool = True,
        scale: int = 0,
        scale_unit: str = "images",
        every: float = 20.0,
    ) -> None:
        self.total, self.unit, self.count, self.enabled = total, unit, initial, enabled
        self.scale, self.scale_unit, self.every = scale, scale_unit, every
        self.values: dict[str, Any] = {}
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = _Bar(self, total=total, initial=initial, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)
        self._shown_at, self._shown_count = time.monotonic(), initial
        self._after_first: tuple[float, int] | None = None  # time and count once the first update is in

    def update(self, n: int = 1, **values: Any) -> None:
        """`n` more steps are done; `values` (name=number) stay in the line until they are given anew."""
        self.count += n
        self.values.update(values)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(n)
        elif self.enabled and now - self._shown_at >= self.every:
            self._print_line(now)
        if self._after_first is None:
            self._after_first = now, self.count

    def write(self, line: str) -> None:
        """Prints a line of its own on stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self.enabled:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Shows the last state once more; further calls do nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self.enabled and self.count != self._shown_count:
            self._print_line(time.monotonic())
        self._bar, self.enabled = None, False

    def describe(self, rate: float | None, average: float | None) -> str:
        """The line at `rate` steps a second, the rest expected at `average` (None: not known yet)."""
        parts = [f"{self.unit} {self.count:,}" + (f"/{self.total:,}" if self.total is not None else "")]
        if rate:
            parts.append(f"{rate:.3g} {self.unit}s/s" if rate < 1000 else f"{rate:,.0f} {self.unit}s/s")
            if self.scale:
                parts.append(f"{rate * self.scale:,.0f} {self.scale_unit}/s")
        parts += [f"{name} {_number(value)}" for name, value in self.values.items()]
        if average and self.total is not None and self.count < self.total:
            parts.append(f"{tqdm.format_interval(round((self.total - self.count) / average))} left")
        return "  ".join(parts)

    def _print_line(self, now: float) -> None:
        def rate(since: float, count: int) -> float | None:
            return (self.count - count) / (now - since) if now > since else None

        rates = (None, None)
        if self._after_first is not None:
            rates = rate(self._shown_at, self._shown_count), rate(*self._after_first)
        print(self.describe(*rates), file=sys.stderr, flush=True)
        self._shown_at, self._shown_count = now, self.count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def waiting(what: str, enabled: bool = True, every: float = 10.0) -> Iterator[None]:
    """Tells on stderr, every so many seconds, that `what` is still going on: for one long call that counts no steps."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"{what}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if enabled:
            thread.join()


class _Bar(tqdm):
    """tqdm with the words of `Progress.describe` behind the bar, put together only when it redraws."""

    def __init__(self, progress: Progress, **options: Any) -> None:
        self._progress = progress
        super().__init__(bar_format="{percentage:3.0f}%|{bar:20}| {line}" if progress.total else "{line}", **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        elapsed, done = values["elapsed"], values["n"] - values["initial"]
        rate = values["rate"] or (done / elapsed if elapsed else None)
        return values | {"line": self._progress.describe(rate, rate)}


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{float(value):.4g}"
