"""Name the errors that the user can mend, each in one line with the thing and the remedy.

Commands end on them with code 1.
"""

from __future__ import annotations


class UserError(ValueError):
    """Base of all errors that the user can mend; anything else that escapes is a fault of the code.

    Attributes:
      step: of the checkpoint from which the same command goes on, where that is the remedy.
    """

    step: int | None = None


class CodingError(UserError):
    """A coded file that cannot be read, or data that cannot be coded."""


class WorkdirError(UserError):
    """A run directory that cannot be used as asked."""


class ConfigError(UserError):
    """A config that cannot be run; the message names the field and what it accepts."""


class DataError(UserError):
    """Data that cannot be used; the message names the set, file or record and the remedy."""

    def __init__(self, message: str) -> None:
        # One line, whatever a library said.
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class BadImages(DataError):
    """Images of a set that cannot be used, of all its splits.

    Attributes:
      reasons: what is wrong with each, in a line that names it.
      count: how many images were tried.
    """

    SHOWN = 20

    def __init__(self, reasons: list[str], count: int) -> None:
        self.reasons, self.count = reasons, count
        if len(reasons) == 1:
            super().__init__(reasons[0])
            return
        more = len(reasons) - self.SHOWN
        lines = "; ".join(reasons[: self.SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
        super().__init__(
            f"{len(reasons):,} of {count:,} images cannot be used, which skip_bad=true leaves out: "
            f"{lines}"
        )


class EvaluationError(UserError):
    """A number that cannot be had, or would mean nothing."""


class HostError(UserError):
    """Hosts that cannot be found, or do not agree."""


class LedgerError(UserError):
    """A ledger that cannot be read, or a row that it does not have."""


class ShardError(UserError):
    """A place that holds other samples, or damaged ones."""


class TopologyError(UserError):
    """A slice that nothing can be compiled for; the message says what to name or to install."""


class WeightsError(UserError):
    """A file that cannot be read as asked, or a network that a layout cannot express."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
