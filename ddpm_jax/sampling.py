"""The reverse chain: x_T ~ N(0, I) down to x_0 in one compiled loop (Ho et al. 2020, Algorithm 2), by any table of `samplers`.

The loop carries x, x0_hat_before where the table uses it, and a fixed number of frames where asked: memory does not grow with
the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion as d
from ddpm_jax.randomness import normal_per_example
from ddpm_jax.samplers import SamplerTable

Rows = dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Frames:
    """What to keep of a chain on its way: `what` ("x_t" after the row, or the "x0" it was formed from) of the rows `after`.

    `after` is int [K], strictly rising, and ends with the last row.
    """

    what: str
    after: np.ndarray


def initial_noise(keys: jax.Array, shape: tuple[int, ...], timesteps: int) -> jax.Array:
    """x_T ~ N(0, I), float32 [b, *shape]; sample i depends on keys[i] alone."""
    return noise_at(keys, timesteps, shape)


def forward_noise(keys: jax.Array, shape: tuple[int, ...], timesteps: int, number: int = 0) -> jax.Array:
    """eps of eq. 4 for chains that start from images, float32 [b, *shape]; apart from every noise of the reverse chain."""
    return noise_at(keys, timesteps + 1 + number, shape)


def noise_at(keys: jax.Array, t: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return normal_per_example(jax.vmap(jax.random.fold_in, (0, None))(keys, t), shape)


@dataclass(frozen=True, eq=False)
class Stepper:
    """One row of a table, for a denoiser.

    Attributes:
      clip: limit x0_hat to [-1, 1] before the update.
      rederive_eps: where x0_hat was clipped, eps_hat is derived from it again, so that x_t, x0_hat and eps_hat satisfy eq. 4;
        otherwise it stays what the network said.
    """

    process: d.GaussianDiffusion
    table: SamplerTable
    denoise: d.Denoiser
    clip: bool = True
    rederive_eps: bool = True

    def rows(self) -> Rows:
        """The table in float32, one array [S] for each column."""
        columns = {name: jnp.asarray(value, jnp.float32) for name, value in vars(self.table).items() if value is not None}
        return columns | {"timesteps": jnp.asarray(self.table.timesteps, jnp.int32)}

    def __call__(
        self,
        row: Rows,
        x: jax.Array,
        noise: Callable[[], jax.Array],
        before: Callable[[jax.Array], jax.Array] = lambda x0: x0,
    ) -> tuple[jax.Array, jax.Array]:
        """x_prev and x0_hat, both like x.

        Args:
          noise: gives z; not called where the table has s = 0 throughout.
          before: gives x0_hat_before, from x0_hat; where it is x0_hat itself the row is of first order.
        """
        process, schedule = self.process, self.process.schedule
        t = jnp.full(x.shape[0], row["timesteps"])
        prediction, raw = d.split_output(process, self.denoise(x, t))
        x0 = d.predict_x0(schedule, process.prediction, prediction, x, t)
        x0 = jnp.clip(x0, -1, 1) if self.clip else x0
        x_prev = row["a"] * x0 + row["b"] * x
        if self.table.c.any():
            if self.clip and self.rederive_eps:
                eps = d.eps_from_x0(schedule, x0, x, t)
            else:
                eps = d.convert(schedule, prediction, x, t, source=process.prediction, target="eps")
            x_prev += row["c"] * eps
        if self.table.d.any():
            x_prev += row["d"] * before(x0)
        if self.table.s.any():
            x_prev += self._scale(row, raw) * noise()
        return x_prev, x0

    def _scale(self, row: Rows, raw: jax.Array | None) -> jax.Array:
        if not self.table.learned:
            return row["s"]
        assert raw is not None
        low, high = row["log_variance_low"], row["log_variance_high"]
        log_variance = raw if self.process.variance == "learned" else d.log_variance_in_range(raw, low, high)
        return row["s"] * jnp.exp(0.5 * log_variance)


def reverse_chain(
    process: d.GaussianDiffusion,
    table: SamplerTable,
    denoise: d.Denoiser,
    x: jax.Array,
    keys: jax.Array,
    *,
    clip: bool = True,
    rederive_eps: bool = True,
    span: tuple[jax.Array, jax.Array] | None = None,
    on_row: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Runs `x` down the table.

    Args:
      x: [b,h,w,c], N(0, I) for a whole chain.
      keys: typed keys [b]; the noise of sample i at timestep t depends on (keys[i], t) alone, whatever the batch.
      clip, rederive_eps: see `Stepper`.
      span: int [b] each; sample i goes through the rows from span[0][i] up to, without, span[1][i]. The loop runs over the
        rows that some sample needs. By default all rows.
      on_row: called on the host with the number of finished rows, about a hundred times a chain and after the last: for
        progress. A program with such a call in it cannot be kept in JAX's compilation cache.

    Returns:
      x_0, float32 [b,h,w,c]; not clipped after the last step (with a clipped x0_hat it lies in [-1, 1] all the same).
    """
    step = Stepper(process, table, denoise, clip, rederive_eps)
    return _run(step, x, keys, span=span, on_row=on_row)["x"]


