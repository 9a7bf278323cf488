"""The repository as a whole: imports are declared, pins fit, any machine will do, a wheel works."""

from __future__ import annotations

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

from ddpm_jax.images import load_png
from tests.support.layers import PACKAGE, ROOT, imports, sources

# Import name -> the extra that brings it. Imported inside functions or try blocks only: the core
# runs without them.
OPTIONAL = {
    "tensorflow": "tensorflow",
    "torch": "torch",
    "diffusers": "torch",
    "libtpu": "tpu",
}
PYTHONS = ("3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name: str) -> dict[str, list[Requirement]]:
    """The lines of a requirements file by canonical name; those of one name differ by markers."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    by_name: dict[str, list[Requirement]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            by_name.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return by_name


# ------------------------------------------------------------------------------------- requirements


def test_every_import_is_declared():
    declared, distributions = requirements("requirements.txt"), metadata.packages_distributions()
    for path in sources(PACKAGE, "scripts", "configs"):
        for imported, always in imports(path):
            top = imported.split(".")[0]
            if top == PACKAGE or top in sys.stdlib_module_names:
                continue
            where = f"{path.relative_to(ROOT)} imports {top}"
            if top in OPTIONAL:
                assert not always, (
                    f"{where} whenever it is imported; move it into the function that needs it"
                )
                assert OPTIONAL[top] in PROJECT["project"]["optional-dependencies"]
            else:
                names = {canonicalize_name(name) for name in distributions.get(top, [])}
                assert names & set(declared), f"{where}, which requirements.txt does not name"


def test_every_requirement_is_used():
    """An import of ours uses it, or the package that its comment names after "for"."""
    distributions = metadata.packages_distributions()
    imported = {
        name.split(".")[0]
        for path in sources(PACKAGE, "scripts", "tests")
        for name, _ in imports(path)
    }
    used = {canonicalize_name(name) for top in imported for name in distributions.get(top, [])}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text, _, comment = line.partition("#")
        if text.strip():
            name = canonicalize_name(Requirement(text).name)
            assert name in used or comment.strip().startswith("for "), (
                f"requirements.txt: nothing imports {name}"
            )


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_the_ranges_allow(python):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "extra": "",
    }
    pins, lock = requirements("requirements.lock"), "requirements.lock"
    for name, (requirement,) in requirements("requirements.txt").items():
        fitting = [
            pin
            for pin in pins.get(name, [])
            if pin.marker is None or pin.marker.evaluate(environment)
        ]
        assert len(fitting) == 1, f"{lock} pins {name} {len(fitting)} times for Python {python}"
        (specifier,) = fitting[0].specifier
        assert specifier.operator == "==", f"{lock}: {fitting[0]} is no pin"
        assert specifier.version in requirement.specifier, (
            f"{lock}: {fitting[0]}, not {requirement}"
        )


def test_the_lock_is_complete():
    """What a pinned and installed package needs is pinned too: pip has nothing to choose."""
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
                assert dependency in pins, (
                    f"requirements.lock lacks {dependency}, which {name} needs"
                )
                assert needed.specifier.contains(pins[dependency], prereleases=True), (
                    f"{name} needs {needed}"
                )
    if not checked:
        pytest.skip("no package of the lock is installed at its pinned version")


def test_extras_parse_and_the_core_has_one_list():
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {
        "file": ["requirements.txt"]
    }
    assert [path.name for path in ROOT.glob("requirements*.txt")] == ["requirements.txt"]
    extras = PROJECT["project"]["optional-dependencies"]
    assert sorted(extras) == ["cuda", "docs", "notebooks", "tensorflow", "torch", "tpu"]
    for lines in extras.values():
        assert all(Requirement(line).specifier for line in lines)


def test_the_backend_that_make_uses_is_pinned():
    """make installs without build isolation, so the lock must bring what builds."""
    for needed in map(Requirement, PROJECT["build-system"]["requires"]):
        (pin,) = requirements("requirements.lock")[canonicalize_name(needed.name)]
        (specifier,) = pin.specifier
        assert specifier.version in needed.specifier


def test_make_gpu_looks_for_the_libraries_of_cuda_too(tmp_path):
    """JAX's plugin alone, which compiling ahead needs, finds no GPU."""
    (code,) = re.findall(r'-c "(import jax_cuda12_plugin[^"]*)"', (ROOT / "Makefile").read_text())
    command = [sys.executable, "-S", "-c", code]  # without what is installed here
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def found() -> bool:
        return not subprocess.run(command, env=environment, capture_output=True).returncode

    (tmp_path / "jax_cuda12_plugin").mkdir()
    assert not found()
    for library in ("cudnn", "cuda_nvcc"):
        (tmp_path / "nvidia" / library).mkdir(parents=True)
    assert found()


def test_the_core_runs_without_tensorflow_and_pytorch():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources(PACKAGE)
    ]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print(sorted(set({sorted(OPTIONAL)}) & set(sys.modules)))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# -------------------------------------------------------------------------------------------- files


