"""The forward process q, its posterior, and the reverse process p_theta (Ho et al. 2020, sections 2 and 3).

Pure functions of arrays. Images are [b, h, w, c] in [-1, 1], timesteps t integer [b] in 0..T-1 (t here is t+1 in the paper),
and the network is any callable `denoise(x_t, t) -> output`, whose channels are those of the image or, where the variance is
learned, twice as many.

What a network predicts, and how that gives the others:

    x_t = sqrt(ab) x0 + sqrt(1-ab) eps                      eq. 4, ab = alphas_cumprod
    v   = sqrt(ab) eps - sqrt(1-ab) x0                      Salimans & Ho 2022
    mu  = coef1 x0 + coef2 x_t                              eq. 7, the mean of q(x_{t-1} | x_t, x0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.schedule import NoiseSchedule

PREDICTIONS = ("eps", "x0", "v", "mu")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A noise schedule, and what the network's output means.

    Attributes:
      prediction: what the (first half of the) output is: eps, x0, v or mu.
      variance: of p_theta(x_{t-1} | x_t). fixed_small is the posterior's, fixed_large is beta_t (section 3.2); learned takes
        the second half of the output as the log-variance; learned_range places it between the logs of the two fixed ones
        (Nichol & Dhariwal 2021, eq. 15).

    Raises:
      ValueError: an unknown kind; or prediction eps with a schedule that ends at alphas_cumprod = 0 (jsd), where 1/sqrt of
        it is infinite and x0 cannot be had.
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    variance: str = "fixed_large"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: one of {', '.join(PREDICTIONS)}")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r}: one of {', '.join(VARIANCES)}")
        if self.prediction == "eps" and self.schedule.ends_in_pure_noise:
            raise ValueError("the schedule ends at alphas_cumprod = 0, where eps cannot give x0: predict x0, v or mu")

    @property
    def learns_variance(self) -> bool:
        return self.variance.startswith("learned")


def extract(coefficients: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """`coefficients[t]` in float32, shape [b, 1, ..., 1] with `ndim` axes: float64 ends here."""
    return jnp.asarray(coefficients, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - t.ndim))


# ---------------------------------------------------------------------------------------------- the forward process


def q_step(schedule: NoiseSchedule, x_prev: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """A draw of q(x_t | x_{t-1}) = N(sqrt(1-beta_t) x_{t-1}, beta_t I), eq. 2, from standard normal `noise`."""
    keep = extract(np.sqrt(1 - schedule.betas), t, x_prev.ndim)
    return keep * x_prev + extract(np.sqrt(schedule.betas), t, x_prev.ndim) * noise


def q_mean_variance(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [b,h,w,c] and variance [b,1,1,1] of q(x_t | x0) = N(sqrt(ab) x0, (1-ab) I), eq. 4."""
    mean = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim) * x0
    return mean, extract(schedule.sqrt_one_minus_alphas_cumprod**2, t, x0.ndim)


