"""Compute what a student learns from: two DDIM steps of its teacher, written as one.

This is Algorithm 2 of Salimans & Ho 2022, on the timesteps of the teacher's own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import Denoiser, GaussianDiffusion, predict_x0
from ddpm_jax.diffusion.schedule import NoiseSchedule
from ddpm_jax.diffusion.spacing import spaced_timesteps

Weighting = Literal["truncated_snr", "snr_plus_one"]
SPACING = "trailing"  # the timesteps of S steps are every second one of those of 2S


@dataclass(frozen=True, eq=False)
class Halving:
    """The levels of a student's steps, each [S]; step i goes from `start` over `middle` to `end`.

    Attributes:
      start, middle: timesteps.
      signal, noise: sqrt(ab) and sqrt(1 - ab) at start, middle and end, [3, S] each. The last end
        is the image itself, with signal 1 and noise 0.
    """

    start: np.ndarray
    middle: np.ndarray
    signal: np.ndarray
    noise: np.ndarray

    @classmethod
    def of(cls, schedule: NoiseSchedule, steps: int) -> Halving:
        """Return the levels of a student of `steps`, whose teacher takes twice as many.

        Raises:
          ValueError: twice the steps are more than there are timesteps.
        """
        visited = spaced_timesteps(schedule, 2 * steps, SPACING)
        middle, start = visited[::2], visited[1::2]
        alphas = np.append(schedule.alphas_cumprod, 1.0)  # -1 is the image
        levels = alphas[np.stack([start, middle, np.append(-1, start[:-1])])]
        return cls(start, middle, np.sqrt(levels), np.sqrt(1 - levels))


def two_step_target(
    process: GaussianDiffusion,
    halving: Halving,
    denoise: Denoiser,
    z: jax.Array,
    step: jax.Array,
    *,
    clip: bool = False,
) -> jax.Array:
    """Compute the x0 with which one DDIM step lands where two steps of the teacher do.

        z'  = a' x(z) + s'/s (z - a x(z))
        z'' = a'' x(z') + s''/s' (z' - a' x(z'))
        x0  = (z'' - s''/s z) / (a'' - s''/s a)

    with the signal a and the noise s at the start, the middle (') and the end ('') of the step.

    Args:
      denoise: the teacher.
      z: [b,h,w,c], noisy images at the starts of their steps.
      step: which, int [b], 0 the last one that a sampler takes.
      clip: clip the teacher's x0 to [-1, 1], as its sampler does.
    """

    def at(rows: np.ndarray) -> jax.Array:
        return jnp.asarray(rows, z.dtype)[step].reshape(-1, *(1,) * (z.ndim - 1))

    def x0_hat(x: jax.Array, timesteps: np.ndarray) -> jax.Array:
        t = jnp.asarray(timesteps, jnp.int32)[step]
        x0 = predict_x0(process.schedule, process.prediction, denoise(x, t), x, t)
        return jnp.clip(x0, -1, 1) if clip else x0

    # Ratios and differences in float64: near t = 0 they are small against their terms.
    (a, a1, a2), (s, s1, s2) = halving.signal, halving.noise
    x = x0_hat(z, halving.start)
    z1 = at(a1 - s1 / s * a) * x + at(s1 / s) * z
    x1 = x0_hat(z1, halving.middle)
    z2 = at(a2 - s2 / s1 * a1) * x1 + at(s2 / s1) * z1
    return (z2 - at(s2 / s) * z) / at(a2 - s2 / s * a)


def student_loss(
    process: GaussianDiffusion,
    halving: Halving,
    output: jax.Array,
    target: jax.Array,
    z: jax.Array,
    step: jax.Array,
    weighting: Weighting,
) -> jax.Array:
    """Compute w (target - x0_hat)^2 of the network's `output`, a mean over pixels, [b].

    With the signal-to-noise ratio r = ab / (1 - ab) the weight w is

        max(r, 1)   weighting="truncated_snr"
        r + 1       weighting="snr_plus_one"
        r           prediction="eps": the squared error of eps, whatever `weighting` is

    A network that predicts eps has an x0 of no use where there is little signal: max(r, 1) would
    train it on 1/r times the error of eps there, which has no bound.
    """

    def at(rows: np.ndarray) -> jax.Array:
        return jnp.asarray(rows, z.dtype)[step].reshape(-1, *(1,) * (z.ndim - 1))

    a, s = halving.signal[0], halving.noise[0]
    t = jnp.asarray(halving.start, jnp.int32)[step]
    if process.prediction == "eps":
        error = (z - at(a) * target) / at(s) - output
        weight = np.ones_like(a)
    else:
        error = target - predict_x0(process.schedule, process.prediction, output, z, t)
        ratio = (a / s) ** 2
        weight = np.maximum(ratio, 1) if weighting == "truncated_snr" else ratio + 1
    return jnp.mean(at(weight) * error**2, axis=tuple(range(1, z.ndim)))
