"""What the user can mend: each message is one line that names the thing and the remedy, and scripts end on it with code 1."""

from __future__ import annotations


class UserError(ValueError):
    """Base of ConfigError, DataError and WorkdirError; anything else that escapes is a fault of the code.

    Attributes:
      step: of the checkpoint that the same command goes on from with --step, where that is the remedy.
    """

    step: int | None = None
