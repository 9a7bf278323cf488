"""Run the reverse chain, Algorithm 2 of Ho et al. 2020, as one `lax.scan` down a sampler's table.

Every sampler of `samplers` is a table with one row for each step, and every row is the same update

    x_prev = row.x0 x0_hat + row.x x_t + row.eps eps_hat + row.z z
           + sum_k row.x0_before[k] x0_hat_before[k] + sum_k row.eps_before[k] eps_hat_before[k],

so there is one loop for all of them, `reverse_chain`. For the ancestral table its body is the body
of Algorithm 2: the row holds the coefficients of eq. 7 and the standard deviation, so that the
update draws from the Gaussian of `process.p_mean_variance`. The test
`test_a_row_draws_from_p_mean_variance` ties the two together.

The scan carries x, as many x0_hat or eps_hat of the rows before as the table uses, and a fixed
number of frames where asked: memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import (
    Denoiser,
    GaussianDiffusion,
    convert,
    eps_from_x0,
    log_variance_in_range,
    predict_x0,
    split_output,
)
from ddpm_jax.diffusion.randomness import normal_per_example
from ddpm_jax.diffusion.samplers import SamplerTable

# Of the columns of former predictions, a row and a carry hold a tuple; it is empty for most tables.
Row = dict[str, Any]
Carry = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Frames:
    """Which states of a chain to keep.

    Attributes:
      what: "x_t" keeps x after the row, "x0" the x0_hat that the row's update used.
      after: int [K], the rows to keep, strictly rising and ending with the last row.
    """

    what: str
    after: np.ndarray


def initial_noise(keys: jax.Array, shape: tuple[int, ...], timesteps: int) -> jax.Array:
    """Draw x_T ~ N(0, I), float32 [b, *shape]; sample i depends on keys[i] alone."""
    return noise_at(keys, timesteps, shape)


def forward_noise(
    keys: jax.Array, shape: tuple[int, ...], timesteps: int, number: int = 0
) -> jax.Array:
    """Draw the eps of eq. 4 for chains that start from images, float32 [b, *shape].

    It is apart from every noise of the reverse chain, and each `number` gives another one.
    """
    return noise_at(keys, timesteps + 1 + number, shape)


def noise_at(keys: jax.Array, t: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw the noise of timestep `t`, float32 [b, *shape]; sample i depends on (keys[i], t)."""
    return normal_per_example(jax.vmap(jax.random.fold_in, (0, None))(keys, t), shape)


