"""The data pipeline alone: what it delivers when nothing waits for it but the next request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.data.batches import TrainBatches
from ddpm_jax.data.prefetch import Prefetcher
from ddpm_jax.data.sources import Source, load_source
from ddpm_jax.devices import Devices


def measure_pipeline(config: Config, data_dir: Path, devices: Devices, batches: int) -> dict[str, Any]:
    """Batches as the training loop takes them, read, decoded, shuffled and placed on the devices.

    Returns:
      images_per_s, and seconds to open the set, which for a set in memory decodes all of it.
    """
    start = time.perf_counter()
    source = load_source(config.data, data_dir, "train")
    opened = time.perf_counter() - start
    return {"open_s": opened, "in_memory": config.data.in_memory, **deliver(source, config, devices, batches)}


def deliver(source: Source, config: Config, devices: Devices, batches: int) -> dict[str, Any]:
    order = TrainBatches(source, config.seed, config.train.batch_size)
    with Prefetcher(order, 0, devices.place) as upcoming:
        for _ in range(5):  # the first order is drawn, and what waits in the queue was prepared on nobody's time
            jax.block_until_ready(next(upcoming)[1])
        start = time.perf_counter()
        for _ in range(batches):
            jax.block_until_ready(next(upcoming)[1])
        taken = time.perf_counter() - start
    return {"batches_per_s": batches / taken, "images_per_s": batches * config.train.batch_size / taken}
