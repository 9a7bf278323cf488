"""Fill in the missing part of an image with a model that never saw a mask (RePaint, 2022).

After every step the known pixels are replaced by a draw of q(x_t | x_0) of the true ones. The
missing ones then fit them in statistics but not in meaning, so the chain goes back up a few steps
(eq. 2 of Ho et al., many at once) and down again, several times, until both have been denoised
together (Lugmayr et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.chain import Row, Update, noise_at, report


@dataclass(frozen=True)
class Repaint:
    """How often, and how far, a chain goes back up.

    Every `jump` rows it goes back up `jump` rows, so that each stretch is gone through `resample`
    times.
    """

    resample: int = 10
    jump: int = 10

    def __post_init__(self) -> None:
        for name in ("resample", "jump"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    def visits(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows in the order of their visits, and the row that each is reached from.

        On the way up a row is reached from a lower one, on the way down from itself. Stretches
        start at the last row and every `jump` rows before it; what is left at the top is gone
        through once.
        """
        rows, origins, left, i = [], [], [self.resample - 1] * steps, 0
        while i < steps:
            back = (steps - 1 - i) % self.jump == 0 and i >= self.jump and left[i] > 0
            origins.append(i)
            if back:
                left[i] -= 1
                i -= self.jump
            rows.append(i)
            i += 1
        return np.array(rows), np.array(origins)


def inpaint_chain(
    update: Update,
    x_T: jax.Array,
    keys: jax.Array,
    known: jax.Array,
    mask: jax.Array,
    repaint: Repaint,
    *,
    on_visit: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Sample x_0 given its pixels where `mask` is 1.

    Args:
      update: the table to run down, and its denoiser.
      x_T: [b,h,w,c]. keys: typed keys [b].
      known: [b,h,w,c], the pixels to keep. mask: [b,h,w,1].
      on_visit: called as `on_row` of `reverse_chain`, with the number of visits that are done.

    Returns:
      x_0, float32 [b,h,w,c], equal to `known` where it is known.

    Raises:
      ValueError: a multistep table, whose history going back up would make void.
    """
    table, schedule = update.table, update.process.schedule
    if table.multistep:
        raise ValueError(
            "inpainting goes back up the chain, which a multistep sampler cannot: take ancestral "
            "or ddim"
        )
    numbers, origins = repaint.visits(table.steps)
    signal = schedule.sqrt_alphas_cumprod[table.timesteps]
    noise = schedule.sqrt_one_minus_alphas_cumprod[table.timesteps]
    # A row that is met where the one before led keeps all, also where a chain ends without signal.
    keep = np.ones(len(numbers))
    np.divide(signal[numbers], signal[origins], out=keep, where=numbers != origins)
    columns = {
        "keep": keep,
        "lose": np.sqrt(np.maximum(1 - keep**2, 0)),
        "signal": np.append(signal[1:], 1.0)[numbers],  # of where the row leads
        "noise": np.append(noise[1:], 0.0)[numbers],
    }
    visits = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    visits["number"] = jnp.arange(len(numbers))
    rows = {
        name: jax.tree.map(lambda column: column[numbers], columns)
        for name, columns in update.rows().items()
    }

    def body(x: jax.Array, at: tuple[Row, Row]) -> tuple[jax.Array, None]:
        visit, row = at

        def draw(which: int) -> jax.Array:
            number = schedule.timesteps + 1 + 3 * visit["number"] + which
            return noise_at(keys, number, x.shape[1:])

        x = visit["keep"] * x + visit["lose"] * draw(0)
        x_prev, *_ = update(row, x, lambda: draw(1))
        given = visit["signal"] * known + visit["noise"] * draw(2)
        if on_visit is not None:
            report(on_visit, visit["number"] + 1, len(numbers))
        return jnp.where(mask > 0, given, x_prev), None

    return jax.lax.scan(body, x_T, (visits, rows))[0]