def recorded_chain(
    process: d.GaussianDiffusion,
    table: SamplerTable,
    denoise: d.Denoiser,
    x: jax.Array,
    keys: jax.Array,
    frames: Frames,
    *,
    clip: bool = True,
    rederive_eps: bool = True,
    on_row: Callable[[jax.Array], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `reverse_chain`; besides x_0 the frames float32 [K,b,h,w,c]. ValueError if the last row is not among them."""
    if frames.after[-1] != table.steps - 1:
        raise ValueError(f"frames end after row {frames.after[-1]}: must end after the last, {table.steps - 1}")
    carry = _run(Stepper(process, table, denoise, clip, rederive_eps), x, keys, frames=frames, on_row=on_row)
    return carry["x"], carry["frames"]


def _run(
    step: Stepper,
    x: jax.Array,
    keys: jax.Array,
    *,
    span: tuple[jax.Array, jax.Array] | None = None,
    frames: Frames | None = None,
    on_row: Callable[[jax.Array], None] | None = None,
) -> dict[str, jax.Array]:
    table, rows = step.table, step.rows()
    carry = {"x": x}
    if table.d.any():
        carry["x0"] = jnp.zeros_like(x)
    if frames is not None:
        carry["frames"] = jnp.zeros((len(frames.after), *x.shape), x.dtype)
        # Each row writes the slot of the next row to be kept, so that slot ends up with that row's.
        slots = jnp.asarray(np.searchsorted(frames.after, np.arange(table.steps)), jnp.int32)
    first, end = (0, table.steps) if span is None else (span[0].min(), span[1].max())

    def update(i: int | jax.Array, carry: dict[str, jax.Array]) -> dict[str, jax.Array]:
        row, x = {name: values[i] for name, values in rows.items()}, carry["x"]
        starts = i == (first if span is None else span[0].reshape(-1, 1, 1, 1))  # nothing came before
        x_prev, x0 = step(
            row,
            x,
            noise=lambda: noise_at(keys, row["timesteps"], x.shape[1:]),
            before=lambda x0: jnp.where(starts, x0, carry["x0"]),
        )
        if span is not None:
            active = ((span[0] <= i) & (i < span[1])).reshape(-1, 1, 1, 1)
            x_prev = jnp.where(active, x_prev, x)
        after = {"x": x_prev} | ({"x0": x0} if "x0" in carry else {})
        if frames is not None:
            after["frames"] = carry["frames"].at[slots[i]].set(x_prev if frames.what == "x_t" else x0)
        if on_row is not None:
            report(on_row, i + 1, end, table.steps)
        return after

    return jax.lax.fori_loop(first, end, update, carry)


def report(on_row: Callable[[jax.Array], None], finished: jax.Array, end: int | jax.Array, steps: int) -> None:
    """Calls `on_row(finished)` on the host, about a hundred times in `steps` and at the `end`."""
    due = (finished % max(1, steps // 100) == 0) | (finished == end)
    jax.lax.cond(due, lambda: jax.debug.callback(on_row, finished), lambda: None)
