"""Training objectives against closed forms for denoisers whose error is known."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.bound import bound_term, prior_term
from ddpm_jax.diffusion.losses import Objective, per_example_loss
from ddpm_jax.diffusion.process import PREDICTIONS, GaussianDiffusion
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from tests.support.gaussian_chain import GaussianChain

T = 20
TIMESTEPS = np.array([0, 1, 7, T - 2, T - 1])
SHAPE = (len(TIMESTEPS), 4, 4, 3)
MADE = NoiseSchedule.from_betas(beta_schedule("linear", T, rescale=False))
CHAIN = GaussianChain(MADE.betas)
NOISE = np.sqrt(np.diag(CHAIN.covariance))
SNR = (CHAIN.signal / NOISE)[TIMESTEPS] ** 2

RANDOM = np.random.default_rng(0)
X0 = RANDOM.integers(0, 256, SHAPE) / 127.5 - 1
EPS = RANDOM.normal(size=SHAPE)
X_T, PERFECT = CHAIN.perfect(TIMESTEPS, X0, EPS)


def float32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def losses(
    process: GaussianDiffusion, objective: Objective, output: np.ndarray
) -> dict[str, np.ndarray]:
    """What `per_example_loss` makes of a fixed output."""
    terms = per_example_loss(
        process,
        objective,
        lambda x_t, t: float32(output),
        float32(X0),
        jnp.asarray(TIMESTEPS),
        float32(EPS),
    )
    assert all(
        value.shape == TIMESTEPS.shape and value.dtype == jnp.float32 for value in terms.values()
    )
    return {name: np.asarray(value, np.float64) for name, value in terms.items()}


def mean_over_pixels(x: np.ndarray) -> np.ndarray:
    return x.mean(axis=(1, 2, 3))


def displaced(error: np.ndarray) -> dict[str, np.ndarray]:
    """Each kind of prediction, made at the same x_t by a network that takes x0 for X0 + error."""
    signal, noise = (v[TIMESTEPS][:, None, None, None] for v in (CHAIN.signal, NOISE))
    x_t, outputs = CHAIN.perfect(TIMESTEPS, X0 + error, EPS - signal / noise * error)
    np.testing.assert_allclose(x_t, X_T, atol=1e-12)
    return outputs


# ------------------------------------------------------------------------------------------- simple


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_prediction_has_no_loss(prediction: str) -> None:
    terms = losses(GaussianDiffusion(MADE, prediction), Objective(), PERFECT[prediction])
    np.testing.assert_allclose(terms["loss"], 0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss_is_the_mean_square_of_the_target_where_the_output_is_zero(
    prediction: str,
) -> None:
    """The target of mu is the posterior mean, by conditioning.

    A sum over pixels would be 48 times this.
    """
    terms = losses(GaussianDiffusion(MADE, prediction), Objective(), np.zeros(SHAPE))
    np.testing.assert_allclose(terms["loss"], mean_over_pixels(PERFECT[prediction] ** 2), rtol=1e-5)
    np.testing.assert_array_equal(terms["loss"], terms["mse"])
    assert set(terms) == {"loss", "mse"}


def test_the_network_sees_x_t_and_its_own_timestep() -> None:
    seen = []

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        seen.append((x_t, t))
        return jnp.zeros_like(x_t)

    per_example_loss(
        GaussianDiffusion(MADE),
        Objective(),
        denoise,
        float32(X0),
        jnp.asarray(TIMESTEPS),
        float32(EPS),
    )
    ((x_t, t),) = seen
    np.testing.assert_array_equal(t, TIMESTEPS)
    np.testing.assert_allclose(x_t, X_T, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weightings_are_one_objective_whatever_is_predicted(prediction: str) -> None:
    """One error of x0, told as four kinds of prediction, costs what the papers say."""
    error = 0.1 * np.random.default_rng(1).normal(size=SHAPE)
    of_x0, output = mean_over_pixels(error**2), displaced(error)[prediction]
    process = GaussianDiffusion(MADE, prediction)
    for gamma in (5.0, 0.3):
        terms = losses(process, Objective(weighting="min_snr", min_snr_gamma=gamma), output)
        np.testing.assert_allclose(terms["loss"], np.minimum(SNR, gamma) * of_x0, rtol=2e-3)
    for gamma, k in ((1.0, 1.0), (0.5, 3.0)):
        terms = losses(process, Objective(weighting="p2", p2_gamma=gamma, p2_k=k), output)
        np.testing.assert_allclose(terms["loss"], SNR * of_x0 / (k + SNR) ** gamma, rtol=2e-3)
    np.testing.assert_allclose(
        terms["mse"], mean_over_pixels((output - PERFECT[prediction]) ** 2), rtol=2e-3
    )


# ---------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_is_T_times_the_kl_in_bits_per_dim(prediction: str, variance: str) -> None:
    error = 0.1 * np.random.default_rng(2).normal(size=SHAPE)
    terms = losses(
        GaussianDiffusion(MADE, prediction, variance),
        Objective("vlb"),
        displaced(error)[prediction],
    )
    assert set(terms) == {"loss", "vlb"}
    np.testing.assert_array_equal(terms["loss"], terms["vlb"])
    for i, t in list(enumerate(TIMESTEPS))[1:]:
        on_x0, _, true = CHAIN.posterior(t - 1, t)
        model = true if variance == "fixed_small" else MADE.betas[t]
        nats = 0.5 * (
            math.log(model / true) - 1 + true / model + on_x0**2 * (error[i] ** 2).mean() / model
        )
        np.testing.assert_allclose(terms["vlb"][i], T * nats / math.log(2), rtol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_at_t0_is_the_decoder(variance: str) -> None:
    """x0 on two neighbouring levels, the predicted mean halfway.

    Each has the probability of one bin from the edge.
    """
    made = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
    levels = jnp.tile(jnp.asarray([-1 / 255, 1 / 255], jnp.float32), 6).reshape(1, 2, 2, 3)
    process = GaussianDiffusion(made, "x0", variance)
    zero, t = jnp.zeros(levels.shape), jnp.zeros(1, jnp.int32)
    for cdf, tolerance in (("erf", 1e-5), ("tanh", 1e-3)):
        term = bound_term(process, zero, levels, zero, t, clip=False, cdf=cdf)
        scale = math.sqrt(5.4532e-5)
        # Both bins end at the mean and are 2/255 wide: Phi(2/255/scale) - Phi(0).
        probability = 0.5 * math.erf(2 / 255 / scale / math.sqrt(2))
        np.testing.assert_allclose(term, -math.log2(probability), rtol=tolerance)


def test_bound_clips_x0_only_when_asked() -> None:
    """The likelihood clips, training does not."""
    process, t = GaussianDiffusion(MADE, "x0"), jnp.asarray(TIMESTEPS)
    far = float32(np.full(SHAPE, 1.5))
    clipped = bound_term(process, far, float32(X0), float32(X_T), t, clip=True)
    free = bound_term(process, far, float32(X0), float32(X_T), t, clip=False)
    at_one = bound_term(process, jnp.ones(SHAPE), float32(X0), float32(X_T), t, clip=False)
    np.testing.assert_allclose(clipped, at_one, rtol=1e-6)
    assert (free[1:] > 1.1 * clipped[1:]).all()
    terms = losses(process, Objective("vlb"), np.full(SHAPE, 1.5))
    np.testing.assert_allclose(terms["vlb"], T * free, rtol=1e-6)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(variance: str) -> None:
    """No gradient of the bound reaches the mean; the variance gets vlb_weight times the bound's."""
    process, t = GaussianDiffusion(MADE, "eps", variance), jnp.asarray(TIMESTEPS)

    def gradient(kind: str, process: GaussianDiffusion = process) -> dict[str, np.ndarray]:
        def total(params: dict[str, jax.Array]) -> jax.Array:
            def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
                prediction = params["mean"] * x_t
                if not process.learns_variance:
                    return prediction
                return jnp.concatenate(
                    [prediction, params["variance"] * jnp.tanh(x_t) - 3], axis=-1
                )

            objective = Objective(kind, vlb_weight=0.02)
            return per_example_loss(process, objective, denoise, float32(X0), t, float32(EPS))[
                "loss"
            ].sum()

        return jax.grad(total)({"mean": jnp.float32(0.8), "variance": jnp.float32(0.3)})

    hybrid, bound, simple = (
        gradient("hybrid"),
        gradient("vlb"),
        gradient("simple", GaussianDiffusion(MADE, "eps")),
    )
    assert abs(simple["mean"]) > 0.1 and abs(bound["mean"]) > 0.01 and abs(bound["variance"]) > 0.1
    np.testing.assert_allclose(hybrid["mean"], simple["mean"], rtol=1e-6)
    np.testing.assert_allclose(hybrid["variance"], 0.02 * bound["variance"], rtol=1e-5)


