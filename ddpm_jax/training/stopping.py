"""Stop a run on a signal, on all hosts at the same step."""

from __future__ import annotations

import signal
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from ddpm_jax.parallel.devices import Devices


def raise_if_stopped(code: int, workdir: Path) -> None:
    """Raise what a signal raises of itself where a training was stopped by one.

    Args:
      code: that the training returned, see `loop.train`.
      workdir: its run directory.

    Raises:
      KeyboardInterrupt, SystemExit: on SIGINT, and on SIGTERM or SIGHUP.
    """
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt(f"the training is saved in {workdir}, and goes on from there")
    if code:
        raise SystemExit(code)


class StopRequest:
    """SIGTERM, SIGINT or SIGHUP, remembered until the step under way is done.

    A second one acts at once. SIGHUP is what a closed terminal sends.

    On several hosts a request to one is one to all, and all hear of it at the same step. After
    each step the devices exchange what their hosts have received, and the answer is read LAG steps
    later, when it is there and nothing has to wait for it.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    LAG = 2

    def __init__(self, devices: Devices) -> None:
        self._devices, self._received = devices, 0
        self._before: dict[int, Any] = {}
        self._asked: deque[Any] = deque()

    def listen(self) -> None:
        """Let signals wait from here on.

        Before there is a step to save, they end the process as they always do. Where another
        thread than the main one trains, which may not set them, they stay as they are.
        """
        if not self._before and threading.current_thread() is threading.main_thread():
            # Whole before the first is taken over: one may come at once.
            self._before = {number: signal.getsignal(number) for number in self.signals}
            if self._before[signal.SIGHUP] == signal.SIG_IGN:  # nohup: the terminal may go
                del self._before[signal.SIGHUP]
            for number in self._before:
                signal.signal(number, self._note)

    def agreed(self) -> int:
        """Return the signal on which all hosts stop now, or 0; all call it after each step."""
        self._asked.append(self._devices.largest(self._received))
        lag = self.LAG if jax.process_count() > 1 else 0
        return int(self._asked.popleft()) if len(self._asked) > lag else 0

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._before[number])
