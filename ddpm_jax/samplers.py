"""Samplers as tables: every one of this family is a linear update whose coefficients depend on the step alone,

    x_prev = a x0_hat + b x_t + c eps_hat + d x0_hat_before + s z,    z ~ N(0, I),

so a sampler is a table with a row (timestep, a, b, c, d, s) for each step, computed in float64, and `sampling.reverse_chain` runs
down its rows. x0_hat_before is the x0_hat of the row before.

A strided chain visits `steps` of the T timesteps. q(x_t | x_0) stays what it was at those, so every coefficient follows from
alphas_cumprod at the visited timesteps. Whatever the spacing, the last row goes to x_0 (alphas_cumprod = 1), not to x at t = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ddpm_jax.diffusion import GaussianDiffusion
from ddpm_jax.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The rows of a chain, first step first, each array [S].

    Attributes:
      timesteps: int32, what the network is told.
      a, b, c, d, s: float64 coefficients of x0_hat, x_t, eps_hat, x0_hat_before and z.
      log_variance_low, log_variance_high: given where the network's own variance is used; s is then 1 or 0 and scales its
        standard deviation. They are the ends of `learned_range`: log posterior variance and log beta of this chain's steps.
    """

    timesteps: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray
    s: np.ndarray
    log_variance_low: np.ndarray | None = None
    log_variance_high: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def learned(self) -> bool:
        return self.log_variance_low is not None

    def rows(self, which: slice) -> SamplerTable:
        """Some of the rows, such as `slice(i, None)` for a chain that starts in the middle."""
        return replace(self, **{name: value[which] for name, value in vars(self).items() if value is not None})

    def row_at(self, timestep: int) -> int:
        """The row of a reverse chain whose timestep is nearest to `timestep`, the later of two equally near."""
        return int(np.abs(self.timesteps.astype(int) - timestep).argmin())


# ---------------------------------------------------------------------------------------------- spacings


def _linspace(timesteps: int, steps: int) -> np.ndarray:
    return np.rint(np.linspace(0, timesteps - 1, steps)) if steps > 1 else np.array([timesteps - 1])


def _uniform(timesteps: int, steps: int) -> np.ndarray:
    return np.arange(steps) * timesteps // steps


def _leading(timesteps: int, steps: int) -> np.ndarray:
    return np.arange(steps) * (timesteps // steps)


def _trailing(timesteps: int, steps: int) -> np.ndarray:
    return np.rint(np.arange(1, steps + 1) * timesteps / steps) - 1


def _quadratic(timesteps: int, steps: int) -> np.ndarray:
    i = np.arange(steps)
    return np.maximum(4 * timesteps * i**2 // (5 * max(steps - 1, 1) ** 2), i)


SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "linspace": _linspace,
    "uniform": _uniform,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
}
SPACING_NAMES = (*SPACINGS, "sections:N,N,...")


def spaced_timesteps(timesteps: int, steps: int, spacing: str = "linspace") -> np.ndarray:
    """The `steps` of 0..timesteps-1 that a chain visits, strictly rising, int32; all of them where steps = timesteps.

    With T timesteps, S < T steps and i = 0..S-1 (first step of the chain, its last):
      linspace          round(i (T-1)/(S-1)): from T-1 to 0; one step is at T-1
      uniform           floor(i T/S), "linear" in Song et al. 2021: from about T - T/S, hence not from T-1, to 0
      leading           i floor(T/S): as uniform where S divides T, otherwise from still earlier, to 0
      trailing          round((i+1) T/S) - 1: from T-1 to about T/S - 1
      quadratic         floor(0.8 T (i/(S-1))^2), for CIFAR-10 in Song et al. 2021: from 0.8 T to 0. The rounded squares would
                        repeat themselves near 0; each is taken to be at least i
      sections:N,N,...  T in as many equal sections, the first T mod n one longer, in each of them N steps as linspace, but one
                        step is its first (Nichol & Dhariwal 2021's code): from T-1, if the last N > 1, to 0

    A chain that does not start at T-1 takes N(0, I) for the marginal of an earlier timestep, which has signal left in it.

    Args:
      steps: 0 means all, or for sections the sum of them.

    Raises:
      ValueError: unknown spacing; steps outside 1..timesteps, or not the sum of the sections; or the one step of a chain
        would be at t = 0, where there is nothing to denoise.
    """
    name, _, counts = spacing.partition(":")
    if name == "sections" and counts:
        kept = _sections(timesteps, steps, counts)
    elif spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing}: one of {', '.join(SPACING_NAMES)}")
    else:
        steps = steps or timesteps
        if not 1 <= steps <= timesteps:
            raise ValueError(f"steps={steps}: must be in 1..{timesteps}")
        kept = SPACINGS[spacing](timesteps, steps)
    if kept[-1] == 0 and timesteps > 1:
        raise ValueError(f"spacing={spacing} with 1 step visits t=0 only: take linspace or trailing, or more steps")
    return kept.astype(np.int32)