def q_sample(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x_t = sqrt(ab) x0 + sqrt(1-ab) eps, eq. 4: a draw of q(x_t | x0) from standard normal `eps`."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim)
    return signal * x0 + extract(schedule.sqrt_one_minus_alphas_cumprod, t, x0.ndim) * eps


def q_posterior(schedule: NoiseSchedule, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [b,h,w,c] and log-variance [b,1,1,1] of q(x_{t-1} | x_t, x0), eqs. 6 and 7.

    At t = 0 the posterior is the point x0; its log-variance is replaced as `NoiseSchedule.from_betas` says.
    """
    mean = extract(schedule.posterior_mean_coef1, t, x0.ndim) * x0
    mean += extract(schedule.posterior_mean_coef2, t, x0.ndim) * x_t
    return mean, extract(schedule.posterior_log_variance_clipped, t, x0.ndim)


# ---------------------------------------------------------------------------------------------- what a network predicts


def predict_x0(schedule: NoiseSchedule, kind: str, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """x0 [b,h,w,c] from an output of `kind` eps, x0, v or mu.

    Raises:
      ValueError: kind eps where the schedule ends at alphas_cumprod = 0; unknown kind.
    """

    def at(coefficients: np.ndarray) -> jax.Array:
        return extract(coefficients, t, x_t.ndim)

    if kind == "x0":
        return output
    if kind == "eps":
        if schedule.ends_in_pure_noise:
            raise ValueError("alphas_cumprod ends at 0, where eps cannot give x0: predict x0, v or mu")
        return at(schedule.sqrt_recip_alphas_cumprod) * x_t - at(schedule.sqrt_recipm1_alphas_cumprod) * output
    if kind == "v":
        return at(schedule.sqrt_alphas_cumprod) * x_t - at(schedule.sqrt_one_minus_alphas_cumprod) * output
    if kind == "mu":
        ratio = schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1
        return at(1 / schedule.posterior_mean_coef1) * output - at(ratio) * x_t
    raise ValueError(f"prediction={kind!r}: one of {', '.join(PREDICTIONS)}")


def eps_from_x0(schedule: NoiseSchedule, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """eps = (x_t - sqrt(ab) x0) / sqrt(1-ab), eq. 4 solved for eps."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, x_t.ndim)
    return (x_t - signal * x0) / extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t.ndim)


def v_from_x0_eps(schedule: NoiseSchedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """v = sqrt(ab) eps - sqrt(1-ab) x0 (Salimans & Ho 2022)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim)
    return signal * eps - extract(schedule.sqrt_one_minus_alphas_cumprod, t, x0.ndim) * x0


def convert(schedule: NoiseSchedule, output: jax.Array, x_t: jax.Array, t: jax.Array, *, source: str, target: str) -> jax.Array:
    """An output of kind `source` as kind `target`, both among eps, x0, v and mu; the errors of `predict_x0`."""
    if target not in PREDICTIONS:
        raise ValueError(f"prediction={target!r}: one of {', '.join(PREDICTIONS)}")
    if source == target:
        return output
    x0 = predict_x0(schedule, source, output, x_t, t)
    if target == "x0":
        return x0
    if target == "mu":
        return q_posterior(schedule, x0, x_t, t)[0]
    # eps itself where it is what we have: the way over x0 would cost digits where the signal is weak.
    eps = output if source == "eps" else eps_from_x0(schedule, x0, x_t, t)
    return eps if target == "eps" else v_from_x0_eps(schedule, x0, eps, t)


# ---------------------------------------------------------------------------------------------- the reverse process


@dataclass(frozen=True)
class ReverseStep:
    """p_theta(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x0 that the mean came from. Arrays like x_t."""

    mean: jax.Array
    log_variance: jax.Array  # [b,1,1,1] where fixed, [b,h,w,c] where learned
    x0: jax.Array


def split_output(diffusion: GaussianDiffusion, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The network's output as (prediction, raw variance); the second is None where the variance is fixed."""
    if not diffusion.learns_variance:
        return output, None
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, raw


def reverse_log_variance(diffusion: GaussianDiffusion, raw: jax.Array | None, t: jax.Array, ndim: int) -> jax.Array:
    """log sigma_t^2 of p_theta, section 3.2.

    learned_range: with f = (raw+1)/2, f log(beta_t) + (1-f) log(posterior variance), Nichol & Dhariwal 2021, eq. 15; the log
    of beta_0 is used as it is, that of the posterior's 0 at t = 0 as `NoiseSchedule.from_betas` says.
    """
    schedule = diffusion.schedule
    if diffusion.variance == "fixed_small":
        return extract(schedule.posterior_log_variance_clipped, t, ndim)
    if diffusion.variance == "fixed_large":
        return extract(schedule.log_betas_clipped, t, ndim)
    assert raw is not None
    if diffusion.variance == "learned":
        return raw
    low = extract(schedule.posterior_log_variance_clipped, t, ndim)
    high = extract(np.log(schedule.betas), t, ndim)
    return log_variance_in_range(raw, low, high)


def log_variance_in_range(raw: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`learned_range`: the log-variance at (raw+1)/2 of the way from `low` to `high`, Nichol & Dhariwal 2021, eq. 15."""
    return low + (raw + 1) / 2 * (high - low)


def p_mean_variance(diffusion: GaussianDiffusion, output: jax.Array, x_t: jax.Array, t: jax.Array, *, clip: bool) -> ReverseStep:
    """The reverse step that a network's output means, eqs. 1 and 11.

    Args:
      clip: limit x0 to [-1, 1] before the mean is formed from it, as the paper's sampler and likelihood do. Its losses do
        not.
    """
    prediction, raw = split_output(diffusion, output)
    log_variance = reverse_log_variance(diffusion, raw, t, x_t.ndim)
    x0 = predict_x0(diffusion.schedule, diffusion.prediction, prediction, x_t, t)
    if clip:
        x0 = jnp.clip(x0, -1, 1)
    elif diffusion.prediction == "mu":  # the mean is what was predicted: no way there and back
        return ReverseStep(prediction, log_variance, x0)
    return ReverseStep(q_posterior(diffusion.schedule, x0, x_t, t)[0], log_variance, x0)


# ---------------------------------------------------------------------------------------------- Gaussians


def normal_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, element by element."""
    # Late in the chain the variances almost agree: exp(ratio) - 1 would leave a difference of 1e-7 from numbers near 1.
    ratio = log_variance1 - log_variance2
    return 0.5 * (jnp.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2))


def standard_normal_cdf_tanh(z: jax.Array) -> jax.Array:
    """The normal distribution function by the tanh approximation that the paper's code uses; off by up to 2e-4.

    0.5 (1 + tanh(y)) is written as the sigmoid of 2y, which keeps its digits in the left tail.
    """
    return jax.nn.sigmoid(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


CDFS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": standard_normal_cdf_tanh, "erf": jax.scipy.stats.norm.cdf}


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array, *, cdf: str = "tanh") -> jax.Array:
    """log P(x) of 8-bit data under a Gaussian cut into 256 bins, eq. 13, in nats, element by element.

    Args:
      x: values k/127.5 - 1 for k = 0..255.
      log_scale: log of the standard deviation, half the log-variance.
      cdf: "tanh" as the paper's code, or "erf", exact.

    The bins are x +- 1/255, the first open to the left and the last to the right. A probability below 1e-12 counts as 1e-12.
    """
    distribution, inverse = CDFS[cdf], jnp.exp(-log_scale)
    upper, lower = inverse * (x - mean + 1 / 255), inverse * (x - mean - 1 / 255)
    # A bin right of the mean is measured as its mirror image on the left, where float32 resolves small probabilities.
    first, last = x < -0.999, x > 0.999
    mirror = last | (~first & (x > mean))
    near, far = jnp.where(mirror, -lower, upper), jnp.where(mirror, -upper, lower)
    probability = distribution(near) - jnp.where(first | last, 0, distribution(far))
    return jnp.log(jnp.maximum(probability, 1e-12))
