"""Train networks of one's own, without a line of ours changed: linen, nnx, a pair of functions.

    python examples/own_network.py runs/own        # three small networks on the 8x8 digits

Step, averages, checkpoints, samplers and the bound are the library's. A run goes on from its last
checkpoint when it is started again with the same network.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import ddpm_jax as ddpm


def time_features(t, width=32):
    """Sinusoids of t / 1000, [b] -> [b, width]."""
    angles = jnp.outer(t / 1000, jnp.pi * 2.0 ** jnp.arange(width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Linen(nn.Module):
    """Two convolutions with the time added in between."""

    @nn.compact
    def __call__(self, x_t, t):
        h = nn.Conv(32, (3, 3))(x_t) + nn.Dense(32)(time_features(t))[:, None, None, :]
        return nn.Conv(x_t.shape[-1], (3, 3))(nn.silu(nn.GroupNorm(8)(h)))


class Nnx(nnx.Module):
    """A perceptron of the pixels and the time, with dropout."""

    def __init__(self, pixels, rngs):
        self.inner = nnx.Linear(pixels + 32, 256, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(256, pixels, rngs=rngs)

    def __call__(self, x_t, t):
        inputs = jnp.concatenate([x_t.reshape(len(x_t), -1), time_features(t)], axis=-1)
        return self.outer(self.dropout(nnx.silu(self.inner(inputs)))).reshape(x_t.shape)


def init(key):
    """Start a linear map of the pixels, [64, 64], at zero."""
    del key
    return {"kernel": jnp.zeros((64, 64))}


def apply(params, x_t, t, labels, dropout):
    """Predict eps as a linear function of x_t, the same at all times."""
    return (x_t.reshape(-1, 64) @ params["kernel"]).reshape(x_t.shape)


ddpm.tune_cpu()  # before JAX runs anything
networks = {
    "linen": Linen(),
    "nnx": Nnx(64, nnx.Rngs(0)),
    "functions": ddpm.Network(init, apply),  # or a network of Equinox, Haiku, NumPyro, ...
}
folder, *overrides = sys.argv[1:]
config = ddpm.load_config("digits", ["train.steps=600", *overrides])
for name, network in networks.items():
    model = ddpm.train(config, f"{folder}/{name}", network=network)
    images = model.sample(64, sampler="ddim", steps=50)
    ddpm.save_png(f"{folder}/{name}.png", ddpm.grid(images, scale=8))
    test = ddpm.load_source(config.data, "data", "test").read(range(64))["image"]
    bits = model.bits_per_dim(test, num_timesteps=20)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{name}: {size:,} parameters, {bits:.2f} bits/dim")
