"""The forward process as one joint Gaussian, in float64: what the closed forms of the library are held against.

Given x_0, the states x_1..x_T of the paper (indices 0..T-1 here) are linear in x_0 and in T unit noises. Their joint
covariance follows from the betas and eq. 2 alone, and every posterior from conditioning it; eqs. 4 to 7 are not used.
"""

from __future__ import annotations

import numpy as np


class GaussianChain:
    """signal [T] and covariance [T,T] of the states given x_0, each pixel on its own."""

    def __init__(self, betas: np.ndarray) -> None:
        steps = len(betas)
        self.signal = np.empty(steps)
        noises = np.zeros(
            (steps, steps)
        )  # state t is signal[t] x_0 + noises[t] @ (the unit noises)
        signal, row = 1.0, np.zeros(steps)
        for t, beta in enumerate(betas):
            signal, row = np.sqrt(1 - beta) * signal, np.sqrt(1 - beta) * row
            row[t] = np.sqrt(beta)
            self.signal[t], noises[t] = signal, row
        self.covariance = noises @ noises.T

    def posterior(self, earlier: int, later: int) -> tuple[float, float, float]:
        """Mean (factors of x_0 and of the later state) and variance of the earlier state given both; -1 is x_0."""
        if earlier < 0:
            return 1.0, 0.0, 0.0
        gain = self.covariance[earlier, later] / self.covariance[later, later]
        variance = self.covariance[earlier, earlier] - gain * self.covariance[later, earlier]
        return self.signal[earlier] - gain * self.signal[later], gain, variance

    def best_x0(self, t: int, mean: float, std: float) -> tuple[float, float]:
        """E[x_0 | x_t] = factor * x_t + offset for pixels drawn from N(mean, std^2)."""
        factor = std**2 * self.signal[t] / (std**2 * self.signal[t] ** 2 + self.covariance[t, t])
        return factor, mean - factor * self.signal[t] * mean

    def perfect(
        self, t: np.ndarray, x0: np.ndarray, eps: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """x_t [b,...] and what a perfect network predicts from it, of each kind, for timesteps t [b]."""
        column = (slice(None),) + (None,) * (x0.ndim - 1)
        signal, noise = self.signal[t][column], np.sqrt(np.diag(self.covariance)[t])[column]
        on_x0, on_xt, _ = (np.array(c)[column] for c in zip(*(self.posterior(i - 1, i) for i in t)))
        x_t = signal * x0 + noise * eps
        # v is the velocity of x_t on its way from x0 to eps along the circle: a numerical derivative by the angle.
        angle, h = np.arctan2(noise, signal), 1e-5
        ahead, behind = (np.cos(a) * x0 + np.sin(a) * eps for a in (angle + h, angle - h))
        return x_t, {
            "eps": eps,
            "x0": x0,
            "v": (ahead - behind) / (2 * h),
            "mu": on_x0 * x0 + on_xt * x_t,
        }
