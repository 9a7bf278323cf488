"""What an evaluation raises."""

from __future__ import annotations

from ddpm_jax.errors import UserError


class EvaluationError(UserError):
    """A number that cannot be had, or would mean nothing."""
