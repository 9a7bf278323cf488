"""What is wrong outside the program: devices, systems, terminals, numbers, paths. One line each."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ddpm_jax import cli
from ddpm_jax.cli import (
    benchmark,
    code_images,
    compare_with_diffusers,
    compile_ahead,
    evaluate,
    export_weights,
    flags,
    plot_metrics,
    reproduce,
    run,
    sample,
    train,
)
from ddpm_jax.config import Config, load_config, override
from ddpm_jax.data.folder import scan
from ddpm_jax.errors import ConfigError, EvaluationError, UserError
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.images import ImageError, check_picture, grid, load_png
from ddpm_jax.parallel.devices import why_none
from ddpm_jax.progress import Lenient
from ddpm_jax.runs.workdir import check_path
from tests.support.layers import ROOT


def one_line(capsys) -> str:
    out, errors = capsys.readouterr()
    assert out == "" and errors.count("\n") == 1 and errors.startswith("error: ")
    return errors


# ------------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5", ""])
def test_a_number_of_devices_that_is_none(count, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", count)
    assert f"JAX_NUM_CPU_DEVICES={count}: must be a whole number, at least 1" == cli.obstacle()


def test_a_system_without_locks_is_told_before_anything_is_imported(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fcntl" else find(name)
    )
    assert cli.obstacle() == (
        "ddpm_jax runs on Linux, on macOS, and on Windows in WSL (wsl --install)"
    )
    assert "Linux, macOS or Windows' WSL" in (ROOT / "README.md").read_text()


def test_all_is_well_here():
    assert cli.obstacle() is None and why_none() is None


def test_devices_that_are_not_there_are_one_line(monkeypatch, capsys):
    def nothing() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda': no such thing\nand more")

    monkeypatch.setattr(jax, "devices", nothing)
    assert run.outcome(nothing) == 1
    assert one_line(capsys) == (
        "error: JAX_PLATFORMS=cpu has no devices here: "
        "Unable to initialize backend 'cuda': no such thing\n"
    )


@pytest.mark.parametrize(
    "command, said",
    [
        (train, "--config.train.accumulation=2, or more, and --config.model.remat=true take less"),
        (sample, "a smaller --batch_size takes less"),
        (evaluate, "a smaller --batch_size takes less"),
        (plot_metrics, "this config is too large for the machine"),
    ],
)
def test_memory_that_runs_out_is_told_with_flags_that_the_command_has(command, said, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    capsys.readouterr()

    def full() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    assert run.outcome(full) == 1
    assert one_line(capsys) == f"error: out of memory: {said}\n"


def test_a_fault_of_the_code_stays_a_traceback():
    def wrong() -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        run.outcome(wrong)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_PLATFORMS", "nonsense", "JAX_PLATFORMS=nonsense has no devices here: "),
        ("JAX_ENABLE_X64", "maybe", "JAX_ENABLE_X64"),
    ],
)
def test_variables_of_jax_that_make_no_sense(name, value, message):
    command = [sys.executable, "scripts/sample.py", "--workdir=none", "--output=x.png"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), name: value}
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 1 and child.stderr.count("\n") == 1 and message in child.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"]])
@pytest.mark.parametrize("closing", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_closed_terminal_is_no_fault_of_the_command(words, closing):
    command = f"{sys.executable} -m ddpm_jax.cli {' '.join(words)} {closing}"
    child = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert child.returncode == (2 if words == ["nonsense"] else 0)
    assert child.stdout == child.stderr == b""


# -------------------------------------------------------------------------------------------- numbers


def parsed(*arguments: str):
    return sample.parser().parse_args(["--workdir=x", "--output=x.png", *arguments])


@pytest.mark.parametrize(
    "argument",
    ["--seed=123456789012345678901", "--levels=1,123456789012345678901", "--step=1" + "0" * 5000]
    + ["--eta=1e999", "--eta=nan", "--guidance=-inf"],
)
def test_numbers_without_bounds_are_refused_by_their_flag(argument, capsys):
    with pytest.raises(SystemExit):
        parsed(argument)
    line = one_line(capsys)
    assert argument.partition("=")[0] in line and len(line) < 300 or "--step" in argument
    assert parsed("--seed=12", "--eta=0.5", "--levels=1,2").levels == [1, 2]


@pytest.mark.parametrize(
    "item",
    [
        "train.steps=" + "9" * 21,
        "train.steps=1e30",
        "train.steps=-" + "9" * 40,
        "optimizer.learning_rate=1" + "0" * 400,
        "train.steps=" + "9" * 5000,
        "model.channel_mult=(1," + "9" * 21 + ")",
        "train.steps=" + "(" * 10_000,
        "train.steps=" + "-" * 100_000 + "1",
    ],
)
def test_numbers_without_bounds_are_refused_by_their_field(item):
    with pytest.raises(ConfigError) as caught:
        override(Config(), item)
    assert len(str(caught.value)) < 200 and item.partition("=")[0] in str(caught.value)


# ---------------------------------------------------------------------------------------------- paths


def test_a_path_may_have_a_colon(tmp_path):
    folder = tmp_path / "12:30"
    folder.mkdir()
    plain, several = folder / "mine.py", folder / "table:2.py"
    plain.write_text(
        "from ddpm_jax.config import Config\ndef get_config(): return Config(seed=5)\n"
    )
    several.write_text(
        "from ddpm_jax.config import Config\nVARIANTS = ('a', 'b')\n"
        "def get_config(variant): return Config(seed=ord(variant))\n"
    )
    assert load_config(plain).seed == 5
    assert load_config(f"{several}:b").seed == ord("b")
    with pytest.raises(ConfigError, match=":VARIANT, one of a, b"):
        load_config(several)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(folder / "other:b")


def test_home_is_written_as_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"")
    assert scan("~/images").images == [tmp_path / "images" / "1.png"]
    assert parsed("--mask=~/m.png", "--images", "~/a.png").mask == tmp_path / "m.png"


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x.png", Path("/proc/nothing/x.png")):
        with pytest.raises(UserError, match=f"output={output} cannot be written .*: name another"):
            parsed(f"--output={output}")
    parsed(f"--output={tmp_path / 'new' / 'folder' / 'x.png'}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "y.png").mkdir()
    with pytest.raises(ConfigError, match="a folder has this name"):
        sample.check_flags(parsed(f"--output={tmp_path / 'y.png'}"))


@pytest.mark.parametrize(
    "command, words",
    [
        (benchmark, "--config=digits"),
        (code_images, "--workdir=x --mode=encode"),
        (compare_with_diffusers, "--config=digits --workdir=x"),
        (compile_ahead, "--config=digits --target=h100"),
        (evaluate, "--workdir=x"),
        (plot_metrics, "--workdir=x"),
        (reproduce, "--ledger"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_in_the_place_of_the_output_is_known_before_the_work(command, words, tmp_path):
    with pytest.raises(UserError, match=f"output={tmp_path} cannot be written .is a folder, not"):
        command.parser().parse_args([*words.split(), f"--output={tmp_path}"])


def test_an_output_that_may_be_a_folder_may_be_there(tmp_path):
    assert parsed(f"--output={tmp_path}").output == tmp_path
    with pytest.raises(UserError, match=f"workdir={tmp_path / 'none'}"):
        export_weights.main(
            [f"--workdir={tmp_path / 'none'}", "--layout=pesser", f"--output={tmp_path}"]
        )


def test_letters_that_are_not_known_here(tmp_path):
    """In a path for the checkpoint library, and in what is printed."""
    check_path(tmp_path / "naïve")
    with pytest.raises(UserError, match="set PYTHONUTF8=1 or LANG=C.UTF-8") as caught:
        check_path(Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve")))
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    print(caught.value, "é", file=Lenient(stream))
    print("still there", file=Lenient(stream), flush=True)
    written = stream.buffer.getvalue().decode("ascii")
    assert "/na\\udcefve: " in written and "\\xe9\nstill there\n" in written


def test_a_mask_that_is_a_pipe_or_a_bomb(tmp_path):
    os.mkfifo(tmp_path / "m.png")
    with pytest.raises(ImageError, match="is a pipe or a device"):
        load_png(tmp_path / "m.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_png(tmp_path)


# ------------------------------------------------------------------------------------ before the work


def test_a_film_of_too_short_frames_is_refused_at_once(tmp_path):
    film = [f"--output={tmp_path / 'x.gif'}", "--mode=denoising"]
    with pytest.raises(ConfigError, match="--milliseconds=5: must be at least 20"):
        sample.check_flags(parsed(*film, "--milliseconds=5"))
    sample.check_flags(parsed(*film, "--milliseconds=20"))


def test_a_picture_that_memory_would_not_hold_is_refused():
    with pytest.raises(ImageError, match="a picture of .* pixels is more than"):
        check_picture(64 * (32 * 9000) ** 2)
    image = jax.numpy.zeros((1, 32, 32, 3), "uint8")
    with pytest.raises(ImageError, match="a smaller scale or fewer images"):
        grid(image, scale=9000)


@pytest.mark.parametrize(
    ("metric", "count"), [("kid", 39), ("is", 19), ("prdc", 5), ("fid", 1), ("sfid", 1)]
)
def test_too_few_images_for_a_metric_are_known_before_they_are_drawn(metric, count):
    with pytest.raises(EvaluationError, match=f"{count} images; at least {count + 1} are needed"):
        EvaluationOptions(metrics=(metric,), workdir=Path("x"), num_images=count)
    EvaluationOptions(metrics=(metric,), workdir=Path("x"), num_images=count + 1)
    if metric != "is":
        with pytest.raises(EvaluationError, match="at least"):
            EvaluationOptions(metrics=(metric,), workdir=Path("x"), reference_images=count)


def test_words_of_flags_are_those_of_the_command(monkeypatch):
    monkeypatch.setattr(flags, "NAMES", {"output"})
    assert run.with_dashes("output=x cannot be written") == "--output=x cannot be written"
