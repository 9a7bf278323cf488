"""Uniform and importance draws of the timestep.

The oracles are exact expectations, frequencies, and a plain Python history.
"""

from __future__ import annotations

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.diffusion.timesteps import (
    HISTORY,
    UNIFORM_SHARE,
    LossHistory,
    empty_history,
    importance_timesteps,
    record_losses,
    timestep_probabilities,
    uniform_timesteps,
)

T = 6
LOSSES = (
    np.random.default_rng(0)
    .gamma(2.0, np.geomspace(10, 0.1, T)[:, None], (T, HISTORY))
    .astype(np.float32)
)
FULL = LossHistory(jnp.asarray(LOSSES), jnp.full(T, HISTORY, jnp.int32))
KEYS = jax.random.split(jax.random.key(0), 12_000)


def test_uniform_draws_are_uniform_over_all_timesteps() -> None:
    t = uniform_timesteps(KEYS, T)
    assert t.dtype == jnp.int32
    assert scipy.stats.chisquare(np.bincount(t, minlength=T)).pvalue > 1e-4
    assert set(np.asarray(t)) == set(
        range(T)
    )  # both ends, and nothing beyond: one off would train no t = 0


def test_draw_of_an_example_does_not_depend_on_the_split_of_the_batch() -> None:
    keys = KEYS[:8]
    whole = uniform_timesteps(keys, 1000)
    parts = [uniform_timesteps(keys[i : i + 4], 1000) for i in (0, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    t, weight = importance_timesteps(keys, FULL)
    for i in range(0, 8, 4):
        part_t, part_weight = importance_timesteps(keys[i : i + 4], FULL)
        np.testing.assert_array_equal(part_t, t[i : i + 4])
        np.testing.assert_array_equal(part_weight, weight[i : i + 4])
    assert len(set(np.asarray(whole))) > 4


def test_probabilities_follow_the_root_mean_square_with_a_uniform_share() -> None:
    p = np.asarray(timestep_probabilities(FULL), np.float64)
    rms = np.array([np.sqrt(np.mean([float(x) ** 2 for x in row])) for row in LOSSES])
    np.testing.assert_allclose(
        p, (1 - UNIFORM_SHARE) * rms / rms.sum() + UNIFORM_SHARE / T, rtol=1e-5
    )
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)


def test_no_timestep_starves() -> None:
    never = LossHistory(jnp.asarray(LOSSES).at[2].set(0), FULL.counts)
    np.testing.assert_allclose(timestep_probabilities(never)[2], 1e-3 / T, rtol=1e-5)
    all_zero = LossHistory(jnp.zeros((T, HISTORY)), FULL.counts)
    np.testing.assert_allclose(timestep_probabilities(all_zero), 1 / T, rtol=1e-6)


def test_draw_is_uniform_until_every_timestep_has_ten_losses() -> None:
    almost = LossHistory(FULL.losses, FULL.counts.at[3].set(HISTORY - 1))
    np.testing.assert_allclose(timestep_probabilities(almost), 1 / T, rtol=1e-6)
    t, weight = importance_timesteps(KEYS, almost)
    np.testing.assert_allclose(weight, 1, rtol=1e-6)
    assert scipy.stats.chisquare(np.bincount(t, minlength=T)).pvalue > 1e-4
    assert np.ptp(timestep_probabilities(FULL)) > 0.1


def test_importance_draws_have_the_probabilities() -> None:
    t, _ = importance_timesteps(KEYS, FULL)
    expected = np.asarray(timestep_probabilities(FULL), np.float64)
    expected *= len(KEYS) / expected.sum()
    assert scipy.stats.chisquare(np.bincount(t, minlength=T), expected).pvalue > 1e-4


def test_weights_leave_the_mean_loss_unbiased() -> None:
    """sum_t p_t w_t L_t = mean of L_t, exactly, for the weights of the draws themselves."""
    t, weight = (np.asarray(v) for v in importance_timesteps(KEYS, FULL))
    weights = np.array([weight[t == i][0] for i in range(T)], np.float64)
    assert all((weight[t == i] == weight[t == i][0]).all() for i in range(T))
    loss = np.random.default_rng(1).uniform(size=T)
    p = np.asarray(timestep_probabilities(FULL), np.float64)
    np.testing.assert_allclose((p * weights * loss).sum(), loss.mean(), rtol=1e-5)


def test_importance_draws_have_less_variance_than_uniform_ones() -> None:
    """What it is for: the bound's terms differ by orders of magnitude."""
    loss = LOSSES.mean(axis=1)
    t, weight = importance_timesteps(KEYS, FULL)
    by_importance, uniform = weight * loss[t], loss[uniform_timesteps(KEYS, T)]
    np.testing.assert_allclose(by_importance.mean(), loss.mean(), rtol=0.05)
    assert by_importance.std() < 0.5 * uniform.std()


@pytest.mark.parametrize("batch", [16, 40])
def test_history_equals_a_deque_for_each_timestep(batch: int) -> None:
    """Several losses of one timestep in one batch are pushed one after the other.

    Of more than the history holds, a batch leaves its last.
    """
    random = np.random.default_rng(2)
    record, history = jax.jit(record_losses), empty_history(T)
    queues = [deque(maxlen=HISTORY) for _ in range(T)]
    for _ in range(12):
        t, losses = (
            random.choice(T, batch, p=[0.4, 0.3, 0.15, 0.135, 0.015, 0]),
            random.uniform(size=batch).astype(np.float32),
        )
        history = record(history, jnp.asarray(t, jnp.int32), jnp.asarray(losses))
        for at, loss in zip(t, losses):
            queues[at].append(loss)
        np.testing.assert_array_equal(history.counts, [len(queue) for queue in queues])
        for row, queue in zip(np.asarray(history.losses), queues):
            np.testing.assert_array_equal(row[: len(queue)], list(queue))
    assert len(queues[0]) == HISTORY and 0 < len(queues[4]) < HISTORY and not queues[5]
    assert history.losses.dtype == jnp.float32 and history.counts.dtype == jnp.int32


def test_history_survives_jit_and_tree_maps() -> None:
    copy = jax.tree.map(lambda x: x + 0, FULL)
    assert isinstance(copy, LossHistory)
    np.testing.assert_array_equal(copy.losses, FULL.losses)
