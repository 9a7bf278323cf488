"""The two sides of scripts/compare_with_diffusers.py start alike and go down the same slope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_jax.benchmark.theirs import initialise
from ddpm_jax.build import Params, denoiser, init_params
from ddpm_jax.config import Config, load_config
from ddpm_jax.weights.layout import read_params
from ddpm_jax.weights.layouts.diffusers_config import layout_of, network_config

pytestmark = pytest.mark.interop
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(CONFIGS / "digits.py")


def network_of(config: Config) -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel.from_config(network_config(config))
    initialise(network)
    return network


def in_our_names(config: Config, tensors: dict[str, torch.Tensor]) -> Params:
    """Parameters, or their gradients, which are laid out alike."""
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in tensors.items()}
    return read_params(layout_of(network_config(config)), config, arrays, "diffusers")


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_both_sides_start_from_the_same_distribution(config):
    ours, theirs = (
        by_path(init_params(config)),
        by_path(in_our_names(config, network_of(config).state_dict())),
    )
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert np.isclose(values.std(), theirs[name].std(), rtol=0.12), name
        assert np.isclose(values.mean(), theirs[name].mean(), atol=0.01), name


def test_gradients_of_the_loss_are_those_of_pytorch(config):
    """Of every parameter, where the last layers are no longer near 0 and let all of them through."""
    network = network_of(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    rng, count = np.random.default_rng(0), 16
    shape = (count, config.data.image_size, config.data.image_size, config.data.channels)
    (x, eps), t = (
        rng.standard_normal((2, *shape)).astype(np.float32),
        rng.integers(0, config.diffusion.timesteps, count),
    )
    channels_first = [torch.from_numpy(np.moveaxis(values, -1, 1).copy()) for values in (x, eps)]
    loss = torch.nn.functional.mse_loss(
        network(channels_first[0], torch.from_numpy(t)).sample, channels_first[1]
    )
    loss.backward()
    named = dict(network.named_parameters())
    params = in_our_names(config, named)
    theirs = by_path(
        in_our_names(config, {name: parameter.grad for name, parameter in named.items()})
    )
    bind = denoiser(config)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda params: jnp.mean((bind(params, None)(x, t) - eps) ** 2))
    )(params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in theirs.values()))
    for name, leaf in by_path(gradient).items():
        if name.endswith(
            "['k']['bias']"
        ):  # shifts every logit of a query alike: softmax does not see it
            assert np.linalg.norm(leaf) < 1e-6 * whole
        else:
            assert np.linalg.norm(leaf - theirs[name]) < 1e-4 * np.linalg.norm(theirs[name]), name
