"""Two hosts open a network that ships, which neither has opened before."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ddpm_jax.images import load_png
from tests.support.hosts import end, start
from tests.support.processes import ROOT, finish, script


@pytest.mark.multiprocess
def test_two_hosts_unpack_a_network_once_and_sample_what_one_does(tmp_path):
    flags = ["--pretrained=digits", "--num_images=8", "--sampler=ddim", "--steps=2"]
    own = ([f"--output={tmp_path / 'two.png'}"],) * 2
    runs = ROOT / "runs" / "pretrained"
    aside = None
    if (runs / "digits").exists():  # of whoever uses this checkout
        aside = tmp_path / "digits"
        (runs / "digits").rename(aside)
    try:
        ended = end(start("sample.py", *flags, own=own))
        assert [code for code, _, _ in ended] == [0, 0], [said[-2000:] for _, _, said in ended]
        assert not list(runs.glob("digits.part-*"))
        code, _, errors = finish(script("sample.py", *flags, f"--output={tmp_path / 'one.png'}"))
        assert code == 0, errors
    finally:
        if aside is not None:
            shutil.rmtree(runs / "digits", ignore_errors=True)
            aside.rename(runs / "digits")
    two, one = load_png(tmp_path / "two.png").astype(int), load_png(tmp_path / "one.png")
    assert np.abs(two - one).max() <= 1
