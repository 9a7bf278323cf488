"""The order of training: `batch(step)` as a pure function, and the test images in their fixed order.

Example i of the global batch of a step is example g = step * batch_size + i of one endless sequence: the epochs
g // N, each a permutation of the N training images drawn from (seed, epoch). There is no iterator state: the data
position is the step, so a resumed run reads what an uninterrupted one would have read, on any number of hosts.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from ddpm_jax.data.errors import DataError
from ddpm_jax.data.sources import Batch, Source


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of 0..count-1 of one epoch, int64 [count].

    It sorts raw 64-bit Philox output, keyed by (seed, epoch): NumPy keeps the raw stream of a bit generator fixed for
    ever, which it does not promise for Generator.permutation.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable")


class TrainBatches:
    """`batches(step)`: this host's rows of the global batch of a step.

    Host p of P reads the rows [p*B/P, (p+1)*B/P) of the B in a global batch and nothing else. Batches straddle epochs.

    Args:
      source: the training split.
      seed: of the order.
      batch_size: B, over all hosts.
      process_index: p.
      process_count: P, a divisor of B.
    """

    def __init__(self, source: Source, seed: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> None:
        self._source, self._batch_size = source, batch_size
        self._rows = _host_rows(batch_size, process_index, process_count)
        # A batch touches two epochs, or many where the set is smaller than the batch and permutations cost nothing.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, count=len(source)))

    def indices(self, step: int) -> np.ndarray:
        """Which training images the rows of this host are, int64 [B/P]."""
        epochs, positions = np.divmod(step * self._batch_size + self._rows, len(self._source))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order(int(epoch))[positions[here]]
        return chosen

    def __call__(self, step: int) -> Batch:
        """{"image": uint8 [B/P, h, w, c], "label": int32 [B/P] if labelled}."""
        return self._source.read(self.indices(step))


def eval_batches(source: Source, count: int, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """The first `count` images (all, if there are fewer), once each, in the order of the source.

    Yields:
      This host's rows, as TrainBatches, of one batch: {"image", "label" if labelled, "mask": float32 [b]}. Every batch
      has the same size; the mask is 0 on the rows that fill up the last one (copies of its last image), which must not
      be counted.
    """
    count = min(count, len(source))
    rows = _host_rows(batch_size, process_index, process_count)
    for start in range(0, count, batch_size):
        indices = start + rows
        batch = source.read(np.minimum(indices, count - 1))
        yield batch | {"mask": (indices < count).astype(np.float32)}


def fingerprint(source: Source) -> str:
    """What tells data sets apart without reading them: their length and a few images. Hosts compare it before they start."""
    few = source.read(np.linspace(0, len(source) - 1, 8).astype(np.int64))
    return f"{len(source)} images, {hashlib.sha256(few['image'].tobytes()).hexdigest()}"


def _host_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    if batch_size % process_count:
        raise DataError(f"batch_size={batch_size} does not divide evenly among {process_count} hosts: use a multiple")
    share = batch_size // process_count
    return np.arange(process_index * share, (process_index + 1) * share)
