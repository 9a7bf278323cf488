"""Schedules against published values, exact rational arithmetic and closed forms."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from ddpm_jax.diffusion.schedule import SCHEDULES, NoiseSchedule, beta_schedule, check_betas
from tests.support.gaussian_chain import GaussianChain


def schedule(kind: str, timesteps: int = 1000, **options) -> NoiseSchedule:
    return NoiseSchedule.from_betas(beta_schedule(kind, timesteps, **options))


@pytest.mark.parametrize(
    ("kind", "alphas_cumprod", "half_a_unit"),
    [
        ("linear", 4.0358e-5, 5e-10),
        ("quad", 7.334e-4, 5e-8),
        ("warmup10", 4.6e-9, 5e-11),
        ("warmup50", 2.6e-7, 5e-9),
        ("const", 1.7e-9, 5e-11),
        ("cosine", 2.4e-9, 5e-11),
    ],
)
def test_published_signal_left_at_the_end_of_1000_steps(
    kind: str, alphas_cumprod: float, half_a_unit: float
) -> None:
    np.testing.assert_allclose(
        schedule(kind).alphas_cumprod[-1], alphas_cumprod, rtol=0, atol=half_a_unit
    )


def test_published_values_of_the_linear_schedule() -> None:
    linear = schedule("linear")
    np.testing.assert_allclose(linear.sqrt_alphas_cumprod[-1], 6.353e-3, rtol=1e-4)
    np.testing.assert_allclose(linear.betas[[0, -1]], [1e-4, 0.02], rtol=1e-15)
    np.testing.assert_allclose(linear.posterior_variance[1], 5.4532e-5, rtol=1e-5)


def test_published_first_beta_of_the_cosine_schedule() -> None:
    cosine = schedule("cosine")
    np.testing.assert_allclose(cosine.betas[0], 4.13e-5, rtol=1e-3)
    assert cosine.betas[-1] == 0.999


def test_log_variance_at_t0_is_that_of_step_1_not_log_beta_0() -> None:
    linear = schedule("linear")
    for log_variance in (linear.posterior_log_variance_clipped, linear.log_betas_clipped):
        np.testing.assert_allclose(log_variance[0], -9.8167, atol=5e-5)
        np.testing.assert_allclose(log_variance[0], math.log(5.4532e-5), atol=1e-5)
    np.testing.assert_allclose(np.exp(linear.log_betas_clipped[1:]), linear.betas[1:], rtol=1e-13)


@pytest.mark.parametrize("timesteps", [1, 2, 3, 10, 1000, 4000])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_at_any_length(kind: str, timesteps: int) -> None:
    made = schedule(kind, timesteps)
    assert made.timesteps == timesteps
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        assert value.dtype == np.float64 and value.shape == (timesteps,), field.name
        if not field.name.startswith("sqrt_recip"):
            assert np.isfinite(value).all(), field.name
    assert (made.betas > 0).all() and (made.betas <= 1).all()
    assert (np.diff(made.alphas_cumprod) < 0).all() and (np.diff(made.snr) < 0).all()
    assert (made.alphas_cumprod < 1).all() and made.alphas_cumprod[-1] >= 0
    assert made.ends_in_pure_noise == (kind == "jsd")
    np.testing.assert_allclose(
        made.sqrt_alphas_cumprod**2 + made.sqrt_one_minus_alphas_cumprod**2, 1, rtol=1e-12
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_float64_product_equals_exact_rational_arithmetic(kind: str) -> None:
    """A float32 cumprod, as several public codes take it, is off in the fifth digit."""
    made = schedule(kind)
    product = Fraction(1)
    for t, beta in enumerate(map(Fraction, made.betas.tolist())):
        assert made.alphas_cumprod_prev[t] == (made.alphas_cumprod[t - 1] if t else 1.0)
        product *= 1 - beta
        if t in (0, 1, 9, 499, 999):
            np.testing.assert_allclose(made.alphas_cumprod[t], float(product), rtol=1e-12)
            np.testing.assert_allclose(
                made.sqrt_one_minus_alphas_cumprod[t], math.sqrt(1 - product), rtol=1e-12
            )


def test_noise_keeps_its_digits_where_beta_is_tiny() -> None:
    betas = np.array([1e-15, 3e-15, 1e-12])
    made, exact = NoiseSchedule.from_betas(betas), Fraction(1)
    for t, beta in enumerate(betas.tolist()):
        exact *= 1 - Fraction(beta)
        np.testing.assert_allclose(
            made.sqrt_one_minus_alphas_cumprod[t] ** 2, float(1 - exact), rtol=1e-14
        )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_and_inverses_equal_rational_arithmetic(kind: str) -> None:
    """Short chains, everything but the square roots exact."""
    made = schedule(kind, 5)
    betas = [Fraction(beta) for beta in made.betas.tolist()]
    for t in range(5):
        cumprod, before = (
            math.prod(1 - b for b in betas[: t + 1]),
            math.prod(1 - b for b in betas[:t]),
        )
        variance = betas[t] * (1 - before) / (1 - cumprod)
        np.testing.assert_allclose(made.posterior_variance[t], float(variance), rtol=1e-13)
        coef1_squared = betas[t] ** 2 * before / (1 - cumprod) ** 2
        coef2_squared = (1 - before) ** 2 * (1 - betas[t]) / (1 - cumprod) ** 2
        np.testing.assert_allclose(
            made.posterior_mean_coef1[t] ** 2, float(coef1_squared), rtol=1e-13
        )
        np.testing.assert_allclose(
            made.posterior_mean_coef2[t] ** 2, float(coef2_squared), rtol=1e-13
        )
        if cumprod:
            np.testing.assert_allclose(
                made.sqrt_recip_alphas_cumprod[t] ** 2, float(1 / cumprod), rtol=1e-12
            )
            np.testing.assert_allclose(
                made.sqrt_recipm1_alphas_cumprod[t] ** 2, float(1 / cumprod - 1), rtol=1e-12
            )
            np.testing.assert_allclose(made.snr[t], float(cumprod / (1 - cumprod)), rtol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_is_the_conditioned_joint_gaussian(kind: str) -> None:
    made = schedule(kind, 40)
    chain = GaussianChain(made.betas)
    np.testing.assert_allclose(made.sqrt_alphas_cumprod, chain.signal, rtol=1e-12)
    np.testing.assert_allclose(
        made.sqrt_one_minus_alphas_cumprod**2, np.diag(chain.covariance), rtol=1e-12
    )
    for t in range(40):
        on_x0, on_xt, variance = chain.posterior(t - 1, t)
        np.testing.assert_allclose(made.posterior_mean_coef1[t], on_x0, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(made.posterior_mean_coef2[t], on_xt, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(made.posterior_variance[t], variance, rtol=1e-6, atol=1e-15)


def test_first_step_does_not_wrap_around_to_the_last() -> None:
    made = schedule("linear")
    assert made.alphas_cumprod_prev[0] == 1
    assert (
        made.posterior_mean_coef1[0],
        made.posterior_mean_coef2[0],
        made.posterior_variance[0],
    ) == (1, 0, 0)


def test_linear_betas_are_equally_spaced() -> None:
    betas = beta_schedule("linear", 7, beta_start=0.1, beta_end=0.4)
    np.testing.assert_allclose(
        betas, [float(Fraction(1, 10) + Fraction(i, 20)) for i in range(7)], rtol=1e-15
    )


def test_quad_square_roots_are_equally_spaced() -> None:
    betas = beta_schedule("quad", 4, beta_start=0.01, beta_end=0.16)
    np.testing.assert_allclose(betas, [0.01, 0.04, 0.09, 0.16], rtol=1e-14)


def test_jsd_signal_falls_linearly_to_exactly_zero() -> None:
    made = schedule("jsd")
    np.testing.assert_allclose(
        made.alphas_cumprod, 1 - np.arange(1, 1001) / 1000, rtol=1e-12, atol=1e-16
    )
    assert made.alphas_cumprod[-1] == 0 and made.ends_in_pure_noise


@pytest.mark.parametrize(("kind", "length"), [("warmup10", 3), ("warmup50", 15)])
def test_warmup_is_linear_then_constant(kind: str, length: int) -> None:
    betas = beta_schedule(kind, 30, beta_start=0.01, beta_end=0.05)
    np.testing.assert_allclose(np.diff(betas[:length]), 0.04 / (length - 1), rtol=1e-12)
    np.testing.assert_array_equal(betas[length - 1 :], 0.05)
    assert betas[0] == 0.01


@pytest.mark.parametrize("timesteps", [10, 1000, 4000])
def test_cosine_signal_is_the_squared_cosine(timesteps: int) -> None:
    made = schedule("cosine", timesteps, beta_start=0.3, beta_end=0.4)  # ends that must not matter

    def f(u: int) -> float:
        return math.cos((u / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    uncapped = np.flatnonzero(made.betas < 0.999)
    np.testing.assert_allclose(
        made.alphas_cumprod[uncapped], [f(t + 1) / f(0) for t in uncapped], rtol=1e-9
    )
    assert len(uncapped) >= timesteps - 2


def test_sigmoid_is_symmetric_between_its_ends() -> None:
    betas = beta_schedule("sigmoid", 101)
    np.testing.assert_allclose(betas + betas[::-1], 1e-4 + 0.02, rtol=1e-12)
    np.testing.assert_allclose(betas[0], 1e-4 + 0.0199 / (1 + math.exp(6)), rtol=1e-12)
    np.testing.assert_allclose(betas[75], 1e-4 + 0.0199 / (1 + math.exp(-3)), rtol=1e-12)


def test_ends_are_rescaled_only_on_request() -> None:
    """Ho et al.'s ends over 100 steps leave a third of the signal.

    Improved DDPM's rescaling does not.
    """
    np.testing.assert_allclose(schedule("linear", 100).alphas_cumprod[-1], 0.36, atol=0.005)
    rescaled = schedule("linear", 100, rescale=True)
    np.testing.assert_allclose(rescaled.betas[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    # Both approximate exp(-mean beta * 1000) = 4.3e-5; the shorter chain less well.
    np.testing.assert_allclose(rescaled.alphas_cumprod[-1], math.exp(-10.05), rtol=0.55)
    np.testing.assert_allclose(
        schedule("linear", 4000, rescale=True).alphas_cumprod[-1], math.exp(-10.05), rtol=0.02
    )
    np.testing.assert_array_equal(schedule("linear", rescale=True).betas, schedule("linear").betas)


@pytest.mark.parametrize("timesteps", [2, 3, 1000])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_signal_shifted_and_scaled_ends_at_zero(kind: str, timesteps: int) -> None:
    """sqrt(alphas_cumprod) is an affine map of what it was: its first value stays, its last is 0.

    jsd, which ends at 0 already, stays as it is.
    """
    before = schedule(kind, timesteps)
    made = schedule(kind, timesteps, zero_terminal_snr=True)
    assert made.alphas_cumprod[-1] == 0 and made.betas[-1] == 1 and made.ends_in_pure_noise
    assert made.betas[0] == before.betas[0] and (np.diff(made.alphas_cumprod) < 0).all()
    first, last = before.sqrt_alphas_cumprod[[0, -1]]
    share = (before.sqrt_alphas_cumprod - last) / (first - last)
    np.testing.assert_allclose(made.sqrt_alphas_cumprod, first * share, rtol=1e-9, atol=1e-14)
    if kind == "jsd":
        np.testing.assert_allclose(made.betas, before.betas, rtol=1e-9)


def test_one_step_cannot_keep_its_signal_and_end_without() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr: .* takes at least 2 steps"):
        beta_schedule("linear", 1, zero_terminal_snr=True)


def test_chain_of_one_step() -> None:
    made = NoiseSchedule.from_betas(np.array([0.3]))
    np.testing.assert_allclose(made.posterior_log_variance_clipped, math.log(0.3))
    np.testing.assert_allclose(made.log_betas_clipped, math.log(0.3))
    assert (made.posterior_mean_coef1[0], made.posterior_mean_coef2[0]) == (1, 0)


def test_signal_beyond_float32_counts_as_pure_noise() -> None:
    """0.98^10000 = 2e-88 is positive in float64, but 1/sqrt of it is infinite in float32.

    There eps would sample NaN.
    """
    made = schedule("const", 10_000)
    assert made.alphas_cumprod[-1] > 0 and made.ends_in_pure_noise


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0, 0.2], "beta_1 = 0"),
        ([0.1, 0.2, 1.5, 2.0], "beta_2 = 1.5"),
        ([-0.1], "beta_0 = -0.1"),
        ([0.1, float("nan")], "beta_1 = nan"),
        ([], "non-empty vector"),
        ([[0.1]], "shape"),
    ],
)
def test_bad_betas_are_refused_naming_the_first(betas: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_betas(np.array(betas))
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(np.array(betas))


@pytest.mark.parametrize(
    ("kind", "timesteps", "options", "message"),
    [
        ("linear", 10, {"rescale": True}, r"beta_5 = 1\.1"),
        ("const", 3, {"beta_end": 0.0}, "beta_0 = 0"),
        ("linear", 0, {}, "timesteps=0"),
        ("liner", 10, {}, "schedule='liner': one of linear"),
    ],
)
def test_bad_schedules_are_refused(kind: str, timesteps: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beta_schedule(kind, timesteps, **options)
