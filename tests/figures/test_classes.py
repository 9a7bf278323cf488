"""Classes under guidance, with the exact denoiser of Gaussian classes in place of a network."""

from __future__ import annotations

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.build import build_process
from ddpm_jax.cli import sample as sample_script
from ddpm_jax.config import to_dict
from ddpm_jax.errors import UserError
from ddpm_jax.figures.classes import classes
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.trained import Trained
from tests.support.tiny import tiny_config

CONFIG = tiny_config(
    data={"name": "digits", "image_size": 8, "channels": 1},
    model={"num_classes": 3, "label_dropout": 0.1},
    diffusion={"timesteps": 10, "beta_end": 0.5, "variance": "fixed_small"},
)
MEANS = np.array([-0.4, 0.1, 0.4, 0.05], np.float32)  # of the classes, and without one
STD = 0.1
ONE = Devices(jax.devices()[:1])
PARAMS = np.zeros(1, np.float32)


def gaussians(means: np.ndarray):
    """Return the exact denoiser of pixels N(means[label], STD^2)."""
    schedule = build_process(CONFIG).schedule

    def bind(params, labels):
        def denoise(x, t):
            signal, noise = (
                jnp.asarray(values, jnp.float32)[t][:, None, None, None]
                for values in (
                    schedule.sqrt_alphas_cumprod,
                    schedule.sqrt_one_minus_alphas_cumprod,
                )
            )
            mean = jnp.asarray(means)[labels][:, None, None, None]
            x0 = mean + STD**2 * signal / (STD**2 * signal**2 + noise**2) * (x - signal * mean)
            return (x - signal * x0) / noise

        return denoise

    return bind


def generator(means: np.ndarray, guidance: float = 1.0):
    with mock.patch(
        "ddpm_jax.sampling.generate.denoiser", lambda config, network=None: gaussians(means)
    ):
        return build_generator(CONFIG, ONE, batch_size=6, guidance=guidance)


def test_guidance_moves_each_class_away_from_the_rest():
    """An exact denoiser is affine in its mean, so that guided by s is exact for u + s (c - u)."""
    inputs = {"seed": 3, "first": 5, "labels": [2, 0, 1], "variants": 2}
    scales = [1.0, 2.0]
    panel = classes([generator(MEANS, scale) for scale in scales], PARAMS, **inputs)
    assert panel.shape == (3, 4, 8, 8, 1)
    for block, scale in enumerate(scales):
        means = MEANS[3] + np.float32(scale) * (MEANS - MEANS[3])
        drawn = generator(means).draw(
            PARAMS,
            seed=3,
            indices=np.array([5, 6] * 3),
            labels=np.array([2, 2, 0, 0, 1, 1]),
        )
        np.testing.assert_allclose(
            panel[:, 2 * block : 2 * block + 2].reshape(drawn.shape), drawn, atol=2e-5
        )
        at_rest = panel[:, 2 * block : 2 * block + 2].mean((1, 2, 3, 4))
        np.testing.assert_allclose(at_rest, means[[2, 0, 1]], atol=0.03)


def draw(monkeypatch, tmp_path, *flags: str, config=CONFIG) -> np.ndarray:
    trained = Trained(config, PARAMS, "ema", 1)
    monkeypatch.setattr(sample_script, "open_trained", lambda *args, **options: trained)
    monkeypatch.setattr(
        "ddpm_jax.sampling.generate.denoiser", lambda config, network=None: gaussians(MEANS)
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    output = tmp_path / "classes.png"
    place = [f"--workdir={tmp_path}", f"--output={output}", "--labels=false"]
    sample_script.main([*place, "--mode=classes", *flags])
    return np.asarray(Image.open(output))


def test_the_command_has_a_row_for_each_class(monkeypatch, tmp_path):
    picture = draw(monkeypatch, tmp_path, "--num_images=2", "--guidances=1,3.5")
    assert picture.shape[:2] == (10 * 3 - 2, 10 * 4 - 2)
    rows = [picture[10 * row : 10 * row + 8].mean() for row in range(3)]
    assert rows == sorted(rows)
    one = draw(monkeypatch, tmp_path, "--num_images=1", "--label=1", "--guidances=2")
    assert one.shape[:2] == (8, 8)


def test_what_cannot_be_drawn_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="mode=classes: this run has no classes"):
        draw(monkeypatch, tmp_path, config=tiny_config())
    always = tiny_config(model={"num_classes": 3})
    with pytest.raises(UserError, match="model.label_dropout=0"):
        draw(monkeypatch, tmp_path, config=always)
