"""The forward process, parameterisations and the reverse step.

The oracles are Gaussian conditioning, quadrature and SciPy.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ddpm_jax.diffusion.gaussians import (
    CDFS,
    discretized_gaussian_log_likelihood,
    normal_kl,
    standard_normal_cdf_tanh,
)
from ddpm_jax.diffusion.process import (
    PREDICTIONS,
    VARIANCES,
    GaussianDiffusion,
    convert,
    eps_from_x0,
    p_mean_variance,
    predict_x0,
    q_mean_variance,
    q_posterior,
    q_sample,
    reverse_log_variance,
    v_from_x0_eps,
)
from ddpm_jax.diffusion.schedule import SCHEDULES, NoiseSchedule, beta_schedule
from tests.support.gaussian_chain import GaussianChain

T = 20
TIMESTEPS = np.array([0, 1, 7, T - 2, T - 1])
SHAPE = (len(TIMESTEPS), 2, 2, 3)


def schedule(kind: str, timesteps: int = T) -> NoiseSchedule:
    return NoiseSchedule.from_betas(beta_schedule(kind, timesteps))


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, None, None, None]


def pixels(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def float32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


# ------------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("kind", SCHEDULES)
def test_q_steps_compose_to_q_sample(kind: str) -> None:
    """Mean and variance carried through every step of eq. 2 equal those of the one jump.

    x_t = sqrt(1-beta_t) x_{t-1} + sqrt(beta_t) noise
    """
    made, t = schedule(kind), jnp.arange(T)
    ones, zeros = jnp.ones((T, 1, 1, 1)), jnp.zeros((T, 1, 1, 1))
    keep, add = np.sqrt(1 - made.betas), np.sqrt(made.betas)
    jump_signal, jump_noise = (
        q_sample(made, ones, t, zeros).ravel(),
        q_sample(made, zeros, t, ones).ravel(),
    )
    mean, variance = q_mean_variance(made, ones, t)
    signal, spread = 1.0, 0.0
    for i in range(T):
        signal, spread = keep[i] * signal, keep[i] ** 2 * spread + add[i] ** 2
        np.testing.assert_allclose([jump_signal[i], mean.ravel()[i]], signal, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose([jump_noise[i] ** 2, variance.ravel()[i]], spread, rtol=1e-5)


def test_q_sample_has_the_moments_of_simulated_q_steps() -> None:
    made, samples = NoiseSchedule.from_betas(np.array([0.05, 0.3, 0.1, 0.6])), 40_000
    x = jnp.full((1, samples, 1, 1), 0.7)
    for beta, key in zip(made.betas, jax.random.split(jax.random.key(0), 4)):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * jax.random.normal(key, x.shape)
    signal = math.sqrt(0.95 * 0.7 * 0.9 * 0.4)
    jump = q_sample(
        made, jnp.full(x.shape, 0.7), jnp.array([3]), jax.random.normal(jax.random.key(1), x.shape)
    )
    for draws in (x, jump):
        np.testing.assert_allclose(
            draws.mean(), 0.7 * signal, atol=4.5 * math.sqrt((1 - signal**2) / samples)
        )
        np.testing.assert_allclose(draws.var(), 1 - signal**2, rtol=4.5 * math.sqrt(2 / samples))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_is_the_conditioned_joint_gaussian(kind: str) -> None:
    made, x0, x_t = schedule(kind), pixels(0), pixels(1)
    mean, log_variance = q_posterior(made, float32(x0), float32(x_t), jnp.asarray(TIMESTEPS))
    assert log_variance.shape == (len(TIMESTEPS), 1, 1, 1)
    chain = GaussianChain(made.betas)
    for i, t in enumerate(TIMESTEPS):
        on_x0, on_xt, variance = chain.posterior(t - 1, t)
        np.testing.assert_allclose(mean[i], on_x0 * x0[i] + on_xt * x_t[i], atol=1e-6)
        if t > 0:
            np.testing.assert_allclose(np.exp(log_variance[i]), variance, rtol=1e-5)


def test_posterior_at_t0_is_x0_whatever_x_t() -> None:
    """An index t-1 would wrap around to T-1 here."""
    x0 = float32(pixels(0))
    mean, log_variance = q_posterior(
        schedule("linear", 1000), x0, 1e6 + x0, jnp.zeros(len(x0), jnp.int32)
    )
    np.testing.assert_array_equal(mean, x0)
    np.testing.assert_allclose(log_variance, -9.8167, atol=5e-5)


# -------------------------------------------------------------------------- what a network predicts


def rounding(
    made: NoiseSchedule, source: str, target: str, unit: float | np.ndarray = 1e-6
) -> np.ndarray:
    """Return what an error of `unit` in the inputs may become, [b,1,1,1].

    The way is source -> x0 -> target.
    """
    chain = GaussianChain(made.betas)
    signal, noise = (
        column(v[TIMESTEPS]) for v in (chain.signal, np.sqrt(np.diag(chain.covariance)))
    )
    coef1 = column(np.array([chain.posterior(t - 1, t)[0] for t in TIMESTEPS]))
    of_x0 = (
        unit
        / {"eps": signal, "x0": np.ones_like(signal), "v": np.ones_like(signal), "mu": coef1 / 2}[
            source
        ]
    )
    of_eps = (unit + signal * of_x0) / noise
    return {"x0": of_x0, "eps": of_eps, "v": signal * of_eps + noise * of_x0, "mu": coef1 * of_x0}[
        target
    ] + unit


@pytest.mark.parametrize("kind", SCHEDULES)
def test_all_sixteen_conversions(kind: str) -> None:
    """Each against its definition, and there and back."""
    made, t = schedule(kind), jnp.asarray(TIMESTEPS)
    exact_x_t, exact = GaussianChain(made.betas).perfect(
        TIMESTEPS, pixels(2).clip(-1, 1), pixels(3)
    )
    x_t = float32(exact_x_t)
    for source, target in itertools.product(PREDICTIONS, repeat=2):
        output = float32(exact[source])
        if source == target:
            np.testing.assert_array_equal(
                convert(made, output, x_t, t, source=source, target=target), output
            )
            continue
        if kind == "jsd" and source == "eps":
            with pytest.raises(ValueError, match="eps cannot give x0"):
                convert(made, output, x_t, t, source=source, target=target)
            continue
        there = convert(made, output, x_t, t, source=source, target=target)
        allowed = rounding(made, source, target)
        assert (np.abs(there - exact[target]) <= allowed).all(), (source, target)
        if kind != "jsd" or target != "eps":
            back = convert(made, there, x_t, t, source=target, target=source)
            allowed = rounding(made, target, source, allowed)
            assert (np.abs(back - exact[source]) <= allowed).all(), (source, target, "and back")


def test_perfect_predictions_give_back_x0_over_1000_steps() -> None:
    made, t = schedule("linear", 1000), jnp.array([0, 1, 100, 500, 999])
    x0, eps = float32(pixels(2).clip(-1, 1)), float32(pixels(3))
    x_t = q_sample(made, x0, t, eps)
    np.testing.assert_allclose(predict_x0(made, "eps", eps, x_t, t), x0, atol=2e-4)
    np.testing.assert_allclose(
        predict_x0(made, "v", v_from_x0_eps(made, x0, eps, t), x_t, t), x0, atol=1e-6
    )
    np.testing.assert_allclose(eps_from_x0(made, x0, x_t, t), eps, atol=1e-4)


def test_unknown_kinds_are_refused() -> None:
    made, x, t = schedule("linear"), jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="prediction='noise': one of eps, x0, v, mu"):
        GaussianDiffusion(made, "noise")
    with pytest.raises(ValueError, match="variance='fixedlarge': one of fixed_small"):
        GaussianDiffusion(made, "eps", "fixedlarge")
    with pytest.raises(ValueError, match="prediction='noise'"):
        convert(made, x, x, t, source="noise", target="x0")
    with pytest.raises(ValueError, match="prediction='noise'"):
        convert(made, x, x, t, source="x0", target="noise")


def test_eps_with_a_schedule_that_ends_in_pure_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="alphas_cumprod = 0.*predict x0, v or mu"):
        GaussianDiffusion(schedule("jsd"), "eps")
    for prediction in ("x0", "v", "mu"):
        GaussianDiffusion(schedule("jsd"), prediction)


# ------------------------------------------------------------------------------ the reverse process


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_clipped_before_the_mean_not_after(prediction: str) -> None:
    """An adversarial prediction: the mean must be that of the posterior at the clipped x0."""
    made, t = schedule("linear"), jnp.asarray(TIMESTEPS)
    wild = 50 * pixels(4)
    chain = GaussianChain(made.betas)
    x_t, exact = chain.perfect(TIMESTEPS, wild, pixels(5))
    process = GaussianDiffusion(made, prediction)
    step = p_mean_variance(process, float32(exact[prediction]), float32(x_t), t, clip=True)
    for i, at in enumerate(TIMESTEPS):
        on_x0, on_xt, _ = chain.posterior(at - 1, at)
        np.testing.assert_allclose(
            step.mean[i], on_x0 * wild[i].clip(-1, 1) + on_xt * x_t[i], rtol=1e-5, atol=1e-4
        )
    np.testing.assert_allclose(step.x0, wild.clip(-1, 1), atol=1e-6)
    free = p_mean_variance(process, float32(exact[prediction]), float32(x_t), t, clip=False)
    np.testing.assert_allclose(free.x0, wild, rtol=1e-4, atol=0.02)
    np.testing.assert_allclose(free.mean, exact["mu"], rtol=1e-4, atol=1e-3)


def test_predicted_mean_is_used_as_it_is() -> None:
    output = float32(pixels(6))
    process = GaussianDiffusion(schedule("linear"), "mu")
    step = p_mean_variance(process, output, float32(pixels(7)), jnp.asarray(TIMESTEPS), clip=False)
    np.testing.assert_array_equal(step.mean, output)


def test_fixed_variances() -> None:
    made, t = schedule("linear", 1000), jnp.array([0, 1, 999])
    small, large = (
        reverse_log_variance(GaussianDiffusion(made, "eps", v), None, t, 4) for v in VARIANCES[:2]
    )
    chain = GaussianChain(made.betas)
    variances = [chain.posterior(0, 1)[2], chain.posterior(0, 1)[2], chain.posterior(998, 999)[2]]
    np.testing.assert_allclose(small.ravel(), np.log(variances), rtol=1e-6)
    np.testing.assert_allclose(
        large.ravel(), [math.log(5.4532e-5), math.log(made.betas[1]), math.log(0.02)], rtol=1e-6
    )


def test_learned_range_reaches_both_ends_and_is_linear_in_the_log() -> None:
    """-1 is the posterior's variance and 1 is beta; at t = 0 the lower end is finite."""
    made, t = schedule("linear", 1000), jnp.array([0, 1, 999])
    process = GaussianDiffusion(made, "eps", "learned_range")
    low, middle, high, beyond = (
        np.asarray(reverse_log_variance(process, jnp.full((3, 1, 1, 1), raw), t, 4)).ravel()
        for raw in (-1, 0, 1, 3)
    )
    chain = GaussianChain(made.betas)
    posterior = [chain.posterior(i - 1, i)[2] for i in (1, 1, 999)]
    np.testing.assert_allclose(low, np.log(posterior), rtol=1e-6)
    np.testing.assert_allclose(high, np.log(made.betas[[0, 1, 999]]), rtol=1e-6)
    np.testing.assert_allclose(
        np.exp(middle), np.sqrt(posterior * made.betas[[0, 1, 999]]), rtol=1e-5
    )
    np.testing.assert_allclose(beyond - high, high - low, atol=1e-5)


