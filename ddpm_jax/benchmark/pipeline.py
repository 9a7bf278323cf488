"""Time the data pipeline alone, when nothing waits for it but the next request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.data.batches import TrainBatches
from ddpm_jax.data.load import load_source
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.source import Source
from ddpm_jax.parallel.devices import Devices


def measure_pipeline(
    config: Config, data_dir: Path, devices: Devices, batches: int
) -> dict[str, Any]:
    """Time batches as the training loop takes them: read, decoded, shuffled, on the devices.

    Returns:
      images_per_s, and seconds to open the set, which for a set in memory decodes all of it.
    """
    start = time.perf_counter()
    source = load_source(config.data, data_dir, "train")
    seconds = time.perf_counter() - start
    return {
        "open_s": seconds,
        "in_memory": config.data.in_memory,
        **deliver(source, config, devices, batches),
    }


def deliver(source: Source, config: Config, devices: Devices, batches: int) -> dict[str, Any]:
    """Time so many batches of an open source."""
    order = TrainBatches(source, config.seed, config.train.batch_size)
    with Prefetcher(order, 0, devices.place) as upcoming:
        # The first order is drawn, and what waits in the queue was prepared on nobody's time.
        for _ in range(5):
            jax.block_until_ready(next(upcoming)[1])
        start = time.perf_counter()
        for _ in range(batches):
            jax.block_until_ready(next(upcoming)[1])
        seconds = time.perf_counter() - start
    return {
        "batches_per_s": batches / seconds,
        "images_per_s": batches * config.train.batch_size / seconds,
    }
