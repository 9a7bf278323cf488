"""The bound term by term, its estimate from strata, and the curve it draws.

The oracle is data whose best denoiser is linear: independent pixels from N(0, s^2), cut into 256
levels. Every expectation is then an integral over one pixel, done here in float64 from the betas,
by conditioning (`gaussian_chain`) and by quadrature.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.bound import (
    bound_term,
    bound_terms,
    prior_term,
    rate_distortion,
    timestep_strata,
)
from ddpm_jax.diffusion.process import GaussianDiffusion, q_sample
from ddpm_jax.diffusion.schedule import SCHEDULES, NoiseSchedule, beta_schedule
from tests.support.gaussian_chain import GaussianChain
from tests.support.two_levels import LEVELS, PROBABILITIES, STD, closed_form, made_schedule


def pixels(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Levels of independent pixels, [count, side, side, 1]."""
    return LEVELS[np.random.default_rng(seed).choice(256, (count, side, side, 1), p=PROBABILITIES)]


def exact_denoiser(chain: GaussianChain):
    """E[x_0 | x_t], for a process that predicts x0."""
    factor = np.array([chain.best_x0(t, 0.0, STD)[0] for t in range(len(chain.signal))])
    return lambda x, t: jnp.asarray(factor, jnp.float32)[t][:, None, None, None] * x


def run(
    process: GaussianDiffusion,
    denoise,
    x0: np.ndarray,
    count: int = 0,
    seed: int = 0,
    clip: bool = False,
):
    strata = timestep_strata(process.schedule, count)
    keys = jax.random.split(jax.random.key(seed), len(x0))
    measure = jax.jit(partial(bound_terms, process, denoise, clip=clip, cdf="erf"))
    columns = measure(
        jnp.asarray(x0, jnp.float32), keys, jnp.asarray(strata.first), jnp.asarray(strata.size)
    )
    prior = prior_term(process.schedule, jnp.asarray(x0, jnp.float32))
    return (
        strata,
        np.asarray(prior, np.float64),
        {name: np.asarray(column, np.float64) for name, column in columns.items()},
    )


def true_bits(x0: np.ndarray) -> float:
    """The true NLL of these very pixels, in bits/dim."""
    return float(-np.mean(np.log2(PROBABILITIES[np.rint((x0 + 1) * 127.5).astype(int)])))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_of_gaussian_data_is_its_closed_form_and_above_the_entropy(variance: str) -> None:
    """The paper's own chain of 1000 steps.

    The noise is integrated out by quadrature, so that 1e-3 bits/dim means something.
    """
    made = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
    chain, process = GaussianChain(made.betas), GaussianDiffusion(made, "x0", variance)
    kept = np.flatnonzero(PROBABILITIES > 1e-9)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x0 = jnp.asarray(np.repeat(LEVELS[kept], 40), jnp.float32)[:, None, None, None]
    eps = jnp.asarray(np.tile(nodes, len(kept)), jnp.float32)[:, None, None, None]
    denoise = exact_denoiser(chain)

    def term(_: None, t: jax.Array) -> tuple[None, jax.Array]:
        t = jnp.full(len(x0), t)
        x_t = q_sample(made, x0, t, eps)
        return None, bound_term(process, denoise(x_t, t), x0, x_t, t, clip=False, cdf="erf")

    terms = np.asarray(jax.jit(lambda: jax.lax.scan(term, None, jnp.arange(1000))[1])(), np.float64)
    over_noise = terms.reshape(1000, len(kept), 40) @ weights / weights.sum()
    share = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    prior = np.asarray(prior_term(made, x0[::40]), np.float64) @ share
    total = prior + (over_noise @ share).sum()
    expected = closed_form(chain, made.betas, variance, LEVELS[kept], share)
    assert abs(total - expected["prior"] - expected["terms"].sum()) < 3e-4
    entropy = -np.sum(PROBABILITIES * np.log2(np.maximum(PROBABILITIES, 1e-300)))
    assert entropy < total < entropy + {"fixed_small": 0.8, "fixed_large": 0.2}[variance]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_sampled_terms_scatter_about_their_closed_form(variance: str) -> None:
    made = made_schedule(20)
    chain, x0 = GaussianChain(made.betas), pixels(64, 64)
    process = GaussianDiffusion(made, "x0", variance)
    _, prior, columns = run(process, exact_denoiser(chain), x0)
    expected = closed_form(chain, made.betas, variance, x0.ravel())
    np.testing.assert_allclose(prior.mean(), expected["prior"], rtol=1e-4)
    for name, values in (("term", expected["terms"]), ("squared_error", expected["errors"])):
        error = columns[name].std(axis=0, ddof=1) / math.sqrt(len(x0))
        assert (np.abs(columns[name].mean(axis=0) - values) < 4.5 * error + 2e-6).all()
    assert prior.mean() + columns["term"].mean(axis=0).sum() > true_bits(x0)


