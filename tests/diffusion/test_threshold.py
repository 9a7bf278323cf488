"""Dynamic thresholding against its definition, its limits and the clip that it takes the place of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, from_dict, override, to_dict, validate
from ddpm_jax.diffusion.chain import Update, reverse_chain, threshold
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import ancestral_table, ddim_table
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.errors import ConfigError

T = 12
BETAS = beta_schedule("linear", T, rescale=True, beta_end=0.008)
PROCESS = GaussianDiffusion(NoiseSchedule.from_betas(BETAS))
RNG = np.random.default_rng(0)
WILD = jnp.asarray(RNG.normal(size=(3, 6, 5, 2)) * np.array([0.2, 1.0, 4.0])[:, None, None, None])


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_each_sample_is_limited_by_its_own_percentile(percentile: float) -> None:
    """Imagen's three lines, sample by sample in NumPy."""
    for x0, limited in zip(np.asarray(WILD), threshold(WILD, percentile)):
        s = max(1, np.quantile(np.abs(x0), percentile))
        np.testing.assert_allclose(limited, np.clip(x0, -s, s) / s, atol=1e-6)


def test_a_low_percentile_is_the_clip() -> None:
    np.testing.assert_array_equal(threshold(WILD, 1e-6), jnp.clip(WILD, -1, 1))


def test_contrast_above_the_range_does_not_matter() -> None:
    """What exceeds 1 at the percentile is divided out: three times as much is the same image."""
    loud = WILD / jnp.quantile(jnp.abs(WILD), 0.9, axis=(1, 2, 3), keepdims=True)
    limited = threshold(1.01 * loud, 0.9)
    np.testing.assert_allclose(threshold(3.03 * loud, 0.9), limited, atol=1e-6)
    assert np.abs(limited).max() == 1
    assert (np.abs(limited) == 1).mean() < 0.15 < (np.abs(jnp.clip(3.03 * loud, -1, 1)) == 1).mean()
    quiet = 0.9 * loud / jnp.abs(loud).max()
    np.testing.assert_array_equal(threshold(quiet, 0.9), quiet)


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), count)


def contrasty(x: jax.Array, t: jax.Array) -> jax.Array:
    return 0.3 * x - 0.05 * x**3


@pytest.mark.parametrize("make", [ancestral_table, ddim_table])
def test_the_update_uses_the_limited_x0(make) -> None:
    """A row with it, and the row of a network that says the limited x0 by itself."""
    process = GaussianDiffusion(PROCESS.schedule, "x0")
    table, x = make(process, 6), 3 * jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    noise = jnp.ones_like(x)

    def loud(x: jax.Array, t: jax.Array) -> jax.Array:
        return 2 * x

    def limited(x: jax.Array, t: jax.Array) -> jax.Array:
        return threshold(loud(x, t), 0.8)

    first = jax.tree.map(lambda column: column[0], Update(process, table, loud).rows())
    by_option = Update(process, table, loud, dynamic_threshold=0.8)(first, x, lambda: noise)
    by_network = Update(process, table, limited)(first, x, lambda: noise)
    for ours, expected in zip(by_option[:2], by_network):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    clipped = Update(process, table, loud)(first, x, lambda: noise)[0]
    assert np.abs(clipped - by_option[0]).max() > 0.05


def test_samples_stay_independent_of_the_batch_and_inside_the_range() -> None:
    table, x = ancestral_table(PROCESS), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))

    def run(x: jax.Array, keys: jax.Array) -> jax.Array:
        return reverse_chain(PROCESS, table, contrasty, x, keys, dynamic_threshold=0.7)

    whole = run(x, keys(4))
    assert np.abs(whole).max() <= 1 + 1e-5
    np.testing.assert_allclose(run(x[2:3], keys(4)[2:3]), whole[2:3], atol=1e-5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["sampling.dynamic_threshold=1.5"], r"dynamic_threshold=1.5: must be in \[0, 1\]"),
        (["sampling.dynamic_threshold=-0.1"], r"dynamic_threshold=-0.1: must be in \[0, 1\]"),
        (["sampling.dynamic_threshold=nan"], "dynamic_threshold"),
        (
            ["sampling.dynamic_threshold=0.9", "sampling.clip=false"],
            "dynamic_threshold=0.9: is a way to clip, which clip=false switches off",
        ),
    ],
)
def test_impossible_thresholds_are_refused_in_one_line(items: list[str], message: str) -> None:
    config = Config()
    with pytest.raises(ConfigError, match=message) as refusal:
        for item in items:
            override(config, item)
        validate(config)
    assert "\n" not in str(refusal.value)


def test_configs_from_before_it_open_with_it_off() -> None:
    values = to_dict(Config())
    del values["sampling"]["dynamic_threshold"]
    assert from_dict(values) == Config() and Config().sampling.dynamic_threshold == 0
