"""The site builds without a warning, its links lead somewhere, and every page is in its menu."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import pytest

import ddpm_jax as ddpm
from ddpm_jax.config import Config, override
from tests.support.layers import ROOT

TOOLS = ("mkdocs", "material", "mkdocstrings", "latex2mathml")


def test_every_page_of_docs_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in menu, page.name


def test_fields_that_pages_set_are_there_and_take_these_values():
    """Such as `loss.kind=simple`, with --config. before it or not; N stands for any number."""
    sections = "|".join(field.name for field in dataclasses.fields(Config) if field.name != "seed")
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for span in re.findall(r"`([^`\n]+)`", page.read_text()):
            if match := re.fullmatch(rf"(?:--config\.)?((?:{sections})\.\w+=\S*[^N\s])", span):
                override(Config(), match[1])
                found += 1
    assert found > 20


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in TOOLS):
        pytest.skip("needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    face = (tmp_path / "api" / "index.html").read_text()
    assert all(f"ddpm.{name}<" in face for name in ddpm.__all__)
    walk = (tmp_path / "notebooks" / "walkthrough" / "index.html").read_text()
    assert "<math" in walk and "$$" not in walk and "data:image/png" in walk
