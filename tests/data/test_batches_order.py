"""The order of training images, from its definition: another one in every epoch, by the seed."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_jax.data.batches import TrainBatches, eval_batches
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.source import ArraySource


def numbered(count: int) -> ArraySource:
    """Label i stands for image i."""
    return ArraySource(np.zeros((count, 2, 2, 1), np.uint8), np.arange(count, dtype=np.int32))


def written_out(seed: int, count: int, epochs: int) -> np.ndarray:
    """Sort the raw output of Philox keyed by (seed, epoch), once an epoch: int [epochs, count]."""
    keys = [np.array([seed, epoch], np.uint64) for epoch in range(epochs)]
    return np.stack([np.argsort(np.random.Philox(key=key).random_raw(count)) for key in keys])


@pytest.mark.parametrize("count, batch_size", [(12, 4), (10, 4), (7, 7), (3, 8)])
@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_batches_go_through_the_orders_of_the_epochs(count, batch_size, seed):
    epochs = 6
    batches = TrainBatches(numbered(count), seed, batch_size)
    steps = range(epochs * count // batch_size)
    labels = np.concatenate([batches(step)["label"] for step in steps])
    expected = written_out(seed, count, epochs)
    np.testing.assert_array_equal(labels, expected.reshape(-1)[: len(labels)])


def test_no_two_epochs_or_seeds_have_one_order():
    orders = []
    for seed in (0, 1):
        batches = TrainBatches(numbered(20), seed, 10)
        epochs = [
            np.concatenate([batches(2 * e)["label"], batches(2 * e + 1)["label"]]) for e in range(4)
        ]
        assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
        orders += [tuple(epoch) for epoch in epochs]
    assert len(set(orders)) == 8


def test_a_run_that_goes_on_in_mid_epoch_reads_what_it_would_have_read():
    """Step 7 of ten images in fours is in the third epoch."""
    expected = written_out(3, 10, 6).reshape(-1)
    with Prefetcher(TrainBatches(numbered(10), 3, 4), 7, lambda batch: batch["label"]) as upcoming:
        for number in range(7, 12):
            step, labels = next(upcoming)
            assert step == number
            np.testing.assert_array_equal(labels, expected[4 * number : 4 * number + 4])


@pytest.mark.parametrize("count", [3, 5, 9])
def test_filler_rows_are_copies_of_the_last_image_that_counts(count):
    """A set of twelve, of which fewer are asked for: no row shows an image that was not."""
    for number, batch in enumerate(eval_batches(numbered(12), count, 4)):
        expected = np.minimum(4 * number + np.arange(4), count - 1)
        np.testing.assert_array_equal(batch["label"], expected)
        np.testing.assert_array_equal(batch["mask"], 4 * number + np.arange(4) < count)
