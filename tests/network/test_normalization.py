"""GroupNorm as CPUs, GPUs and TPUs compute it.

The oracles are the definition in float64, its gradient by finite differences, flax's parameters.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.network import normalization
from ddpm_jax.network.normalization import GroupNorm
from tests.support.norms import traced_anew
from tests.support.programs import precisions

EPSILON = 1e-6


def exact(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, groups: int) -> np.ndarray:
    """Group by group, in float64."""
    x, y, size = np.asarray(x, np.float64), np.zeros(x.shape), x.shape[-1] // groups
    for image in range(len(x)):
        for group in range(groups):
            part = x[image, ..., group * size : (group + 1) * size]
            y[image, ..., group * size : (group + 1) * size] = (part - part.mean()) / np.sqrt(
                part.var() + EPSILON
            )
    return y * scale + bias


@pytest.fixture(params=["cpu", "cuda", "tpu"])
def platform(request, monkeypatch):
    """The form of each platform, computed here."""
    choose = jax.lax.platform_dependent

    def chosen(*args, **forms):
        return choose(*args, default=forms[request.param])

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    with traced_anew():
        yield request.param


def draw(c: int, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(mean, 2, (2, 4, 6, c)).astype(np.float32)
    return x, random.normal(size=c).astype(np.float32), random.normal(size=c).astype(np.float32)


@pytest.mark.parametrize("c, groups", [(8, 4), (8, 1), (8, 8), (6, 2)])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_it_is_the_definition(c, groups, mean, platform):
    """A mean 150 times the deviation too.

    E[x^2] - E[x]^2 would lose a hundredth of the variance there, and more beyond.
    """
    x, scale, bias = draw(c, mean)
    y = GroupNorm(groups, EPSILON, "float32").apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(y, exact(x, scale, bias, groups), atol=2e-6 * (1 + mean))


def test_means_by_a_product_are_as_precise_as_sums():
    """A TPU would round them to bfloat16 by itself, which no other platform shows."""
    traced = jax.make_jaxpr(lambda values: normalization._product_mean(values, 4))(jnp.ones((2, 8)))
    assert precisions(traced.jaxpr, "dot_general") == [(jax.lax.Precision.HIGHEST,) * 2]


def test_a_pixel_far_from_all_others_is_a_bad_start_but_not_a_fatal_one():
    """The form for GPUs takes differences from the first pixel: it may lose n roundings, no more."""
    x, scale, bias = draw(8)
    x[:, 0, 0] += 1e5
    y = normalization.in_one_pass(x, scale, bias, groups=4, epsilon=EPSILON, dtype=jnp.float32)
    size = np.abs(exact(x, scale, bias, 4)).max()
    np.testing.assert_allclose(y, exact(x, scale, bias, 4), atol=24 * 2**-24 * size * 4)


def test_its_gradient_is_that_of_finite_differences(platform):
    """Along random directions, of a scalar of y that is not symmetric in anything.

    The oracle is differences of the float64 definition.
    """
    x, scale, bias = draw(8, 3.0)
    random = np.random.default_rng(1)
    weights = random.normal(size=x.shape)

    def ours(x, scale, bias):
        y = GroupNorm(4, EPSILON, "float32").apply({"params": {"scale": scale, "bias": bias}}, x)
        return jnp.sum(y * weights.astype(np.float32))

    gradients = jax.grad(ours, (0, 1, 2))(x, scale, bias)
    for place, inputs in enumerate((x, scale, bias)):
        for _ in range(3):
            along, values, step = random.normal(size=inputs.shape), [], 1e-5
            for sign in (1, -1):
                moved = [np.asarray(value, np.float64) for value in (x, scale, bias)]
                moved[place] = moved[place] + sign * step * along
                values.append(np.sum(exact(*moved, 4) * weights))
            slope = (values[0] - values[1]) / (2 * step)
            assert float(np.sum(gradients[place] * along)) == pytest.approx(
                slope, rel=1e-4, abs=1e-3
            )


def test_it_has_flax_parameters_and_types(platform):
    x = jnp.ones((2, 4, 4, 8), jnp.bfloat16)
    ours, theirs = GroupNorm(4, EPSILON, "bfloat16"), nn.GroupNorm(4, dtype="bfloat16")
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
    y, pull = jax.vjp(ours.apply, variables, x)
    (dparams, dx) = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, dparams))} == {jnp.dtype("float32")}


def test_statistics_are_float32_whatever_x_is(platform):
    """4096 bfloat16 values with a mean of 4.

    Summed in bfloat16, the mean itself would be off by tenths.
    """
    x = (4 + jax.random.normal(jax.random.key(0), (1, 64, 64, 1))).astype(jnp.bfloat16)
    y = GroupNorm(1, EPSILON, "float32").apply(
        {"params": {"scale": np.ones(1), "bias": np.zeros(1)}}, x
    )
    assert abs(float(y.mean())) < 1e-5 and float(y.std()) == pytest.approx(1, abs=1e-5)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 channels do not make 4 groups"):
        GroupNorm(4, EPSILON, "float32").init(jax.random.key(0), jnp.ones((1, 2, 2, 6)))
