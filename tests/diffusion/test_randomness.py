"""Keys are functions of (seed, stream, step, example) and of nothing else."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ddpm_jax.diffusion.randomness import Stream, example_keys, normal_per_example, stream_key


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_every_seed_stream_step_and_example_has_its_own_key() -> None:
    examples = jnp.arange(3)
    keys = []
    for seed, stream, step in itertools.product((0, 1, 2**31, 2**32 - 1), Stream, (0, 1, 800_000)):
        key = stream_key(seed, stream, step)
        keys += [bits(key), *map(bits, example_keys(key, examples))]
    assert len(set(keys)) == len(keys)


def test_stream_numbers_never_change() -> None:
    """A renumbered stream silently changes every run that is resumed."""
    names = ["PARAMETERS", "TIMESTEPS", "NOISE", "FLIPS", "DROPOUT", "LABEL_DROPOUT"]
    names += ["HELD_OUT_TIMESTEPS", "HELD_OUT_NOISE", "SAMPLES", "LIKELIHOOD"]
    assert [Stream(i).name for i in range(len(names))] == names


def test_key_of_a_traced_step_is_that_of_the_number() -> None:
    traced = jax.jit(lambda step: stream_key(7, Stream.NOISE, step))(jnp.int32(41))
    assert bits(traced) == bits(stream_key(7, Stream.NOISE, 41))


def test_noise_of_an_example_does_not_depend_on_the_split_of_the_batch() -> None:
    key = stream_key(0, Stream.NOISE, 5)
    whole = normal_per_example(example_keys(key, jnp.arange(8)), (4, 4, 3))
    for start in (0, 4):
        part = normal_per_example(example_keys(key, jnp.arange(start, start + 4)), (4, 4, 3))
        np.testing.assert_array_equal(part, whole[start : start + 4])
    shuffled = jnp.array([5, 0, 7, 2])
    np.testing.assert_array_equal(
        normal_per_example(example_keys(key, shuffled), (4, 4, 3)), whole[shuffled]
    )


def test_noise_is_standard_normal_and_independent() -> None:
    """Across examples, streams and steps: the same key on every device is a classic."""
    examples = jnp.arange(8)
    keys = [
        stream_key(0, Stream.NOISE, 0),
        stream_key(0, Stream.NOISE, 1),
        stream_key(0, Stream.SAMPLES, 0),
    ]
    noise = np.concatenate(
        [normal_per_example(example_keys(key, examples), (20, 20, 3)) for key in keys]
    )
    assert noise.dtype == np.float32 and noise.shape == (24, 20, 20, 3)
    flat = noise.reshape(24, -1).astype(np.float64)
    assert scipy.stats.kstest(flat.ravel(), "norm").pvalue > 1e-4
    correlation = np.corrcoef(flat) - np.eye(24)
    assert np.abs(correlation).max() < 5 / np.sqrt(flat.shape[1])
