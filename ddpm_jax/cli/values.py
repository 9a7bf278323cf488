"""Read the values of flags; what does not serve is an ArgumentTypeError, which names the flag."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Literal

from ddpm_jax.files import MOST_DIGITS

TRUTH = {None: None, "true": True, "false": False}  # None: the flag was not given


def path(text: str) -> Path:
    """Return the path that a flag names, with ~ for the home folder.

    Shells leave --workdir=~/runs as it is. An empty path would be the current folder, which nobody
    means by it.
    """
    if not text:
        raise argparse.ArgumentTypeError("name a file or folder")
    return Path(os.path.expanduser(text))


def whole(text: str) -> int:
    """Return the whole number that a flag names, one that 64 bits hold."""
    if len(text.strip()) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"{text[:MOST_DIGITS]}...: a whole number of at most {MOST_DIGITS} digits"
        )
    return int(text)


def real(text: str) -> float:
    """Return the number that a flag names, neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be finite")
    return value


def step(text: str) -> int | Literal["best"]:
    """Return the checkpoint that a flag names: its number, or "best", of lowest held-out loss."""
    if text == "best":
        return "best"
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no step: a whole number, 0 or more, or best")
    return int(text)


def numbers(text: str) -> list[int]:
    """Return the whole numbers that a flag lists with commas between."""
    return [whole(item) for item in text.split(",")]


def labels(text: str) -> list[str]:
    """Return the classes that a flag lists with commas between, by number or name."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers or names of classes, commas between")
    return items


def sides(text: str) -> tuple[int, int]:
    """Return the height and the width that a flag names, as "32" for a square or as "32,64"."""
    values = numbers(text)
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r}: one side, or HEIGHT,WIDTH")
    return values[0], values[-1]
