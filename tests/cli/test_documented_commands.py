"""Every command that the documentation writes down is one that its parser accepts.

Commands stand in README.md, REPRODUCTION.md, docs/, the headers of configs/, benchmarks/paper.json
and the examples of --help. Each goes through `main` of its command until the flags are parsed, and
through the checks of the flags; a config that it names must exist and take its overrides.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from ddpm_jax.config import load_config
from tests.support.commands import command_module

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
PAGES = [
    *(ROOT / "README.md", ROOT / "REPRODUCTION.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.py")),
]

# Not commands but mentions of one, with dots for the rest.
MENTIONS = {
    ("README.md", "train ..."),
    ("docs/running.md", "train ... --step=2"),
}
CONFIGS_OF_RUNS = "runs/"  # an import or a training writes these

START = re.compile(r"(?:python scripts/(\w+)\.py|\bddpm ([a-z][a-z-]*))(?=\s|$)")
# In running text a script may be named without python; it is a command where flags follow.
NAMED = re.compile(r"^(?:scripts/)?(\w+)\.py(?= .*--)")


class Parsed(Exception):
    """The flags have been parsed: what is carried instead of the command's work."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        super().__init__()
        self.parser, self.options = parser, options


def commands_of(text: str) -> list[str]:
    """The commands of a page in Markdown: those of code blocks, then those of running text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return list(itertools.chain(*map(commands_in, lines), *map(commands_in, spans)))


def commands_in(line: str) -> list[str]:
    """The command of one line, as "name flags"; none where there is none.

    What follows it, after # or a gap, is a remark. Where a script is named without python, the run
    that all such lines share is left out, and the picture where only the mode matters.
    """
    line = re.sub(r"\s#\s.*", "", line).strip()
    if match := START.search(line):
        name = (match[1] or match[2]).replace("-", "_")
        return [f"{name} {line[match.end() :].strip()}".strip()]
    if (match := NAMED.search(line)) and match[1] in COMMANDS:
        arguments = re.sub(r"\s{2,}(?=[^-\[\s]).*", "", line[match.end() :].strip())
        if "--config=" not in arguments:
            arguments += " --workdir=runs/x"
        if match[1] == "sample" and "--output" not in arguments:
            arguments += " --output=x.png"
        return [f"{match[1]} {arguments}"]
    return []


def documented() -> list[tuple[str, str]]:
    """(page, command) of all pages, each once."""
    found = []
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text()
        if page.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
            found += [
                (name, c)
                for line in text.replace("\\\n", " ").splitlines()
                for c in commands_in(line)
            ]
        else:
            found += [(name, command) for command in commands_of(text)]
    for figure in json.loads((ROOT / "benchmarks" / "paper.json").read_text())["figures"]:
        (command,) = commands_in(figure["command"])
        found.append(("benchmarks/paper.json", command))
    return list(dict.fromkeys(found))


def variants(command: str) -> list[str]:
    """The command without its [optional parts], and with each choice of [one | another]."""
    optional = re.compile(r"\[(--[^\]]*)\]")
    choices = max([part.count(" | ") + 1 for part in optional.findall(command)], default=0)
    texts = [optional.sub("", command)]
    for number in range(choices):
        texts.append(optional.sub(lambda m, n=number: (m[1].split(" | ") * choices)[n], command))
    return texts


def parse(name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """What `main` of a command parses; it ends there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(self, original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        command_module(name).main(argv)
    return parsed.value


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command, run the checks of its flags, and load the config that it names."""
    monkeypatch.chdir(ROOT)
    name, *argv = shlex.split(re.sub(r"\$\w+", "0", command))
    options = parse(name, argv, monkeypatch).options
    if check_flags := getattr(command_module(name), "check_flags", None):
        check_flags(options)
    overrides = [item.removeprefix("--config.") for item in argv if item.startswith("--config.")]
    if options_of := getattr(command_module(name), "options_of", None):
        options_of(options, overrides)
    config = getattr(options, "config", None)
    if config and config != "..." and not config.startswith(CONFIGS_OF_RUNS):
        load_config(config, overrides)
    if name == "prepare_data":
        assert options.dataset in {*data_sets(), "folder"}, "no config's data set"


def data_sets() -> set[str]:
    """The data sets that the configs train on."""
    names = set()
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataConfig":
                names |= {word.value.value for word in node.keywords if word.arg == "name"}
    return names


@pytest.mark.parametrize("page, command", documented())
def test_documented_commands_are_accepted(page, command, monkeypatch):
    if (page, command) in MENTIONS or command.isidentifier():  # a name alone
        pytest.skip("a mention, not a command")
    for variant in variants(command):
        check(variant, monkeypatch)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_are_accepted(name, monkeypatch):
    required = {
        "code_images": ["--workdir=x", "--mode=measure"],
        "compare_with_diffusers": ["--config=x", "--workdir=x", "--output=x"],
        "distill": ["--teacher=x", "--workdir=x"],
        "export_weights": ["--workdir=x", "--layout=diffusers", "--output=x"],
        "import_weights": ["--workdir=x", "--layout=ho", "--input=x"],
        "plot_metrics": ["--workdir=x", "--output=x"],
        "prepare_data": ["--dataset=cifar10"],
        "sample": ["--workdir=x", "--output=x"],
        "train": ["--config=x", "--workdir=x"],
    }
    with monkeypatch.context() as patch:
        argv = required.get(name, ["--config=x"] if name == "benchmark" else [])
        epilog = parse(name, argv, patch).parser.epilog
    examples = [command for line in epilog.splitlines() for command in commands_in(line)]
    assert examples and all(example.split()[0] == name for example in examples)
    for example in examples:
        check(example, monkeypatch)


def test_commands_are_found_as_they_are_written():
    page = """
Text with `python scripts/train.py --config=configs/digits.py
--workdir=runs/a` and `scripts/sample.py`, `scripts/train.py --config=x`, `ddpm_jax`.

```
python scripts/sample.py --workdir=runs/a \\
    --output=grid.png        # or digits
ddpm import-weights --workdir=runs/b [--weights=ema]
sample.py --mode=denoising    [--frames=40]     x_t on its way down
pip install -r requirements.txt
```
"""
    assert commands_of(page) == [
        "sample --workdir=runs/a      --output=grid.png",
        "import_weights --workdir=runs/b [--weights=ema]",
        "sample --mode=denoising    [--frames=40] --workdir=runs/x --output=x.png",
        "train --config=configs/digits.py --workdir=runs/a",
        "train --config=x",
    ]
    assert variants("a [--b] [--c | --d]") == ["a  ", "a --b --c", "a --b --d"]


@pytest.mark.parametrize(
    "command",
    [
        "train --config=configs/digits.py --workdir=x --stepz=3",
        "train --config=configs/digits.py --workdir=x --config.train.stepz=3",
        "train --config=configs/nothing.py --workdir=x",
        "prepare_data --dataset=celeb_a_hq",
        "evaluate --workdir=x --metrics=fud",
    ],
)
def test_a_command_that_would_be_refused_is_noticed(command, monkeypatch):
    with pytest.raises((SystemExit, ValueError, AssertionError, pytest.fail.Exception)):
        check(command, monkeypatch)
