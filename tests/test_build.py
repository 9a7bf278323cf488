"""What is built of a config has the config's own values, each of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from ddpm_jax.build import (
    abstract_params,
    build_model,
    build_objective,
    build_process,
    denoiser,
    image_shape,
    init_params,
)
from ddpm_jax.config import validate
from ddpm_jax.network.adapt import Network
from tests.support.tiny import tiny_config


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("prediction, variance", [("v", "fixed_small"), ("x0", "learned_range")])
def test_the_process_is_that_of_the_config(rescale: bool, prediction: str, variance: str) -> None:
    config = tiny_config()
    config.loss.kind = "hybrid" if variance == "learned_range" else "simple"
    fields = {"timesteps": 40, "beta_start": 2e-4, "beta_end": 0.01, "rescale_betas": rescale}
    config.diffusion = dataclasses.replace(
        config.diffusion, prediction=prediction, variance=variance, **fields
    )
    process = build_process(validate(config))
    assert (process.prediction, process.variance) == (prediction, variance)
    factor = 25 if rescale else 1
    expected = np.linspace(2e-4 * factor, 0.01 * factor, 40)
    np.testing.assert_allclose(process.schedule.betas, expected, rtol=1e-12)
    assert build_model(config).out_channels == (2 if variance == "learned_range" else 1)


def test_the_schedule_is_that_of_the_config() -> None:
    config = tiny_config(diffusion={"schedule": "const", "beta_end": 0.07})
    np.testing.assert_array_equal(build_process(config).schedule.betas, np.full(20, 0.07))


def test_the_end_of_the_schedule_is_that_of_the_config() -> None:
    config = tiny_config(diffusion={"zero_terminal_snr": True, "prediction": "v"})
    assert build_process(config).schedule.alphas_cumprod[-1] == 0


def test_the_objective_is_that_of_the_config() -> None:
    fields = {"kind": "hybrid", "vlb_weight": 0.25, "weighting": "p2"}
    fields |= {"min_snr_gamma": 3.0, "p2_gamma": 0.5, "p2_k": 2.0}
    config = tiny_config(loss=fields, diffusion={"variance": "learned_range"})
    assert dataclasses.asdict(build_objective(config)) == fields


def test_parameters_start_by_the_seed() -> None:
    config = tiny_config(model={"attention_in_mid": False})
    first, again, other = (
        jax.tree.leaves(init_params(dataclasses.replace(config, seed=seed))) for seed in (3, 3, 4)
    )
    for one, same in zip(first, again):
        np.testing.assert_array_equal(one, same)
    kernels = [(one, new) for one, new in zip(first, other) if one.ndim > 1]
    assert all(np.abs(one - new).max() > 0 for one, new in kernels)
    assert jax.tree.map(lambda x: x.shape, first) == [
        x.shape for x in jax.tree.leaves(abstract_params(config))
    ]


def test_a_network_with_classes_is_told_where_there_is_none() -> None:
    """By the number of classes, as in training, where a label that was dropped is that number."""
    config = tiny_config(model={"num_classes": 3, "label_dropout": 0.5})

    def apply(params, x_t, t, labels, dropout):
        return x_t + labels[:, None, None, None]

    bind = denoiser(config, Network(lambda key: {}, apply))
    x, t = np.zeros((2, 8, 8, 1), np.float32), np.array([4, 7])
    for labels, seen in ((None, [3, 3]), (np.array([0, 2]), [0, 2])):
        np.testing.assert_array_equal(bind({}, labels)(x, t)[:, 0, 0, 0], seen)


def test_images_have_the_shape_of_the_config() -> None:
    config = tiny_config(data={"image_size": 16, "channels": 3})
    assert image_shape(config) == (16, 16, 3)
