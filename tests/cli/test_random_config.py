"""Three hundred broken configs, files and command lines end in one line each, and none starts.

Every example is made from something that runs by breaking one part of it at random, and goes
through `main` of the command itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ddpm_jax.cli import evaluate, sample, train
from ddpm_jax.cli.run import outcome
from ddpm_jax.config import Config
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.spacing import SPACING_NAMES
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training import loop
from tests.support.processes import write_config
from tests.support.tiny import tiny_config


def examples(count: int) -> Callable:
    """The same ones at every run: a broken build must be one that somebody can repeat."""
    fixtures = [HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=fixtures,
    )


class Started(Exception):
    """Work began that should have been refused."""


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> tuple[Path, Path]:
    """A config file and a run directory that serve."""
    folder = tmp_path_factory.mktemp("ready")
    config = tiny_config(train={"steps": 2, "eval_images": 0})
    assert (
        loop.train(config, folder / "run", data_dir=folder, devices=Devices(jax.devices()[:1])) == 0
    )
    return write_config(folder, config), folder / "run"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, tmp_path) -> Iterator[None]:
    """No training and no network on the devices start, and the current folder stays empty."""

    def started(*arguments: object, **options: object) -> None:
        raise Started

    monkeypatch.setattr(loop, "restore_or_init", started)
    monkeypatch.setattr(Devices, "map_batch", lambda self, function: started)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list(Path().iterdir())


def refused(script, flags: list[str]) -> str:
    """The one line of a script that refuses these flags."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = outcome(lambda: script.main(flags))
        except SystemExit as end:
            code = end.code
    # Two steps are few for an average, which is said before what is refused.
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("note: ema ")]
    assert (
        code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 15
    ), (code, lines)
    return lines[0]


# ------------------------------------------------------------------------------------ broken values

words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
letters = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=9)
no_number = st.sampled_from(
    [
        "",
        "x",
        "None",
        "[]",
        "{}",
        "(",
        "1,,2",
        "1 2",
        "--3",
        "0x",
        "1e",
        "nan",
        "inf",
        "-inf",
        "1e400",
    ]
)


def negative(numbers: st.SearchStrategy) -> st.SearchStrategy[str]:
    return numbers.map(str)


def other_than(*known: str) -> st.SearchStrategy[str]:
    return st.one_of(words, letters, st.sampled_from(known).map(str.upper)).filter(
        lambda text: text not in known
    )


def fields(section: object, path: str = "") -> Iterator[tuple[str, typing.Any]]:
    for name, annotation in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{path}{name}.")
        else:
            yield path + name, annotation


FIELDS = dict(fields(Config()))
NAMES = {"sampling.sampler": tuple(SAMPLERS), "sampling.spacing": tuple(SPACING_NAMES)}


def broken_value(path: str) -> st.SearchStrategy[str]:
    """Texts that this field cannot have, whatever the others are.

    No field takes a negative number.
    """
    annotation = FIELDS[path]
    if path in NAMES:
        return other_than(*NAMES[path])
    if path == "data.name":
        return st.sampled_from(
            [
                "../x",
                "/etc/passwd",
                "a/../b",
                "",
                ".",
                "a b",
                "a/b/c",
                "no_such_set",
                "folder",
                "cifar10/x",
            ]
        )
    if path == "data.path":
        return words.filter(bool)  # only data.name=folder has one
    if annotation is bool:
        return other_than("true", "1", "yes", "false", "0", "no").filter(
            lambda text: text.lower() not in ("true", "1", "yes", "false", "0", "no")
        )
    if typing.get_origin(annotation) is typing.Literal:
        return other_than(*typing.get_args(annotation))
    below, above = st.integers(max_value=-1), st.integers(min_value=2**32)
    if annotation is int:
        fractions = st.floats(-5, 5).filter(lambda x: not x.is_integer())
        return st.one_of(
            no_number, st.just("True"), below.map(str), above.map(str), fractions.map(str)
        )
    if annotation is float:
        return st.one_of(
            no_number, st.just("True"), st.floats(max_value=-1e-9, allow_infinity=False).map(str)
        )
    return st.one_of(
        no_number.filter(lambda text: text not in ("[]", "")),
        below.map("({},)".format),
        letters.map("(1,'{}')".format),
    )


