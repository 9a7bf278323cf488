"""The commands, as modules."""

from __future__ import annotations

import importlib
from types import ModuleType


def command_module(name: str) -> ModuleType:
    return importlib.import_module(f"ddpm_jax.cli.{name}")