def test_clipping_keeps_the_bound_a_bound() -> None:
    """With x0_hat far outside [-1, 1] the two differ, and both stay above the true NLL."""
    made = made_schedule(20)
    process = GaussianDiffusion(made, "x0", "fixed_large")
    x0 = pixels(8, 32)
    true, totals = true_bits(x0), {}
    for clip in (True, False):
        _, prior, columns = run(process, lambda x, t: 3 * x, x0, clip=clip)
        totals[clip] = prior.mean() + columns["term"].mean(axis=0).sum()
    assert true < totals[True] < totals[False]


@pytest.mark.parametrize("clip, x0_hat", [(True, 1.0), (False, 2.0)])
def test_distortion_is_of_the_x0_that_the_bound_uses(clip: bool, x0_hat: float) -> None:
    process, x0 = GaussianDiffusion(made_schedule(20), "x0", "fixed_large"), pixels(2, 8)
    _, _, columns = run(process, lambda x, t: jnp.full_like(x, 2.0), x0, clip=clip)
    error = np.mean((x0 - x0_hat) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(columns["squared_error"], error[:, None].repeat(20, 1), rtol=1e-5)


def test_strata_partition_the_timesteps() -> None:
    for kind in SCHEDULES:
        made = NoiseSchedule.from_betas(beta_schedule(kind, 300))
        for count in (2, 3, 17, 150, 299, 300):
            strata = timestep_strata(made, count)
            assert len(strata) == count and (strata.size >= 1).all()
            np.testing.assert_array_equal(strata.first, np.cumsum(np.append(0, strata.size[:-1])))
            assert strata.timesteps == 300 and strata.size[0] == 1
    np.testing.assert_array_equal(timestep_strata(made).first, np.arange(300))
    assert len(timestep_strata(NoiseSchedule.from_betas(np.array([0.5])))) == 1


@pytest.mark.parametrize("count", [1, -1, 301])
def test_impossible_counts_of_strata_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_timesteps={count}: must be in 2..300"):
        timestep_strata(NoiseSchedule.from_betas(beta_schedule("linear", 300)), count)


def test_estimate_from_strata_is_unbiased_and_agrees_within_its_error() -> None:
    made = made_schedule(200)
    chain = GaussianChain(made.betas)
    process, x0 = GaussianDiffusion(made, "x0", "fixed_small"), pixels(1500, 8)
    expected = closed_form(chain, made.betas, "fixed_small", x0.ravel())
    strata, _, columns = run(process, exact_denoiser(chain), x0, count=12)
    inside = (columns["t"] >= strata.first) & (columns["t"] < strata.first + strata.size)
    assert inside.all()
    for k, (first, size) in enumerate(zip(strata.first, strata.size)):
        assert set(np.unique(columns["t"][:, k])) == set(range(first, first + size))
    sums = (columns["term"] * strata.size)[:, 1:].sum(axis=1)
    error = sums.std(ddof=1) / math.sqrt(len(sums))
    exact = expected["terms"][1:].sum()
    assert error < 0.02 * exact
    assert abs(sums.mean() - exact) < 3.5 * error
    # Each stratum on its own, too: a wrong weight in one could hide in the sum.
    for k in range(1, 12):
        column = columns["term"][:, k] * strata.size[k]
        part = expected["terms"][strata.first[k] : strata.first[k] + strata.size[k]].sum()
        assert abs(column.mean() - part) < 4.5 * column.std() / math.sqrt(len(column))


def test_rate_plus_decoder_is_the_total_and_distortion_falls() -> None:
    made = made_schedule(40)
    chain, x0 = GaussianChain(made.betas), pixels(16, 64)
    process = GaussianDiffusion(made, "x0", "fixed_large")
    strata, prior, columns = run(process, exact_denoiser(chain), x0)
    mean = {name: column.mean(axis=0) for name, column in columns.items()}
    below = (columns["term"] * (columns["t"] - strata.first)).mean(axis=0)
    assert not below.any()
    curve = rate_distortion(strata, prior.mean(), mean["term"], below, mean["squared_error"])
    total = prior.mean() + mean["term"].sum()
    np.testing.assert_allclose(curve.rate[-1] + mean["term"][0], total, rtol=1e-12)
    np.testing.assert_allclose(curve.rate[0], prior.mean(), rtol=1e-12)
    np.testing.assert_array_equal(curve.t, np.arange(40)[::-1])
    assert (np.diff(curve.rate) >= 0).all()
    # At the noisy end nothing is known of x_0 for many steps: the curve is flat there, and the
    # draws scatter by 0.002.
    assert (np.diff(curve.rmse) < 0.01).all() and (np.diff(curve.rmse[::4]) <= 0.002).all()
    # What x_t leaves unknown of x_0, in levels: s^2 (1-ab) / (ab s^2 + 1-ab).
    noise = np.diag(chain.covariance)
    unknown = STD**2 * noise / (chain.signal**2 * STD**2 + noise)
    np.testing.assert_allclose(curve.rmse[::-1], 127.5 * np.sqrt(unknown), rtol=0.01)
    # The rate of Gaussian data, 1/2 log2(1 + s^2 SNR) bits, is what an endless chain would take;
    # this one takes a little more.
    least = 0.5 * np.log2(1 + STD**2 * made.snr)
    assert (curve.rate[::-1] > least - 1e-3).all()


def test_curve_of_an_estimate_lies_on_that_of_all_terms() -> None:
    made = made_schedule(200)
    chain, x0 = GaussianChain(made.betas), pixels(2000, 8)
    process = GaussianDiffusion(made, "x0", "fixed_small")
    expected = closed_form(chain, made.betas, "fixed_small", x0.ravel())
    rate = expected["prior"] + np.append(np.cumsum(expected["terms"][::-1])[::-1][1:], 0)
    strata, prior, columns = run(process, exact_denoiser(chain), x0, count=20)
    mean = {name: column.mean(axis=0) for name, column in columns.items()}
    below = (columns["term"] * (columns["t"] - strata.first)).mean(axis=0)
    curve = rate_distortion(strata, prior.mean(), mean["term"], below, mean["squared_error"])
    for k, (first, size) in enumerate(zip(strata.first, strata.size)):
        row, own = len(strata) - 1 - k, slice(first, first + size)
        np.testing.assert_allclose(curve.t[row], np.arange(200)[own].mean())
        np.testing.assert_allclose(curve.rate[row], rate[own].mean(), rtol=0.06, atol=1e-4)
        np.testing.assert_allclose(
            curve.rmse[row], 127.5 * math.sqrt(expected["errors"][own].mean()), rtol=0.03
        )


def test_an_image_has_its_own_noise_and_timesteps_whatever_the_batch() -> None:
    made = made_schedule(30)
    process, x0 = GaussianDiffusion(made, "eps"), jnp.asarray(pixels(6, 4), jnp.float32)
    keys, strata = jax.random.split(jax.random.key(0), 6), timestep_strata(made, 5)
    measure = partial(bound_terms, process, lambda x, t: 0.1 * x, clip=True, cdf="tanh")
    first, size = jnp.asarray(strata.first), jnp.asarray(strata.size)
    whole = measure(x0, keys, first, size)
    order = jnp.array([4, 1, 5])
    part = measure(x0[order], keys[order], first[3:], size[3:])
    for name, column in whole.items():
        np.testing.assert_allclose(part[name], column[order][:, 3:], rtol=1e-5)
    same = measure(jnp.repeat(x0[:1], 6, axis=0), keys, first, size)["term"]
    assert (np.std(same, axis=0) > 0).all()


def test_strata_draw_their_timesteps_apart() -> None:
    """Strata of one size would else draw the same place in each, and errors would add up."""
    process, first = GaussianDiffusion(made_schedule(200), "eps"), jnp.arange(0, 200, 50)
    measure = partial(bound_terms, process, lambda x, t: 0 * x, clip=True, cdf="tanh")
    x0, keys = jnp.zeros((600, 1, 1, 1)), jax.random.split(jax.random.key(2), 600)
    places = np.asarray(measure(x0, keys, first, jnp.full(4, 50))["t"]) - np.asarray(first)
    assert places.min() == 0 and places.max() == 49
    apart = np.corrcoef(places.T)[~np.eye(4, dtype=bool)]
    assert np.abs(apart).max() < 5 / np.sqrt(600)


def test_memory_does_not_grow_with_the_number_of_terms() -> None:
    """T x images x pixels would be 1000 times the batch."""

    def temporary(count: int) -> int:
        made = made_schedule(count)
        process = GaussianDiffusion(made, "eps")
        strata = timestep_strata(made)
        measure = jax.jit(
            partial(bound_terms, process, lambda x, t: 0.1 * x, clip=True, cdf="tanh")
        )
        arguments = (
            jnp.zeros((4, 32, 32, 3)),
            jax.random.split(jax.random.key(0), 4),
            strata.first,
            strata.size,
        )
        return measure.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    one_image_batch = 4 * 32 * 32 * 3 * 4
    assert temporary(1000) - temporary(20) < 2 * one_image_batch


@pytest.mark.parametrize("cdf", ["tanh", "erf"])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.999, 1.7])
@pytest.mark.parametrize("std", [0.003, 0.05, 2.0])
def test_probabilities_of_the_256_levels_sum_to_1(cdf: str, mean: float, std: float) -> None:
    """Through the bound itself.

    L_0 of 256 images that are each one level, under a denoiser that always says `mean`.
    """
    # With T = 1 the decoder's variance is beta_0.
    process = GaussianDiffusion(
        NoiseSchedule.from_betas(np.array([min(std**2, 1.0)])), "x0", "fixed_large"
    )
    x0 = jnp.asarray(LEVELS, jnp.float32)[:, None, None, None]
    keys = jax.random.split(jax.random.key(0), 256)
    term = bound_terms(
        process,
        lambda x, t: jnp.full_like(x, mean),
        x0,
        keys,
        jnp.zeros(1, int),
        jnp.ones(1, int),
        clip=False,
        cdf=cdf,
    )["term"]
    np.testing.assert_allclose(np.exp2(-np.asarray(term, np.float64)).sum(), 1, atol=2e-5)
