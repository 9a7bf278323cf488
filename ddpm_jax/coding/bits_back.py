"""Code 8-bit images without loss, to the length of the bound: bits-back along the chain.

The sender takes x_1 ~ q(x_1 | x_0) off the stack, that is, draws it with bits that the message
already holds, and pushes x_0 under p(x_0 | x_1); takes x_2 ~ q(x_2 | x_1), pushes x_1 under
p(x_1 | x_2); and so on to x_T, pushed under N(0, I). The receiver walks back and returns every bit
that a draw took. What remains is, in the mean,

    E_q [ log q(x_1..x_T | x_0) - log p(x_0..x_T) ],    eqs. 3 and 5,

the bound that `evaluation.nll` measures, for the same clipping and decoder. Drawing x_t from its
predecessor, not from x_0, needs only the bits of one x_1 at a time to begin with (Kingma, Abbeel &
Ho 2019, "Bit-Swap").

The slots that a draw reads are those that the last symbol was pushed to. Without a mask the noise
of x_{t+1} would follow from x_{t-1}, and the message would be some percent longer than the bound.

States are numbered as timesteps: state t is x_{t+1} of the paper, 0..T-1. Each lives on a lattice a
fraction as wide as the noise that its step adds; the images live on their 256 levels, whose bins
are those of eq. 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ddpm_jax.coding.ans import Stack, draw_mask
from ddpm_jax.coding.gaussians import BinnedGaussian, Lattice, cdf_erf, cdf_tanh
from ddpm_jax.diffusion.schedule import NoiseSchedule
from ddpm_jax.errors import CodingError

REACH = 8.0  # states are coded within [-8, 8]; they have a variance of 1 at most
# Of a step's noise: the lattice then costs less than 0.01 bits/dim over a thousand steps.
BINS_PER_STD = 8
MASKS = 1 << 32  # the seed of what randomises the draws, apart from all seeds a user can choose
LEVELS = Lattice(-1 - 1 / 255, 2 / 255, 256)
CDFS = {"tanh": cdf_tanh, "erf": cdf_erf}


@dataclass(frozen=True)
class Reverse:
    """A reverse step, p(x_{t-1} | x_t) = N(mean, exp(log_variance)), float32 [b,h,w,c].

    Attributes:
      x0: the x0_hat behind the mean.
    """

    mean: np.ndarray
    log_variance: np.ndarray
    x0: np.ndarray


# (x_t float32 [b,h,w,c], t) -> Reverse. Sender and receiver must compute the same bits: the same
# program on the same kind of machine.
Network = Callable[[np.ndarray, int], Reverse]


class ChainCoder:
    """A bits-back coder with one model.

    Args:
      network: the reverse process.
      cdf: of the decoder p(x_0 | x_1), "tanh" or "erf", as in the bound that the length is compared
        with.
      on_step: called after each forward pass: for progress.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        network: Network,
        *,
        cdf: str = "erf",
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._keep, self._std = np.sqrt(1 - schedule.betas), np.sqrt(schedule.betas)
        self._network, self._cdf, self._on_step = network, CDFS[cdf], on_step
        widths = self._std / BINS_PER_STD
        self._lattices = [
            Lattice(-REACH, width, int(np.ceil(2 * REACH / width))) for width in widths
        ]

    def encode(self, stack: Stack, images: np.ndarray) -> None:
        """Push uint8 images [b,h,w,c], all of them side by side."""
        bins, lattice = images.astype(np.int64).ravel(), LEVELS
        for t, own in enumerate(self._lattices):
            after = self._forward(t, lattice.centres(bins)).pop(stack, self._mask(t, len(bins)))
            self._reverse(t, own.centres(after), images.shape, lattice).push(stack, bins)
            bins, lattice = after, own
        self._prior(len(bins)).push(stack, bins)

    def decode(self, stack: Stack, shape: tuple[int, ...]) -> np.ndarray:
        """Take images of `shape` off the stack, uint8; what `encode` drew is there again."""
        bins = self._prior(int(np.prod(shape))).pop(stack)
        for t in reversed(range(len(self._lattices))):
            own, lattice = self._lattices[t], self._lattices[t - 1] if t else LEVELS
            before = self._reverse(t, own.centres(bins), shape, lattice).pop(stack)
            self._forward(t, lattice.centres(before)).push(stack, bins, self._mask(t, len(bins)))
            bins = before
        return bins.astype(np.uint8).reshape(shape)

    def _forward(self, t: int, x_prev: np.ndarray) -> BinnedGaussian:
        """Return q(x_t | x_{t-1}), eq. 2."""
        std = np.full(len(x_prev), self._std[t])
        return BinnedGaussian(self._lattices[t], self._keep[t] * x_prev, std, leak=False)

    def _reverse(
        self, t: int, x_t: np.ndarray, shape: tuple[int, ...], lattice: Lattice
    ) -> BinnedGaussian:
        """Return p(x_{t-1} | x_t), eqs. 1 and 13."""
        step = self._network(x_t.astype(np.float32).reshape(shape), t)
        self._on_step()
        mean, std = decoder_moments(step, t)
        return BinnedGaussian(lattice, mean, std, leak=True, cdf=self._cdf if t == 0 else cdf_erf)

    def _mask(self, t: int, count: int) -> np.ndarray:
        return draw_mask(MASKS, t, count)

    def _prior(self, count: int) -> BinnedGaussian:
        return BinnedGaussian(self._lattices[-1], np.zeros(count), np.ones(count), leak=True)


def decoder_moments(step: Reverse, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation of a reverse step, float64 [b*h*w*c].

    Raises:
      CodingError: they are not finite.
    """
    mean = step.mean.astype(np.float64).ravel()
    log_variance = np.broadcast_to(step.log_variance, step.mean.shape).astype(np.float64)
    std = np.exp(0.5 * log_variance).ravel()
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise CodingError(
            f"the network's output is not finite at t={t}: "
            "code with another checkpoint or other weights"
        )
    return mean, std
