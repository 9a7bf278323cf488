"""Compute the weights of what a network said at former rows, in solvers of order 2 and 3.

An exponential integrator takes the linear part of the probability-flow ODE as it is. What is left
is an integral of the network's prediction, and a multistep solver puts there the polynomial through
the predictions of the rows before. The weight of each is the integral of its Lagrange polynomial.

Row i of S is of order min(order, i + 1, S - i). The first row has no former predictions, and the
last goes to x_0, where log(signal / noise) is infinite: both are DDIM's. The last but one, often
the longest step of the chain in log(signal / noise), looks back no farther than order 2 does.
"""

from __future__ import annotations

import numpy as np

from ddpm_jax.diffusion.schedule import NoiseSchedule
from ddpm_jax.diffusion.spacing import chain_levels

ORDERS = (2, 3)
# Gauss-Legendre quadrature on [0, 1].
_POINTS, _SHARES = (np.polynomial.legendre.leggauss(32)[i] / 2 + (0.5, 0)[i] for i in range(2))


def check_order(order: int) -> None:
    """Check that a solver can have this order.

    Raises:
      ValueError: neither 2 nor 3.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order}: must be 2 or 3")


def dpmpp_2m_extrapolation(schedule: NoiseSchedule, visits: np.ndarray) -> np.ndarray:
    """Compute k = h / (2 h_before) of DPM-Solver++(2M), float64 [S]; see `dpmpp_2m_table`.

    With it (1 + k) x0_hat - k x0_hat_before is x0_hat in the middle of the step, were it a straight
    line in log(signal / noise). It is 0 in the first and the last row.
    """
    h = np.diff(_half_log_snr(schedule)[visits[::-1]])
    k = np.zeros(len(visits))
    # With alphas_cumprod = 0 (schedule jsd) the first h is infinite, and k after it is 0.
    k[1:-1] = h[1:] / (2 * h[:-1])
    return k


def deis_weights(schedule: NoiseSchedule, visits: np.ndarray, order: int) -> np.ndarray:
    """Compute the weights of eps_hat in DEIS (tAB) of Zhang & Chen 2023.

    With rho = noise / signal and L_j(t) the Lagrange polynomials of the last rows' timesteps,

        x_prev = signal' / signal x_t + signal' sum_j eps_hat_j int L_j(t) d rho(t).

    With x_t = signal x0_hat + noise eps_hat that is, as it stands in the table,

        x_prev = signal' x0_hat + sum_j weight_j eps_hat_j,   where sum_j weight_j = noise'.

    Between two timesteps of the schedule log rho is a straight line.

    Args:
      visits: int [S], rising.

    Returns:
      float64 [S, order]: of eps_hat now, of the row before, and so on.
    """
    timesteps, (at, to) = visits[::-1].astype(int), chain_levels(schedule, visits)
    half_log_snr = _half_log_snr(schedule)
    weights = np.zeros((len(visits), order))
    for row, count in enumerate(_orders(len(visits), order)):
        if count == 1:
            weights[row, 0] = to.noise[row]
            continue
        start, end = timesteps[row : row + 2]
        left = np.arange(end, start)[:, None]  # each step between timesteps by itself
        slope = half_log_snr[left] - half_log_snr[left + 1]
        half_log_snr_at_t = half_log_snr[left] - slope * _POINTS
        measure = -to.signal[row] * np.exp(-half_log_snr_at_t) * slope * _SHARES
        nodes = (start - timesteps[row + 1 - count : row + 1][::-1]) / (start - end)
        points = (start - (left + _POINTS)) / (start - end)
        weights[row, :count] = _integrals(nodes, points, measure)
        weights[row, 0] += to.signal[row] * at.noise[row] / at.signal[row]
    return weights


def unipc_weights(schedule: NoiseSchedule, visits: np.ndarray, order: int) -> np.ndarray:
    """Compute the weights of x0_hat in UniPC in UniPC of Zhao et al. 2023, with their B2.

    With polynomials in log(signal / noise), whose step is h, a row predicts x_prev from x0_hat now
    and before (UniP). When the network has spoken there, its x0_hat corrects x_prev (UniC):

        predicted = noise' / noise x + sum_j predictor_j x0_hat_j
        corrected = noise' / noise x + sum_j corrector_j x0_hat_j.

    Both start from the same x, so that they differ in x0_hat alone. The row after can therefore
    correct the x_t that it is handed, and predict from it, in one linear update:

        x_prev = noise' / noise (x_t + sum_j (corrector_j - predictor_j) x0_hat_j)
               + sum_j predictor'_j x0_hat_j.

    The network is asked once a row, at the predicted x_t. As in the authors' code, the predictor of
    order 2 and the corrector of order 1 divide no integral by B2(h) = 1 - exp(-h), but take 1/2,
    the limit for short steps. That predictor is DPM-Solver++(2M). All other weights follow from the
    integrals, whatever B is.

    Args:
      visits: int [S], rising.

    Returns:
      float64 [S, order + 1]: of x0_hat now, of the row before, and so on.
    """
    at, to = chain_levels(schedule, visits)
    half_log_snr = _half_log_snr(schedule)[visits[::-1]]
    # A first one of -infinity (alphas_cumprod = 0, schedule jsd) is no node of a polynomial.
    usable = np.maximum(np.cumsum(np.isfinite(half_log_snr)), 1)
    rise = to.signal - to.noise * at.signal / at.noise  # signal' (1 - exp(-h)), and 1 at the end
    weights, correction = np.zeros((len(visits), order + 1)), np.zeros(order + 1)
    for row, count in enumerate(np.minimum(_orders(len(visits), order), usable)):
        if count == 1:
            predictor, corrector = rise[row : row + 1], rise[row] * np.array([0.5, 0.5])
        else:
            h = half_log_snr[row + 1] - half_log_snr[row]
            nodes = (half_log_snr[row + 1 - count : row + 1][::-1] - half_log_snr[row]) / h
            measure = to.signal[row] * h * np.exp(-h * (1 - _POINTS)) * _SHARES
            corrector = _integrals(np.append(1.0, nodes), _POINTS, measure)
            if count == 2:
                predictor = rise[row] * np.array([1 - 0.5 / nodes[1], 0.5 / nodes[1]])
            else:
                predictor = _integrals(nodes, _POINTS, measure)
        weights[row] = to.noise[row] / at.noise[row] * correction
        weights[row, :count] += predictor
        correction[:] = 0
        correction[: count + 1] = corrector - np.append(0.0, predictor)
    return weights


def _half_log_snr(schedule: NoiseSchedule) -> np.ndarray:
    """Return log(signal / noise) [T]; -infinity where alphas_cumprod = 0."""
    with np.errstate(divide="ignore"):
        return np.log(schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod)


def _orders(steps: int, order: int) -> np.ndarray:
    """Return the order of each row, int [S]."""
    row = np.arange(steps)
    return np.minimum(order, np.minimum(row + 1, steps - row))


def _integrals(nodes: np.ndarray, points: np.ndarray, measure: np.ndarray) -> np.ndarray:
    """Integrate the Lagrange polynomials of `nodes` [n] by a quadrature, float64 [n].

    The weights are those that are exact for 1, t, ..., t^(n-1):
    sum_j weight_j nodes_j^k = sum_i measure_i points_i^k.
    """
    powers = np.arange(len(nodes))[:, None]
    return np.linalg.solve(nodes**powers, (measure.ravel() * points.ravel() ** powers).sum(axis=1))
