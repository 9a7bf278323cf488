"""Draw the timesteps of a training batch: uniformly, or by importance.

Importance is that of Nichol & Dhariwal 2021, section 3.3. The terms of the bound differ by orders
of magnitude in t, so a uniform draw estimates it with a large variance. Drawing t with p_t
proportional to sqrt(E[L_t^2]) and dividing by T p_t keeps the mean and minimises the variance.
E[L_t^2] is taken over the last ten losses seen at t: a history that changes the next draw, hence
part of the training state.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

HISTORY = 10  # losses kept for each timestep
UNIFORM_SHARE = 1e-3  # of the draw that stays uniform, so that no timestep starves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossHistory:
    """The last losses at each timestep.

    Attributes:
      losses: float32 [T, 10], the oldest first once full.
      counts: int32 [T], how many of them are real.
    """

    losses: jax.Array
    counts: jax.Array


def empty_history(timesteps: int) -> LossHistory:
    """Return the history before any loss was seen."""
    return LossHistory(
        jnp.zeros((timesteps, HISTORY), jnp.float32), jnp.zeros(timesteps, jnp.int32)
    )


def uniform_timesteps(keys: jax.Array, timesteps: int) -> jax.Array:
    """Draw t ~ U{0..T-1}, int32 [b], element i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, timesteps))(keys)


def timestep_probabilities(history: LossHistory) -> jax.Array:
    """Compute p_t, float32 [T], summing to 1: uniform until every timestep has ten losses."""
    timesteps = history.counts.shape[0]
    root_mean_square = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    # All losses exactly zero give no direction: uniform again, rather than 0/0.
    total = root_mean_square.sum()
    by_loss = jnp.where(total > 0, root_mean_square / jnp.where(total > 0, total, 1), 1 / timesteps)
    mixed = (1 - UNIFORM_SHARE) * by_loss + UNIFORM_SHARE / timesteps
    return jnp.where(jnp.all(history.counts >= HISTORY), mixed, 1 / timesteps)


def importance_timesteps(keys: jax.Array, history: LossHistory) -> tuple[jax.Array, jax.Array]:
    """Draw t ~ p_t and the weights 1/(T p_t) that keep the loss unbiased.

    Returns:
      t int32 [b], and weights float32 [b].
    """
    probabilities = timestep_probabilities(history)
    t = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(probabilities)))(keys)
    return t, 1 / (history.counts.shape[0] * probabilities[t])


def record_losses(history: LossHistory, t: jax.Array, losses: jax.Array) -> LossHistory:
    """Add losses float32 [b] at t int [b], as if one by one in the order of the global batch.

    All are moved at once: a loop over the batch costs a GPU six launches an example.
    """
    added = jnp.zeros_like(history.counts).at[t].add(1)
    dropped = jnp.maximum(history.counts + added - HISTORY, 0)  # the oldest, to make room
    places = jnp.arange(HISTORY)[None] + dropped[:, None]
    kept = jnp.take_along_axis(history.losses, jnp.minimum(places, HISTORY - 1), axis=1)
    same = t[:, None] == t[None]
    rank = jnp.sum(jnp.tril(same, -1), axis=1)  # among those of its t
    place = history.counts[t] + rank - dropped[t]
    # Those that its own batch pushes out again go past the end, which drops them. A negative place
    # would count from the end, and two writes to one place have no order on a GPU.
    place = jnp.where(place < 0, HISTORY, place)
    return LossHistory(
        kept.at[t, place].set(losses, mode="drop"),
        jnp.minimum(history.counts + added, HISTORY),
    )
