"""Derive every random draw from (seed, stream, step, example); nothing random is stored.

    key(seed) -> stream -> step -> index of the example in the global batch

Nothing random is carried along, so there is nothing to save. No draw depends on how the batch is
laid out, so one device, eight devices and two hosts compute the same step.
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
    """Return the key of one stream at one step, a typed scalar key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(stream)), step)


def example_keys(key: jax.Array, examples: jax.Array) -> jax.Array:
    """Derive one key for each global example index: keys [b] from integers [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, examples)


def normal_per_example(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normal float32 [b, *shape], row i from keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def sample_keys(seeds: jax.Array, indices: jax.Array) -> jax.Array:
    """Derive the keys [b] of samples number `indices` [b] under `seeds` [b]."""
    return jax.vmap(
        lambda seed, index: jax.random.fold_in(stream_key(seed, Stream.SAMPLES), index)
    )(seeds, indices)
