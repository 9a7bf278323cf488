"""Name the classes of a set: the folders of one's own images, or what their publishers say.

Class 0 is the first name. Folders are sorted by their names, as torchvision's ImageFolder does,
but numbers by their value: 0, 1, 2, 10.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.originals.formats import CIFAR10_LABELS, FASHION_LABELS
from ddpm_jax.errors import ConfigError, check
from ddpm_jax.files import MOST_DIGITS

Labels = int | str | Sequence[int | str] | np.ndarray | None

PUBLISHED = {"cifar10": CIFAR10_LABELS, "fashion_mnist": FASHION_LABELS}


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names of folders as classes: by value if all are numbers, else as text."""
    names = list(names)
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numbers else None))


def some_of(names: Sequence[str], most: int = 12) -> str:
    """Write names for a message, the first of many."""
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown}, and {len(names) - most:,} more" if len(names) > most else shown


def names_of_run(origin: Mapping[str, Any], name: str, count: int) -> tuple[str, ...]:
    """Return the names of a run's classes, of which the network has `count`; () if unknown.

    Args:
      origin: what the run remembers of its data.
      name: of its data set.
    """
    names = tuple(origin.get("classes", ()))
    if names:
        return names if len(names) <= count else ()
    # Images from Python have classes of their own, whatever set the config names.
    from_python = "train" in origin and "data_dir" not in origin
    published = () if from_python else PUBLISHED.get(name, ())
    return published if len(published) == count else ()


def numbers_of(labels: Sequence[int | str], names: Sequence[str], count: int) -> list[int]:
    """Return the numbers of the classes that `labels` name.

    A number stands for itself, unless numbers are what the classes are called. Names are matched
    as they are written, or else without regard to case.

    Args:
      labels: names or numbers.
      names: of the classes, in their order; () where they are not known.
      count: of the classes.

    Raises:
      ConfigError: no such class, or no classes.
    """
    numbered = any(name.isdecimal() for name in names)
    by_name = {name: number for number, name in enumerate(names)}
    folded = [name.casefold() for name in names]

    def number_of(label: int | str) -> int:
        text = str(label)
        if count == 0:
            raise ConfigError(f"label={text}: this run has no classes")
        if text in by_name:
            return by_name[text]
        if folded.count(text.casefold()) == 1:
            return folded.index(text.casefold())
        if text.isdecimal() and not numbered:
            if len(text) <= MOST_DIGITS and int(text) < count:
                return int(text)
            raise ConfigError(f"label={text}: must be in 0..{count - 1}{_or_one_of(text, names)}")
        if names:
            raise ConfigError(f"label={text}: no such class{_or_one_of(text, names)}")
        raise ConfigError(
            f"label={text}: the names of this run's classes are not known: a number in "
            f"0..{count - 1}"
        )

    return [number_of(label) for label in labels]


def classes_of(labels: Labels, names: Sequence[str], count: int) -> np.ndarray:
    """Return the classes [n] that a caller from Python names, one or several, by number or name.

    Args:
      names, count: as in `numbers_of`; a number that is no text always stands for itself.

    Raises:
      ConfigError: no such class, or no classes.
    """
    check(count > 0, "labels: this network has no classes")
    try:
        given = np.atleast_1d(labels)
    except ValueError:  # lists of several lengths
        given = np.empty(0)
    if given.ndim == 1 and given.dtype.kind == "U":
        given = np.asarray(numbers_of(given.tolist(), names, count))
    whole = given.ndim == 1 and len(given) > 0 and given.dtype.kind in "iu"
    fits = whole and bool(np.all((0 <= given) & (given < count)))
    check(fits, f"labels={labels}: must be in 0..{count - 1}")
    return given


def _or_one_of(text: str, names: Sequence[str]) -> str:
    """Return "; there are cat, dog", the nearest name first, or "" where there are none."""
    near = sorted(
        names,
        key=lambda name: difflib.SequenceMatcher(None, name.casefold(), text.casefold()).ratio(),
        reverse=True,
    )
    return f"; there are {some_of(near)}" if near else ""