def test_no_file_is_of_one_machine():
    """No home folder, no package index that only one place has: a clone works anywhere."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = subprocess.run(
        listing, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    machine = re.compile(
        r"(?<![\w.~])/(?:root|home|Users|work|opt|srv|mnt)/\w|[A-Z]:\\Users"
        r"|(?:find-links|index-url)[ =]"
    )
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
    done = subprocess.run(
        ["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert (
        "python3.9 is not Python 3.11 to 3.14; name one that is: make PYTHON=python3.12 test"
        in done.stderr
    )
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "version, fits", [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False)]
)
def test_make_takes_the_pythons_that_have_wheels(version, fits, monkeypatch):
    """As README and pyproject.toml say it."""
    (code,) = re.findall(r'-c "(import sys; sys\.exit\(.*\))"', (ROOT / "Makefile").read_text())
    monkeypatch.setattr(sys, "version_info", (*version, 7, "final", 0))
    with pytest.raises(SystemExit) as ended:
        exec(code)
    assert bool(ended.value.code) is not fits
    assert "Python 3.11 to 3.14 on Linux" in (ROOT / "README.md").read_text()
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.15"


def test_ci_is_a_program_that_bash_understands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    marked = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    selected = " ".join(re.findall(r'\bsuite \S+ "([^"]+)"', text))
    for marker in (line.partition(":")[0] for line in marked):
        assert re.search(rf"(?<!not )\b{marker}\b", selected), (
            f".ci/run leaves out the tests marked {marker}"
        )
    # What the first run leaves out is what the second one runs, and is there.
    oracles = re.search(r"oracles=\((.*)\)", text)[1].split()
    assert oracles and all((ROOT / path).exists() for path in oracles)
    (left_out,) = re.findall(r"--ignore\S*", text)
    assert f'ARGS="${{oracles[*]/#/{left_out}' in text and left_out == '--ignore=}"'
    assert '-m pytest "${workers[@]}" "${oracles[@]}"\n' in text


# ---------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment into which the wheel is installed.

    It is built from the source distribution. What it needs is found where these tests find it; the
    checkout is out of reach.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = {"runs", "data", "build", "dist"}

    def ignore(place: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name.startswith(".") or name.endswith(".egg-info")}
        return hidden | (left_out if Path(place) == ROOT else set())

    shutil.copytree(ROOT, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-index"]
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    (sdist,) = folder.glob("*.tar.gz")
    build = [*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", folder, sdist]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *options, wheel], check=True)
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", place], capture_output=True, text=True, check=True)
    path = Path(site.stdout.strip(), "of_the_tests.pth")
    # An environment may itself take packages from another one.
    path.write_text("".join(f"{place}\n" for place in sys.path if "site-packages" in place))
    return python.parent


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["JAX_PLATFORMS"] = "cpu"

    def run(*words: str) -> str:
        done = subprocess.run(
            [installed / words[0], *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import ddpm_jax, ddpm_jax.files as f; print(ddpm_jax.__file__, f.checkout())"
    file, checkout = run("python", "-c", code).split()
    assert Path(file).is_relative_to(installed.parent) and checkout == "None"
    assert run("ddpm", "--version").startswith("ddpm_jax 0.")
    sample = ["ddpm", "sample", "--pretrained=digits", "--num_images=4", "--steps=10"]
    run(*sample, "--output=grid.png")
    assert load_png(tmp_path / "grid.png").shape == (18, 18, 1)
    small = [f"--config.{item}" for item in ("train.steps=1", "model.base_channels=8")]
    run("ddpm", "train", "--config=digits", "--workdir=run", *small)
    assert (tmp_path / "run" / "config.json").is_file()
    dry = run("ddpm", "reproduce", "--row=eps_simple", "--dry_run")
    assert dry.startswith("ddpm train --config=configs/")
    code = "import ddpm_jax as ddpm; print(ddpm.load('fashion_mnist'))"
    assert "<Model of fashion_mnist" in run("python", "-c", code)
    license = metadata_of(installed)["License-Expression"]
    assert license == "Apache-2.0" == PROJECT["project"]["license"]


def metadata_of(bin_folder: Path) -> metadata.PackageMetadata:
    """The metadata of the installed wheel, its license file beside it."""
    (folder,) = (bin_folder.parent / "lib").rglob("ddpm_jax-*.dist-info")
    assert "Apache License" in (folder / "licenses" / "LICENSE").read_text()
    return metadata.PathDistribution(folder).metadata
