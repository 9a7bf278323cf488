"""The Python of README.md and docs/ runs, and README's map is the package."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import ddpm_jax as ddpm
from ddpm_jax.config import load_config
from tests.support.layers import LAYERS, ROOT, layer_map

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A training of README is this one here.
SMALL = {"steps": 2, "batch_size": 8, "eval_images": 0}
NETWORK = {"base_channels": 8, "channel_mult": (1,), "attention_resolutions": ()}
# What takes a trained run and hours is called with its arguments checked, and does nothing.
LONG = {"docs/evaluation.md": [("ddpm_jax.evaluation.jobs", "evaluate")]}


def small_config(name: str, overrides: Sequence[str] = ()) -> ddpm.Config:
    """The config that was asked for, with a training and a network that take seconds."""
    fields = [f"train.{key}={value}" for key, value in SMALL.items()]
    fields += [f"model.{key}={value}" for key, value in NETWORK.items()]
    return load_config(name, [*overrides, *fields])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def with_python() -> list:
    """Return the pages that have Python code; that of README trains, which takes long."""
    names = [str(page.relative_to(ROOT)) for page in PAGES if blocks(page)]
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name == "README.md" else name for name in names]


@pytest.mark.parametrize("name", with_python())
def test_python_of_a_page_runs(name, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, in an empty folder."""
    called = []
    for module, function in LONG.get(name, []):
        monkeypatch.setattr(importlib.import_module(module), function, called.append)
    monkeypatch.setattr(ddpm, "load_config", small_config)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(ROOT / name):
        exec(compile(block, name, "exec"), names)
    assert len(called) == len(LONG.get(name, []))
    if name == "README.md":
        assert names["images"].shape == (16, 8, 8, 1) and names["loss"].shape == (8,)
        assert abs(names["again"].astype(int) - names["test"]).mean() < 8  # of 255 levels
        assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "runs"}


def test_the_map_is_the_package():
    assert f"```\n{layer_map()}\n```" in (ROOT / "README.md").read_text(), (
        "python -m tests.support.layers prints the map"
    )
    assert all(len(line) <= 128 for line in layer_map().splitlines())
    assert len(layer_map().splitlines()) == sum(map(len, LAYERS))


def test_links_within_the_repository_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            place = page.parent / target
            assert place.exists(), f"{page.relative_to(ROOT)} links to {target}"