def test_learned_variance_passes_through_from_the_second_half_of_the_channels() -> None:
    process = GaussianDiffusion(schedule("linear"), "x0", "learned")
    prediction, raw = float32(pixels(8)), float32(pixels(9))
    output = jnp.concatenate([prediction, raw], axis=-1)
    step = p_mean_variance(process, output, float32(pixels(10)), jnp.asarray(TIMESTEPS), clip=False)
    np.testing.assert_array_equal(step.log_variance, raw)
    np.testing.assert_array_equal(step.x0, prediction)


# ---------------------------------------------------------------------------------------- Gaussians


def test_normal_kl_equals_numerical_integration() -> None:
    cases = [(0, 0, 1, 0), (0.3, -2, 0.2, -1), (-1, 1, 1, -0.5), (0, -9, 0.01, -8.5)]
    for mean1, log_variance1, mean2, log_variance2 in cases:
        std = math.exp(0.5 * log_variance1)
        x = np.linspace(mean1 - 12 * std, mean1 + 12 * std, 200_001)
        log_p = scipy.stats.norm.logpdf(x, mean1, std)
        log_q = scipy.stats.norm.logpdf(x, mean2, math.exp(0.5 * log_variance2))
        integral = np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0])
        kl = normal_kl(
            *(jnp.asarray(v, jnp.float32) for v in (mean1, log_variance1, mean2, log_variance2))
        )
        np.testing.assert_allclose(kl, integral, rtol=1e-5)


