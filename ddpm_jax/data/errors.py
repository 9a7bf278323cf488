"""The one exception of the data layer."""

from __future__ import annotations

from ddpm_jax.errors import UserError


class DataError(UserError):
    """Data that cannot be used; the message names the set, file or record and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # one line, whatever a library said
