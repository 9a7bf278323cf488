"""What can be wrong with a file of weights, in one line that names the file and the remedy."""

from __future__ import annotations

from ddpm_jax.errors import UserError


class WeightsError(UserError):
    """A file that cannot be read as asked, or a network that a layout cannot express."""
