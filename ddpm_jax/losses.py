"""Training objectives, one value an example (Ho et al. 2020, sections 2 and 3.4).

    simple   mean over pixels of (target - prediction)^2, eq. 14; the target is what the network predicts: eps, x0, v, or mu
             (then the posterior mean, the unweighted error of the paper's Table 2), optionally weighted in t
    vlb      T times the bound's term at the drawn t, eq. 5, in bits/dim: with t uniform its mean is the bound without L_T
    hybrid   simple + w * vlb with no gradient through the mean (Nichol & Dhariwal 2021, eq. 16), so that the bound trains
             the variance and nothing else

The paper's own code minimises one term of the bound, not T of them. Under Adam the two differ by a factor that clip and
epsilon see: multiply both by T to run the same optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion as d
from ddpm_jax.schedule import NoiseSchedule

LOSSES = ("simple", "vlb", "hybrid")
WEIGHTINGS = ("none", "min_snr", "p2")


@dataclass(frozen=True)
class Objective:
    """Which loss; the fields are those of `config.LossConfig`."""

    kind: str = "simple"
    weighting: str = "none"
    vlb_weight: float = 1e-3
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(f"loss={self.kind!r}: one of {', '.join(LOSSES)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: one of {', '.join(WEIGHTINGS)}")


def per_example_loss(
    process: d.GaussianDiffusion,
    objective: Objective,
    denoise: d.Denoiser,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each example at its own timestep.

    Args:
      x0: images [b,h,w,c] in [-1, 1], 8-bit levels where the bound is used.
      t: integer [b]. eps: standard normal, like x0.

    Returns:
      float32 [b] each: `loss`, what is minimised; `mse`, the unweighted squared error of the prediction, unless kind is vlb;
      `vlb` in bits/dim, unless kind is simple.
    """
    x_t = d.q_sample(process.schedule, x0, t, eps)
    output = denoise(x_t, t)
    prediction, raw = d.split_output(process, output)
    terms = {}
    if objective.kind != "vlb":
        target = training_target(process, x0, x_t, t, eps)
        terms["mse"] = _mean_over_pixels((target - prediction) ** 2)
        weight = squared_error_weight(process.schedule, process.prediction, objective)
        terms["loss"] = d.extract(weight, t, 1) * terms["mse"]
    if objective.kind == "hybrid":
        output = jnp.concatenate([jax.lax.stop_gradient(prediction), raw], axis=-1)
    if objective.kind != "simple":
        terms["vlb"] = process.schedule.timesteps * bound_term(process, output, x0, x_t, t, clip=False)
        terms["loss"] = terms["vlb"] if objective.kind == "vlb" else terms["loss"] + objective.vlb_weight * terms["vlb"]
    return terms


def training_target(process: d.GaussianDiffusion, x0: jax.Array, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """What the prediction is compared with: eps, x0, v, or the posterior mean for mu. Shape of x0."""
    if process.prediction == "eps":
        return eps
    if process.prediction == "x0":
        return x0
    if process.prediction == "v":
        return d.v_from_x0_eps(process.schedule, x0, eps, t)
    return d.q_posterior(process.schedule, x0, x_t, t)[0]


def bound_term(
    process: d.GaussianDiffusion,
    output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    clip: bool,
    cdf: str = "tanh",
) -> jax.Array:
    """The term of the variational bound at t, eq. 5, in bits/dim, [b].

    KL(q(x_{t-1} | x_t, x0) || p_theta(x_{t-1} | x_t)) for t > 0, the decoder's -log p(x0 | x_1) for t = 0.
    """
    step = d.p_mean_variance(process, output, x_t, t, clip=clip)
    true_mean, true_log_variance = d.q_posterior(process.schedule, x0, x_t, t)
    kl = d.normal_kl(true_mean, true_log_variance, step.mean, step.log_variance)
    decoder = -d.discretized_gaussian_log_likelihood(x0, step.mean, 0.5 * step.log_variance, cdf=cdf)
    nats = jnp.where(t == 0, _mean_over_pixels(decoder), _mean_over_pixels(kl))
    return nats / np.log(2)


def prior_term(schedule: NoiseSchedule, x0: jax.Array) -> jax.Array:
    """L_T = KL(q(x_T | x0) || N(0, I)) of eq. 5, in bits/dim, [b]. It has no parameters."""
    mean, variance = d.q_mean_variance(schedule, x0, jnp.full(x0.shape[0], schedule.timesteps - 1))
    zero = jnp.zeros((), x0.dtype)
    kl = d.normal_kl(mean, jnp.log(variance), zero.reshape(1, 1, 1, 1), zero.reshape(1, 1, 1, 1))
    return _mean_over_pixels(kl) / np.log(2)


def squared_error_weight(schedule: NoiseSchedule, prediction: str, objective: Objective) -> np.ndarray:
    """The weight of the squared error at each t, float64 [T].

    Each published weighting is a weight on one particular error; the errors of the four predictions at the same x_t differ
    by known factors, so the same weighting is the same objective whatever the network predicts.
      min_snr: min(SNR, gamma) on the error of x0 (Hang et al. 2023)
      p2: 1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022)
    """
    if objective.weighting == "none":
        return np.ones(schedule.timesteps)
    of_x0 = x0_error_factor(schedule, prediction)
    if objective.weighting == "min_snr":
        return np.minimum(schedule.snr, objective.min_snr_gamma) * of_x0
    of_eps = schedule.snr * of_x0
    return of_eps / (objective.p2_k + schedule.snr) ** objective.p2_gamma


def x0_error_factor(schedule: NoiseSchedule, prediction: str) -> np.ndarray:
    """(error of x0)^2 / (error of the prediction)^2 at equal x_t, float64 [T]: 1/SNR for eps, 1/(1+SNR) for v, ..."""
    if prediction == "eps":
        return 1 / schedule.snr
    if prediction == "v":
        return 1 / (1 + schedule.snr)
    if prediction == "mu":
        return 1 / schedule.posterior_mean_coef1**2
    return np.ones(schedule.timesteps)


def _mean_over_pixels(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
