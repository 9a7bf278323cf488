"""These tests compare with PyTorch. They are not even imported unless asked for: `pytest -m interop`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

AVAILABLE = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = (
        "interop" in (config.option.markexpr or "interop")
        and "not interop" not in config.option.markexpr
    )
    return True if not (wanted and AVAILABLE) and collection_path.suffix == ".py" else None
