"""Data whose bits per dimension are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import scipy.stats

from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from tests.support.gaussian_chain import GaussianChain

STD = 0.25


LEVELS = np.arange(256) / 127.5 - 1


PROBABILITIES = np.diff(
    scipy.stats.norm.cdf(np.concatenate([[-np.inf], LEVELS[:-1] + 1 / 255, [np.inf]]), 0, STD)
)


def made_schedule(timesteps: int) -> NoiseSchedule:
    """A chain of any length from little noise to nearly N(0, I)."""
    return NoiseSchedule.from_betas(
        beta_schedule("linear", timesteps, beta_start=0.1 / timesteps, beta_end=18 / timesteps)
    )


def closed_form(
    chain: GaussianChain,
    betas: np.ndarray,
    variance: str,
    x0: np.ndarray,
    share: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """prior, terms [T] in bits/dim and squared error [T]: the mean over eps and over levels x0 [n], weighted by `share`."""
    values, which = np.unique(x0, return_inverse=True)
    share = np.bincount(which, share) / (1 if share is not None else len(x0))
    second = np.sum(share * values**2)
    steps = len(betas)
    noise = np.diag(chain.covariance)
    prior = 0.5 * (chain.signal[-1] ** 2 * second + noise[-1] - 1 - math.log(noise[-1]))
    terms, errors = np.empty(steps), np.empty(steps)
    first = chain.posterior(0, 1)[2]
    for t in range(steps):
        factor, _ = chain.best_x0(t, 0.0, STD)
        errors[t] = (1 - factor * chain.signal[t]) ** 2 * second + factor**2 * noise[t]
        if t == 0:
            continue
        on_x0, _, true = chain.posterior(t - 1, t)
        model = true if variance == "fixed_small" else betas[t]
        terms[t] = 0.5 * (math.log(model / true) - 1 + (true + on_x0**2 * errors[t]) / model)
    # L_0: x_1 = signal x_0 + noise eps, the decoder N(factor x_1, first), by quadrature over eps at each level.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    factor, _ = chain.best_x0(0, 0.0, STD)
    mean = factor * (chain.signal[0] * values[:, None] + math.sqrt(noise[0]) * nodes)
    upper = np.where(values > 0.999, np.inf, values + 1 / 255)[:, None]
    lower = np.where(values < -0.999, -np.inf, values - 1 / 255)[:, None]
    z_upper, z_lower = (upper - mean) / math.sqrt(first), (lower - mean) / math.sqrt(first)
    right = z_lower > 0  # measured from the nearer side, where float64 has its digits
    near, far = np.where(right, -z_lower, z_upper), np.where(right, -z_upper, z_lower)
    log_p = np.log(np.maximum(scipy.stats.norm.cdf(near) - scipy.stats.norm.cdf(far), 1e-300))
    terms[0] = -np.sum(share[:, None] * weights / weights.sum() * log_p)
    return {"prior": prior / math.log(2), "terms": terms / math.log(2), "errors": errors}
