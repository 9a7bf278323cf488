"""Show the progress of anything longer than a few seconds: how far, how fast, how long still.

On a terminal it is a bar that redraws itself. Anywhere else (a log file, a batch system) it is a
plain line every few seconds, because carriage returns make such files unreadable.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

from tqdm import tqdm


class Lenient:
    """A text stream whose failures end nothing: output is never worth a run.

    A full disk, a closed terminal or a reader that has left makes it silent from then on. `stream`
    may be None, as `sys.stdout` is where a process has none.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        if self._stream is not None:
            with self._tolerance():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:  # such as a path in a terminal without its letters
                    known = getattr(self._stream, "encoding", None) or "ascii"
                    self._stream.write(text.encode(known, "backslashreplace").decode(known))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        if self._stream is not None:
            with self._tolerance():
                self._stream.flush()

    def isatty(self) -> bool:
        """Return whether a terminal shows it."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the file is closed
            # What waits in the buffer must go somewhere, or it fails again at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def say(line: str) -> None:
    """Print a line on stderr, if it can be printed."""
    print(line, file=Lenient(sys.stderr), flush=True)


def is_first() -> bool:
    """Tell whether this process is the first of the hosts of a run, or alone.

    It imports no JAX, and starts none of its devices where no hosts have joined.
    """
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


class Progress:
    """A count of steps, shown on stderr.

        with Progress(20_000, initial=5_000, scale=128, scale_unit="images") as progress:
            progress.update(loss=0.031)

    shows `step 5,100/20,000  3.42 steps/s  438 images/s  loss 0.031  1:12:35 left`. Rates are
    those of the steps made here: a resumed run starts at `initial` without counting it as work
    done, and the time left is reckoned without the first update, which may have waited for a
    compiler. Values are turned into text only when a line is due, so that one still being computed
    on a device does not hold up the loop at every step.

    Args:
      total: steps in all, those before `initial` included; None where nobody knows.
      unit: what one step is, singular.
      initial: steps made before this run.
      enabled: False is silent, for every process but the first.
      scale: how many of `scale_unit` one step holds, such as the batch size; 0 shows no second
        rate.
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
        self._stream = Lenient(sys.stderr)
        if enabled and self._stream.isatty():
            self._bar = _Bar(
                self,
                total=total,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.5,
            )
        self._shown_at, self._shown_count = time.monotonic(), initial
        # Time and count once the first update is in.
        self._after_first: tuple[float, int] | None = None

    def update(self, n: int = 1, **values: Any) -> None:
        """Count `n` more steps; `values` (name=number) stay in the line until they change.

        A step counts once it is done: one that was only started would make for wrong rates. A loop
        that has news of none calls with 0.
        """
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
        """Print a line of its own on stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self.enabled:
            say(line)

    def close(self) -> None:
        """Show the last state once more; further calls do nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self.enabled and self.count != self._shown_count:
            self._print_line(time.monotonic())
        self._bar, self.enabled = None, False

    def describe(self, rate: float | None, average: float | None) -> str:
        """Return the line at `rate` steps a second, the rest expected at `average`.

        None stands for a rate that is not known yet.
        """
        parts = [
            f"{self.unit} {self.count:,}" + (f"/{self.total:,}" if self.total is not None else "")
        ]
        if rate:
            parts.append(
                f"{rate:.3g} {self.unit}s/s" if rate < 1000 else f"{rate:,.0f} {self.unit}s/s"
            )
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
        say(self.describe(*rates))
        self._shown_at, self._shown_count = now, self.count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def waiting(what: str, enabled: bool = True, every: float = 10.0) -> Iterator[None]:
    """Print on stderr, every so many seconds, that `what` is still going on.

    It is for one long call that counts no steps.
    """
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every):
            say(f"{what}: {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=report, name="waiting", daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if enabled:
            thread.join()


class _Bar(tqdm):
    """tqdm with the words of `Progress.describe` behind the bar, composed only when it redraws."""

    def __init__(self, progress: Progress, **options: Any) -> None:
        self._progress = progress
        super().__init__(
            bar_format="{percentage:3.0f}%|{bar:20}| {line}" if progress.total else "{line}",
            **options,
        )

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
