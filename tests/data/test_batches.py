import threading
import time

import jax
import numpy as np
import pytest

from ddpm_jax.data.batches import StreamBatches, TrainBatches, epoch_order, eval_batches
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.source import ArraySource, Stream
from ddpm_jax.errors import DataError


def numbered(count: int) -> ArraySource:
    """Image i is filled with i, and so is its label."""
    values = np.arange(count)
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (count, 2, 2, 1))
    return ArraySource(np.ascontiguousarray(images), values.astype(np.int32))


# ------------------------------------------------------------ training


@pytest.mark.parametrize("count, batch_size", [(12, 4), (10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_shows_every_image_once(count, batch_size):
    batches = TrainBatches(numbered(count), seed=5, batch_size=batch_size)
    epochs = 6
    labels = np.concatenate(
        [batches(step)["label"] for step in range(-(-epochs * count // batch_size))]
    )
    for epoch in labels[: epochs * count].reshape(epochs, count):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_batch_is_a_pure_function_of_the_step():
    used = TrainBatches(numbered(50), seed=1, batch_size=8)
    for step in (0, 99, 3, 1000):
        used(step)
    fresh = TrainBatches(numbered(50), seed=1, batch_size=8)
    for step in (7, 3, 1000):
        np.testing.assert_array_equal(used(step)["image"], fresh(step)["image"])


def test_batch_has_the_promised_types():
    batch = TrainBatches(numbered(50), seed=1, batch_size=8)(0)
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (8, 2, 2, 1)
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (8,)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert set(TrainBatches(ArraySource(numbered(50).images), seed=1, batch_size=8)(0)) == {"image"}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_split_the_global_batch(hosts):
    source = numbered(50)
    for step in (0, 6, 400):  # step 6 straddles two epochs
        whole = TrainBatches(source, seed=3, batch_size=8)(step)["label"]
        parts = [TrainBatches(source, 3, 8, host, hosts)(step)["label"] for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_host_reads_its_own_rows_only():
    class Spy:
        image_shape, labelled, asked = (2, 2, 1), True, []

        def __len__(self):
            return 50

        def read(self, indices):
            self.asked.append(indices)
            return {}

    spy = Spy()
    TrainBatches(spy, 0, 8, process_index=1, process_count=4)(0)
    assert [len(indices) for indices in spy.asked] == [2]


def test_seeds_and_epochs_shuffle_differently():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert epoch_order(0, 1, 100).tobytes() != epoch_order(1, 0, 100).tobytes()


def test_every_image_is_as_likely_in_every_place():
    count, epochs = 8, 4000
    orders = np.stack([epoch_order(0, epoch, count) for epoch in range(epochs)])
    seen = np.stack([np.bincount(orders[:, place], minlength=count) for place in range(count)])
    chi2 = ((seen - epochs / count) ** 2 / (epochs / count)).sum()
    assert chi2 < 49 + 5 * np.sqrt(
        2 * 49
    )  # (8-1)^2 degrees of freedom; one order for all epochs gives 224,000


def test_order_is_the_same_on_every_machine_and_numpy():
    """Frozen: if this changes, interrupted runs no longer go on with the data they would read."""
    np.testing.assert_array_equal(epoch_order(0, 0, 10), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7])
    np.testing.assert_array_equal(epoch_order(7, 3, 10), [2, 5, 9, 7, 3, 0, 6, 8, 4, 1])


def test_batch_size_must_divide_among_hosts():
    with pytest.raises(DataError, match="batch_size=9 does not divide evenly among 2 hosts"):
        TrainBatches(numbered(50), 0, 9, 0, 2)


# ------------------------------------------------------------ streams


def stream(count: int, size: int) -> Stream:
    """`numbered(count)` in pieces of `size`."""
    whole = numbered(count)
    return Stream(
        lambda: (whole.read(np.arange(i, min(i + size, count))) for i in range(0, count, size))
    )


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_a_stream_is_cut_into_batches_in_its_order(size):
    batches = StreamBatches(stream(10, size), batch_size=4)
    labels = np.concatenate([batches(step)["label"] for step in range(6)])
    np.testing.assert_array_equal(labels, np.arange(24) % 10)  # it begins again at its end


def test_a_stream_gives_a_step_its_batch_wherever_it_was():
    batches = StreamBatches(stream(10, 3), batch_size=4)
    for step in (3, 1, 1, 5):
        expected = (4 * step + np.arange(4)) % 10
        np.testing.assert_array_equal(batches(step)["image"][:, 0, 0, 0], expected)


def test_an_array_of_a_stream_is_copied_once_and_no_more(monkeypatch):
    """Ten steps of an array that holds ten batches; its memory may then hold the next one."""
    array, copied, join = np.zeros((40, 2, 2, 1), np.uint8), [], np.concatenate

    def refilled():
        for number in range(3):
            array[:] = number
            yield array

    def counting(parts):
        copied.append(sum(map(len, parts)))
        return join(parts)

    batches = StreamBatches(Stream(refilled), batch_size=4)
    monkeypatch.setattr(np, "concatenate", counting)
    shown = [batches(step)["image"] for step in range(30)]
    assert sum(copied) == 3 * len(array)
    for step, images in enumerate(shown):
        assert (images == step // 10).all()


def test_hosts_share_the_batches_of_a_stream():
    parts = [StreamBatches(stream(10, 3), 4, host, 2)(2)["label"] for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), [8, 9, 0, 1])


def test_a_stream_that_changes_is_refused():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    batches = StreamBatches(Stream(lambda: [images, images[:, :2]]), batch_size=4)
    with pytest.raises(DataError, match="item 1 of the stream is not as the first one, 4x4x1"):
        batches(0)


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.arange(99), r"item 1 of the stream has labels int64 \[99\] for 100 images: must be"),
        (np.arange(100)[:, None], r"labels int64 \[100, 1\] for 100 images"),
        (np.arange(100) / 2, r"labels float64 \[100\] for 100 images: must be whole numbers"),
    ],
)
def test_labels_of_a_stream_are_one_class_for_each_image(labels, message):
    """Of every item: those of the second one would go to wrong images, or to none."""
    images = np.zeros((100, 2, 2, 1), np.uint8)
    good = {"image": images, "label": np.arange(100)}
    batches = StreamBatches(Stream(lambda: [good, {"image": images, "label": labels}]), 100)
    assert batches(0)["label"].dtype == np.int32
    with pytest.raises(DataError, match=message):
        batches(1)


# ------------------------------------------------------------ evaluation


@pytest.mark.parametrize("count, batch_size", [(10, 4), (8, 4), (3, 8), (20, 7), (99, 4)])
def test_eval_batches_count_each_image_once(count, batch_size):
    batches = list(eval_batches(numbered(20), count, batch_size))
    assert {len(batch["image"]) for batch in batches} == {batch_size}
    kept = np.concatenate([batch["label"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(kept, np.arange(min(count, 20)))
    assert sum(batch["mask"].sum() for batch in batches) == min(count, 20)
    assert batches[0]["mask"].dtype == np.float32


def test_eval_batches_of_hosts_make_up_the_whole():
    whole = list(eval_batches(numbered(20), 10, 8))
    parts = [list(eval_batches(numbered(20), 10, 8, host, 4)) for host in range(4)]
    for step, batch in enumerate(whole):
        for name in ("image", "label", "mask"):
            np.testing.assert_array_equal(
                np.concatenate([part[step][name] for part in parts]), batch[name]
            )


# ------------------------------------------------------------ prefetching


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetcher_counts_up_from_start_and_places():
    with Prefetcher(lambda step: step * 10, start=3, place=lambda batch: batch + 1) as upcoming:
        assert [next(upcoming) for _ in range(5)] == [(3, 31), (4, 41), (5, 51), (6, 61), (7, 71)]
    assert not prefetch_threads()


def test_prefetcher_places_on_devices():
    batches = TrainBatches(numbered(50), seed=1, batch_size=8)
    with Prefetcher(batches, start=2, place=jax.device_put) as upcoming:
        step, placed = next(upcoming)
    assert step == 2 and isinstance(placed["image"], jax.Array)
    np.testing.assert_array_equal(placed["label"], batches(2)["label"])


def test_prefetcher_works_ahead_but_no_further_than_depth():
    made, third = [], threading.Event()

    def batches(step):
        made.append((step, threading.current_thread().name))
        if step == 3:
            third.set()
        return step

    with Prefetcher(batches, start=0, place=lambda batch: batch, depth=3):
        assert third.wait(10)  # nobody has asked for anything: 0, 1, 2 wait, and 3 is made
        time.sleep(0.05)
        ahead = [step for step, _ in made]
    assert ahead == [0, 1, 2, 3]
    assert {name for _, name in made} == {"prefetch"}


@pytest.mark.parametrize("culprit", ["batches", "place"])
def test_what_the_thread_raises_reaches_the_caller_at_its_step(culprit):
    def fail_at_two(step):
        if step == 2:
            raise DataError("record 2 is damaged")
        return step

    ways = {"batches": lambda step: step, "place": lambda batch: batch} | {culprit: fail_at_two}
    upcoming = Prefetcher(ways["batches"], 0, ways["place"])
    assert next(upcoming) == (0, 0) and next(upcoming) == (1, 1)
    with pytest.raises(DataError, match="record 2 is damaged"):
        next(upcoming)
    with pytest.raises(StopIteration):
        next(upcoming)
    assert not prefetch_threads()


def test_closing_early_leaves_no_thread():
    upcoming = Prefetcher(lambda step: step, 0, lambda batch: batch, depth=1)
    next(upcoming)
    upcoming.close()
    upcoming.close()
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(upcoming)
