"""Data whose best denoiser is known: independent pixels from N(m, s^2).

With the exact denoiser the reverse chain is linear, so the mean and variance of its samples, every
term of the bound and the training loss have closed forms. They are computed here in float64 from
the betas, by conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.diffusion.bound import prior_term
from ddpm_jax.diffusion.chain import initial_noise, reverse_chain
from ddpm_jax.diffusion.losses import Objective, per_example_loss
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import ancestral_table
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from tests.support.gaussian_chain import GaussianChain

MEAN, STD = 0.3, 0.4


def schedule(timesteps: int) -> NoiseSchedule:
    """A short chain that still ends near N(0, I)."""
    betas = beta_schedule("linear", timesteps, beta_start=0.1 / timesteps, beta_end=18 / timesteps)
    return NoiseSchedule.from_betas(betas)


def exact_denoiser(chain: GaussianChain, mean: float = MEAN, std: float = STD) -> Callable:
    """E[eps | x_t] as a network would give it, float32."""
    noise = np.sqrt(np.diag(chain.covariance))
    best = np.array([chain.best_x0(t, mean, std) for t in range(len(noise))])
    slope, offset = (1 - chain.signal * best[:, 0]) / noise, -chain.signal * best[:, 1] / noise

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        a, b = (jnp.asarray(v, jnp.float32)[t][:, None, None, None] for v in (slope, offset))
        return a * x + b

    return denoise


def sampled_moments(chain: GaussianChain, kept: np.ndarray, variance: str) -> tuple[float, float]:
    """Return mean and variance of what the chain over the timesteps `kept` makes of N(0, 1).

    Both are in closed form.
    """
    mean, spread = 0.0, 1.0
    for later, earlier in zip(kept[::-1], [*kept[-2::-1], -1]):
        on_x0, on_xt, added = chain.posterior(earlier, later)
        factor, offset = chain.best_x0(later, MEAN, STD)
        if variance == "fixed_large" and earlier >= 0:
            ratio = chain.signal[later] / chain.signal[earlier]
            added = 1 - ratio**2
        gain = on_x0 * factor + on_xt
        mean, spread = gain * mean + on_x0 * offset, gain**2 * spread + added
    return mean, spread


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_samples_have_the_moments_of_the_discrete_chain(variance: str, steps: int) -> None:
    """20 steps are few enough for the two variances, and for a strided chain, to show."""
    made = schedule(20)
    chain, process = GaussianChain(made.betas), GaussianDiffusion(made, "eps", variance)
    table, shape = ancestral_table(process, steps), (16, 16, 3)

    @jax.jit
    def run(keys: jax.Array) -> jax.Array:
        return reverse_chain(
            process, table, exact_denoiser(chain), initial_noise(keys, shape, 20), keys, clip=False
        )

    x = np.asarray(run(jax.random.split(jax.random.key(0), 256)), np.float64)
    mean, spread = sampled_moments(chain, table.timesteps[::-1], variance)
    np.testing.assert_allclose(x.mean(), mean, atol=4.5 * math.sqrt(spread / x.size))
    np.testing.assert_allclose(x.var(), spread, rtol=4.5 * math.sqrt(2 / x.size))
    other = sampled_moments(
        chain, table.timesteps[::-1], {"fixed_small": "fixed_large"}.get(variance, "fixed_small")
    )
    assert abs(other[1] - spread) > 20 * spread * math.sqrt(
        2 / x.size
    )  # so that the wrong one would be seen
    assert scipy.stats.kstest((x.ravel()[::7] - mean) / math.sqrt(spread), "norm").pvalue > 1e-4


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_long_chains_reach_the_data(variance: str) -> None:
    """The library's own table carried through in float64.

    The error of the variance falls with the number of steps.
    """
    errors = []
    for timesteps in (50, 200, 1000):
        made = schedule(timesteps)
        chain, table = (
            GaussianChain(made.betas),
            ancestral_table(GaussianDiffusion(made, "eps", variance)),
        )
        mean, spread = 0.0, 1.0
        for t, a, b, s in zip(table.timesteps, table.x0, table.x, table.z):
            factor, offset = chain.best_x0(t, MEAN, STD)
            mean, spread = (
                (a * factor + b) * mean + a * offset,
                (a * factor + b) ** 2 * spread + s**2,
            )
        errors.append(abs(spread - STD**2))
    assert abs(mean - MEAN) < 3e-3
    assert errors[2] < 0.02 * STD**2 and errors[2] < 0.3 * errors[1] and errors[1] < 0.4 * errors[0]


def test_training_loss_of_the_exact_denoiser_is_what_cannot_be_known() -> None:
    """E ||eps - E[eps|x_t]||^2 = ab s^2 / (ab s^2 + 1 - ab)."""
    made = schedule(20)
    chain, t = GaussianChain(made.betas), jnp.arange(20)
    x0, eps = jax.random.normal(jax.random.key(1), (2, 20, 32, 32, 3))
    denoise = exact_denoiser(chain)
    loss = per_example_loss(GaussianDiffusion(made), Objective(), denoise, MEAN + STD * x0, t, eps)[
        "loss"
    ]
    signal, noise = chain.signal**2 * STD**2, np.diag(chain.covariance)
    np.testing.assert_allclose(
        loss, signal / (signal + noise), rtol=4.5 * math.sqrt(2 / (32 * 32 * 3))
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_the_bound_have_their_closed_form(variance: str) -> None:
    """The KL of the exact denoiser is what x_t leaves unknown of x0, over 2 var.

    That is coef1^2 s^2 (1-ab)/(ab s^2 + 1-ab).
    """
    made = schedule(20)
    chain, t = GaussianChain(made.betas), jnp.arange(20)
    x0, eps = jax.random.normal(jax.random.key(2), (2, 20, 32, 32, 3))
    process = GaussianDiffusion(made, "eps", variance)
    terms = per_example_loss(
        process, Objective("vlb"), exact_denoiser(chain), MEAN + STD * x0, t, eps
    )["vlb"]
    for i in range(1, 20):
        on_x0, _, true = chain.posterior(i - 1, i)
        model = true if variance == "fixed_small" else made.betas[i]
        noise = chain.covariance[i, i]
        unknown = STD**2 * noise / (chain.signal[i] ** 2 * STD**2 + noise)
        spread = on_x0**2 * unknown / model
        nats = 0.5 * (math.log(model / true) - 1 + true / model + spread)
        error = 4.5 * 0.5 * spread * math.sqrt(2 / (32 * 32 * 3))
        np.testing.assert_allclose(
            terms[i], 20 * nats / math.log(2), rtol=1e-4, atol=20 * error / math.log(2)
        )


def test_bound_of_the_exact_reverse_process_is_the_entropy_of_the_data() -> None:
    """With the true p(x_{t-1} | x_t), learned variance included, the bound is tight.

        prior + all terms = -E log P(x0)


    A term lost or counted twice, nats for bits, a sum for a mean or a T too many: all are far
    outside.
    """
    made, std, timesteps = schedule(50), 0.25, 50
    chain = GaussianChain(made.betas)
    process, denoise_eps = (
        GaussianDiffusion(made, "eps", "learned"),
        exact_denoiser(chain, 0.0, std),
    )
    log_variance = []
    for t in range(timesteps):
        on_x0, _, known = chain.posterior(t - 1, t)
        unknown = (
            std**2
            * chain.covariance[t, t]
            / (chain.signal[t] ** 2 * std**2 + chain.covariance[t, t])
        )
        log_variance.append(math.log(known + on_x0**2 * unknown))

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        raw = jnp.asarray(log_variance, jnp.float32)[t][:, None, None, None]
        return jnp.concatenate([denoise_eps(x, t), jnp.broadcast_to(raw, x.shape)], axis=-1)

    levels = np.arange(256) / 127.5 - 1
    p = np.diff(
        scipy.stats.norm.cdf(np.append(-np.inf, np.append(levels[:-1] + 1 / 255, np.inf)), 0.0, std)
    )
    index = np.random.default_rng(3).choice(256, (timesteps, 16, 16, 3), p=p)
    images, t = jnp.asarray(levels[index], jnp.float32), jnp.arange(timesteps)
    eps = jax.random.normal(jax.random.key(4), images.shape)
    terms = per_example_loss(process, Objective("vlb"), denoise, images, t, eps)["vlb"] / timesteps
    bound = terms.sum() + prior_term(made, images).mean()
    np.testing.assert_allclose(bound, -(p * np.log2(p)).sum(), atol=0.05)
