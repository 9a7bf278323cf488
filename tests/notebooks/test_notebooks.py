"""The notebooks are what their sources say, small, without an error, and they run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
from pathlib import Path

import matplotlib
import pytest

import ddpm_jax as ddpm
from tests.support.layers import ROOT

FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
LARGEST = 2_000_000  # bytes
named = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def cells_of_source(path: Path) -> list[tuple[str, str]]:
    """(kind, text) of each cell of a percent-format file, comments of Markdown taken off."""
    _, *cells = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)
    pairs = []
    for marker, text in zip(cells[::2], cells[1::2]):
        markdown = "[markdown]" in marker
        if markdown:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        pairs.append(("markdown" if markdown else "code", text.strip()))
    return pairs


def notebook_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".ipynb").read_text())


@named
def test_a_notebook_has_the_cells_of_its_source(path):
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook_of(path)["cells"]]
    assert cells == cells_of_source(path), f"make notebooks NOTEBOOKS={path.stem}"


@named
def test_a_notebook_was_executed_in_order_without_an_error(path):
    notebook = path.with_suffix(".ipynb")
    assert notebook.stat().st_size <= LARGEST
    code = [cell for cell in notebook_of(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    machine = re.compile(r"(?<![\w.~])/(?:root|home|Users|work)/\w")
    assert not machine.search(notebook.read_text())


@named
def test_what_a_notebook_asks_of_the_public_face_is_there(path):
    tree = ast.parse(path.read_text())
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ddpm"
    }
    assert asked <= set(ddpm.__all__)


def test_every_notebook_has_its_source():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, in the quickest form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_QUICK", "1")
    monkeypatch.setattr(ddpm, "tune_cpu", list)  # the process is that of the tests
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return tmp_path


@pytest.mark.slow
@named
def test_a_notebook_runs(path, quick):
    """In a kernel where there is one, and as a plain file otherwise."""
    if (
        importlib.util.find_spec("nbclient") is None
        or importlib.util.find_spec("ipykernel") is None
    ):
        backend = matplotlib.get_backend()
        matplotlib.use("template")  # which draws nothing, and shows nothing
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            matplotlib.use(backend)
        return
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook()
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook.cells = [make[kind](text) for kind, text in cells_of_source(path)]
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
