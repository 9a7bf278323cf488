"""RePaint (Lugmayr et al. 2022): the missing part of an image, from a model that never saw a mask.

After every step the known pixels are replaced by a draw of q(x_t | x_0) of the true ones. The missing ones then fit them in
statistics but not in meaning, so the chain goes back up a few steps (eq. 2 of Ho et al., many at once) and down again, several
times, until both have been denoised together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.sampling import Stepper, noise_at, report


@dataclass(frozen=True)
class Repaint:
    """Every `jump` rows the chain goes back up `jump` rows, so that each stretch is gone through `resample` times."""

    resample: int = 10
    jump: int = 10

    def __post_init__(self) -> None:
        for name in ("resample", "jump"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    def visits(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order of their visits, and the row each visit is reached from on the way up (itself: on the way down).

        Stretches start at the last row and every `jump` rows before it; what is left at the top is gone through once.
        """
        rows, reached_from, left, i = [], [], [self.resample - 1] * steps, 0
        while i < steps:
            back = (steps - 1 - i) % self.jump == 0 and i >= self.jump and left[i] > 0
            reached_from.append(i)
            if back:
                left[i] -= 1
                i -= self.jump
            rows.append(i)
            i += 1
        return np.array(rows), np.array(reached_from)


def inpaint_chain(
    step: Stepper,
    x: jax.Array,
    keys: jax.Array,
    known: jax.Array,
    mask: jax.Array,
    repaint: Repaint,
    *,
    on_visit: Callable[[jax.Array], None] | None = None,
) -> jax.Array:
    """Runs `x` down the table of `step` with the pixels of `known` [b,h,w,c] where `mask` [b,h,w,1] is 1.

    `on_visit` is called as `on_row` of `reverse_chain`, with the number of finished visits.

    Returns:
      x_0, float32 [b,h,w,c], equal to `known` where it is known.

    Raises:
      ValueError: a multistep table, whose history going back up would make void.
    """
    table, schedule = step.table, step.process.schedule
    if table.d.any():
        raise ValueError("inpainting goes back up the chain, which a multistep sampler cannot: take ancestral or ddim")
    visited, reached_from = repaint.visits(table.steps)
    signal, noise = (values[table.timesteps] for values in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod))
    keep = signal[visited] / signal[reached_from]
    columns = {
        "visit": np.arange(len(visited), dtype=np.int32),
        "keep": keep,
        "lose": np.sqrt(np.maximum(1 - keep**2, 0)),
        "signal": np.append(signal[1:], 1.0)[visited],  # of where the row leads
        "noise": np.append(noise[1:], 0.0)[visited],
    }
    visits = {name: jnp.asarray(value, jnp.int32 if name == "visit" else jnp.float32) for name, value in columns.items()}
    rows = {name: values[visited] for name, values in step.rows().items()}

    def update(x: jax.Array, at: tuple[dict[str, jax.Array], dict[str, jax.Array]]) -> tuple[jax.Array, None]:
        visit, row = at

        def draw(number: int) -> jax.Array:
            return noise_at(keys, schedule.timesteps + 1 + 3 * visit["visit"] + number, x.shape[1:])

        x = visit["keep"] * x + visit["lose"] * draw(0)
        x_prev, _ = step(row, x, lambda: draw(1))
        x_prev = jnp.where(mask > 0, visit["signal"] * known + visit["noise"] * draw(2), x_prev)
        if on_visit is not None:
            report(on_visit, visit["visit"] + 1, len(visited), len(visited))
        return x_prev, None

    return jax.lax.scan(update, x, (visits, rows))[0]
