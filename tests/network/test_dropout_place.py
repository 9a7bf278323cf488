"""Where dropout stands in a residual block, at a rate that keeps some of what it meets."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import UNetConfig
from ddpm_jax.network.blocks import ResidualBlock

CONFIG = UNetConfig(base_channels=8, group_norm_groups=2, group_norm_epsilon=1e-3)
CHANNELS, RATE = 8, 0.25
# The last convolution mixes channels at each pixel: what stood before it is found by undoing that.
MIX = np.eye(CHANNELS) + np.roll(np.eye(CHANNELS), 1, axis=1) * 0.5


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normalise(x: np.ndarray, groups: int, epsilon: float) -> np.ndarray:
    """GroupNorm without scale and bias, in float64."""
    b, h, w, c = x.shape
    g = x.reshape(b, h, w, groups, c // groups)
    axes = (1, 2, 4)
    g = g - g.mean(axis=axes, keepdims=True)
    return (g / np.sqrt((g**2).mean(axis=axes, keepdims=True) + epsilon)).reshape(x.shape)


@pytest.mark.parametrize("conditioning", ["add", "scale_shift"])
def test_dropout_stands_between_silu_and_the_last_convolution(conditioning: str) -> None:
    """Each value there is 0 or silu(...) / (1 - rate); a quarter is 0, each image by its own mask."""
    config = dataclasses.replace(CONFIG, conditioning=conditioning)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 8, 8, CHANNELS)).astype(np.float32)
    condition, examples = np.zeros((4, 32), np.float32), jnp.arange(4) + 3
    block = ResidualBlock(config, CHANNELS, RATE)
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout"))}
    params = block.init(keys, x, condition, examples)["params"]
    middle = np.zeros((3, 3, CHANNELS, CHANNELS), np.float32)
    first, last = middle.copy(), middle.copy()
    first[1, 1], last[1, 1] = np.eye(CHANNELS), MIX
    params = params | {
        "conv1": {"kernel": first, "bias": np.zeros(CHANNELS, np.float32)},
        "conv2": {"kernel": last, "bias": np.zeros(CHANNELS, np.float32)},
    }
    output = block.apply(
        {"params": params}, x, condition, examples, rngs={"dropout": keys["dropout"]}
    )
    before = (np.asarray(output, np.float64) - x) @ np.linalg.inv(MIX)

    h = normalise(x.astype(np.float64), 2, 1e-3)
    h = normalise(h * sigmoid(h), 2, 1e-3)
    silu = h * sigmoid(h)
    gone = np.abs(before) < 1e-4
    np.testing.assert_allclose(before, np.where(gone, 0, silu / (1 - RATE)), atol=2e-4)
    large = np.abs(silu) > 1e-2  # where 0 is not what it was anyway
    assert abs(gone[large].mean() - RATE) < 0.06
    assert not np.array_equal(gone[0], gone[1])
