"""Flags and options at their edges: the last value that is taken, the first that is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ddpm_jax.cli import flags, sample, values
from ddpm_jax.coding.jobs import CodingOptions
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.options import EvaluationOptions

LAST_SEED = 2**32 - 1


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        (["--seed=0"], ["--seed=-1"]),
        ([f"--seed={LAST_SEED}"], [f"--seed={LAST_SEED + 1}"]),
        (["--num_images=1"], ["--num_images=0"]),
        (["--batch_size=1"], ["--batch_size=0"]),
        (["--scale=1"], ["--scale=0"]),
        (["--points=2"], ["--points=1"]),
        (["--first=0"], ["--first=-1"]),
        # The last number of a sample is 2^32 - 1.
        (["--num_images=5", f"--first={2**32 - 5}"], ["--num_images=5", f"--first={2**32 - 4}"]),
        (["--guidance=1"], ["--guidance=1.5"]),
        (["--guidance=1.5", "--label=0"], ["--guidance=0"]),
        (["--hole=1,2,3,4"], ["--hole=1,2,3,4,5"]),
    ],
)
def test_flags_of_sample_end_where_they_say(accepted: list[str], refused: list[str]) -> None:
    def check(items: list[str]) -> None:
        parser = sample.parser()
        sample.check_flags(parser.parse_args(["--workdir=x", "--output=x.png", *items]))

    check(accepted)
    with pytest.raises(UserError):
        check(refused)


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"seed": LAST_SEED}, {"seed": LAST_SEED + 1}),
        ({"seed": 0}, {"seed": -1}),
        ({"seeds": (0, LAST_SEED)}, {"seeds": (0, LAST_SEED + 1)}),
        ({"num_images": 1}, {"num_images": 0}),
        ({"batch_size": 1}, {"batch_size": 0}),
        ({"reference_images": 1}, {"reference_images": 0}),
    ],
)
def test_options_of_an_evaluation_end_where_they_say(accepted: dict, refused: dict) -> None:
    EvaluationOptions(("nll",), workdir=Path("x"), **accepted)
    with pytest.raises(UserError):
        EvaluationOptions(("nll",), workdir=Path("x"), **refused)


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"seed": LAST_SEED}, {"seed": LAST_SEED + 1}),
        ({"num_images": 1}, {"num_images": 0}),
        ({"rate": 0.0}, {"rate": -1e-9}),
    ],
)
def test_options_of_coding_end_where_they_say(accepted: dict, refused: dict) -> None:
    files = {"mode": "decode", "input": Path("x"), "output": Path("x.npz")}
    CodingOptions(**files, **accepted)
    with pytest.raises(UserError):
        CodingOptions(**files, **refused)


@pytest.mark.parametrize("name", ["host_timeout", "start_timeout"])
def test_hosts_wait_for_a_second_at_least(name: str) -> None:
    parser = argparse.ArgumentParser()
    flags.add_hosts(parser)
    flags.join_hosts(parser.parse_args([f"--{name}=1"]))
    with pytest.raises(UserError, match=f"{name}=0: at least 1 second"):
        flags.join_hosts(parser.parse_args([f"--{name}=0"]))


@pytest.mark.parametrize("text", ["0", "12", "best"])
def test_a_step_is_a_number_or_best(text: str) -> None:
    assert values.step(text) == (text if text == "best" else int(text))


@pytest.mark.parametrize("text", ["-1", "1.5", "", "newest", "1" * 19])
def test_nothing_else_is_a_step(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.step(text)
