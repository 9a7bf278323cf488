"""Build samplers as tables: a row for each step, whose coefficients depend on the step alone.

Every sampler of this family is one linear update of what is known at x_t,

    x_prev = row.x0 x0_hat + row.x x_t + row.eps eps_hat + row.z z
           + sum_k row.x0_before[k] x0_hat_before[k] + sum_k row.eps_before[k] eps_hat_before[k],

with z ~ N(0, I), and x0_hat_before[k] the x0_hat of k + 1 rows before. A sampler is therefore a
table of rows, computed in float64, and `chain.reverse_chain` runs down them.

A strided chain visits `steps` of the T timesteps. q(x_t | x_0) stays what it was at those, so every
coefficient follows from alphas_cumprod at the visited timesteps. Whatever the spacing, the last row
goes to x_0 (alphas_cumprod = 1), not to x at t = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ddpm_jax.diffusion import multistep
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.spacing import chain_levels, respace, spaced_timesteps


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """Hold the rows of a chain, first step first, each array [S].

    Attributes:
      timesteps: int32, what the network is told.
      x0, x, eps, z: float64 coefficients of x0_hat, x_t, eps_hat and z.
      x0_before, eps_before: [S, K], of the former x0_hat and eps_hat, that of the row before
        first; None where the sampler uses none.
      log_variance_low, log_variance_high: given where the network's own variance is used; z is then
        1 or 0 and scales its standard deviation. They are the ends of `learned_range`: log
        posterior variance and log beta of this chain's steps.
    """

    timesteps: np.ndarray
    x0: np.ndarray
    x: np.ndarray
    eps: np.ndarray
    z: np.ndarray
    x0_before: np.ndarray | None = None
    eps_before: np.ndarray | None = None
    log_variance_low: np.ndarray | None = None
    log_variance_high: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """Return the number of rows."""
        return len(self.timesteps)

    @property
    def learned(self) -> bool:
        """Return whether the network's own variance is used."""
        return self.log_variance_low is not None

    @property
    def history(self) -> dict[str, int]:
        """Return how many former x0_hat and eps_hat the rows use, by the names of the columns."""
        counts = {"x0_before": 0, "eps_before": 0}
        for name in counts:
            columns = getattr(self, name)
            if columns is not None and columns.any():
                counts[name] = 1 + int(np.flatnonzero(columns.any(axis=0))[-1])
        return counts

    @property
    def multistep(self) -> bool:
        """Return whether rows use what the network said at former ones."""
        return any(self.history.values())

    def rows(self, which: slice) -> SamplerTable:
        """Return some of the rows: `slice(i, None)` for a chain that starts in the middle."""
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return replace(self, **{name: column[which] for name, column in columns.items()})

    def row_at(self, timestep: int) -> int:
        """Return the row whose timestep is nearest to `timestep`, the later of two equally near."""
        return int(np.abs(self.timesteps.astype(int) - timestep).argmin())


def ancestral_table(
    process: GaussianDiffusion,
    steps: int = 0,
    spacing: str = "linspace",
    *,
    variance: str | None = None,
) -> SamplerTable:
    """Tabulate Algorithm 2: x_{t-1} ~ p_theta(x_{t-1} | x_t) in `steps` steps (0: all T).

    The mean is that of the posterior at x0_hat, eq. 7; the last step adds no noise. On a strided
    chain everything is that of the stride's own beta' = 1 - alphas_cumprod_t / alphas_cumprod_prev:
    fixed_small is eta = 1 of Song et al. 2021; fixed_large, whose variance is beta', is their
    sigma-hat.

    Args:
      variance: fixed_small or fixed_large instead of that of `process`.

    Raises:
      ValueError: see `spaced_timesteps`; or a strided chain whose variance is `learned`, which is
        the variance of single steps.
    """
    visits = spaced_timesteps(process.schedule, steps, spacing)
    chain, variance = respace(process.schedule, visits), variance or process.variance
    if variance == "learned" and len(visits) < process.schedule.timesteps:
        raise ValueError(
            "variance=learned is that of single steps: take all of them, or ancestral_small or "
            "ancestral_large"
        )
    ends = {}
    if variance == "fixed_small":
        scale = np.sqrt(chain.posterior_variance)
    elif variance == "fixed_large":
        scale = np.sqrt(chain.betas)
    else:
        scale = np.ones(len(visits))
        ends["log_variance_low"] = chain.posterior_log_variance_clipped[::-1]
        ends["log_variance_high"] = np.log(chain.betas)[::-1]
    zeros = np.zeros(len(visits))
    return SamplerTable(
        timesteps=visits[::-1],
        x0=chain.posterior_mean_coef1[::-1],
        x=chain.posterior_mean_coef2[::-1],
        eps=zeros,
        z=np.append(scale[:0:-1], 0.0),
        **ends,
    )


