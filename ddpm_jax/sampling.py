"""The reverse chain: x_T ~ N(0, I) down to x_0 in one `lax.scan` (Ho et al. 2020, Algorithm 2).

Every sampler of this family is one linear update with coefficients that depend on the step alone,

    x_prev = a x0_hat + b x_t + c eps_hat + s z,    z ~ N(0, I),

so a sampler is a table with a row (timestep, a, b, c, s) for each step, computed in float64, and the scan runs down its rows.
x0_hat is clipped before the update; eps_hat is derived from it again, so that the three always satisfy eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion as d
from ddpm_jax.randomness import normal_per_example
from ddpm_jax.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The rows of a reverse chain, first step first, each array [S].

    Attributes:
      timesteps: int32, what the network is told; strictly falling, the last row leads to x_0.
      a, b, c, s: float64 coefficients of x0_hat, x_t, eps_hat and z. Where the variance is learned, s is 1 or 0 and scales
        the standard deviation that the network gives.
      log_variance_low, log_variance_high: float64 ends of `learned_range`, log posterior variance and log beta of this
        chain's own steps.
    """

    timesteps: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    s: np.ndarray
    log_variance_low: np.ndarray
    log_variance_high: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def spaced_timesteps(timesteps: int, steps: int) -> np.ndarray:
    """`steps` of 0..timesteps-1 in equal distances, rising, int32: always T-1 and, from two steps on, always 0.

    Raises:
      ValueError: steps outside 1..timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps}: must be in 1..{timesteps}")
    if steps == 1:
        return np.array([timesteps - 1], np.int32)
    return np.round(np.linspace(0, timesteps - 1, steps)).astype(np.int32)


def respace(schedule: NoiseSchedule, kept: np.ndarray) -> NoiseSchedule:
    """The schedule of the chain that visits only the timesteps `kept` (rising).

    q(x_t | x_0) stays what it was at those t, so its betas are 1 - alphas_cumprod_t / alphas_cumprod_{t before}: a stride of
    many steps is one step with a large beta, and every variance follows from that one, not from the original.
    """
    if len(kept) == schedule.timesteps:
        return schedule
    alphas_cumprod = schedule.alphas_cumprod[kept]
    return NoiseSchedule.from_betas(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def ancestral_table(process: d.GaussianDiffusion, steps: int = 0) -> SamplerTable:
    """Algorithm 2: x_{t-1} ~ p_theta(x_{t-1} | x_t) with the variance of `process`, in `steps` steps (0: all T).

    The mean is that of the posterior at x0_hat, eq. 7; the last step adds no noise.
    """
    kept = spaced_timesteps(process.schedule.timesteps, steps or process.schedule.timesteps)
    chain = respace(process.schedule, kept)
    if process.variance == "fixed_small":
        scale = np.sqrt(chain.posterior_variance)
    elif process.variance == "fixed_large":
        scale = np.sqrt(chain.betas)
    else:
        scale = np.ones(len(kept))
    return SamplerTable(
        timesteps=kept[::-1],
        a=chain.posterior_mean_coef1[::-1],
        b=chain.posterior_mean_coef2[::-1],
        c=np.zeros(len(kept)),
        s=np.append(scale[:0:-1], 0.0),
        log_variance_low=chain.posterior_log_variance_clipped[::-1],
        log_variance_high=np.log(chain.betas)[::-1],
    )


def initial_noise(keys: jax.Array, shape: tuple[int, ...], timesteps: int) -> jax.Array:
    """x_T ~ N(0, I), float32 [b, *shape]; sample i depends on keys[i] alone."""
    return _noise_at(keys, timesteps, shape)


def reverse_chain(
    process: d.GaussianDiffusion,
    table: SamplerTable,
    denoise: d.Denoiser,
    x: jax.Array,
    keys: jax.Array,
    *,
    clip: bool = True,
    on_row: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Runs `x` down the table.

    Args:
      x: [b,h,w,c], N(0, I) for a whole chain.
      keys: typed keys [b]; the noise of sample i at timestep t depends on (keys[i], t) alone, whatever the batch.
      clip: limit x0_hat to [-1, 1] before the update.
      on_row: called on the host with the number of finished rows, about a hundred times a chain and after the last: for
        progress. A program with such a call in it cannot be kept in JAX's compilation cache.

    Returns:
      x_0, float32 [b,h,w,c]; not clipped after the last step (with a clipped x0_hat it lies in [-1, 1] all the same).
    """
    rows = {
        "row": jnp.arange(table.steps),
        "t": jnp.asarray(table.timesteps, jnp.int32),
        **{name: jnp.asarray(getattr(table, name), jnp.float32) for name in ("a", "b", "c", "s")},
        "low": jnp.asarray(table.log_variance_low, jnp.float32),
        "high": jnp.asarray(table.log_variance_high, jnp.float32),
    }
    report_every = max(1, table.steps // 100)

    def update(x: jax.Array, row: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        t = jnp.full(x.shape[0], row["t"])
        prediction, raw = d.split_output(process, denoise(x, t))
        x0 = d.predict_x0(process.schedule, process.prediction, prediction, x, t)
        x0 = jnp.clip(x0, -1, 1) if clip else x0
        x_prev = row["a"] * x0 + row["b"] * x
        if table.c.any():
            x_prev += row["c"] * d.eps_from_x0(process.schedule, x0, x, t)
        scale = row["s"]
        if process.learns_variance:
            fraction = (raw + 1) / 2
            log_variance = raw if process.variance == "learned" else row["low"] + fraction * (row["high"] - row["low"])
            scale = scale * jnp.exp(0.5 * log_variance)
        x_prev += scale * _noise_at(keys, row["t"], x.shape[1:])
        if on_row is not None:
            finished = row["row"] + 1
            due = (finished % report_every == 0) | (finished == table.steps)
            jax.lax.cond(due, lambda: jax.debug.callback(on_row, finished), lambda: None)
        return x_prev, None

    return jax.lax.scan(update, x, rows)[0]


def _noise_at(keys: jax.Array, t: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return normal_per_example(jax.vmap(jax.random.fold_in, (0, None))(keys, t), shape)
