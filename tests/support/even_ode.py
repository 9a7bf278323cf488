"""A chain whose probability-flow ODE is known in closed form, to measure orders of convergence on in float64.

The data are Gaussian pixels. Along the ODE each keeps (x - mean) / std: that is the exact solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import SamplerTable
from ddpm_jax.diffusion.schedule import NoiseSchedule
from tests.support.gaussian_chain import GaussianChain

MEAN, STD = 0.3, 0.4


def even_schedule(timesteps: int) -> NoiseSchedule:
    """log(signal / noise) from 3 down to -3 in equal steps, so that `linspace` halves every step of the solvers at once."""
    signal_to_noise = np.exp(2 * np.linspace(3, -3, timesteps))
    alphas_cumprod = signal_to_noise / (1 + signal_to_noise)
    return NoiseSchedule.from_betas(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


EVEN = even_schedule(2**10 + 1)
EVEN_CHAIN = GaussianChain(EVEN.betas)
BEST = np.array([EVEN_CHAIN.best_x0(t, MEAN, STD) for t in range(EVEN.timesteps)])


def spread(t: int) -> float:
    """Standard deviation of x_t for pixels of N(MEAN, STD^2)."""
    return math.sqrt(EVEN_CHAIN.signal[t] ** 2 * STD**2 + EVEN_CHAIN.covariance[t, t])


def exact(t: int, deviations: float = 1.7) -> float:
    """The ODE's solution at t that starts so many standard deviations from the mean."""
    return EVEN_CHAIN.signal[t] * MEAN + deviations * spread(t)


def predictions(x: float, t: int) -> tuple[float, float]:
    """x0_hat and eps_hat of the perfect network: E[x0 | x_t], and eq. 4."""
    x0 = BEST[t, 0] * x + BEST[t, 1]
    return x0, (x - EVEN_CHAIN.signal[t] * x0) / math.sqrt(EVEN_CHAIN.covariance[t, t])


def walk(table: SamplerTable, x: float, former: tuple[int, ...] = ()) -> float:
    """x down the rows, with the exact E[x0 | x_t], in float64.

    `former` are timesteps before the table's first row, newest first, at which the exact solution is known.
    """
    history = [predictions(exact(t), t) for t in former]
    for row, t in enumerate(table.timesteps):
        x0, eps = predictions(x, t)
        x = table.x0[row] * x0 + table.x[row] * x + table.eps[row] * eps
        for kind, columns in enumerate((table.x0_before, table.eps_before)):
            for k in range(0 if columns is None else columns.shape[1]):
                assert k < len(history) or columns[row, k] == 0
                x += columns[row, k] * history[k][kind] if k < len(history) else 0.0
        history.insert(0, (x0, eps))
    return x


def order_of(make: Callable, most: int, least: int = 4, skip: int = 0) -> tuple[float, list[float]]:
    """The slope of log error against log steps, and the errors, at the last visited timestep, t = 0.

    Args:
      make: of process and steps, the table.
      most, least: from 2^least to 2^most steps, the latter without.
      skip: take the exact solution after so many rows, to see the order of the others alone.
    """
    errors, counts = [], [2**k for k in range(least, most)]
    for count in counts:
        table = make(GaussianDiffusion(EVEN), count + 1)
        former = tuple(int(t) for t in table.timesteps[:skip][::-1])
        end = walk(table.rows(slice(skip, -1)), exact(table.timesteps[skip]), former)
        errors.append(abs(end - exact(0)))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors
