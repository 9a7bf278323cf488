"""Plant deliberate faults one at a time and count which ones the tests catch: `make mutate`.

    python -m tests.support.mutations [FOLDER ...]        # ddpm_jax/FOLDER, such as training; all

tests/support/mutations.toml lists the faults. Each is an exact text of one file, what stands in its
place, what that breaks, and the test files that ought to fail. The tree is copied to a temporary
folder first, so that the one at hand is never touched; a process of its own runs the tests of each
fault up to the first that fails. A fault that no test notices is a hole: it gets a test.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "ddpm_jax"
TABLE = Path(__file__).with_suffix(".toml")
COPIED = (PACKAGE, "tests", "configs", "scripts", "pretrained", "examples", "docs", "benchmarks")
SECONDS = 900  # for the tests of one fault; a program that hangs counts as a fault that shows
# Imported once, in the process that all others are forked from: most of a short test's time.
HEAVY = ["pytest", "jax", "numpy", "scipy.stats", "flax.linen", "optax", "orbax.checkpoint"]


@dataclass(frozen=True)
class Fault:
    """One entry of the table.

    Attributes:
      file: where, below ddpm_jax/.
      text: what stands there, once.
      put: what is put in its place.
      breaks: what goes wrong then.
      tests: the test files that ought to notice, below tests/, separated by spaces.
    """

    file: str
    text: str
    put: str
    breaks: str
    tests: str

    @property
    def folder(self) -> str:
        """Return the part of the package that it is in, such as "training" or "images"."""
        return Path(self.file).parts[0].removesuffix(".py")

    def plant(self, root: Path) -> str:
        """Change the file below `root`, and return what it held.

        Raises:
          ValueError: `text` is not there exactly once.
        """
        path = root / PACKAGE / self.file
        source = path.read_text()
        if source.count(self.text) != 1:
            raise ValueError(
                f"{PACKAGE}/{self.file} holds this {source.count(self.text)} times, not once: "
                f"{self.text!r}; bring tests/support/{TABLE.name} up to date"
            )
        path.write_text(source.replace(self.text, self.put))
        return source

    @contextlib.contextmanager
    def planted(self, root: Path) -> Iterator[None]:
        """Plant the fault below `root` for the time of a block."""
        source = self.plant(root)
        try:
            yield
        finally:
            (root / PACKAGE / self.file).write_text(source)


def faults() -> list[Fault]:
    """Read the table."""
    return [Fault(**row) for row in tomllib.loads(TABLE.read_text())["fault"]]


def copy_tree(target: Path) -> None:
    """Copy what the tests need of the work tree."""
    without = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, target / path.name, ignore=without)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, target)


def passes(root: Path, tests: Sequence[str], log: Path, seconds: float = SECONDS) -> bool:
    """Return whether the test files below `root`/tests pass, run in a process of their own.

    Args:
      log: what pytest prints.
      seconds: how long they may take.

    Raises:
      RuntimeError: there are no tests in them.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_tests, args=(str(root), list(tests), str(log)))
    process.start()
    try:
        process.join(seconds)
    finally:  # too long, or Ctrl-C here, which does not reach it
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if process.exitcode in (4, 5):  # pytest: a wrong command, or no tests
        raise RuntimeError(f"{' '.join(tests)}: no tests were run, see {log}")
    return process.exitcode == 0


def _run_tests(root: str, tests: list[str], log: str) -> None:
    os.setsid()  # what the tests leave running can be ended with them
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(root)
    os.environ["PYTHONPATH"] = root
    sys.path[:] = [root, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest

    quick = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--durations=0"]
    sys.exit(int(pytest.main([*quick, *(f"tests/{name}" for name in tests)])))


def first_failure(log: Path) -> str:
    """Return the test that pytest says failed, or that it came to no end."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" ", 2)[1].removeprefix("tests/") if lines else "ran too long, or died"


def prepare(heavy: Sequence[str] = HEAVY) -> None:
    """Set what the tests' processes inherit, before the first of them."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # which is told from the source by the second
    multiprocessing.set_forkserver_preload(list(heavy))


def main(folders: Sequence[str]) -> int:
    """Plant the faults of `folders`, all by default; return 1 where one is not caught."""
    table = [fault for fault in faults() if not folders or fault.folder in folders]
    if not table:
        known = ", ".join(sorted({fault.folder for fault in faults()}))
        print(f"error: no faults in {' '.join(folders)}; there are faults in {known}")
        return 2
    prepare()
    caught, total, survivors = Counter(), Counter(), []
    with tempfile.TemporaryDirectory(prefix="ddpm-mutations-") as name:
        root, log = Path(name, "tree"), Path(name, "log")
        root.mkdir()
        copy_tree(root)
        sound = sorted({test for fault in table for test in fault.tests.split()})
        print(f"{len(table)} faults; first {len(sound)} test files without any", flush=True)
        for test in sound:
            if not passes(root, [test], log, 4 * SECONDS):
                print(f"error: tests/{test} fails without a fault:\n{log.read_text()[-3000:]}")
                return 2
        for number, fault in enumerate(table, 1):
            started = time.monotonic()
            with fault.planted(root):
                noticed = not passes(root, fault.tests.split(), log)
            total[fault.folder] += 1
            caught[fault.folder] += noticed
            word, seconds = "caught  " if noticed else "SURVIVED", time.monotonic() - started
            line = f"{number:3}/{len(table)} {word} {seconds:5.0f} s  {fault.file}: {fault.breaks}"
            print(f"{line}  [{first_failure(log)}]" if noticed else line, flush=True)
            survivors += [] if noticed else [fault]
    print()
    for folder in sorted(total):
        print(f"{folder:12} {caught[folder]:3}/{total[folder]}")
    print(f"{'all':12} {sum(caught.values()):3}/{sum(total.values())} caught")
    for fault in survivors:
        print(f"SURVIVED {fault.file}: {fault.breaks}\n  {fault.text!r} -> {fault.put!r}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
