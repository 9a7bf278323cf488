"""Randomness is derived, never stored: every draw is a function of (seed, stream, step, example).

    key(seed) --stream--> --step--> --index of the example in the global batch-->

Nothing random is carried along, so there is nothing to save; and no draw depends on how the batch is laid out, so one device,
eight devices and two hosts compute the same step.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """What a draw is for. The numbers are part of every run's identity: append, never renumber."""

    PARAMETERS = 0
    TIMESTEPS = 1
    NOISE = 2
    FLIPS = 3
    DROPOUT = 4
    LABEL_DROPOUT = 5
    HELD_OUT_TIMESTEPS = 6
    HELD_OUT_NOISE = 7
    SAMPLES = 8
    LIKELIHOOD = 9


def stream_key(seed: int | jax.Array, stream: Stream, step: int | jax.Array = 0) -> jax.Array:
    """The key of one stream at one step, a typed scalar key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(stream)), step)


def example_keys(key: jax.Array, examples: jax.Array) -> jax.Array:
    """One key for each global example index: keys [b] from integers [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, examples)


def normal_per_example(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [b, *shape], row i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
