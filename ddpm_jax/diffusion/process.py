"""Compute the forward process q, its posterior and the reverse process p_theta.

They are those of Ho et al. 2020, sections 2 and 3, as pure functions of arrays. Images are
[b, h, w, c] in [-1, 1]. Timesteps t are integer [b] in 0..T-1, where t here is t+1 in the paper.
The network is any callable `denoise(x_t, t) -> output`, whose channels are those of the image or,
where the variance is learned, twice as many.

What a network predicts, and how that gives the others:

    x_t = sqrt(ab) x0 + sqrt(1-ab) eps                      eq. 4, ab = alphas_cumprod
    v   = sqrt(ab) eps - sqrt(1-ab) x0                      Salimans & Ho 2022
    mu  = coef1 x0 + coef2 x_t                              eq. 7, the mean of q(x_{t-1} | x_t, x0)
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.schedule import NoiseSchedule

Prediction = Literal["eps", "x0", "v", "mu"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
PREDICTIONS: tuple[str, ...] = typing.get_args(Prediction)
VARIANCES: tuple[str, ...] = typing.get_args(Variance)

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A noise schedule, and what the network's output means.

    Attributes:
      prediction: what the (first half of the) output is: eps, x0, v or mu.
      variance: of p_theta(x_{t-1} | x_t). fixed_small is the posterior's, fixed_large is beta_t
        (section 3.2). learned takes the second half of the output as the log-variance;
        learned_range places it between the logs of the two fixed ones (Nichol & Dhariwal 2021,
        eq. 15).

    Raises:
      ValueError: an unknown kind; or prediction eps with a schedule that ends at
        alphas_cumprod = 0, where 1/sqrt of it is infinite and eps does not give x0.
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
            raise ValueError(
                "the schedule ends at alphas_cumprod = 0, where eps cannot give x0: "
                "predict x0, v or mu"
            )

    @property
    def learns_variance(self) -> bool:
        """Return whether the second half of the output says the variance."""
        return self.variance.startswith("learned")


def extract(coefficients: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """Take `coefficients[t]` as float32 [b, 1, ..., 1] with `ndim` axes: float64 ends here."""
    return jnp.asarray(coefficients, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - t.ndim))


# ------------------------------------------------------------------------------ the forward process


def q_mean_variance(
    schedule: NoiseSchedule, x0: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean [b,h,w,c] and variance [b,1,1,1] of q(x_t | x0), eq. 4.

    q(x_t | x0) = N(sqrt(ab) x0, (1-ab) I)
    """
    mean = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim) * x0
    return mean, extract(schedule.sqrt_one_minus_alphas_cumprod**2, t, x0.ndim)


