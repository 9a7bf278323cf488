"""Choose the timesteps that a strided chain visits, and the schedule of that chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ddpm_jax.diffusion.schedule import NoiseSchedule

KARRAS_RHO = 7  # of eq. 5 of Karras et al. 2022


def _linspace(timesteps: int, steps: int) -> np.ndarray:
    return np.rint(np.linspace(0, timesteps - 1, steps)) if steps > 1 else np.array([timesteps - 1])


def _uniform(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.arange(steps) * schedule.timesteps // steps


def _leading(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.arange(steps) * (schedule.timesteps // steps)


def _trailing(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.rint(np.arange(1, steps + 1) * schedule.timesteps / steps) - 1


def _quadratic(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    i = np.arange(steps)
    return np.maximum(4 * schedule.timesteps * i**2 // (5 * max(steps - 1, 1) ** 2), i)


def _logsnr(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return _equidistant(-np.log(schedule.snr), steps)


def _karras(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return _equidistant(schedule.snr ** (-0.5 / KARRAS_RHO), steps)


def _equidistant(levels: np.ndarray, steps: int) -> np.ndarray:
    """Return the timesteps, all different, whose levels are nearest to equidistant ones.

    Args:
      levels: [T], rising. The last may be infinite (alphas_cumprod = 0). It counts as the one
        before it, which leaves equal distances between all others.
    """
    last = len(levels) - 1
    if steps == 1:
        return np.array([last])
    levels = np.append(levels[:-1], levels[-1] if np.isfinite(levels[-1]) else levels[-2])
    targets = np.linspace(levels[0], levels[-1], steps)
    i = np.arange(steps)
    visited = np.rint(np.interp(targets, levels, np.arange(last + 1)))
    visited[-1] = last
    # Where timesteps are farther apart than the targets, several targets round to one timestep: the
    # later ones move up, and at the upper end all move down as far as the last needs it.
    visited = np.maximum.accumulate(visited - i) + i
    return np.minimum(visited, last - steps + 1 + i)


SPACINGS: dict[str, Callable[[NoiseSchedule, int], np.ndarray]] = {
    "linspace": lambda schedule, steps: _linspace(schedule.timesteps, steps),
    "uniform": _uniform,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
}

SPACING_NAMES = (*SPACINGS, "sections:N,N,...")


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "linspace") -> np.ndarray:
    """Choose the `steps` of the T timesteps of `schedule` that a chain visits.

    With T timesteps, S < T steps and i = 0..S-1 (first step of the chain, its last):
      linspace          round(i (T-1)/(S-1)): from T-1 to 0; one step is at T-1
      uniform           floor(i T/S), "linear" in Song et al. 2021: from about T - T/S, hence not
                        from T-1, to 0
      leading           i floor(T/S): as uniform where S divides T, otherwise from still earlier,
                        to 0
      trailing          round((i+1) T/S) - 1: from T-1 to about T/S - 1
      quadratic         floor(0.8 T (i/(S-1))^2), for CIFAR-10 in Song et al. 2021: from 0.8 T to
                        0. The rounded squares would repeat themselves near 0; each is taken to be
                        at least i
      logsnr            nearest to equal distances in log(ab / (1-ab)), ab = alphas_cumprod
                        (Lu et al. 2022): from T-1 to 0
      karras            nearest to equal distances in sigma^(1/7), sigma = sqrt((1-ab) / ab)
                        (eq. 5 of Karras et al. 2022): from T-1 to 0
      sections:N,N,...  T in as many equal sections, the first T mod n one longer; in each of them
                        N steps as linspace, but one step is its first (Nichol & Dhariwal 2021's
                        code): from T-1, if the last N > 1, to 0

    A chain that does not start at T-1 takes N(0, I) for the marginal of an earlier timestep, which
    has signal left in it. Where logsnr and karras ask for timesteps closer together than 1, as they
    do near t = 0 and for cosine near T-1, the chain visits neighbours.

    Args:
      steps: 0 means all, or for sections the sum of them.

    Returns:
      int32 [steps], strictly rising; all timesteps where steps = T.

    Raises:
      ValueError: unknown spacing; steps outside 1..T, or not the sum of the sections; or
        the one step of a chain would be at t = 0, where there is nothing to denoise.
    """
    timesteps = schedule.timesteps
    name, _, counts = spacing.partition(":")
    if name == "sections" and counts:
        visited = _sections(timesteps, steps, counts)
    elif spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing}: one of {', '.join(SPACING_NAMES)}")
    else:
        steps = steps or timesteps
        if not 1 <= steps <= timesteps:
            raise ValueError(f"steps={steps}: must be in 1..{timesteps}")
        visited = SPACINGS[spacing](schedule, steps)
    if visited[-1] == 0 and timesteps > 1:
        raise ValueError(
            f"spacing={spacing} with 1 step visits t=0 only: "
            "take linspace or trailing, or more steps"
        )
    return visited.astype(np.int32)


def _sections(timesteps: int, steps: int, counts: str) -> np.ndarray:
    try:
        sizes = [int(count) for count in counts.split(",")]
    except ValueError:
        raise ValueError(
            f"spacing=sections:{counts}: write the steps of each section, as in sections:10,15,20"
        ) from None
    if steps not in (0, sum(sizes)):
        raise ValueError(
            f"steps={steps}: spacing=sections:{counts} has {sum(sizes)}; leave steps at 0"
        )
    parts, start = [], 0
    for number, count in enumerate(sizes):
        size = timesteps // len(sizes) + (number < timesteps % len(sizes))
        if not 1 <= count <= size:
            raise ValueError(
                f"spacing=sections:{counts}: section {number + 1} has {size} timesteps, not {count}"
            )
        parts.append(start + (_linspace(size, count) if count > 1 else np.zeros(1)))
        start += size
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Levels:
    """Hold the square roots of alphas_cumprod and 1 - alphas_cumprod at each row, float64 [S]."""

    signal: np.ndarray
    noise: np.ndarray


def chain_levels(schedule: NoiseSchedule, visited: np.ndarray) -> tuple[Levels, Levels]:
    """Return the levels where each row of a chain starts, and those where it leads.

    Args:
      visited: int [S], rising. The chain goes down it, and from the last to x_0.
    """
    signal = schedule.sqrt_alphas_cumprod[visited[::-1]]
    noise = schedule.sqrt_one_minus_alphas_cumprod[visited[::-1]]
    return Levels(signal, noise), Levels(np.append(signal[1:], 1.0), np.append(noise[1:], 0.0))


def respace(schedule: NoiseSchedule, visited: np.ndarray) -> NoiseSchedule:
    """Compute the schedule of the chain that visits only some timesteps, rising.

        beta'_i = 1 - alphas_cumprod_{t_i} / alphas_cumprod_{t_{i-1}}

    so that q(x_t | x_0) stays what it was at those t. A stride of many steps is one step with a
    large beta, and every variance follows from that one, not from the original.
    """
    if len(visited) == schedule.timesteps:
        return schedule
    alphas_cumprod = schedule.alphas_cumprod[visited]
    return NoiseSchedule.from_betas(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
