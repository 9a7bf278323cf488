"""Read the fields of a JSON config that others wrote, each in the type that it must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax.config.checking import short
from ddpm_jax.config.reading import accept, typed
from ddpm_jax.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object. What is absent has the default of the class that wrote it.

    Attributes:
      path: of the file, for messages.
      values: the object.
    """

    path: Path
    values: Mapping[str, Any]

    def like(self, ours: str, name: str, default: Any) -> Any:
        """Return a field that stands for one of our config.

        Args:
          ours: "section.field", whose type and rules it must satisfy.
          name: what they call it.
          default: None accepts null as well, and stands for it.

        Raises:
          WeightsError: another type, or a value that the field of our config does not accept.
        """
        value = self.values.get(name, default)
        if value is None and default is None:
            return None
        try:
            return accept(value, ours, name)
        except ConfigError as error:
            raise self._refused(error, value) from error

    def all_of(self, kind: type, name: str, default: tuple[Any, ...]) -> list[Any]:
        """Return a field that lists values of one kind.

        Raises:
          WeightsError: it is empty or no list, or a value is of another kind.
        """
        value = self.values.get(name, default)
        if not isinstance(value, (list, tuple)) or not value:
            raise WeightsError(
                f"{self.path}: {name}={short(value)}: must be a list, one {kind.__name__} a level"
            )
        items = []
        for item in value:
            try:
                items.append(typed(item, kind, name))
            except ConfigError as error:
                raise self._refused(error, item) from error
        return items

    def choose(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """Return what `choices` has for the value of a field; null is its default.

        Raises:
          WeightsError: a value that is not among them.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise WeightsError(
                f"{self.path}: {name}={short(repr(value))} has no counterpart here "
                f"(only {', '.join(choices)})"
            )
        return choices[value]

    def only(self, name: str, *values: Any, default: Any = None) -> None:
        """Raise WeightsError unless a field has one of these values."""
        value = self.values.get(name, default)
        if value not in values:
            raise WeightsError(
                f"{self.path}: {name}={short(repr(value))} has no counterpart here "
                f"(only {' or '.join(map(repr, values))})"
            )

    def _refused(self, error: ConfigError, value: Any) -> WeightsError:
        """Return the error that names the file, and says of a string that it is one."""
        return WeightsError(
            f"{self.path}: {error}" + (", not a string" if isinstance(value, str) else "")
        )
