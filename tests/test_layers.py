"""The house: layers import downwards only, files stay small, each kind of thing stands in one place."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support.layers import LAYERS, LEVEL, PACKAGE, ROOT, imports, modules, sources

NAMES = {name for name, _, _ in modules()}
MATHS = {"jax", "numpy", "scipy"}
MOST_FILES, MOST_LINES, MOST_SCRIPT_LINES = 12, 330, 8
BUILD_COMMANDS = {f"{PACKAGE}.data.prepared"}  # modules that print a whole command as a remedy
ONE_A_COMMAND = {"cli"}  # folders that hold as many files as there are commands


def module_of(imported: str) -> str | None:
    """The module of the package that `imported` (a.b.c or a.b.Name) comes from."""
    while imported.startswith(f"{PACKAGE}."):
        if imported in NAMES:
            return imported
        imported = imported.rpartition(".")[0]
    return None


def test_every_entry_has_a_layer():
    found = {top for _, top, _ in modules()}
    assert found == set(LEVEL), "place it in LAYERS of tests/support/layers.py"
    assert len(LEVEL) == sum(map(len, LAYERS))


@pytest.mark.parametrize(
    ("name", "top", "path"),
    list(modules()),
    ids=lambda value: None if isinstance(value, Path) else value,
)
def test_imports_point_downwards(name, top, path):
    for imported, _ in imports(path):
        if imported.split(".")[0] == PACKAGE:
            found = module_of(imported)
            assert found is not None, f"{name} imports {imported}, which is no module"
            below = found.split(".")[1]
            assert below == top or LEVEL[below] < LEVEL[top], (
                f"{name} imports {imported}, which is not below it"
            )


def test_no_circle_between_files():
    """Imports inside functions count: what two files need of each other belongs into one, or into a third."""
    needs = {}
    for name, _, path in modules():
        needs[name] = {module_of(imported) for imported, _ in imports(path)} - {None, name}
    while free := {name for name, needed in needs.items() if not needed & set(needs)}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert not needs, (
        f"these files import each other in a circle, or one that does: {sorted(needs)}"
    )


def test_maths_knows_arrays_only():
    for name, top, path in modules():
        if top == "diffusion":
            for imported, _ in imports(path):
                first = imported.split(".")[0]
                fine = first in MATHS | sys.stdlib_module_names or imported.startswith(
                    f"{PACKAGE}.diffusion"
                )
                assert fine or imported == "flax.struct", f"{name} imports {imported}"


def test_ground_knows_no_other_module():
    for name, top, path in modules():
        if top in LAYERS[0]:
            inside = [imported for imported, _ in imports(path) if imported.startswith(PACKAGE)]
            assert not inside, f"{name} imports {inside}"


def test_the_command_line_stands_in_cli_only():
    """A library function names its argument `workdir`; the command line adds the dashes."""
    builds_commands = {"benchmark", "reproduction"}  # these start commands, or print them
    for name, top, path in modules():
        if top != "cli":
            assert not any(imported.startswith("argparse") for imported, _ in imports(path)), name
        if top not in builds_commands | {"cli"}:
            for node in ast.walk(ast.parse(path.read_text())):
                text = node.value if isinstance(node, ast.Constant) else None
                flag = isinstance(text, str) and re.match("--[a-z]", text)
                assert not flag or name in BUILD_COMMANDS, f"{name}:{node.lineno}: {text!r}"


def test_docstrings_open_with_what_they_say():
    """Readable alone: no first word that leans on a name outside, and no line beyond the margin."""
    for name, _, path in modules():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node, clean=False)
                where = f"{name}: {getattr(node, 'name', 'its head')}"
                assert not text or text.split()[0] not in ("Of", "As", "That", "Those"), where
        for node in tree.body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_"
            if public and ".cli." not in name:
                assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_configs_import_the_config_only():
    for path in sources("configs"):
        inside = [name for name, _ in imports(path) if name.startswith(PACKAGE)]
        assert all(name.startswith(f"{PACKAGE}.config.") for name in inside), (
            f"{path.name} imports {inside}"
        )


def test_devices_are_named_in_one_file():
    names = {"pmap", "devices", "local_devices", "device_count", "local_device_count"}
    for name, _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            of_jax = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "jax"
            )
            if of_jax and name != f"{PACKAGE}.parallel.devices":
                assert node.attr not in names, (
                    f"{name}:{node.lineno}: jax.{node.attr} belongs in parallel/devices.py"
                )


def test_no_private_modules_of_others():
    for path in sources(PACKAGE, "scripts", "configs", "tests"):
        for name, _ in imports(path):
            private = any(
                part.startswith("_") for part in name.removeprefix("__future__").split(".")
            )
            assert not private, (
                f"{path.relative_to(ROOT)} imports {name}: no promise holds for private names"
            )


def test_nothing_imports_a_test_module():
    for path in sources("tests"):
        for name, _ in imports(path):
            assert not any(part.startswith("test_") for part in name.split(".")[:-1]), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_scripts_are_thin():
    for path in sources("scripts"):
        assert len(path.read_text().splitlines()) <= MOST_SCRIPT_LINES, path.name
        assert (ROOT / PACKAGE / "cli" / path.name).is_file()


def test_folders_and_files_stay_small():
    folders: dict[Path, int] = {}
    for _, _, path in modules():
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, (
            f"{path.relative_to(ROOT)} has {lines} lines, at most {MOST_LINES}"
        )
    for folder, count in folders.items():
        if folder != ROOT / PACKAGE and folder.name not in ONE_A_COMMAND:
            assert count <= MOST_FILES, (
                f"{folder.relative_to(ROOT)} has {count} files, at most {MOST_FILES}"
            )
