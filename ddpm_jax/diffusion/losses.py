"""Compute training objectives, one value an example (Ho et al. 2020, sections 2 and 3.4).

    simple   mean over pixels of (target - prediction)^2, eq. 14, optionally weighted in t; the
             target is what the network predicts: eps, x0, v, or mu (then the posterior mean, the
             unweighted error of the paper's Table 2)
    vlb      T times the bound's term at the drawn t, eq. 5, in bits/dim: with t uniform its mean
             is the bound without L_T
    hybrid   simple + w * vlb with no gradient through the mean (Nichol & Dhariwal 2021, eq. 16),
             so that the bound trains the variance and nothing else

The paper's own code minimises one term of the bound, not T of them. Under Adam the two differ by a
factor that clip and epsilon see: multiply both by T to run the same optimisation.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.bound import bound_term
from ddpm_jax.diffusion.gaussians import mean_over_pixels
from ddpm_jax.diffusion.process import (
    Denoiser,
    GaussianDiffusion,
    extract,
    q_posterior,
    q_sample,
    split_output,
    v_from_x0_eps,
)
from ddpm_jax.diffusion.schedule import NoiseSchedule

Loss = Literal["simple", "vlb", "hybrid"]
Weighting = Literal["none", "min_snr", "p2"]
LOSSES: tuple[str, ...] = typing.get_args(Loss)
WEIGHTINGS: tuple[str, ...] = typing.get_args(Weighting)


@dataclass
class Objective:
    """Which loss; a config's section `loss` has these fields and that of the timesteps' draw."""

    kind: Loss = "simple"
    vlb_weight: float = 1e-3  # hybrid: simple + vlb_weight * (bound in bits/dim)
    weighting: Weighting = "none"  # of the squared error
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ValueError(f"loss={self.kind!r}: one of {', '.join(LOSSES)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={self.weighting!r}: one of {', '.join(WEIGHTINGS)}")


def per_example_loss(
    process: GaussianDiffusion,
    objective: Objective,
    denoise: Denoiser,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> dict[str, jax.Array]:
    """Compute the loss of each example at its own timestep.

    With the default objective this is line 5 of Algorithm 1 of the paper, before the gradient:

        || eps - eps_theta(sqrt(ab) x0 + sqrt(1-ab) eps, t) ||^2, as a mean over pixels

    Args:
      x0: images [b,h,w,c] in [-1, 1], 8-bit levels where the bound is used.
      t: integer [b]. eps: standard normal, like x0.

    Returns:
      float32 [b] each: `loss`, what is minimised; `mse`, the unweighted squared error of the
      prediction, unless kind is vlb; `vlb` in bits/dim, unless kind is simple.
    """
    x_t = q_sample(process.schedule, x0, t, eps)
    output = denoise(x_t, t)
    prediction, raw = split_output(process, output)
    terms = {}
    if objective.kind != "vlb":
        target = training_target(process, x0, x_t, t, eps)
        terms["mse"] = mean_over_pixels((target - prediction) ** 2)
        weight = squared_error_weight(process.schedule, process.prediction, objective)
        terms["loss"] = extract(weight, t, 1) * terms["mse"]
    if objective.kind == "hybrid":
        output = jnp.concatenate([jax.lax.stop_gradient(prediction), raw], axis=-1)
    if objective.kind != "simple":
        terms["vlb"] = process.schedule.timesteps * bound_term(
            process, output, x0, x_t, t, clip=False
        )
        terms["loss"] = (
            terms["vlb"]
            if objective.kind == "vlb"
            else terms["loss"] + objective.vlb_weight * terms["vlb"]
        )
    return terms


def training_target(
    process: GaussianDiffusion, x0: jax.Array, x_t: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """Return what the prediction is compared with: eps, x0, v, or for mu the posterior mean."""
    if process.prediction == "eps":
        return eps
    if process.prediction == "x0":
        return x0
    if process.prediction == "v":
        return v_from_x0_eps(process.schedule, x0, eps, t)
    return q_posterior(process.schedule, x0, x_t, t)[0]


def squared_error_weight(
    schedule: NoiseSchedule, prediction: str, objective: Objective
) -> np.ndarray:
    """Compute the weight of the squared error at each t, float64 [T].

    Each published weighting is a weight on one particular error. The errors of the four
    predictions at the same x_t differ by known factors, so the same weighting is the same
    objective whatever the network predicts.
      min_snr: min(SNR, gamma) on the error of x0 (Hang et al. 2023)
      p2: 1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022)
    """
    if objective.weighting == "none":
        return np.ones(schedule.timesteps)
    x0_factor = x0_error_factor(schedule, prediction)
    if objective.weighting == "min_snr":
        return np.minimum(schedule.snr, objective.min_snr_gamma) * x0_factor
    eps_factor = schedule.snr * x0_factor
    return eps_factor / (objective.p2_k + schedule.snr) ** objective.p2_gamma


def x0_error_factor(schedule: NoiseSchedule, prediction: str) -> np.ndarray:
    """Compute (error of x0)^2 / (error of the prediction)^2 at equal x_t, float64 [T].

    It is 1/SNR for eps, 1/(1+SNR) for v, 1/coef1^2 for mu, and 1 for x0.
    """
    if prediction == "eps":
        return 1 / schedule.snr
    if prediction == "v":
        return 1 / (1 + schedule.snr)
    if prediction == "mu":
        return 1 / schedule.posterior_mean_coef1**2
    return np.ones(schedule.timesteps)
