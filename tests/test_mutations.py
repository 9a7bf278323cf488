"""The table of deliberate faults fits the code, and the runner tells what is caught from what is not."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.support.mutations import PACKAGE, ROOT, Fault, faults, main, passes, prepare

FAULTS = faults()
# Everything that computes, reads or writes a number of the paper.
COVERED = {
    "benchmark",
    "build",
    "cli",
    "coding",
    "config",
    "data",
    "diffusion",
    "distillation",
    "evaluation",
    "figures",
    "files",
    "images",
    "machine",
    "model",
    "network",
    "parallel",
    "reproduction",
    "runs",
    "sampling",
    "trained",
    "training",
    "weights",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.breaks}")
def test_every_fault_can_be_planted(fault: Fault) -> None:
    """Its text is there once, the code with it is still Python, and its tests are there."""
    source = (ROOT / PACKAGE / fault.file).read_text()
    assert source.count(fault.text) == 1, "bring tests/support/mutations.toml up to date"
    planted = source.replace(fault.text, fault.put)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))
    assert fault.tests
    for name in fault.tests.split():
        assert (ROOT / "tests" / name.partition("::")[0]).is_file(), name


def test_the_table_covers_the_package() -> None:
    count = Counter(fault.folder for fault in FAULTS)
    assert set(count) == COVERED and sum(count.values()) >= 200
    assert len({(fault.file, fault.text, fault.put) for fault in FAULTS}) == len(FAULTS)


def test_a_fault_is_planted_and_taken_out_again(tmp_path: Path) -> None:
    file = tmp_path / PACKAGE / "sums.py"
    file.parent.mkdir()
    file.write_text("def add(a, b):\n    return a + b\n")
    fault = Fault("sums.py", "a + b", "a - b", "adds the wrong way", "test_sums.py")
    with fault.planted(tmp_path):
        assert file.read_text() == "def add(a, b):\n    return a - b\n"
    assert file.read_text() == "def add(a, b):\n    return a + b\n"
    file.write_text("def add(a, b):\n    return sum((a, b))\n")
    with pytest.raises(ValueError, match="sums.py holds this 0 times, not once: 'a . b'"):
        fault.plant(tmp_path)


def test_a_test_that_fails_is_told_from_one_that_passes(tmp_path: Path, monkeypatch) -> None:
    """In a process of its own each time, as the code may have changed between."""
    prepare(heavy=["pytest"])
    (tmp_path / "tests").mkdir()
    (tmp_path / PACKAGE).mkdir()
    source, test = tmp_path / PACKAGE / "sums.py", tmp_path / "tests" / "test_sums.py"
    source.write_text("def add(a, b):\n    return a + b\n")
    test.write_text(
        f"import sys\nfrom {PACKAGE}.sums import add\n\n\ndef test_sum():\n    assert add(2, 3) == 5\n"
    )
    log = tmp_path / "log"
    assert passes(tmp_path, ["test_sums.py"], log)
    fault = Fault("sums.py", "a + b", "a - b", "adds the wrong way", "test_sums.py")
    with fault.planted(tmp_path):
        assert not passes(tmp_path, ["test_sums.py"], log)
        assert "test_sum" in log.read_text()
    with Fault("sums.py", "a + b", "b + a", "nothing", "test_sums.py").planted(tmp_path):
        assert passes(tmp_path, ["test_sums.py"], log)
    test.write_text("import time\n\n\ndef test_sum():\n    time.sleep(60)\n")
    assert not passes(tmp_path, ["test_sums.py"], log, seconds=1)
    with pytest.raises(RuntimeError, match="test_none.py: no tests were run"):
        passes(tmp_path, ["test_none.py"], log)


def test_folders_without_faults_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trianing"]) == 2
    assert "no faults in trianing; there are faults in benchmark, build" in capsys.readouterr().out