def _sections(timesteps: int, steps: int, counts: str) -> np.ndarray:
    try:
        sizes = [int(count) for count in counts.split(",")]
    except ValueError:
        raise ValueError(f"spacing=sections:{counts}: write the steps of each section, as in sections:10,15,20") from None
    if steps not in (0, sum(sizes)):
        raise ValueError(f"steps={steps}: spacing=sections:{counts} has {sum(sizes)}; leave steps at 0")
    kept, start = [], 0
    for number, count in enumerate(sizes):
        size = timesteps // len(sizes) + (number < timesteps % len(sizes))
        if not 1 <= count <= size:
            raise ValueError(f"spacing=sections:{counts}: section {number + 1} has {size} timesteps, not {count}")
        kept.append(start + (_linspace(size, count) if count > 1 else np.zeros(1)))
        start += size
    return np.concatenate(kept)


def respace(schedule: NoiseSchedule, kept: np.ndarray) -> NoiseSchedule:
    """The schedule of the chain that visits only the timesteps `kept` (rising).

    q(x_t | x_0) stays what it was at those t, so its betas are 1 - alphas_cumprod_t / alphas_cumprod_{t before}: a stride of
    many steps is one step with a large beta, and every variance follows from that one, not from the original.
    """
    if len(kept) == schedule.timesteps:
        return schedule
    alphas_cumprod = schedule.alphas_cumprod[kept]
    return NoiseSchedule.from_betas(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


# ---------------------------------------------------------------------------------------------- samplers


def ancestral_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace", *, variance: str | None = None
) -> SamplerTable:
    """Algorithm 2: x_{t-1} ~ p_theta(x_{t-1} | x_t) in `steps` steps (0: all T).

    The mean is that of the posterior at x0_hat, eq. 7; the last step adds no noise. On a strided chain everything is that of the
    stride's own beta' = 1 - alphas_cumprod_t / alphas_cumprod_prev: fixed_small is eta = 1 of Song et al. 2021; fixed_large,
    whose variance is beta', their sigma-hat.

    Args:
      variance: fixed_small or fixed_large instead of that of `process`.

    Raises:
      ValueError: as `spaced_timesteps`; or a strided chain with variance learned, which is that of single steps.
    """
    kept = spaced_timesteps(process.schedule.timesteps, steps, spacing)
    chain, variance = respace(process.schedule, kept), variance or process.variance
    if variance == "learned" and len(kept) < process.schedule.timesteps:
        raise ValueError("variance=learned is that of single steps: take all of them, or ancestral_small or ancestral_large")
    ends = {}
    if variance == "fixed_small":
        scale = np.sqrt(chain.posterior_variance)
    elif variance == "fixed_large":
        scale = np.sqrt(chain.betas)
    else:
        scale = np.ones(len(kept))
        ends["log_variance_low"] = chain.posterior_log_variance_clipped[::-1]
        ends["log_variance_high"] = np.log(chain.betas)[::-1]
    return SamplerTable(
        timesteps=kept[::-1],
        a=chain.posterior_mean_coef1[::-1],
        b=chain.posterior_mean_coef2[::-1],
        c=np.zeros(len(kept)),
        d=np.zeros(len(kept)),
        s=np.append(scale[:0:-1], 0.0),
        **ends,
    )