def test_hybrid_value_is_the_sum_of_its_parts() -> None:
    process = GaussianDiffusion(MADE, "eps", "learned_range")
    output = np.concatenate([np.zeros(SHAPE), np.full(SHAPE, 0.5)], axis=-1)
    terms = losses(process, Objective("hybrid", vlb_weight=0.02), output)
    np.testing.assert_allclose(terms["mse"], mean_over_pixels(EPS**2), rtol=1e-5)
    np.testing.assert_allclose(
        terms["vlb"], losses(process, Objective("vlb"), output)["vlb"], rtol=1e-6
    )
    np.testing.assert_allclose(terms["loss"], terms["mse"] + 0.02 * terms["vlb"], rtol=1e-6)


@pytest.mark.parametrize(("power", "bits"), [(0.25, 7.3e-6), (0.5, 1.5e-5)])
def test_published_prior_term(power: float, bits: float) -> None:
    """KL(q(x_T | x0) || N(0, I)) of the paper's schedule for images with E[x^2] = power."""
    x0 = jnp.full((2, 3, 3, 1), math.sqrt(power), jnp.float32)
    prior = prior_term(NoiseSchedule.from_betas(beta_schedule("linear", 1000)), x0)
    assert prior.shape == (2,)
    np.testing.assert_allclose(prior, bits, rtol=0.04)
    signal = 4.035829765e-5
    np.testing.assert_allclose(
        prior, 0.5 * (signal * power - signal - math.log1p(-signal)) / math.log(2), rtol=1e-4
    )


def test_prior_term_keeps_its_digits_where_it_is_tiny() -> None:
    """In float32, 1 - 2.4e-9 is 1: what is left of the cosine schedule's prior is its mean."""
    cosine = NoiseSchedule.from_betas(beta_schedule("cosine", 1000))
    prior = prior_term(cosine, jnp.full((1, 2, 2, 1), 0.5, jnp.float32))
    np.testing.assert_allclose(prior, 0.5 * 2.42877e-9 * 0.25 / math.log(2), rtol=1e-4)


def test_prior_term_is_zero_where_the_signal_is_gone() -> None:
    prior = prior_term(NoiseSchedule.from_betas(beta_schedule("jsd", 10)), jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(prior, 0)


def test_unknown_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match="loss='mse': one of simple, vlb, hybrid"):
        Objective("mse")
    with pytest.raises(ValueError, match="weighting='snr': one of none, min_snr, p2"):
        Objective(weighting="snr")