def ddim_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace", *, eta: float = 0.0
) -> SamplerTable:
    """Tabulate DDIM, eqs. 12 and 16 of Song et al. 2021.

    With ab = alphas_cumprod at the timestep and ab' at the next one visited:

        x_prev = sqrt(ab') x0_hat + sqrt(1 - ab' - sigma^2) eps_hat + sigma z,
        sigma  = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab').

    eta = 0 draws nothing after x_T; eta = 1 is `ancestral_table` with fixed_small.

    Raises:
      ValueError: see `spaced_timesteps`; or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be in 0..1")
    visits = spaced_timesteps(process.schedule, steps, spacing)
    to = chain_levels(process.schedule, visits)[1]
    sigma = eta * np.sqrt(respace(process.schedule, visits).posterior_variance[::-1])
    zeros = np.zeros(len(visits))
    return SamplerTable(
        timesteps=visits[::-1],
        x0=to.signal,
        x=zeros,
        eps=np.sqrt(np.maximum(to.noise**2 - sigma**2, 0)),
        z=sigma,
    )


def ddim_inversion_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace"
) -> SamplerTable:
    """Tabulate DDIM (eta = 0) the other way, from an image x_0 to x_T.

    Each row is an Euler step with the eps_hat of where it starts. The first row takes the image to
    the first visited timestep, with what the network says of it there: an image has no timestep of
    its own.
    """
    visits = spaced_timesteps(process.schedule, steps, spacing)
    to = chain_levels(process.schedule, visits)[0]
    on_image, zeros = np.arange(len(visits)) == 0, np.zeros(len(visits))  # where x itself is x0
    signal = to.signal[::-1]
    return SamplerTable(
        timesteps=np.append(visits[:1], visits[:-1]),
        x0=np.where(on_image, 0.0, signal),
        x=np.where(on_image, signal, 0.0),
        eps=to.noise[::-1],
        z=zeros,
    )


def dpmpp_2m_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace"
) -> SamplerTable:
    """Tabulate DPM-Solver++(2M) of Lu et al. 2022 (Algorithm 2), deterministic, of second order.

    With signal and noise the square roots of ab and 1 - ab, l = log(signal / noise), h = l' - l the
    step, h_before the one before and k = h / (2 h_before):

        x_prev = (noise' / noise) x_t
               + signal' (1 - exp(-h)) ((1 + k) x0_hat - k x0_hat_before).

    The first and the last row (to x_0, where h is infinite) are of first order, k = 0: DDIM's.
    """
    visits = spaced_timesteps(process.schedule, steps, spacing)
    at, to = chain_levels(process.schedule, visits)
    k = multistep.dpmpp_2m_extrapolation(process.schedule, visits)
    rise = to.signal - to.noise * at.signal / at.noise  # signal' (1 - exp(-h)), and 1 at the end
    zeros = np.zeros(len(visits))
    return SamplerTable(
        timesteps=visits[::-1],
        x0=rise * (1 + k),
        x=to.noise / at.noise,
        eps=zeros,
        x0_before=-(rise * k)[:, None],
        z=zeros,
    )


def dpmpp_2m_sde_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace"
) -> SamplerTable:
    """Tabulate SDE-DPM-Solver++(2M) of Lu et al. 2022, with h and k as in `dpmpp_2m_table`.

        x_prev = (noise' / noise) exp(-h) x_t + noise' sqrt(1 - exp(-2h)) z
               + signal' (1 - exp(-2h)) ((1 + k) x0_hat - k x0_hat_before).

    That is the ancestral chain with the posterior's variance, but for the k of its x0_hat.
    """
    visits = spaced_timesteps(process.schedule, steps, spacing)
    table = ancestral_table(process, steps, spacing, variance="fixed_small")
    k = multistep.dpmpp_2m_extrapolation(process.schedule, visits)
    return replace(table, x0=table.x0 * (1 + k), x0_before=-(table.x0 * k)[:, None])


def deis_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace", *, order: int = 2
) -> SamplerTable:
    """Tabulate DEIS (tAB) of Zhang & Chen 2023, which is DDIM with an extrapolated eps_hat:

        x_prev = signal' x0_hat + noise' (a mean of eps_hat and those before, see `deis_weights`).

    It keeps eps_hat as the paper does, but takes the signal of x_prev from x0_hat, not from x_t.
    So a clipped x0_hat bounds it as in DDIM, and each eps_hat is derived again from a clipped one.

    Raises:
      ValueError: see `spaced_timesteps`; or an order that is not 2 or 3.
    """
    multistep.check_order(order)
    visits = spaced_timesteps(process.schedule, steps, spacing)
    weights, zeros = multistep.deis_weights(process.schedule, visits, order), np.zeros(len(visits))
    return SamplerTable(
        timesteps=visits[::-1],
        x0=chain_levels(process.schedule, visits)[1].signal,
        x=zeros,
        eps=weights[:, 0],
        eps_before=weights[:, 1:],
        z=zeros,
    )


def unipc_table(
    process: GaussianDiffusion, steps: int = 0, spacing: str = "linspace", *, order: int = 2
) -> SamplerTable:
    """Tabulate UniPC of Zhao et al. 2023, in its form for x0, with B2.

    Each row first corrects the x_t that the row before predicted, then predicts: see
    `unipc_weights` for why that is one linear update and one evaluation of the network.

    Raises:
      ValueError: see `spaced_timesteps`; or an order that is not 2 or 3.
    """
    multistep.check_order(order)
    visits = spaced_timesteps(process.schedule, steps, spacing)
    at, to = chain_levels(process.schedule, visits)
    weights, zeros = multistep.unipc_weights(process.schedule, visits, order), np.zeros(len(visits))
    return SamplerTable(
        timesteps=visits[::-1],
        x0=weights[:, 0],
        x=to.noise / at.noise,
        eps=zeros,
        x0_before=weights[:, 1:],
        z=zeros,
    )


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ancestral": ancestral_table,
    "ancestral_small": functools.partial(ancestral_table, variance="fixed_small"),
    "ancestral_large": functools.partial(ancestral_table, variance="fixed_large"),
    # The same, by the DDIM paper's name.
    "sigma_hat": functools.partial(ancestral_table, variance="fixed_large"),
    "ddim": ddim_table,
    "dpmpp_2m": dpmpp_2m_table,
    "dpmpp_2m_sde": dpmpp_2m_sde_table,
    "deis": deis_table,
    "unipc": unipc_table,
}
OF_AN_ORDER = ("deis", "unipc")


def sampler_table(
    process: GaussianDiffusion,
    sampler: str,
    steps: int = 0,
    spacing: str = "linspace",
    eta: float = 0.0,
    order: int = 0,
) -> SamplerTable:
    """Tabulate a sampler by its name.

    Args:
      order: of deis and unipc, 2 or 3; 0 is 2.

    Raises:
      ValueError: an unknown sampler, an eta other than 0 where the sampler is not ddim, an order
        where it is neither deis nor unipc, and what the table itself refuses.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler}: one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta={eta}: sampler={sampler} has none, only ddim does")
    if order and sampler not in OF_AN_ORDER:
        raise ValueError(
            f"order={order}: sampler={sampler} has none, only {' and '.join(OF_AN_ORDER)} do"
        )
    options = {"eta": eta} if sampler == "ddim" else {"order": order} if order else {}
    return SAMPLERS[sampler](process, steps, spacing, **options)