def ddim_table(process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace", *, eta: float = 0.0) -> SamplerTable:
    """Song et al. 2021, eqs. 12 and 16, with ab = alphas_cumprod at the timestep and ab' at the next one visited:

        x_prev = sqrt(ab') x0_hat + sqrt(1 - ab' - sigma^2) eps_hat + sigma z,
        sigma  = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab').

    eta = 0 draws nothing after x_T; eta = 1 is `ancestral_table` with fixed_small.

    Raises:
      ValueError: as `spaced_timesteps`; eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be in 0..1")
    kept = spaced_timesteps(process.schedule.timesteps, steps, spacing)
    to = _levels(process.schedule, kept)[1]
    s = eta * np.sqrt(respace(process.schedule, kept).posterior_variance[::-1])
    zeros = np.zeros(len(kept))
    return SamplerTable(kept[::-1], a=to.signal, b=zeros, c=np.sqrt(np.maximum(to.noise**2 - s**2, 0)), d=zeros, s=s)


def ddim_inversion_table(process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace") -> SamplerTable:
    """DDIM (eta = 0) the other way, from an image x_0 to x_T: each row is an Euler step with eps_hat where it starts.

    The first row takes the image to the first visited timestep, with what the network says of it there: an image has no
    timestep of its own.
    """
    kept = spaced_timesteps(process.schedule.timesteps, steps, spacing)
    to = _levels(process.schedule, kept)[0]
    on_image, zeros = np.arange(len(kept)) == 0, np.zeros(len(kept))  # where x itself is x0
    signal = to.signal[::-1]
    return SamplerTable(
        timesteps=np.append(kept[:1], kept[:-1]),
        a=np.where(on_image, 0.0, signal),
        b=np.where(on_image, signal, 0.0),
        c=to.noise[::-1],
        d=zeros,
        s=zeros,
    )


def dpmpp_2m_table(process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace") -> SamplerTable:
    """DPM-Solver++(2M) of Lu et al. 2022 (Algorithm 2), deterministic and of second order.

    With signal and noise the square roots of ab and 1 - ab, l = log(signal / noise), h = l' - l the step, h_before the one
    before and k = h / (2 h_before):

        x_prev = (noise' / noise) x_t + signal' (1 - exp(-h)) ((1 + k) x0_hat - k x0_hat_before).

    The first and the last row (to x_0, where h is infinite) are of first order, k = 0: DDIM's.
    """
    kept = spaced_timesteps(process.schedule.timesteps, steps, spacing)
    at, to = _levels(process.schedule, kept)
    with np.errstate(divide="ignore"):  # alphas_cumprod = 0 (schedule jsd): the first h is infinite, and k after it 0
        half_log_snr = np.log(at.signal / at.noise)
    h = np.diff(half_log_snr)
    k = np.zeros(len(kept))
    k[1:-1] = h[1:] / (2 * h[:-1])
    rise = to.signal - to.noise * at.signal / at.noise  # signal' (1 - exp(-h)), and 1 at the end
    return SamplerTable(kept[::-1], rise * (1 + k), to.noise / at.noise, np.zeros(len(kept)), -rise * k, np.zeros(len(kept)))


@dataclass(frozen=True)
class _Levels:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at each row of a reverse chain, float64 [S]."""

    signal: np.ndarray
    noise: np.ndarray


def _levels(schedule: NoiseSchedule, kept: np.ndarray) -> tuple[_Levels, _Levels]:
    """Where each row starts, and where it leads."""
    signal, noise = schedule.sqrt_alphas_cumprod[kept[::-1]], schedule.sqrt_one_minus_alphas_cumprod[kept[::-1]]
    return _Levels(signal, noise), _Levels(np.append(signal[1:], 1.0), np.append(noise[1:], 0.0))


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ancestral": ancestral_table,
    "ancestral_small": functools.partial(ancestral_table, variance="fixed_small"),
    "ancestral_large": functools.partial(ancestral_table, variance="fixed_large"),
    "sigma_hat": functools.partial(ancestral_table, variance="fixed_large"),  # the same, by the DDIM paper's name
    "ddim": ddim_table,
    "dpmpp_2m": dpmpp_2m_table,
}


def sampler_table(
    process: GaussianDiffusion, sampler: str, steps: int = 0, spacing: str = "linspace", eta: float = 0.0
) -> SamplerTable:
    """The table of a sampler by name.

    Raises:
      ValueError: unknown sampler, eta other than 0 where it is not ddim, and what the table itself refuses.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler}: one of {', '.join(SAMPLERS)}")
    if sampler == "ddim":
        return ddim_table(process, steps, spacing, eta=eta)
    if eta:
        raise ValueError(f"eta={eta}: sampler={sampler} has none, only ddim does")
    return SAMPLERS[sampler](process, steps, spacing)
