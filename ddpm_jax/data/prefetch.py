"""Prepare the next batches, and place them on the devices, in the background of training."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any


class Prefetcher(Iterator[tuple[int, Any]]):
    """Iterator over (step, place(batches(step))) for step = start, start + 1, ... without end.

    Use it in a `with` block, or call `close`: the thread ends with it. What `batches` or `place`
    raises comes out of `next`, at the step that it belongs to, and ends the iteration.

    Args:
      batches: step -> batch.
      start: the first step.
      place: batch -> what the caller gets; device_put, usually.
      depth: how many batches may wait, besides the one in preparation.
    """

    def __init__(
        self, batches: Callable[[int], Any], start: int, place: Callable[[Any], Any], depth: int = 2
    ) -> None:
        self._batches, self._place = batches, place
        self._ready: queue.Queue[tuple[int, Any, Exception | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start,), name="prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> tuple[int, Any]:
        if self._closed.is_set():
            raise StopIteration
        step, batch, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return step, batch

    def close(self) -> None:
        """End the thread and wait for it; batches in the queue are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            # Makes room for a put that is under way. It is the last: the thread then ends.
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, start: int) -> None:
        for step in itertools.count(start):
            try:
                item = (step, self._place(self._batches(step)), None)
            except Exception as error:  # whatever it is, it is the caller's to handle
                item = (step, None, error)
            if self._closed.is_set():
                return
            self._ready.put(item)
            if item[2] is not None:
                return