@st.composite
def broken_override(draw) -> str:
    kind = draw(st.sampled_from(["value"] * 6 + ["misspelt", "no value", "section", "too deep"]))
    path = draw(st.sampled_from(sorted(FIELDS)))
    section, _, name = path.rpartition(".")
    if kind == "value":
        return f"{path}={draw(broken_value(path))}"
    if kind == "misspelt":
        wrong = draw(
            letters.filter(
                lambda text: (
                    f"{section}.{text}".strip(".") not in FIELDS and text not in ("data", "train")
                )
            )
        )
        return f"{section}.{wrong}=1".strip(".") if section else f"{wrong}x.y=1"
    if kind == "no value":
        return path
    return f"{section or 'train'}=1" if kind == "section" else f"{path}.{draw(letters)}=1"


@examples(110)
@given(
    broken=broken_override(),
    around=st.lists(st.sampled_from(["train.steps=5", "seed=3", "data.flip=false"]), max_size=2),
)
@example(broken="train.steps=1000000000000", around=[])
@example(broken="sampling.sampler=euler", around=[])
@example(broken="data.name=../../etc", around=[])
def test_broken_overrides(ready, tmp_path, broken, around):
    config, _ = ready
    flags = [f"--config.{item}" for item in (*around, broken)]
    refused(train, [f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()


HEAD = "from ddpm_jax.config import Config, TrainConfig\n\n\ndef get_config():\n    return "
PROGRAMS = [
    "",
    "def get_config(:\n",
    "get_config = 3\n",
    "def get_config():\n    return {}\n",
    "def get_config():\n    return None\n",
    "def get_config():\n    raise KeyError('x')\n",
    "def get_config():\n    return 1 / 0\n",
    "import no_such_module\n",
    "from ddpm_jax.config import Confg\n",
    "raise SystemError\n",
    f"{HEAD}Config(train=TrainConfig(stps=3))\n",
    f"{HEAD}Config(train=TrainConfig(steps=-3))\n",
    f"{HEAD}Config(train=None)\n",
    f"{HEAD}Config(train=TrainConfig(steps='x'))\n",
    "def get_config(size):\n    return size\n",
]


@examples(40)
@given(
    content=st.one_of(
        st.sampled_from(PROGRAMS).map(str.encode), words.map(str.encode), st.binary(max_size=60)
    )
)
def test_broken_config_files(tmp_path, content):
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    refused(train, [f"--config={path}", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(letters, inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def broken_config_json(draw) -> bytes:
    """The config.json of a run directory: cut short, damaged, foreign, or with one wrong field."""
    whole = json.dumps(dataclasses.asdict(tiny_config()))
    kind = draw(st.sampled_from(["cut", "bytes", "other", "field", "field", "added"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))].encode()
    if kind == "bytes":
        at = draw(st.integers(0, len(whole) - 1))
        return whole[:at].encode() + b"\xff\xfe\x00" + whole[at + 3 :].encode()
    if kind == "other":
        return json.dumps(draw(json_values.filter(bool))).encode()
    values = json.loads(whole)
    if kind == "added":
        values[draw(letters.filter(lambda name: name not in values))] = draw(json_values)
        return json.dumps(values).encode()
    path = draw(st.sampled_from(sorted(FIELDS)))
    *sections, last = path.split(".")
    holder = values
    for section in sections:
        holder = holder[section]
    holder[last] = draw(st.sampled_from([None, {}, {"a": 1}, "../x", -7, [[1]]]))
    return json.dumps(values).encode()


@examples(40)
@given(content=broken_config_json())
def test_broken_run_directories(tmp_path, content):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_bytes(content)
    refused(sample, [f"--workdir={workdir}", f"--output={tmp_path / 'grid.png'}"])
    refused(evaluate, [f"--workdir={workdir}", "--metrics=nll"])


# ----------------------------------------------------------------------------- broken command lines

below_one = st.one_of(no_number, st.integers(max_value=0).map(str), st.just("1.5"))
below_zero = st.one_of(no_number.filter(bool), st.integers(max_value=-1).map(str), st.just("1.5"))
no_folder = st.sampled_from(["", "FILE", "FILE/run"])
HOSTS = {
    "--num_processes": st.one_of(no_number, st.integers().map(str)),
    "--process_id": st.one_of(no_number, st.integers().map(str)),
    "--coordinator_address": words,
    "--host_timeout": below_one,
    "--start_timeout": below_one,
}
TRAIN = HOSTS | {
    "--config": other_than("x").filter(lambda text: text.strip(".") != "" and "/" not in text)
    | st.just(""),
    "--workdir": no_folder,
    "--step": below_zero,
}
SAMPLE = HOSTS | {
    "--workdir": no_folder | st.just("nowhere"),
    "--mode": other_than(*sample.MODES),
    "--output": words.map(lambda text: text + ".jpg") | st.just("grid.png.txt"),
    "--num_images": below_one,
    "--seed": below_zero | st.integers(2**32).map(str),
    "--first": below_zero,
    "--label": no_number.filter(bool) | st.integers().map(str),  # the run has no classes
    "--guidance": no_number | st.floats(1.1, 9).map(str),
    "--sampler": other_than(*SAMPLERS),
    "--steps": below_zero | st.integers(21).map(str),  # of 20
    "--spacing": other_than(*SPACING_NAMES),
    "--eta": no_number | st.floats(1.001, 1e9).map(str) | st.floats(-1e9, -0.001).map(str),
    "--order": no_number | st.integers().filter(lambda order: order != 0).map(str),  # ancestral
    "--dynamic_threshold": no_number | st.floats(1.001, 1e9).map(str),
    "--clip": other_than("true", "false"),
    "--weights": other_than("ema", "raw", "0.9", "0.99"),
    "--step": below_zero | st.integers(3).map(str),
    "--batch_size": below_one,
    "--scale": below_one,
    "--split": other_than("train", "test"),
    "--rows": below_one,
    "--columns": below_one,
    "--frames": below_one,
    "--points": below_one,
}
EVALUATE = HOSTS | {
    name: SAMPLE[name]
    for name in (
        "--workdir",
        "--num_images",
        "--seed",
        "--weights",
        "--step",
        "--batch_size",
        "--split",
        "--clip",
    )
}
EVALUATE |= {
    "--metrics": other_than("nll"),
    "--num_timesteps": below_zero | st.integers(21).map(str),
    "--cdf": other_than("tanh", "erf"),
}


@st.composite
def broken_flags(
    draw, good: list[str], wrong: dict[str, st.SearchStrategy], required: int
) -> list[str]:
    """`good` with a wrong flag, without one that is required, or with something that is no flag."""
    kind = draw(st.sampled_from(["wrong"] * 7 + ["missing", "unknown", "stray"]))
    if kind == "missing":
        left_out = draw(st.sampled_from(good[:required]))
        return [flag for flag in good if flag != left_out]
    if kind == "unknown":
        unknown = letters.filter(
            lambda name: name not in ("help", "config") and f"--{name}" not in wrong
        )
        return [*good, f"--{draw(unknown)}_={draw(words)}"]
    if kind == "stray":
        return [*good, draw(words.filter(lambda text: not text.startswith("-")))]
    name = draw(st.sampled_from(sorted(wrong)))
    return [flag for flag in good if flag.partition("=")[0] != name] + [
        f"{name}={draw(wrong[name])}"
    ]


def placed(flags: list[str], ready: tuple[Path, Path], folder: Path) -> list[str]:
    """With the real names in the place of CONFIG, RUN, FILE (which is no folder) and OUT."""
    (folder / "file").touch()
    names = {"CONFIG": ready[0], "RUN": ready[1], "FILE": folder / "file", "OUT": folder / "out"}
    for name, path in names.items():
        flags = [flag.replace(f"={name}", f"={path}") for flag in flags]
    return flags


@examples(40)
@given(flags=broken_flags(["--config=CONFIG", "--workdir=OUT", "--step=0"], TRAIN, 2))
def test_broken_command_lines_of_train(ready, tmp_path, flags):
    refused(train, placed([flag for flag in flags if flag != "--step=0"], ready, tmp_path))
    assert not (tmp_path / "out").exists()


@examples(50)
@given(flags=broken_flags(["--workdir=RUN", "--output=OUT.png", "--num_images=2"], SAMPLE, 2))
def test_broken_command_lines_of_sample(ready, tmp_path, flags):
    refused(sample, placed(flags, ready, tmp_path))
    assert not list(tmp_path.glob("out*"))


@examples(30)
@given(flags=broken_flags(["--workdir=RUN", "--metrics=nll", "--num_images=2"], EVALUATE, 2))
def test_broken_command_lines_of_evaluate(ready, tmp_path, flags):
    before = sorted(ready[1].rglob("*"))
    refused(evaluate, placed(flags, ready, tmp_path))
    assert sorted(ready[1].rglob("*")) == before


def test_what_is_not_broken_starts(ready, tmp_path):
    """Or the tests above would prove nothing: the same flags, unbroken, get as far as the work."""
    config, run = ready
    for script, flags in (
        (train, [f"--config={config}", f"--workdir={tmp_path / 'run'}"]),
        (sample, [f"--workdir={run}", f"--output={tmp_path / 'out.png'}", "--num_images=2"]),
        (evaluate, [f"--workdir={run}", "--metrics=nll", "--num_images=2"]),
    ):
        with pytest.raises(Started), contextlib.redirect_stdout(io.StringIO()):
            script.main(flags)
