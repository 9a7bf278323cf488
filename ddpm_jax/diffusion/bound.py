"""Compute the variational bound of an image, term by term, and the rate-distortion curve.

Ho et al. 2020, eq. 5 and section 4.3:

    -log p(x0) <= L_T + sum_{t>=1} L_t + L_0
    L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  t = T-1..0

(t here is t+1 in the paper, whose L_{t-1} is our term at t-1.) Each expectation over x_t is taken
at one draw an image, so that all T terms cost T forward passes. An estimate with fewer passes
draws one timestep from each of K strata of 0..T-1:

    sum_t L_t ~ sum_k size_k L_{t_k},   t_k uniform in stratum k, drawn anew for each image

It is unbiased whatever the strata, and with K = T it is the sum itself. One stratum is t = 0
alone, so that L_0 is always seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.gaussians import (
    discretized_gaussian_log_likelihood,
    mean_over_pixels,
    normal_kl,
)
from ddpm_jax.diffusion.process import (
    Denoiser,
    GaussianDiffusion,
    p_mean_variance,
    q_mean_variance,
    q_posterior,
    q_sample,
)
from ddpm_jax.diffusion.randomness import normal_per_example
from ddpm_jax.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Strata:
    """A partition of 0..T-1 into K runs of timesteps, lowest first.

    Attributes:
      first, size: int32 [K] each.
    """

    first: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def timesteps(self) -> int:
        """Return T, the number of timesteps in all strata."""
        return int(self.size.sum())


def timestep_strata(schedule: NoiseSchedule, count: int = 0) -> Strata:
    """Divide 0..T-1 into `count` strata, the first of them t = 0 alone.

    The others are equal steps of log(1 + SNR) = -log(1 - ab), what a step reveals of Gaussian
    data, as far as whole timesteps allow. Single terms differ by orders of magnitude; the sums
    over these strata do not.

    Args:
      count: how many; 0 for one a timestep.

    Raises:
      ValueError: count outside 2..T (1..T where T = 1).
    """
    timesteps = schedule.timesteps
    count = count or timesteps
    if not min(2, timesteps) <= count <= timesteps:
        raise ValueError(f"num_timesteps={count}: must be in {min(2, timesteps)}..{timesteps}")
    passed = 2 * np.log(schedule.sqrt_one_minus_alphas_cumprod)
    passed = passed - passed[0]
    ends = np.searchsorted(passed, np.linspace(0, passed[-1], count)) + 1
    edges = np.concatenate([[0], ends])
    edges[-1] = timesteps
    for k in range(1, count):  # no stratum is empty, seen from below and from above
        edges[k] = min(max(edges[k], edges[k - 1] + 1), timesteps - count + k)
    return Strata(edges[:-1].astype(np.int32), np.diff(edges).astype(np.int32))


def bound_terms(
    process: GaussianDiffusion,
    denoise: Denoiser,
    x0: jax.Array,
    keys: jax.Array,
    first: jax.Array,
    size: jax.Array,
    *,
    clip: bool,
    cdf: str,
) -> dict[str, jax.Array]:
    """Compute one term of the bound from each of K strata, in one `lax.scan`.

    It takes one forward pass and one image-sized array a stratum.

    Args:
      x0: [b,h,w,c], levels k/127.5 - 1 of 8-bit images.
      keys: typed keys [b]. Timestep and noise of image i depend on (keys[i], stratum) alone, the
        noise through t.
      first, size: int32 [K], strata as of `timestep_strata`; any of them, in any order.
      clip: limit x0_hat to [-1, 1], as the paper's evaluation does and its losses do not.
      cdf: of the decoder, "tanh" as in the paper's code, or "erf", exact.

    Returns:
      [b, K] each: `t` int32; `term` float32, L_t at x_t ~ q(x_t | x0), in bits/dim;
      `squared_error` float32, the mean over pixels of (x0 - x0_hat(x_t))^2.
    """
    timesteps = process.schedule.timesteps

    def one_stratum(
        _: None, stratum: tuple[jax.Array, jax.Array]
    ) -> tuple[None, dict[str, jax.Array]]:
        first, size = stratum
        draw_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, timesteps + first)
        t = first + jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(draw_keys)
        eps = normal_per_example(jax.vmap(jax.random.fold_in)(keys, t), x0.shape[1:])
        x_t = q_sample(process.schedule, x0, t, eps)
        output = denoise(x_t, t)
        x0_hat = p_mean_variance(process, output, x_t, t, clip=clip).x0
        error = jnp.mean((x0 - x0_hat) ** 2, axis=(1, 2, 3))
        term = bound_term(process, output, x0, x_t, t, clip=clip, cdf=cdf)
        return None, {"t": t, "term": term, "squared_error": error}

    _, columns = jax.lax.scan(one_stratum, None, (first, size))
    return {name: column.T for name, column in columns.items()}


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """Figure 5: what the receiver knows of x0 once x_t has come.

    Float64 [K] each, t falling, which is the order of sending.

    Attributes:
      t: the mean timestep of each stratum. T - t reverse steps lead from x_t to x_0.
      rate: L_T + the terms above t, in bits/dim: the paper's cumulative rate.
      rmse: root mean square of x0 - x0_hat(x_t) over pixels and images, on the scale 0..255.
    """

    t: np.ndarray
    rate: np.ndarray
    rmse: np.ndarray


def rate_distortion(
    strata: Strata,
    prior: float,
    term: np.ndarray,
    term_below: np.ndarray,
    squared_error: np.ndarray,
) -> RateDistortion:
    """Compute the rate-distortion curve from means over images.

    At t the receiver has what L_T and the terms above t have paid for. A stratum of several
    timesteps gives the mean of that rate over them, whose share from its own terms is
    sum_t L_t (t - first) / size, hence `term_below`.

    Args:
      prior: L_T.
      term, term_below, squared_error: float64 [K], means of `term`, `term * (t - first)` and
        `squared_error` of `bound_terms`.
    """
    stratum_sum = strata.size * term
    above = prior + np.append(np.cumsum(stratum_sum[::-1])[::-1][1:], 0.0)
    middle = strata.first + (strata.size - 1) / 2
    rmse = 127.5 * np.sqrt(squared_error)
    return RateDistortion(middle[::-1], (above + term_below)[::-1], rmse[::-1])


def bound_term(
    process: GaussianDiffusion,
    output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    clip: bool,
    cdf: str = "tanh",
) -> jax.Array:
    """Compute the term of the variational bound at t, eq. 5, in bits/dim, [b].

    KL(q(x_{t-1} | x_t, x0) || p_theta(x_{t-1} | x_t))    for t > 0
    -log p(x0 | x_1), the decoder's                       for t = 0
    """
    step = p_mean_variance(process, output, x_t, t, clip=clip)
    true_mean, true_log_variance = q_posterior(process.schedule, x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, step.mean, step.log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, step.mean, 0.5 * step.log_variance, cdf=cdf)
    nats = jnp.where(t == 0, mean_over_pixels(decoder), mean_over_pixels(kl))
    return nats / np.log(2)


def prior_term(schedule: NoiseSchedule, x0: jax.Array) -> jax.Array:
    """Compute L_T = KL(q(x_T | x0) || N(0, I)) of eq. 5, in bits/dim, [b].

    It has no parameters.
    """
    mean, variance = q_mean_variance(schedule, x0, jnp.full(x0.shape[0], schedule.timesteps - 1))
    zero = jnp.zeros((), x0.dtype)
    kl = normal_kl(mean, jnp.log(variance), zero.reshape(1, 1, 1, 1), zero.reshape(1, 1, 1, 1))
    return mean_over_pixels(kl) / np.log(2)
