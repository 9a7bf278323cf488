"""What holds of the repository as a whole: imports are declared and point downwards, pins fit, any machine will do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = "ddpm_jax"

# DESIGN.md's picture from the bottom up. A module or sub-package imports from its own row and from those above it here.
LAYERS = [
    {"errors", "progress"},
    {
        "schedule",
        "diffusion",
        "losses",
        "timesteps",
        "samplers",
        "sampling",
        "inpainting",
        "likelihood",
        "randomness",
        "ans",
        "coding",
        "progressive",
    },
    {"unet", "convolution", "normalization", "config", "build"},
    {"hosts", "devices", "checkpoints", "data", "weights", "writers", "images", "shards", "hlo", "tpu", "flops", "programs"},
    {
        "training",
        "loop",
        "generate",
        "trained",
        "pretrained",
        "evaluation",
        "galleries",
        "compression",
        "curves",
        "ledger",
        "tpu_report",
        "benchmark",
        "ahead_of_time",
    },
    {"cli"},
]
LEAVES, MATHS = LAYERS[:2]

# Import name -> the file that declares it. Imported inside functions or try blocks only: the core runs without them.
OPTIONAL = {
    "tensorflow": "requirements-tensorflow.txt",
    "torch": "requirements-torch.txt",
    "diffusers": "requirements-torch.txt",
    "libtpu": "requirements-tpu.txt",
}
PYTHONS = ("3.11", "3.12", "3.13")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it runs whenever the file is imported) of each import; `from a import b` counts as a.b."""
    found = []

    def visit(node: ast.AST, always: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, always) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write ddpm_jax.<module>"
            found.extend((f"{node.module}.{alias.name}", always) for alias in node.names)
        always = always and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try))
        for child in ast.iter_child_nodes(node):
            visit(child, always)

    visit(ast.parse(path.read_text()), True)
    return found


def requirements(name: str) -> dict[str, list[Requirement]]:
    """The lines of a requirements file by canonical name; several lines of one name differ by their markers."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def module(path: Path) -> str:
    """Name of the module or sub-package of ddpm_jax that a file belongs to."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[tuple[str, Path]]:
    return [(module(path), path) for path in sources(PACKAGE) if path != ROOT / PACKAGE / "__init__.py"]


# ---------------------------------------------------------------------------------------------- layers


def test_every_module_has_a_layer_and_imports_downwards():
    level = {name: i for i, row in enumerate(LAYERS) for name in row}
    for name, path in modules():
        assert name in level, f"{path.relative_to(ROOT)}: place {name} in LAYERS of tests/test_setup.py"
        for imported, _ in imports(path):
            top, _, rest = imported.partition(".")
            below = rest.split(".")[0]
            if top == PACKAGE:
                assert below in level, f"{path.relative_to(ROOT)} imports {imported}, which is in no layer"
                assert level[below] <= level[name], f"{path.relative_to(ROOT)} imports {imported}, from a layer above its own"


def test_no_module_needs_itself():
    needs = {name: set() for name, _ in modules()}
    for name, path in modules():
        inside = [imported for imported, _ in imports(path) if imported.startswith(f"{PACKAGE}.")]
        needs[name] |= {imported.split(".")[1] for imported in inside} - {name}
    while free := {name for name, needed in needs.items() if not needed & set(needs)}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert not needs, f"these modules import each other in a circle, or need one that does: {sorted(needs)}"


def test_leaves_know_no_other_module():
    for name, path in modules():
        if name in LEAVES:
            inside = [imported for imported, _ in imports(path) if imported.startswith(PACKAGE)]
            assert not inside, f"{path.relative_to(ROOT)} imports {inside}"


def test_maths_knows_arrays_only():
    """No Flax, no config, no devices: the bottom layer is pure functions of arrays, keys and a callable."""
    allowed = {"jax", "numpy", "scipy", PACKAGE}
    for name, path in modules():
        if name in MATHS:
            for imported, _ in imports(path):
                top = imported.split(".")[0]
                fine = top in allowed | sys.stdlib_module_names or imported == "flax.struct"
                assert fine, f"{path.relative_to(ROOT)} imports {imported}"


def test_devices_are_named_in_one_file():
    names = {"pmap", "devices", "local_devices", "device_count", "local_device_count"}
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            of_jax = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax"
            if of_jax and name != "devices":
                assert node.attr not in names, f"{path.relative_to(ROOT)}:{node.lineno}: jax.{node.attr} belongs in devices.py"


