"""Networks of one's own become two pure functions, and what cannot serve is named."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpm_jax.errors import ConfigError
from ddpm_jax.network.adapt import Dropout, Network, adapt, check_network

SHAPE = (4, 4, 1)
X = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
T = np.array([0, 5, 9], np.int32)
DROPOUT = Dropout(jax.random.key(7), jnp.arange(3))


class Linen(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, t, train=False):
        return nn.Dropout(self.rate, deterministic=not train)(nn.Dense(1)(x))


class Told(nn.Module):
    """One that has to be told whether it is trained."""

    @nn.compact
    def __call__(self, x, t, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(1)(x))


class TwoStreams(nnx.Module):
    """Noise from two random streams of its own: their difference."""

    def __init__(self, rngs):
        self.streams = nnx.List([nnx.Rngs(params=0).params, nnx.Rngs(params=0).params])

    def __call__(self, x, t):
        one, other = (jax.random.normal(stream(), x.shape) for stream in self.streams)
        return one - other


class WithClasses(nn.Module):
    @nn.compact
    def __call__(self, x, t, labels):
        return x + nn.Embed(3, 1)(labels)[:, None, None, :]


class Nnx(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.layers = nnx.List([nnx.Linear(1, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, t):
        return self.layers[1](self.dropout(self.layers[0](x)))


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, x, t):
        return self.norm(x)


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.BatchNorm(use_running_average=True)(x)


def test_linen_is_called_as_it_is():
    network = adapt(Linen(), SHAPE, 0)
    params = network.init(jax.random.key(0))
    np.testing.assert_allclose(
        network.apply(params, X, T, None, None),
        X * params["Dense_0"]["kernel"].item() + params["Dense_0"]["bias"].item(),
        rtol=1e-6,
    )


def test_classes_are_the_third_argument():
    network = adapt(WithClasses(), SHAPE, 3)
    params = {"Embed_0": {"embedding": jnp.array([[1.0], [2.0], [3.0]])}}
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    out = network.apply(params, X, T, jnp.array([2, 0, 1]), None)
    np.testing.assert_allclose((out - X)[:, 0, 0, 0], [3, 1, 2], rtol=1e-5)


def test_nnx_starts_from_its_own_parameters():
    module = Nnx(nnx.Rngs(3))
    network = adapt(module, SHAPE, 0)
    params = network.init(jax.random.key(0))
    assert sorted(params) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("bias", "kernel")]
    np.testing.assert_allclose(network.apply(params, X, T, None, None), module(X, T), rtol=1e-6)
    doubled = {name: 2 * leaf for name, leaf in params.items()}
    changed = network.apply(doubled, X, T, None, None)
    np.testing.assert_allclose(changed, 4 * module(X, T), rtol=1e-5)  # its biases are 0


def test_random_streams_of_a_module_are_apart():
    network = adapt(TwoStreams(nnx.Rngs(0)), SHAPE, 0)
    difference = network.apply(network.init(jax.random.key(0)), X, T, None, DROPOUT)
    assert np.std(difference) > 0.5


@pytest.mark.parametrize("module", [Linen(rate=0.5), Told(), Nnx(nnx.Rngs(0), rate=0.5)])
def test_dropout_is_of_training_and_of_the_step(module):
    network = adapt(module, SHAPE, 0)
    params = network.init(jax.random.key(0))
    still, again = (network.apply(params, X, T, None, None) for _ in range(2))
    np.testing.assert_array_equal(still, again)
    first, same = (network.apply(params, X, T, None, DROPOUT) for _ in range(2))
    np.testing.assert_array_equal(first, same)
    other_step = DROPOUT._replace(key=jax.random.key(8))
    other_device = DROPOUT._replace(examples=jnp.arange(3, 6))
    for dropout in (other_step, other_device):
        assert not np.array_equal(network.apply(params, X, T, None, dropout), first)
    assert not np.array_equal(first, still)


@pytest.mark.parametrize("module", [Normalised(nnx.Rngs(0)), LinenNormalised()])
def test_state_beside_the_parameters_is_refused(module):
    with pytest.raises(ConfigError, match=r"carries (BatchStat|batch_stats) beside its parameters"):
        adapt(module, SHAPE, 0).init(jax.random.key(0))


def test_what_is_no_network_is_refused():
    with pytest.raises(ConfigError, match="network=function: must be a Flax module"):
        adapt(lambda x, t: x, SHAPE, 0)
    identity = Network(lambda key: {}, lambda params, x, t, labels, dropout: x)
    assert adapt(identity, SHAPE, 0) is identity
    check_network(identity, SHAPE, 1, 0)
    with pytest.raises(ConfigError, match=r"is \(2, 4, 4, 1\), must be \(2, 4, 4, 2\)"):
        check_network(identity, SHAPE, 2, 0)


def test_a_bare_array_is_no_tree_of_parameters():
    """Each leaf of a state is like it, and what joins parameters takes the counts for them."""
    network = Network(lambda key: jnp.zeros(()), lambda params, x, t, labels, dropout: params * x)
    with pytest.raises(ConfigError, match="^network: its parameters are one bare array: wrap it"):
        check_network(network, SHAPE, 1, 0)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16"])
def test_parameters_are_float32(dtype):
    """Of a mixture, what joins them would make float32, and no checkpoint would fit the network."""

    def init(key):
        return {"a": jnp.zeros(1), "n": jnp.zeros(1, dtype)}

    network = Network(init, lambda params, x, t, labels, dropout: x)
    with pytest.raises(ConfigError, match=rf"parameter \['n'\] is {dtype}, must be float32: cast"):
        check_network(network, SHAPE, 1, 0)
