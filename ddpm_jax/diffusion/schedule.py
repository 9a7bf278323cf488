"""Compute noise schedules: beta_0..beta_{T-1} and every coefficient that follows from them.

    alpha_t = 1 - beta_t,   alphas_cumprod_t = prod_{s<=t} alpha_s,   alphas_cumprod_{-1} = 1

t is 0-based: index t here is t+1 in Ho et al. 2020. Everything is float64 NumPy on the host,
computed once. `process.extract` casts to float32 where a coefficient meets an image, and nowhere
else: a product of a thousand factors taken in float32 is already wrong in its fifth digit, which
the likelihood notices.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import numpy as np

Schedule = Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine", "sigmoid"]
SCHEDULES: tuple[str, ...] = typing.get_args(Schedule)


def beta_schedule(
    kind: str,
    timesteps: int,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = False,
    zero_terminal_snr: bool = False,
) -> np.ndarray:
    """Compute the variances beta_t of the forward steps, eq. 2.

    In Ho et al.'s code, with a = beta_start, b = beta_end, T = timesteps:
      linear              T equal steps from a to b
      quad                the square of T equal steps from sqrt(a) to sqrt(b)
      const               b
      warmup10, warmup50  linear from a to b over the first int(0.1 T) or int(0.5 T) steps, then b
      jsd                 1/T, 1/(T-1), ..., 1: the signal is gone exactly, alphas_cumprod_{T-1} = 0
    In later work:
      cosine   alphas_cumprod = f(t+1)/f(0), f(u) = cos^2((u/T + 0.008)/1.008 * pi/2), beta at
               most 0.999 (Nichol & Dhariwal 2021, eq. 17); the ends are not used
      sigmoid  a + (b - a) * sigmoid(x), x in T equal steps from -6 to 6 (Song et al. 2021's code)

    Args:
      rescale: multiply both ends by 1000/T, so that a chain of any length destroys about as much
        signal as one of 1000 steps (Nichol & Dhariwal's code). Ho et al. keep the ends whatever T
        is: at T = 100 a third of the signal's variance is left at the end of the chain.
      zero_terminal_snr: shift and scale sqrt(alphas_cumprod) so that it keeps its first value and
        ends at 0 exactly: the last x_t is the noise that samples start from (Lin et al. 2023,
        Algorithm 1).

    Returns:
      float64 [timesteps], each in (0, 1].

    Raises:
      ValueError: unknown kind, timesteps < 1, a beta outside (0, 1], or one step alone that should
        both keep its signal and end without.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps={timesteps}: a chain has at least 1 step")
    scale = 1000 / timesteps if rescale else 1.0
    start, end = scale * beta_start, scale * beta_end
    if kind == "linear":
        betas = np.linspace(start, end, timesteps)
    elif kind == "quad":
        betas = np.linspace(start**0.5, end**0.5, timesteps) ** 2
    elif kind == "const":
        betas = np.full(timesteps, float(end))
    elif kind in ("warmup10", "warmup50"):
        betas = np.full(timesteps, float(end))
        warmup = int(timesteps * (0.1 if kind == "warmup10" else 0.5))
        betas[:warmup] = np.linspace(start, end, warmup)
    elif kind == "jsd":
        betas = 1 / np.arange(timesteps, 0, -1, dtype=np.float64)
    elif kind == "cosine":
        signal = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    elif kind == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))
    else:
        raise ValueError(f"schedule={kind!r}: one of {', '.join(SCHEDULES)}")
    if zero_terminal_snr:
        if timesteps == 1:
            raise ValueError("zero_terminal_snr: a chain that ends in noise takes at least 2 steps")
        signal = np.sqrt(np.cumprod(1 - check_betas(betas)))
        shifted = signal - signal[-1]
        # From one to the next the scale cancels, and beta_0 stays.
        betas[1:] = 1 - (shifted[1:] / shifted[:-1]) ** 2
    return check_betas(betas)


def check_betas(betas: np.ndarray) -> np.ndarray:
    """Return `betas` as float64 [T], each in (0, 1].

    Raises:
      ValueError: no vector, or an empty one, or a beta outside (0, 1]; the first such is named.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty vector, not an array of shape {betas.shape}")
    bad = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if bad.size:
        raise ValueError(f"beta_{bad[0]} = {betas[bad[0]]:g}: every beta must be in (0, 1]")
    return betas


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The coefficients of q and of its posterior, each float64 [T]; `from_betas` makes one."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    # x0 = sqrt_recip_alphas_cumprod * x_t - sqrt_recipm1_alphas_cumprod * eps
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    # q(x_{t-1} | x_t, x0) = N(coef1 * x0 + coef2 * x_t, variance), eq. 7
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray
    posterior_variance: np.ndarray
    # log of the reverse step's variance for fixed_small and fixed_large
    posterior_log_variance_clipped: np.ndarray
    log_betas_clipped: np.ndarray

    @classmethod
    def from_betas(cls, betas: np.ndarray) -> NoiseSchedule:
        """Compute the coefficients of eqs. 4 and 7 for all t.

        At t = 0 the posterior is a point: its variance is 0 and a log of it is useless. Where
        T > 1 both kinds of fixed log-variance take posterior_variance_1 there, as Ho et al.'s code
        does "to get a better decoder log likelihood". With T = 1 there is none, and both are
        log beta_0.

        Raises:
          ValueError: a beta is outside (0, 1].
        """
        betas = check_betas(betas)
        alphas_cumprod = np.cumprod(1 - betas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        # 1 - alphas_cumprod by its own recurrence: subtracting would cancel where beta_0 is tiny.
        noise = np.empty_like(betas)
        left = 0.0
        for t, beta in enumerate(betas):
            noise[t] = left = beta + (1 - beta) * left
        noise_prev = np.append(0.0, noise[:-1])
        posterior_variance = betas * noise_prev / noise
        first = posterior_variance[1] if len(betas) > 1 else betas[0]
        # Infinite where alphas_cumprod = 0, which is refused where it would be used.
        with np.errstate(divide="ignore"):
            recip = 1 / alphas_cumprod
            return cls(
                betas=betas,
                alphas_cumprod=alphas_cumprod,
                alphas_cumprod_prev=alphas_cumprod_prev,
                sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
                sqrt_one_minus_alphas_cumprod=np.sqrt(noise),
                sqrt_recip_alphas_cumprod=np.sqrt(recip),
                sqrt_recipm1_alphas_cumprod=np.sqrt(recip * noise),
                posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / noise,
                posterior_mean_coef2=noise_prev * np.sqrt(1 - betas) / noise,
                posterior_variance=posterior_variance,
                posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
                log_betas_clipped=np.log(np.append(first, betas[1:])),
            )

    @property
    def timesteps(self) -> int:
        """Return T, the length of the chain."""
        return len(self.betas)

    @property
    def snr(self) -> np.ndarray:
        """Return alphas_cumprod / (1 - alphas_cumprod), float64 [T], falling in t."""
        return self.alphas_cumprod / self.sqrt_one_minus_alphas_cumprod**2

    @property
    def ends_in_pure_noise(self) -> bool:
        """Return whether eps no longer determines x0 at the end of the chain.

        It does not where alphas_cumprod is 0, or 1/sqrt of it overflows float32.
        """
        return bool(self.sqrt_recip_alphas_cumprod[-1] > np.finfo(np.float32).max)