def threshold(x0: jax.Array, percentile: float) -> jax.Array:
    """Limit x0_hat [b,h,w,c] to [-1, 1] by a range of its own for each sample.

    This is dynamic thresholding, section 2.3 of Saharia et al. 2022 (Imagen):

        s = max(1, quantile(|x0_hat|, percentile)),   clip(x0_hat, -s, s) / s

    Few pixels outside are clipped, many shrink the contrast of the whole sample.
    """
    s = jnp.quantile(jnp.abs(x0), percentile, axis=(1, 2, 3), keepdims=True)
    s = jnp.maximum(s, 1)
    return jnp.clip(x0, -s, s) / s


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one row, for a denoiser.

    Attributes:
      clip: limit x0_hat to [-1, 1] before the update.
      dynamic_threshold: the percentile of `threshold`, which then limits it; 0 clips.
      rederive_eps: where x0_hat was clipped, derive eps_hat from it again, so that x_t, x0_hat and
        eps_hat satisfy eq. 4; otherwise eps_hat stays what the network predicted.
    """

    process: GaussianDiffusion
    table: SamplerTable
    denoise: Denoiser
    clip: bool = True
    rederive_eps: bool = True
    dynamic_threshold: float = 0.0

    def rows(self) -> Row:
        """Return the table in float32, arrays [S] for each column, with the rows' numbers."""
        history = self.table.history
        columns = {
            name: jnp.asarray(column, jnp.float32)
            for name, column in vars(self.table).items()
            if column is not None and name not in history
        }
        former = {
            name: tuple(
                jnp.asarray(getattr(self.table, name)[:, k], jnp.float32) for k in range(count)
            )
            for name, count in history.items()
        }
        columns["timesteps"] = jnp.asarray(self.table.timesteps, jnp.int32)
        return columns | former | {"number": jnp.arange(self.table.steps)}

    def __call__(
        self,
        row: Row,
        x_t: jax.Array,
        noise: Callable[[], jax.Array],
        before: Callable[[str, jax.Array], Iterable[jax.Array]] = lambda _, now: repeat(now),
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Take x_t one row down.

        Args:
          row: one row of `rows()`.
          x_t: [b,h,w,c].
          noise: gives z. It is not called where the table draws nothing.
          before: gives the former ones, newest first, from the column ("x0_before" or
            "eps_before") and what it is now. Where all are as now, the row is of first order.

        Returns:
          x_prev, x0_hat, and eps_hat where the table uses it, all like x_t.
        """
        x0, eps, log_variance = self._predict(row, x_t)
        x_prev = row["x0"] * x0 + row["x"] * x_t
        if self.table.eps.any():
            x_prev += row["eps"] * eps
        for name, now in (("x0_before", x0), ("eps_before", eps)):
            if row[name]:
                for factor, former in zip(row[name], before(name, now)):
                    x_prev += factor * former
        if self.table.z.any():
            learned = log_variance is not None
            scale = row["z"] * jnp.exp(0.5 * log_variance) if learned else row["z"]
            x_prev += scale * noise()
        return x_prev, x0, eps

    def _predict(
        self, row: Row, x_t: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Return x0_hat, eps_hat where the table uses it, and log sigma^2 where it is learned."""
        process, schedule = self.process, self.process.schedule
        t = jnp.full(x_t.shape[0], row["timesteps"])
        prediction, raw = split_output(process, self.denoise(x_t, t))
        x0 = predict_x0(schedule, process.prediction, prediction, x_t, t)
        if self.clip and self.dynamic_threshold:
            x0 = threshold(x0, self.dynamic_threshold)
        elif self.clip:
            x0 = jnp.clip(x0, -1, 1)
        eps = log_variance = None
        if self.table.eps.any() and self.clip and self.rederive_eps:
            eps = eps_from_x0(schedule, x0, x_t, t)
        elif self.table.eps.any():
            eps = convert(schedule, prediction, x_t, t, source=process.prediction, target="eps")
        if self.table.learned:
            low, high = row["log_variance_low"], row["log_variance_high"]
            learned = process.variance == "learned"
            log_variance = raw if learned else log_variance_in_range(raw, low, high)
        return x0, eps, log_variance


def reverse_chain(
    process: GaussianDiffusion,
    table: SamplerTable,
    denoise: Denoiser,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    clip: bool = True,
    rederive_eps: bool = True,
    dynamic_threshold: float = 0.0,
    span: tuple[jax.Array, jax.Array] | None = None,
    on_row: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Sample x_0 by running x_T down the table (Algorithm 2).

    Args:
      x_T: [b,h,w,c], N(0, I) for a whole chain.
      keys: typed keys [b]. The noise of sample i at timestep t depends on (keys[i], t) alone,
        whatever the batch.
      clip, rederive_eps, dynamic_threshold: see `Update`.
      span: int [b] each. Sample i goes through the rows from `span[0][i]` up to, without,
        `span[1][i]`. A row that no sample needs costs nothing. By default all rows.
      on_row: called on the host with the number of rows that are done, about a hundred times a
        chain and after the last, for progress. A program with such a call in it cannot be kept in
        JAX's compilation cache.

    Returns:
      x_0, float32 [b,h,w,c]. It is not clipped after the last row; with a clipped x0_hat it lies
      in [-1, 1] all the same.
    """
    update = Update(process, table, denoise, clip, rederive_eps, dynamic_threshold)
    return _scan(update, x_T, keys, span=span, on_row=on_row)["x"]


def recorded_chain(
    process: GaussianDiffusion,
    table: SamplerTable,
    denoise: Denoiser,
    x_T: jax.Array,
    keys: jax.Array,
    frames: Frames,
    *,
    clip: bool = True,
    rederive_eps: bool = True,
    dynamic_threshold: float = 0.0,
    on_row: Callable[[jax.Array], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sample as `reverse_chain` does, and keep states on the way.

    Returns:
      x_0, and the frames float32 [K,b,h,w,c].

    Raises:
      ValueError: the last row is not among the frames.
    """
    if frames.after[-1] != table.steps - 1:
        end = f"frames end after row {frames.after[-1]}"
        raise ValueError(f"{end}: must end after the last, {table.steps - 1}")
    update = Update(process, table, denoise, clip, rederive_eps, dynamic_threshold)
    end = _scan(update, x_T, keys, frames=frames, on_row=on_row)
    return end["x"], end["frames"]


def _scan(
    update: Update,
    x_T: jax.Array,
    keys: jax.Array,
    *,
    span: tuple[jax.Array, jax.Array] | None = None,
    frames: Frames | None = None,
    on_row: Callable[[jax.Array], None] | None = None,
) -> Carry:
    table, rows = update.table, update.rows()
    start: Carry = {"x": x_T}
    for name, count in table.history.items():
        start[name] = (jnp.zeros_like(x_T),) * count
    if frames is not None:
        start["frames"] = jnp.zeros((len(frames.after), *x_T.shape), x_T.dtype)
        # Each row writes the slot of the next row to be kept, which so ends up with that row's.
        slots = np.searchsorted(frames.after, np.arange(table.steps))
        rows["slot"] = jnp.asarray(slots, jnp.int32)
    first = 0 if span is None else span[0].reshape(-1, 1, 1, 1)

    def one_row(carry: Carry, row: Row) -> Carry:
        x_t = carry["x"]

        def before(name: str, now: jax.Array, but: int = 0) -> tuple[jax.Array, ...]:
            """Return the former ones; a sample's first row, which has none, repeats its own."""
            former = carry[name][: len(carry[name]) - but]
            return tuple(jnp.where(row["number"] == first, now, value) for value in former)

        x_prev, x0, eps = update(
            row, x_t, noise=lambda: noise_at(keys, row["timesteps"], x_t.shape[1:]), before=before
        )
        after = carry | {"x": x_prev}
        for name, now in (("x0_before", x0), ("eps_before", eps)):
            if carry[name]:
                after[name] = (now, *before(name, now, but=1))
        if frames is not None:
            frame = x_prev if frames.what == "x_t" else x0
            after["frames"] = carry["frames"].at[row["slot"]].set(frame)
        return after

    def body(carry: Carry, row: Row) -> tuple[Carry, None]:
        if span is None:
            after = one_row(carry, row)
        else:
            active = (span[0] <= row["number"]) & (row["number"] < span[1])
            after = jax.lax.cond(active.any(), one_row, lambda carry, row: carry, carry, row)
            after["x"] = jnp.where(active.reshape(-1, 1, 1, 1), after["x"], carry["x"])
        if on_row is not None:
            report(on_row, row["number"] + 1, table.steps)
        return after, None

    return jax.lax.scan(body, start, rows)[0]


def report(on_row: Callable[[jax.Array], None], done: jax.Array, steps: int) -> None:
    """Call `on_row(done)` on the host, about a hundred times in `steps` and at the end."""
    due = (done % max(1, steps // 100) == 0) | (done == steps)
    jax.lax.cond(due, lambda: jax.debug.callback(on_row, done), lambda: None)
