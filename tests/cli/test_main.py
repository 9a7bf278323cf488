"""The command `ddpm`: one word for a command, and what its flags may name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.cli import distill, flags, main, run, sample, train
from ddpm_jax.config import load_config
from ddpm_jax.errors import ConfigError
from tests.support.layers import PACKAGE, ROOT

OTHERS = {
    "__main__",
    "__init__",
    "flags",
    "values",
    "main",
    "run",
}  # files of the folder that are no commands


@pytest.fixture
def as_ddpm():
    """Commands are started as `ddpm NAME`."""
    yield flags.start_as
    flags.start_as()


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def refused(capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main.main()
    out, errors = capsys.readouterr()
    assert end.value.code == 2 and out == "" and errors.count("\n") == 1
    return errors


# -------------------------------------------------------------------------------------- commands


def test_every_command_is_listed():
    files = {path.stem for path in (ROOT / PACKAGE / "cli").glob("*.py")} - OTHERS
    assert sorted(files) == sorted(map(main.module_name, main.COMMANDS))
    for name in main.COMMANDS:
        assert len(main.summary(name)) > 10 and main.summary(name).endswith(".")
        tree = ast.parse((ROOT / PACKAGE / "cli" / f"{main.module_name(name)}.py").read_text())
        assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_help_imports_no_command(tmp_path):
    code = (
        "import sys; sys.argv = ['ddpm', '--help']\n"
        "from ddpm_jax.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'jax', 'numpy', 'ddpm_jax.cli.flags'} & set(sys.modules)))"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    *help_lines, modules = done.stdout.splitlines()
    assert modules == "[]" and all(len(line) <= 130 for line in help_lines)
    text = "\n".join(help_lines)
    assert text.startswith("usage: ddpm COMMAND")
    for name in main.COMMANDS:
        assert f"\n  {name} " in text


def test_the_flags_of_training_are_listed_without_jax(tmp_path):
    """Importing it takes longer than all else."""
    code = (
        "import sys; sys.argv = ['ddpm', 'train', '--help']\n"
        "from ddpm_jax.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'jax', 'numpy'} & set(sys.modules)))"
    )
    done = python("-c", code, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ddpm train ") and done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "no command 'trian', did you mean train?"),
        (["prepare_data"], "did you mean prepare-data?"),
        (["sample.py"], "did you mean sample?"),
        (["xyzzy"], "no command 'xyzzy' (ddpm --help"),
        ([], "name a command first (ddpm --help lists the commands)"),
        (["--config=digits", "train"], "name a command first"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddpm", *words])
    assert said in refused(capsys)


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddpm", "--version"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("ddpm_jax ")


def test_a_command_runs_as_a_module(tmp_path):
    done = python(
        "-m", "ddpm_jax.cli", "sample", "--pretrained=cat", "--output=x.png", folder=tmp_path
    )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == "error: --pretrained=cat: one of cifar10_small, digits, faces, fashion_mnist\n"
    )
    assert not list(tmp_path.iterdir())


def test_help_shows_the_command_as_it_was_started(as_ddpm, capsys):
    as_ddpm("ddpm", "train")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: ddpm train ") and "\n  ddpm train --config=" in text
    assert "scripts/" not in text


@pytest.mark.parametrize(
    "command, remedy",
    [
        (train, "ddpm command --workdir=x --step=3 # once: then leave --step out"),
        (sample, "ddpm command --workdir=x --step=3"),
        (distill, "move this one away, and the same command does"),
    ],
)
def test_remedies_repeat_the_command_as_it_was_started(
    as_ddpm, monkeypatch, capsys, command, remedy
):
    """A training that is given --step again goes back again, and loses what it did since."""

    def damaged() -> None:
        error = ConfigError("damaged, go on with")
        error.step = 3
        raise error

    monkeypatch.setattr(sys, "argv", ["/usr/bin/ddpm", "--workdir=x", "--step", "5"])
    as_ddpm("ddpm", "command")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert run.outcome(damaged) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"go on with: {remedy}\n")


# -------------------------------------------------------------------------------------- paths


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--workdir=~/run", "--output=~/x.png", "--data_dir=~", "--images", "~/a.png", "b~.png"]
    options = sample.parser().parse_args(words)
    assert options.workdir == tmp_path / "run" and options.output == tmp_path / "x.png"
    assert options.data_dir == tmp_path
    assert options.images == [tmp_path / "a.png", Path("b~.png")]


def test_an_empty_path_is_refused(capsys):
    with pytest.raises(SystemExit):
        sample.parser().parse_args(["--workdir=x", "--output="])
    assert "--output: name a file or folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- configs


def test_a_config_that_ships_goes_by_its_name(tmp_path, monkeypatch):
    digits = load_config(ROOT / "configs" / "digits.py")
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.py", "configs/digits.py"):
        assert load_config(name) == digits
    variant = load_config("table2:eps_simple", ["train.steps=7"])
    assert variant.train.steps == 7 and variant.loss.kind == "simple"
    (tmp_path / "digits").mkdir()  # a folder is no config
    assert load_config("digits") == digits


def test_a_file_goes_before_a_config_that_ships(tmp_path, monkeypatch):
    (tmp_path / "digits").write_text("")
    text = "from ddpm_jax.config import Config\n\n\ndef get_config():\n    return Config(seed=5)\n"
    (tmp_path / "digits.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("digits.py").seed == load_config("~/digits.py").seed == 5
    with pytest.raises(ConfigError, match="config=digits: not a Python file"):
        load_config("digits")


@pytest.mark.parametrize(
    "name, said",
    [
        ("digit", "config=digit: no such file; did you mean digits?"),
        ("other/digits", "config=other/digits: no such file; did you mean digits?"),
        ("nothing", "config=nothing: no such file; these ship: celeba32, celeba64, "),
        ("", "config=: no such file"),
        ("table2", "config=.*table2.py:VARIANT, one of mu_l_learned"),
        ("digits:x", "digits.py has no variants"),
    ],
)
def test_a_config_that_is_not_there_is_one_line(name, said):
    with pytest.raises(ConfigError, match=said):
        load_config(name)


@pytest.mark.parametrize("between", ["=", " "])
def test_a_field_is_set_in_one_word_or_in_two(between):
    """As the help writes it, and as other flags are set; a negative number is a value too."""
    words = f"--config.seed{between}-1 --workdir runs/x --config.data.name{between}folder"
    options, overrides = flags.parse_with_overrides(
        train.parser(), [*words.split(), "--config", "digits", "--config.data.path", "--config.x=2"]
    )
    assert overrides == ["seed=-1", "data.name=folder", "data.path", "x=2"]
    assert (options.workdir, options.config) == (Path("runs/x"), "digits")
    with pytest.raises(ConfigError, match="config.data.path: write config.data.path=VALUE"):
        load_config("digits", overrides[2:3])