def test_no_private_modules_of_others():
    for path in sources(PACKAGE, "scripts", "configs", "tests"):
        for name, _ in imports(path):
            private = any(part.startswith("_") for part in name.removeprefix("__future__").split("."))
            assert not private, f"{path.relative_to(ROOT)} imports {name}: no promise holds for private names"


# ---------------------------------------------------------------------------------------------- requirements


def test_every_import_is_declared():
    declared, distributions = requirements("requirements.txt"), metadata.packages_distributions()
    for path in sources(PACKAGE, "scripts", "configs"):
        for imported, always in imports(path):
            top = imported.split(".")[0]
            if top == PACKAGE or top in sys.stdlib_module_names:
                continue
            where = f"{path.relative_to(ROOT)} imports {top}"
            if top in OPTIONAL:
                assert not always, f"{where} whenever it is imported; move it into the function that needs it"
                assert requirements(OPTIONAL[top])
            else:
                names = {canonicalize_name(name) for name in distributions.get(top, [])}
                assert names & set(declared), f"{where}, which requirements.txt does not name"


def test_every_requirement_is_used():
    """By an import of ours, or, where its comment begins with 'for', by the package that the comment names."""
    distributions = metadata.packages_distributions()
    imported = {name.split(".")[0] for path in sources(PACKAGE, "scripts", "tests") for name, _ in imports(path)}
    used = {canonicalize_name(name) for top in imported for name in distributions.get(top, [])}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text, _, comment = line.partition("#")
        if text.strip():
            name = canonicalize_name(Requirement(text).name)
            assert name in used or comment.strip().startswith("for "), f"requirements.txt: nothing imports {name}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_the_ranges_allow(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    pins, lock = requirements("requirements.lock"), "requirements.lock"
    for name, (requirement,) in requirements("requirements.txt").items():
        fitting = [pin for pin in pins.get(name, []) if pin.marker is None or pin.marker.evaluate(environment)]
        assert len(fitting) == 1, f"{lock} pins {name} {len(fitting)} times for Python {python}"
        (specifier,) = fitting[0].specifier
        assert specifier.operator == "==", f"{lock}: {fitting[0]} is no pin"
        assert specifier.version in requirement.specifier, f"{lock}: {fitting[0]}, not {requirement}"


def test_the_lock_is_complete():
    """What a pinned and installed package needs is pinned too, at a version it accepts: pip has nothing to choose."""
    pins = {}
    for name, lines in requirements("requirements.lock").items():
        for pin in lines:
            if pin.marker is None or pin.marker.evaluate():
                (specifier,) = pin.specifier
                pins[name] = specifier.version
    installed = {canonicalize_name(d.name): d for d in metadata.distributions()}
    checked = 0
    for name, version in pins.items():
        if name not in installed or installed[name].version != version:
            continue
        checked += 1
        for needed in map(Requirement, installed[name].requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                dependency = canonicalize_name(needed.name)
                assert dependency in pins, f"requirements.lock lacks {dependency}, which {name} needs"
                assert needed.specifier.contains(pins[dependency], prereleases=True), f"{name} needs {needed}"
    if not checked:
        pytest.skip("no package of the lock is installed at its pinned version")


def test_the_files_of_extra_requirements_exist_and_parse():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    files = dynamic["dependencies"]["file"] + [f for extra in dynamic["optional-dependencies"].values() for f in extra["file"]]
    assert sorted(files) == sorted(path.name for path in ROOT.glob("requirements*.txt"))
    for name in files:
        assert requirements(name)


def test_the_core_runs_without_tensorflow_and_pytorch():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sources(PACKAGE)]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print(sorted(set({sorted(OPTIONAL)}) & set(sys.modules)))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------------------------------- files


def test_no_file_is_of_one_machine():
    """No home folder, no package index that only one place has: a clone works anywhere."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    machine = re.compile(r"(?<![\w.~])/(?:root|home|Users|work|opt|srv|mnt)/\w|[A-Z]:\\Users|(?:find-links|index-url)[ =]")
    for name in filter(None, names):
        path = ROOT / name
        try:
            text = path.read_text() if path.is_file() else ""
        except UnicodeDecodeError:
            continue  # a picture, not a text
        for number, line in enumerate(text.splitlines(), 1):
            assert not machine.search(line), f"{name}:{number}: {line.strip()}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_asks_for_a_python_it_can_use(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").touch()
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "python3.9 is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 test" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_is_a_program_that_bash_understands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    marked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for marker in (line.partition(":")[0] for line in marked):
        assert re.search(rf"\bsuite {marker}\b", text), f".ci/run leaves out the tests marked {marker}"
