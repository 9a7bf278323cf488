"""Samples of a trained network, any number of them, over all devices.

Sample i is a function of (parameters, seed, i) alone: not of how many are drawn, in which batches, on how many devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np

from ddpm_jax.build import Params, build_process, denoiser, image_shape
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.randomness import Stream, stream_key
from ddpm_jax.sampling import SamplerTable, ancestral_table, initial_noise, reverse_chain

SAMPLERS: dict[str, Callable[..., SamplerTable]] = {"ancestral": ancestral_table}


class Generator:
    """The reverse chain of a config, compiled once and mapped over devices.

    Args:
      batch_size: samples a call, over all devices; rounded up to a multiple of their number.
      sampler, steps, clip: as in `config.SamplingConfig`, whose values they default to.
      progress: show denoising steps done, their rate and the time left on stderr.

    Raises:
      ConfigError: unknown sampler, or more steps than timesteps.
    """

    def __init__(
        self,
        config: Config,
        devices: Devices,
        *,
        batch_size: int = 64,
        sampler: str | None = None,
        steps: int | None = None,
        clip: bool | None = None,
        progress: bool = False,
    ) -> None:
        sampler = config.sampling.sampler if sampler is None else sampler
        steps = config.sampling.steps if steps is None else steps
        clip = config.sampling.clip if clip is None else clip
        if sampler not in SAMPLERS:
            raise ConfigError(f"sampler={sampler}: one of {', '.join(SAMPLERS)}")
        process, bind, shape = build_process(config), denoiser(config), image_shape(config)
        try:
            self.table = SAMPLERS[sampler](process, steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error

        def chain(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            def key(seed: jax.Array, index: jax.Array) -> jax.Array:
                return jax.random.fold_in(stream_key(seed, Stream.SAMPLES), index)

            keys = jax.vmap(key)(batch["seed"], batch["index"])
            x = initial_noise(keys, shape, process.schedule.timesteps)
            denoise = bind(params, batch.get("label"))
            on_row = self._report if progress else None
            return reverse_chain(process, self.table, denoise, x, keys, clip=clip, on_row=on_row)

        self.devices, self.batch_size = devices, -(-batch_size // len(devices.devices)) * len(devices.devices)
        self._chain = devices.map_batch(chain)
        self._show_progress, self._progress, self._rows_before = progress and devices.is_main, None, 0

    def __call__(
        self, params: Params, *, seed: int, indices: np.ndarray, labels: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Samples number `indices` [n] as float32 [<= batch_size, h, w, c] in [-1, 1], batch by batch.

        `params` lie replicated on the devices (`Devices.replicate`). The last batch runs padded and comes back cut.
        """
        total = -(-len(indices) // self.batch_size) * self.table.steps
        with Progress(total, "step", enabled=self._show_progress, scale=0) as self._progress:
            for number, start in enumerate(range(0, len(indices), self.batch_size)):
                self._rows_before = number * self.table.steps
                rows = np.minimum(np.arange(start, start + self.batch_size), len(indices) - 1)
                batch = {"index": indices[rows].astype(np.uint32), "seed": np.full(len(rows), seed, np.uint32)}
                if labels is not None:
                    batch["label"] = labels[rows].astype(np.int32)
                samples = self.devices.rows(self._chain(params, self.devices.place(self.devices.own_rows(batch))))
                yield samples[: len(indices) - start]

    def _report(self, rows: np.ndarray) -> None:
        """Called from inside the chain, once for each device, in no promised order: only news counts."""
        news = self._rows_before + int(rows) - self._progress.count
        if news > 0:
            self._progress.update(news)
