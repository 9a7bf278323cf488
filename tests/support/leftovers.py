"""A temporary and a home folder of the run's own, in which nothing may be left."""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

CACHES = {".cache", ".config"}  # what libraries keep, as matplotlib its list of fonts


class Leftovers:
    """A plugin that gives tests, and what they start, two folders and looks at them at the end.

    A run that passes leaves nothing behind. One that fails leaves the folder, with the tmp_path of
    its tests, and the last lines name it.

    Args:
      enforced: fail a run that leaves something; other suites run programs of others as well, whose
        leftovers are told and no more.
    """

    def __init__(self, *, enforced: bool) -> None:
        self.enforced = enforced
        self.folder = Path(tempfile.mkdtemp(prefix="ddpm_jax_tests_"))
        self.temporary = self.folder / "temporary"
        self.temporary.mkdir()
        self.home = self.folder / "home"
        self.home.mkdir()
        self.left: list[str] = []
        self.passed = True
        # Workers and subprocesses inherit them; the last is where pytest puts its tmp_path.
        if enforced:  # other suites install packages, whose caches are in the user's home
            os.environ["HOME"] = str(self.home)
        os.environ["TMPDIR"] = str(self.temporary)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(self.folder)
        tempfile.tempdir = None  # or this process would go on with what it found before

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        left = [path.name for path in self.temporary.iterdir()]
        # A manager of multiprocessing clears its own away when the interpreter ends, after this.
        names = {f"{name} in the temporary folder" for name in left if name[:5] != "pymp-"}
        names |= {
            f"{path.name} in the home folder"
            for path in self.home.iterdir()
            if path.name not in CACHES
        }
        self.left = sorted(names)
        if self.left and self.enforced and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        good = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        self.passed = session.exitstatus in good

    def pytest_terminal_summary(self, terminalreporter) -> None:
        for name in self.left:
            failed = "FAILED: " * self.enforced
            terminalreporter.write_line(f"{failed}the tests left {name}", red=True)
        if not self.passed:
            terminalreporter.write_line(f"their folders are in {self.folder}")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self.passed:
            # After multiprocessing, which clears its own folder in there away with priority -100.
            remove, options = shutil.rmtree, {"ignore_errors": True}
            Finalize(None, remove, args=[self.folder], kwargs=options, exitpriority=-200)
