"""Order the examples: training batches as a pure function of the step, test images in sequence.

Example i of the global batch of a step is example g = step * batch_size + i of one endless
sequence. That sequence consists of the epochs g // N, each a permutation of the N training images
drawn from (seed, epoch). There is no iterator state: the position in the data is the step, so a
resumed run reads what an uninterrupted one would have read, on any number of hosts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from ddpm_jax.data.source import Batch, Source, Stream
from ddpm_jax.errors import DataError


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the permutation of 0..count-1 of one epoch, int64 [count].

    It sorts raw 64-bit Philox output, keyed by (seed, epoch). NumPy keeps the raw stream of a bit
    generator fixed for ever, which it does not promise for Generator.permutation.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable")


class TrainBatches:
    """Training batches: `batches(step)` reads this host's rows of the global batch of a step.

    Host p of P reads the rows [p*B/P, (p+1)*B/P) of the B in a global batch and nothing else.
    Batches straddle epochs.

    Args:
      source: the training split.
      seed: of the order.
      batch_size: B, over all hosts.
      process_index: p.
      process_count: P, a divisor of B.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._source, self._batch_size = source, batch_size
        self._rows = _host_rows(batch_size, process_index, process_count)
        # A batch touches two epochs. Or many, where the set is smaller than the batch, and then
        # permutations cost nothing.
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, seed, count=len(source))
        )

    def indices(self, step: int) -> np.ndarray:
        """Return which training images the rows of this host are, int64 [B/P]."""
        epochs, positions = np.divmod(step * self._batch_size + self._rows, len(self._source))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order(int(epoch))[positions[here]]
        return chosen

    def __call__(self, step: int) -> Batch:
        """Read {"image": uint8 [B/P, h, w, c], "label": int32 [B/P] if labelled}."""
        return self._source.read(self.indices(step))


class StreamBatches:
    """Training batches of a stream: that of a step holds its images [step*B, (step+1)*B).

    It reads on where steps come in order, and from the start again where they do not.

    Args: as of TrainBatches, without the seed: a stream has its own order.
    """

    def __init__(
        self, stream: Stream, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        self._stream, self._batch_size = stream, batch_size
        self._rows = _host_rows(batch_size, process_index, process_count)
        self._restart()

    def __call__(self, step: int) -> Batch:
        """Read {"image": uint8 [B/P, h, w, c], "label": int32 [B/P] if labelled}."""
        if step < self._next:
            self._restart()
        while self._next < step:
            self._take()
        batch = self._take()
        return {name: column[self._rows] for name, column in batch.items()}

    def _restart(self) -> None:
        self._arrays, self._next = self._stream.arrays(), 0
        self._left: Batch = {}

    def _take(self) -> Batch:
        """Return the next global batch."""
        parts = [self._left] if self._left else []
        count = sum(len(part["image"]) for part in parts)
        whole = self._left
        if count < self._batch_size:
            while count < self._batch_size:
                parts.append(next(self._arrays))
                count += len(parts[-1]["image"])
            # Each array is copied once, as it comes: the stream may fill its memory anew.
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._left = {name: column[self._batch_size :] for name, column in whole.items()}
        self._next += 1
        return {name: column[: self._batch_size] for name, column in whole.items()}


def train_batches(
    source: Source | Stream, seed: int, batch_size: int, process_index: int, process_count: int
) -> TrainBatches | StreamBatches:
    """Return the training batches of any source; see TrainBatches for the arguments."""
    if isinstance(source, Stream):
        return StreamBatches(source, batch_size, process_index, process_count)
    return TrainBatches(source, seed, batch_size, process_index, process_count)


def eval_batches(
    source: Source, count: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Read the first `count` images, or all if there are fewer, once each, in the source's order.

    Yields:
      The rows of this host, as TrainBatches has them, of one batch: {"image", "label" if labelled,
      "mask": float32 [b]}. Every batch has the same size. The mask is 0 on the rows that fill up
      the last one (copies of its last image), which must not be counted.
    """
    count = min(count, len(source))
    rows = _host_rows(batch_size, process_index, process_count)
    for start in range(0, count, batch_size):
        indices = start + rows
        batch = source.read(np.minimum(indices, count - 1))
        yield batch | {"mask": (indices < count).astype(np.float32)}


def fingerprint(source: Source | Stream, *, skip_bad: bool = False) -> str:
    """Return what tells data sets apart without reading them: their length and a few images.

    Hosts compare it before they start.

    Args:
      skip_bad: of records: one of the few that cannot be decoded counts as black.
    """
    if isinstance(source, Stream):
        return f"a stream, {hashlib.sha256(source.first['image'].tobytes()).hexdigest()}"
    rows, bad = np.linspace(0, len(source) - 1, 8).astype(np.int64), {}
    few = source.read(rows, bad) if skip_bad else source.read(rows)
    if bad:
        few["image"][np.isin(rows, list(bad))] = 0
    return f"{len(source)} images, {hashlib.sha256(few['image'].tobytes()).hexdigest()}"


def _host_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    if batch_size % process_count:
        raise DataError(
            f"batch_size={batch_size} does not divide evenly among {process_count} hosts: "
            "use a multiple"
        )
    share = batch_size // process_count
    return np.arange(process_index * share, (process_index + 1) * share)