def test_normal_kl_keeps_its_digits_where_the_variances_almost_agree() -> None:
    """Hundreds of late timesteps are like this: 1e-7 lost in each would be seen in the sum."""
    ratio = np.float32([1e-3, -1e-3, 1e-2, 0])
    zero = jnp.zeros(4)
    exact = 0.5 * (np.expm1(ratio.astype(np.float64)) - ratio.astype(np.float64))
    np.testing.assert_allclose(
        normal_kl(zero, jnp.asarray(ratio), zero, zero), exact, rtol=1e-3, atol=1e-12
    )


LEVELS = np.arange(256) / 127.5 - 1
likelihood = jax.jit(discretized_gaussian_log_likelihood, static_argnames="cdf")


def decoder(mean: np.ndarray, log_scale: np.ndarray, cdf: str) -> np.ndarray:
    """log P of the 256 levels, float64 [n, 256], for n means and scales."""
    mean, log_scale = (
        float32(np.broadcast_to(v[:, None], (len(v), 256))) for v in (mean, log_scale)
    )
    return np.asarray(
        likelihood(float32(np.broadcast_to(LEVELS, mean.shape)), mean, log_scale, cdf=cdf),
        np.float64,
    )


MEANS = np.repeat([-30.0, -3.0, -1.004, -0.4, 0.0, 0.123, 0.9, 1.0, 1.7], 6)
SCALES = np.tile(np.exp([-8.0, -5.0, -3.0, -1.0, 0.5, 3.0]), 9)


