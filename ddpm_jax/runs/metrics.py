"""Write the metrics of a run: metrics.jsonl for programs, TensorBoard events for eyes.

metrics.jsonl has one line for each `write_scalars`, strict JSON: {"step": 1200, "loss": 0.031}.
What JSON has no number for is a string that float() reads back: "NaN", "Infinity", "-Infinity".
Scalars go to both, pictures to TensorBoard only. Events are written with the tensorboard package
alone, which needs no TensorFlow. A line is in the file when the call returns; a full disk is an
error of that call.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ddpm_jax.files import naming, parse_json, replacing
from ddpm_jax.images import encode_png


class MetricWriter:
    """Appends to `workdir`/metrics.jsonl and to TensorBoard events in `workdir`.

    Args:
      workdir: the run directory, made if need be.
      enabled: False makes every call do nothing, for every process but the first.

    Raises (every method):
      OSError: a file cannot be written, such as on a full disk; one line that names the file.
    """

    def __init__(self, workdir: str | Path, *, enabled: bool = True) -> None:
        self._workdir, self._enabled = Path(workdir), enabled
        self._path = self._workdir / "metrics.jsonl"
        # Opened by the first write, so that what `truncate_after` leaves sorts before it.
        self._events: _EventFile | None = None
        if enabled:
            with naming(self._path):
                self._workdir.mkdir(parents=True, exist_ok=True)
                _drop_torn_line(self._path)
                self._lines = open(self._path, "ab", buffering=0)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl and a point to each curve.

        Args:
          scalars: numbers, or arrays of one number, by name.

        Raises:
          ValueError: a value that is not one number, or one called "step".
        """
        if not self._enabled:
            return
        numbers = {name: _number(name, value) for name, value in scalars.items()}
        row = {"step": int(step)} | {name: _json(value) for name, value in numbers.items()}
        rest = json.dumps(row, allow_nan=False).encode() + b"\n"
        with naming(self._path):
            while rest:  # a disk that fills up takes a part first and refuses the rest
                rest = rest[self._lines.write(rest) :]
        self._open_events().write_scalars(int(step), numbers)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Show uint8 images [h, w, c] in TensorBoard."""
        if self._enabled:
            self._open_events().write_images(int(step), images)

    def truncate_after(self, step: int) -> None:
        """Forget what a run wrote after `step`, the one it resumes from.

        No step is then there twice. metrics.jsonl is replaced as a whole; lines that do not parse
        (a power cut) go too, with a warning. TensorBoard hides the points after `step` in the
        event files that are there, and shows those written from now on.
        """
        if not self._enabled:
            return
        self._close_events()
        lines = [line for line, row in _rows(self._path) if row["step"] <= step]
        self._lines.close()
        with replacing(self._path) as file:
            file.writelines(lines)
        self._lines = open(self._path, "ab", buffering=0)
        if _event_files(self._workdir):
            self._mark_start(step + 1)

    def close(self) -> None:
        """Close the files; the writer is silent from then on."""
        if self._enabled:
            self._enabled = False
            self._lines.close()
            self._close_events()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_events(self) -> _EventFile:
        if self._events is None:
            if not _event_files(self._workdir):
                self._mark_start(0)
            self._events = _EventFile(self._workdir)
        return self._events

    def _mark_start(self, step: int) -> None:
        """Tell TensorBoard that a session starts at `step`.

        Each mark but the first hides what it had from there.
        """
        mark = _EventFile(self._workdir)
        mark.write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        mark.close()

    def _close_events(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            events.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """Read the lines of `workdir`/metrics.jsonl, in the order written.

    NaN and the infinities are floats again.
    """
    rows = (row for _, row in _rows(Path(workdir) / "metrics.jsonl"))
    return [{name: _UNQUOTED.get(value, value) for name, value in row.items()} for row in rows]


# ------------------------------------------------------------------------------------ lines of JSON

_UNQUOTED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    number = array.item() if array.size == 1 else None
    if not isinstance(number, (int, float)):
        raise ValueError(
            f"write_scalars: {name} must be one number, got {array.dtype} {list(array.shape)}"
        )
    if name == "step":
        raise ValueError("write_scalars: the name step is taken by the step itself")
    return number


def _json(value: int | float) -> int | float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a metrics.jsonl that parse, as bytes and as dicts; warn of the others."""
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            row = parse_json(line, nan=True)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            damaged += 1
            continue
        yield line, row
    if damaged:
        logging.getLogger(__name__).warning("%s: %d damaged lines left out", path, damaged)


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line feed.

    A killed process left it unfinished, and the next line would be appended to it.
    """
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


# ------------------------------------------------------------------------------- TensorBoard events


def _event_files(folder: Path) -> list[Path]:
    return list(folder.glob("events.out.tfevents.*.*"))


class _EventFile:
    """A TensorBoard event file, written as it comes.

    TensorBoard reads the event files of a folder in the order of their names, which start with the
    second they were made. A file made in the same second as the last one, or after the clock was
    set back, takes the next second.
    """

    def __init__(self, folder: Path) -> None:
        earlier = [int(path.name.split(".")[3]) for path in _event_files(folder)]
        second = max(int(time.time()), max(earlier, default=0) + 1)
        self._path = (
            folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        )
        with naming(self._path):
            self._file = open(self._path, "xb")
        self._records = RecordWriter(self._file)
        self.write(Event(file_version="brain.Event:2"))

    def write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._path):
            self._records.write(event.SerializeToString())
            self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.write(Event(step=step, summary=Summary(value=values)))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            png = encode_png(image)
            height, width, channels = np.shape(image)
            picture = Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=png
            )
            self.write(
                Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))
            )

    def close(self) -> None:
        with naming(self._path):
            self._file.close()
