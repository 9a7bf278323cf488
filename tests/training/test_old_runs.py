"""A run directory of November 2026, made before the modules moved, is still a run directory."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.config import override
from ddpm_jax.images import to_uint8
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.workdir import load_workdir_config
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.trained import open_trained
from ddpm_jax.training.loop import train

FIXTURES = Path(__file__).parents[1] / "support" / "fixtures"
EXPECTED = json.loads((FIXTURES / "run_of_2026_11.json").read_text())


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The run at its step 4: classes, dropout, flips, importance sampling, two averages."""
    with tarfile.open(FIXTURES / "run_of_2026_11.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_samples_the_pixels_it_sampled_then(workdir):
    one = Devices(jax.devices()[:1])
    trained = open_trained(workdir, one)
    assert (trained.step, trained.weights) == (4, "ema 0.9")
    generator = build_generator(trained.config, one, batch_size=4)
    numbers = np.arange(4)
    samples = to_uint8(generator.draw(trained.params, seed=0, indices=numbers, labels=numbers))
    levels = np.array(EXPECTED["samples"]).reshape(samples.shape)
    # Processors round differently: a level may fall to the other side, and no more.
    assert np.abs(samples.astype(int) - levels).max() <= 1 and (samples == levels).mean() > 0.9


@pytest.mark.slow
def test_it_resumes_where_it_was(workdir, tmp_path):
    config = load_workdir_config(workdir)
    override(config, "train.steps=12")
    assert train(config, workdir, data_dir=tmp_path, devices=Devices(jax.devices()[:1])) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > 4]
    for name in ("loss", "parameter_norm", "held_out_loss"):
        values = [row[name] for row in rows if name in row]
        np.testing.assert_allclose(values, EXPECTED[name], rtol=2e-5, err_msg=name)
