"""Say what a single field accepts: rules that stand in its annotation, applied by `check_fields`.

    learning_rate: Annotated[float, Positive()] = 2e-4

What several fields must satisfy together stands in checking.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ddpm_jax.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A condition on a value, and the words that say what is accepted."""

    holds: Callable[[Any], bool]
    accepts: str


class AtLeast(Rule):
    """Numbers from `least` on; `meaning` says what a special one stands for."""

    def __init__(self, least: int, meaning: str = "") -> None:
        words = f"must be at least {least}" + (f" ({meaning})" if meaning else "")
        super().__init__(lambda value: value >= least, words)


class Positive(Rule):
    """Numbers above 0."""

    def __init__(self) -> None:
        super().__init__(lambda value: value > 0, "must be positive")


class In(Rule):
    """Numbers of an interval written as in mathematics, such as "[0, 1)"."""

    def __init__(self, interval: str) -> None:
        low, high = map(float, interval[1:-1].split(","))
        above = float.__ge__ if interval[0] == "[" else float.__gt__
        below = float.__le__ if interval[-1] == "]" else float.__lt__
        super().__init__(
            lambda value: above(float(value), low) and below(float(value), high),
            f"must be in {interval}",
        )


# Arrays and loops count in int32; the seed alone has a rule of its own.
INT32 = Rule(lambda value: type(value) is not int or value < 2**31, "must be below 2^31")


def check_fields(config: Any) -> None:
    """Check each field of nested dataclasses by the rules in its annotation, in their order.

    Raises:
      ConfigError: naming the first field at fault and what it accepts.
    """
    for path, value, rules in _fields(config):
        check_value(value, rules, f"config.{path}")


def check_name(holder: Any, name: str, what: str) -> None:
    """Check that the dataclass `holder`, which messages call `what`, has a field of this name.

    Raises:
      ConfigError: it has none, with the nearest name that it has.
    """
    known = [field.name for field in dataclasses.fields(holder)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise ConfigError(f"{what} has no field {short(name)!r}: {hint}")


def check_value(value: Any, rules: Iterable[Rule], name: str) -> None:
    """Raise ConfigError, naming what is accepted, unless all `rules` hold for the value `name`."""
    for rule in rules:
        if not rule.holds(value):
            raise ConfigError(f"{name}={value}: {rule.accepts}")


def short(value: Any) -> str:
    """Write a value of any size for a message."""
    text = "a number too long to write" if isinstance(value, int) and abs(value) >= 2**63 else ""
    text = text or str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _fields(holder: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Rule, ...]]]:
    hints = typing.get_type_hints(type(holder), include_extras=True)
    for field in dataclasses.fields(holder):
        value, path = getattr(holder, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{path}.")
        else:
            rules = getattr(hints[field.name], "__metadata__", ())
            yield path, value, (INT32, *rules) if prefix else rules
