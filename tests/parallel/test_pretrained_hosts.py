"""Two hosts open a network that ships, which neither has opened before."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_jax.images import load_png
from tests.support.commands import command_module


@pytest.mark.multiprocess
def test_two_hosts_unpack_a_network_once_and_sample_what_one_does(pair, tmp_path, monkeypatch):
    """In a folder of its own, whose runs/ is not there yet."""
    flags = ["--pretrained=digits", "--num_images=8", "--sampler=ddim", "--steps=2"]
    own = ([f"--output={tmp_path / 'two.png'}"],) * 2
    pair.run_both("sample.py", *flags, own=own, at=(tmp_path, tmp_path))
    runs = tmp_path / "runs" / "pretrained"
    assert (runs / "digits").is_dir() and not list(runs.glob("digits.part-*"))
    monkeypatch.chdir(tmp_path)
    command_module("sample").main([*flags, f"--output={tmp_path / 'one.png'}"])  # here
    two, one = load_png(tmp_path / "two.png").astype(int), load_png(tmp_path / "one.png")
    assert np.abs(two - one).max() <= 1