def q_sample(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Draw from q(x_t | x0) with standard normal `eps`, eq. 4.

    x_t = sqrt(ab) x0 + sqrt(1-ab) eps
    """
    signal = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim)
    return signal * x0 + extract(schedule.sqrt_one_minus_alphas_cumprod, t, x0.ndim) * eps


def q_posterior(
    schedule: NoiseSchedule, x0: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean [b,h,w,c] and log-variance [b,1,1,1] of q(x_{t-1} | x_t, x0), eqs. 6 and 7.

        mean = sqrt(ab_{t-1}) beta_t / (1-ab_t) x0 + sqrt(1-beta_t) (1-ab_{t-1}) / (1-ab_t) x_t
        variance = (1-ab_{t-1}) / (1-ab_t) beta_t

    At t = 0 the posterior is the point x0. Its log-variance is replaced as
    `NoiseSchedule.from_betas` says.
    """
    mean = extract(schedule.posterior_mean_coef1, t, x0.ndim) * x0
    mean += extract(schedule.posterior_mean_coef2, t, x0.ndim) * x_t
    return mean, extract(schedule.posterior_log_variance_clipped, t, x0.ndim)


# -------------------------------------------------------------------------- what a network predicts


def predict_x0(
    schedule: NoiseSchedule, kind: str, output: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Compute x0 [b,h,w,c] from an output of `kind` eps, x0, v or mu.

        eps:  x0 = x_t / sqrt(ab) - sqrt(1/ab - 1) eps
        v:    x0 = sqrt(ab) x_t - sqrt(1-ab) v
        mu:   x0 = (mu - coef2 x_t) / coef1

    Raises:
      ValueError: kind eps where the schedule ends at alphas_cumprod = 0; unknown kind.
    """

    def at(coefficients: np.ndarray) -> jax.Array:
        return extract(coefficients, t, x_t.ndim)

    if kind == "x0":
        return output
    if kind == "eps":
        if schedule.ends_in_pure_noise:
            raise ValueError(
                "alphas_cumprod ends at 0, where eps cannot give x0: predict x0, v or mu"
            )
        return (
            at(schedule.sqrt_recip_alphas_cumprod) * x_t
            - at(schedule.sqrt_recipm1_alphas_cumprod) * output
        )
    if kind == "v":
        return (
            at(schedule.sqrt_alphas_cumprod) * x_t
            - at(schedule.sqrt_one_minus_alphas_cumprod) * output
        )
    if kind == "mu":
        ratio = schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1
        return at(1 / schedule.posterior_mean_coef1) * output - at(ratio) * x_t
    raise ValueError(f"prediction={kind!r}: one of {', '.join(PREDICTIONS)}")


def eps_from_x0(schedule: NoiseSchedule, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Compute eps = (x_t - sqrt(ab) x0) / sqrt(1-ab), which is eq. 4 solved for eps."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, x_t.ndim)
    return (x_t - signal * x0) / extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_t.ndim)


def v_from_x0_eps(
    schedule: NoiseSchedule, x0: jax.Array, eps: jax.Array, t: jax.Array
) -> jax.Array:
    """Compute v = sqrt(ab) eps - sqrt(1-ab) x0 (Salimans & Ho 2022)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, x0.ndim)
    return signal * eps - extract(schedule.sqrt_one_minus_alphas_cumprod, t, x0.ndim) * x0


def convert(
    schedule: NoiseSchedule,
    output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    source: str,
    target: str,
) -> jax.Array:
    """Convert an output of kind `source` to kind `target`, both among eps, x0, v and mu.

    Raises:
      ValueError: an unknown kind, or as `predict_x0`.
    """
    if target not in PREDICTIONS:
        raise ValueError(f"prediction={target!r}: one of {', '.join(PREDICTIONS)}")
    if source == target:
        return output
    x0 = predict_x0(schedule, source, output, x_t, t)
    if target == "x0":
        return x0
    if target == "mu":
        return q_posterior(schedule, x0, x_t, t)[0]
    # eps as it is where we have it: the way over x0 would cost digits where the signal is weak.
    eps = output if source == "eps" else eps_from_x0(schedule, x0, x_t, t)
    return eps if target == "eps" else v_from_x0_eps(schedule, x0, eps, t)


# ------------------------------------------------------------------------------ the reverse process


@dataclass(frozen=True)
class ReverseStep:
    """p_theta(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x0 that gave the mean.

    Arrays like x_t.
    """

    mean: jax.Array
    log_variance: jax.Array  # [b,1,1,1] where fixed, [b,h,w,c] where learned
    x0: jax.Array


def split_output(
    process: GaussianDiffusion, output: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Split the network's output into prediction and raw variance.

    The second is None where the variance is fixed.
    """
    if not process.learns_variance:
        return output, None
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, raw


def reverse_log_variance(
    process: GaussianDiffusion, raw: jax.Array | None, t: jax.Array, ndim: int
) -> jax.Array:
    """Compute log sigma_t^2 of p_theta, section 3.2.

    learned_range, with f = (raw+1)/2 (Nichol & Dhariwal 2021, eq. 15):

        log sigma_t^2 = f log(beta_t) + (1-f) log(posterior variance)

    The log of beta_0 is used as it is; that of the posterior's 0 at t = 0 is replaced as
    `NoiseSchedule.from_betas` says.
    """
    schedule = process.schedule
    if process.variance == "fixed_small":
        return extract(schedule.posterior_log_variance_clipped, t, ndim)
    if process.variance == "fixed_large":
        return extract(schedule.log_betas_clipped, t, ndim)
    assert raw is not None
    if process.variance == "learned":
        return raw
    low = extract(schedule.posterior_log_variance_clipped, t, ndim)
    high = extract(np.log(schedule.betas), t, ndim)
    return log_variance_in_range(raw, low, high)


def log_variance_in_range(raw: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Compute the log-variance at (raw+1)/2 of the way from `low` to `high`.

    This is `learned_range`, eq. 15 of Nichol & Dhariwal 2021.
    """
    return low + (raw + 1) / 2 * (high - low)


def p_mean_variance(
    process: GaussianDiffusion, output: jax.Array, x_t: jax.Array, t: jax.Array, *, clip: bool
) -> ReverseStep:
    """Compute the reverse step that a network's output stands for, eqs. 1 and 11.

        p_theta(x_{t-1} | x_t) = N(mean of q(x_{t-1} | x_t, x0_hat), sigma_t^2)

    Args:
      clip: limit x0_hat to [-1, 1] before the mean is formed from it, as the paper's sampler and
        likelihood do. Its losses do not.
    """
    prediction, raw = split_output(process, output)
    log_variance = reverse_log_variance(process, raw, t, x_t.ndim)
    x0 = predict_x0(process.schedule, process.prediction, prediction, x_t, t)
    if clip:
        x0 = jnp.clip(x0, -1, 1)
    elif process.prediction == "mu":  # the mean is what was predicted: no way there and back
        return ReverseStep(prediction, log_variance, x0)
    return ReverseStep(q_posterior(process.schedule, x0, x_t, t)[0], log_variance, x0)
