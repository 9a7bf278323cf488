"""Draw samples of a trained network, any number of them, over all devices.

Sample i is a function of (parameters, seed, i) alone: not of how many are drawn, in which batches,
on how many devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ddpm_jax.build import Bind, Params, build_process, denoiser, image_shape
from ddpm_jax.config import Config
from ddpm_jax.diffusion.chain import initial_noise
from ddpm_jax.diffusion.randomness import sample_keys
from ddpm_jax.errors import check
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.sampling.guidance import check_guidance, guided
from ddpm_jax.sampling.sampler import Sampler, build_sampler


def check_draw(seed: int, indices: np.ndarray) -> None:
    """Check that seed and numbers are those of a draw: another one must not stand in for it.

    Raises:
      ConfigError: one is outside 0..2^32-1, where it would wrap around.
    """
    check(0 <= seed < 2**32, f"seed={seed}: must be in 0..2^32-1")
    for index in (indices.min(initial=0), indices.max(initial=0)):
        check(0 <= index < 2**32, f"indices={index}: must be in 0..2^32-1")


def even_batch(batch_size: int, count: int) -> int:
    """Return the least batch that draws `count` samples in as many calls as `batch_size` does.

    A call costs the same however few of its samples are asked for.

    Raises:
      ConfigError: a batch of none.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    calls = -(-count // batch_size)
    return -(-count // calls)


class Generator:
    """A sampler compiled once and mapped over devices.

    Args:
      sampler: the chain to run.
      bind: `bind(params, labels)` is the denoiser.
      shape: of one image, (h, w, c).
      batch_size: samples a call, over all devices; rounded up to a multiple of their number.
      progress: show denoising steps done, their rate and the time left on stderr.
    """

    def __init__(
        self,
        sampler: Sampler,
        bind: Bind,
        shape: tuple[int, int, int],
        devices: Devices,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> None:
        self.sampler, self.shape, self.devices = sampler, shape, devices
        count = len(devices.devices)
        self.batch_size = -(-batch_size // count) * count
        self._bind = bind
        self._on_row = self._report if progress else None
        self._chain = devices.map_batch(self._on_one_device)
        self._show_progress = progress and devices.is_main
        self._progress, self._rows_before = None, 0

    def __call__(
        self,
        params: Params,
        *,
        seed: int,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        x: np.ndarray | None = None,
        span: tuple[np.ndarray, np.ndarray] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Draw the samples with numbers `indices` [n], batch by batch.

        Args:
          params: replicated on the devices (`Devices.replicate`).
          labels: [n] classes.
          x: [n,h,w,c] to start from, instead of x_T drawn by the index.
          span: [n] each, first row and end of the rows that each sample goes through.
          known: images [n,h,w,c] and masks [n,h,w,1], where the sampler repaints.

        Yields:
          float32 [<= batch_size, h, w, c] in [-1, 1], or frames [.., K, h, w, c]. The last batch
          runs padded and comes back cut.

        Raises:
          ConfigError: a seed or number that 32 bits do not hold.
        """
        count = len(indices)
        check_draw(seed, indices)
        columns = {
            "index": indices.astype(np.uint32),
            "seed": np.full(count, seed, np.uint32),
        }
        if labels is not None:
            columns["label"] = labels.astype(np.int32)
        if x is not None:
            columns["x"] = x.astype(np.float32)
        if span is not None:
            columns["first"], columns["end"] = (rows.astype(np.int32) for rows in span)
        if known is not None:
            columns["known"], columns["mask"] = (part.astype(np.float32) for part in known)
        rows_a_batch = self.sampler.rows
        total = -(-count // self.batch_size) * rows_a_batch
        show = self._show_progress
        with Progress(total, "step", enabled=show, scale=0) as self._progress:
            for number, start in enumerate(range(0, count, self.batch_size)):
                self._rows_before = number * rows_a_batch
                rows = np.minimum(np.arange(start, start + self.batch_size), count - 1)
                batch = {name: values[rows] for name, values in columns.items()}
                placed = self.devices.place(self.devices.own_rows(batch))
                with _interruptible():
                    drawn = self.devices.rows(self._chain(params, placed))
                yield drawn[: count - start]

    def draw(self, params: Params, **inputs: Any) -> np.ndarray:
        """Return all that a call yields, in one array."""
        return np.concatenate(list(self(params, **inputs)))

    def lower(self, params: Params, *, labels: bool = False) -> jax.stages.Lowered:
        """Lower the program of a plain batch from shapes, to compile it where it cannot run."""
        count = len(self.devices.devices)
        rows = count, self.batch_size // count
        columns = {"index": np.uint32, "seed": np.uint32} | ({"label": np.int32} if labels else {})
        shapes = {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in columns.items()}
        return self._chain.lower(params, shapes)

    def _on_one_device(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        keys = sample_keys(batch["seed"], batch["index"])
        timesteps = self.sampler.process.schedule.timesteps
        x_T = batch["x"] if "x" in batch else initial_noise(keys, self.shape, timesteps)
        denoise = self._bind(params, batch.get("label"))
        return self.sampler(denoise, x_T, keys, batch, self._on_row)

    def _report(self, rows: np.ndarray) -> None:
        """Count rows. The chain calls this once for each device, in no promised order."""
        news = self._rows_before + int(rows) - self._progress.count
        if news > 0:
            self._progress.update(news)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for a Ctrl-C during a chain's report: XLA makes its own error of it.

    The signal may fall anywhere between XLA and the report, so that nothing there can hold it off.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "KeyboardInterrupt" not in str(error):
            raise
        raise KeyboardInterrupt from None


def build_generator(
    config: Config,
    devices: Devices,
    *,
    batch_size: int = 64,
    guidance: float = 1.0,
    progress: bool = False,
    network: Network | None = None,
    **how: Any,
) -> Generator:
    """Build the generator of `config`: its network, guided where asked, and its sampler.

    Args:
      guidance: see `guided`; 1 switches it off.
      network: in place of the config's.
      how: what `build_sampler` takes.

    Raises:
      ConfigError: see `build_sampler` and `check_guidance`.
    """
    bind = denoiser(config, network)
    if guidance != 1:
        check_guidance(config)
        bind = guided(bind, build_process(config), config.model.num_classes, guidance)
    sampler, shape = build_sampler(config, **how), image_shape(config)
    return Generator(sampler, bind, shape, devices, batch_size=batch_size, progress=progress)
