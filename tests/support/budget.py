"""Processor seconds of each test and of the whole run, and what a default test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

BUDGET = 20.0  # processor seconds of a test, compiling with a cold cache
SHARED_BUDGET = 60.0  # of what it sets up, for other tests as well
SUITES = ("slow", "multiprocess", "interop", "tpu", "gpu_ahead")  # markers that free a test from it


def processor_seconds() -> float:
    """Return what this process, and the processes it waited for, have used of all processors."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def strain() -> float:
    """Return by how much the machine's load may stretch processor seconds, 1 to 2."""
    return min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), 2.0)


class Budget:
    """A plugin that measures every phase of a test, and fails one that takes too much.

    A busy machine makes a test take many times longer by the clock, and up to twice as many
    processor seconds, as programs share caches: the budget grows with the load, and no further.
    What a test sets up is counted by itself, as other tests may share it.
    """

    def __init__(self, *, enforced: bool) -> None:
        self.enforced = enforced
        self.tests = 0
        self.clock = 0.0
        self.used = 0.0  # by the workers of pytest-xdist, or by this process alone

    def pytest_runtest_logstart(self) -> None:
        self.clock = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Note a phase's processor seconds in its report, and fail it where they are too many."""
        report = yield
        now = processor_seconds()
        used, self.clock = now - self.clock, now
        free = any(item.get_closest_marker(name) for name in SUITES)
        budget = (SHARED_BUDGET if report.when == "setup" else BUDGET) * strain()
        if self.enforced and not free and report.passed and used > budget:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid}: its {report.when} took {used:.1f} processor seconds, its own and "
                f"those of the processes it started, of the {budget:.0f} that a default test may "
                "take (the load of the machine is allowed for). Make it smaller, share what it "
                "compiles, or mark it slow."
            )
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests += report.when == "call"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["processor_seconds"] = processor_seconds()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.used += getattr(node, "workeroutput", {}).get("processor_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        times = os.times()
        used = times.user + times.system + self.used if self.used else processor_seconds()
        wall = terminalreporter._session_start.elapsed().seconds
        terminalreporter.write_line(
            f"{self.tests} tests, {wall:.0f} s by the clock, {used:.0f} processor seconds"
        )