@pytest.mark.parametrize("cdf", CDFS)
def test_decoder_sums_to_1_over_256_bins(cdf: str) -> None:
    """Whatever the mean, also far outside [-1, 1], and whatever the scale."""
    total = np.exp(decoder(MEANS, np.log(SCALES), cdf)).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=5e-6)


def test_exact_decoder_equals_scipy() -> None:
    log_p = decoder(MEANS, np.log(SCALES), "erf")
    norm = scipy.stats.norm
    for mean, scale, row in zip(MEANS, SCALES, log_p):
        above, below = (LEVELS - mean + 1 / 255) / scale, (LEVELS - mean - 1 / 255) / scale
        above[-1], below[0] = np.inf, -np.inf
        # The difference taken on the side where it keeps its digits.
        p = np.where(below > 0, norm.sf(below) - norm.sf(above), norm.cdf(above) - norm.cdf(below))
        np.testing.assert_allclose(np.exp(row), p, atol=2e-6 + 5e-8 / scale)
        if scale > 0.01:  # for a needle the float32 of the inputs decides
            np.testing.assert_allclose(row[p > 1e-9], np.log(p[p > 1e-9]), atol=4e-3)
    np.testing.assert_allclose(log_p.min(), math.log(1e-12), rtol=1e-6)


def test_tanh_decoder_is_the_three_cases_of_the_papers_code() -> None:
    log_p = decoder(MEANS, np.log(SCALES), "tanh")

    def cdf(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    for mean, scale, row in zip(MEANS, SCALES, log_p):
        if scale < 0.01:
            continue  # there the float32 of the inputs decides
        above, below = (
            cdf((LEVELS - mean + 1 / 255) / scale),
            cdf((LEVELS - mean - 1 / 255) / scale),
        )
        p = above - below
        p[0], p[-1] = above[0], 1 - below[-1]
        np.testing.assert_allclose(np.exp(row), p, atol=2e-5)
        np.testing.assert_allclose(row[p > 1e-3], np.log(p[p > 1e-3]), atol=2e-3)


def test_tanh_cdf_is_within_2e4_of_the_exact_one() -> None:
    z = np.linspace(-8, 8, 4001)
    error = np.abs(standard_normal_cdf_tanh(float32(z)) - scipy.special.ndtr(z))
    assert 1e-4 < error.max() < 2e-4


@pytest.mark.parametrize("cdf", CDFS)
def test_bin_edges_are_1_255th_from_the_level(cdf: str) -> None:
    """A needle on the edge between two levels is shared by halves.

    Edges at 1/256 or 1/127.5 would not do that.
    """
    needle = np.array([LEVELS[100] + 1 / 255, LEVELS[0] + 1 / 255, LEVELS[255] - 1 / 255])
    p = np.exp(decoder(needle, np.full(3, math.log(2e-4)), cdf))
    np.testing.assert_allclose(
        [p[0, 100], p[0, 101], p[1, 0], p[1, 1], p[2, 254], p[2, 255]], 0.5, atol=2e-3
    )


@pytest.mark.parametrize("side", [-1, 1])
def test_decoder_keeps_its_digits_in_both_tails(side: int) -> None:
    """1 - cdf in float32 knows nothing below 1e-7."""
    x, mean, scale = side * LEVELS[200], 0.0, 0.095
    exact = scipy.stats.norm.cdf((-abs(x) + 1 / 255) / scale) - scipy.stats.norm.cdf(
        (-abs(x) - 1 / 255) / scale
    )
    assert 1e-11 < exact < 1e-9
    log_p = likelihood(*(float32(np.array([v])) for v in (x, mean, math.log(scale))), cdf="erf")
    np.testing.assert_allclose(log_p[0], math.log(exact), atol=1e-4)


@pytest.mark.parametrize("cdf", CDFS)
def test_decoder_gradients_are_finite_everywhere(cdf: str) -> None:
    grid = np.meshgrid(LEVELS[::15], [-1e4, -30, -1, 0, 1e-3, 1, 30, 1e4], [-30.0, -12, -5, 0, 10])
    x, mean, log_scale = (float32(v) for v in grid)

    def total(mean: jax.Array, log_scale: jax.Array) -> jax.Array:
        return likelihood(x, mean, log_scale, cdf=cdf).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(mean, log_scale)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert all((g != 0).any() for g in gradients)
