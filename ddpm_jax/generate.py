"""Samples of a trained network, any number of them, over all devices.

Sample i is a function of (parameters, seed, i) alone: not of how many are drawn, in which batches, on how many devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params, build_process, denoiser, image_shape
from ddpm_jax.config import Config, ConfigError, validate
from ddpm_jax.devices import Devices
from ddpm_jax.diffusion import Denoiser, GaussianDiffusion, split_output
from ddpm_jax.inpainting import Repaint, inpaint_chain
from ddpm_jax.progress import Progress
from ddpm_jax.randomness import Stream, stream_key
from ddpm_jax.samplers import SamplerTable, ddim_inversion_table, sampler_table
from ddpm_jax.sampling import Frames, Stepper, initial_noise, recorded_chain, reverse_chain

MAX_FRAMES = 500
Bind = Callable[[Params, jax.Array | None], Denoiser]


def with_sampling(config: Config, **changes: Any) -> Config:
    """`config` with fields of its `sampling` replaced, those that are not None; ConfigError as `validate`."""
    given = {name: value for name, value in changes.items() if value is not None}
    return validate(dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **given)))


def config_table(config: Config, *, inverted: bool = False) -> SamplerTable:
    """The table that `config.sampling` names, or DDIM's from images to x_T in as many steps; ConfigError if there is none."""
    process, options = build_process(config), config.sampling
    try:
        if inverted:
            return ddim_inversion_table(process, options.steps, options.spacing)
        return sampler_table(process, options.sampler, options.steps, options.spacing, options.eta)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def guided(bind: Bind, process: GaussianDiffusion, num_classes: int, scale: float) -> Bind:
    """Classifier-free guidance (Ho & Salimans 2022): u + scale (c - u), of outputs c with the label and u without.

    scale 1 is the plain conditional model, 0 the unconditional one; it is 1 + w of the paper's eq. 6. Of a learned variance
    that with the label counts.
    """

    def guided_bind(params: Params, labels: jax.Array) -> Denoiser:
        both = bind(params, jnp.concatenate([labels, jnp.full_like(labels, num_classes)]))

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            output = both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
            (given, raw), (free, _) = (split_output(process, half) for half in jnp.split(output, 2))
            mixed = free + scale * (given - free)
            return mixed if raw is None else jnp.concatenate([mixed, raw], axis=-1)

        return denoise

    return guided_bind


class Generator:
    """The chain of a config, compiled once and mapped over devices.

    Args:
      batch_size: samples a call, over all devices; rounded up to a multiple of their number.
      sampler, steps, clip: as in `config.SamplingConfig`, whose values they, and its other fields, default to.
      table: instead of the sampler's, such as that of the inversion.
      guidance: see `guided`; 1 switches it off.
      record: "x_t" (with x_T first) or "x0" gives `num_frames` frames of each sample on its way instead of the sample.
      repaint: calls take images and masks, see `inpainting`.
      bind: the denoiser for parameters and labels, by default the config's network.
      progress: show denoising steps done, their rate and the time left on stderr.

    Raises:
      ConfigError: unknown sampler or spacing, more steps than timesteps, more frames than steps or than MAX_FRAMES, guidance of
        a network that has not learned to do without labels, or repaint with a multistep sampler.
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
        table: SamplerTable | None = None,
        guidance: float = 1.0,
        record: str | None = None,
        num_frames: int = 0,
        repaint: Repaint | None = None,
        bind: Bind | None = None,
        progress: bool = False,
    ) -> None:
        config = with_sampling(config, sampler=sampler, steps=steps, clip=clip)
        self.config, self.process = config, build_process(config)
        self.table = config_table(config) if table is None else table
        self.devices, self.batch_size = devices, -(-batch_size // len(devices.devices)) * len(devices.devices)
        self._bind = bind or denoiser(config)
        if guidance != 1:
            check_guidance(config)
            self._bind = guided(self._bind, self.process, config.model.num_classes, guidance)
        self._frames = None if record is None else frames_of(self.table.steps, record, num_frames)
        if repaint is not None and self.table.d.any():
            raise ConfigError(f"sampler={config.sampling.sampler}: a multistep sampler cannot inpaint; take ancestral or ddim")
        self._repaint = repaint
        self._on_row = self._report if progress else None
        self._chain = devices.map_batch(self._on_one_device)
        self.rows_a_batch = self.table.steps if repaint is None else len(repaint.visits(self.table.steps)[0])
        self._show_progress, self._progress, self._rows_before = progress and devices.is_main, None, 0

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
        """Samples number `indices` [n], batch by batch, float32 [<= batch_size, h, w, c] in [-1, 1], or frames [.., K, h, w, c].

        Args:
          params: replicated on the devices (`Devices.replicate`).
          labels: [n] classes.
          x: [n,h,w,c] to start from, instead of x_T drawn by the index.
          span: [n] each, first row and end of the rows that each sample goes through.
          known: images [n,h,w,c] and masks [n,h,w,1], with repaint.

        The last batch runs padded and comes back cut.
        """
        columns = {"index": indices.astype(np.uint32), "seed": np.full(len(indices), seed, np.uint32)}
        if labels is not None:
            columns["label"] = labels.astype(np.int32)
        if x is not None:
            columns["x"] = x.astype(np.float32)
        if span is not None:
            columns["first"], columns["end"] = (rows.astype(np.int32) for rows in span)
        if known is not None:
            columns["known"], columns["mask"] = (part.astype(np.float32) for part in known)
        total = -(-len(indices) // self.batch_size) * self.rows_a_batch
        with Progress(total, "step", enabled=self._show_progress, scale=0) as self._progress:
            for number, start in enumerate(range(0, len(indices), self.batch_size)):
                self._rows_before = number * self.rows_a_batch
                rows = np.minimum(np.arange(start, start + self.batch_size), len(indices) - 1)
                batch = {name: values[rows] for name, values in columns.items()}
                samples = self.devices.rows(self._chain(params, self.devices.place(self.devices.own_rows(batch))))
                yield samples[: len(indices) - start]

    def draw(self, params: Params, **inputs: Any) -> np.ndarray:
        """All that a call yields, in one array."""
        return np.concatenate(list(self(params, **inputs)))

    def lower(self, params: Params) -> jax.stages.Lowered:
        """The program of a plain batch, from shapes alone: to compile it where it cannot run."""
        rows = len(self.devices.devices), self.batch_size // len(self.devices.devices)
        columns = {"index": np.uint32, "seed": np.uint32} | ({"label": np.int32} if self.config.model.num_classes else {})
        return self._chain.lower(params, {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in columns.items()})

    def _on_one_device(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        keys = sample_keys(batch["seed"], batch["index"])
        x = batch["x"] if "x" in batch else initial_noise(keys, image_shape(self.config), self.process.schedule.timesteps)
        clip, rederive_eps = self.config.sampling.clip, self.config.sampling.rederive_eps
        options = {"clip": clip, "rederive_eps": rederive_eps, "on_row": self._on_row}
        chain = self.process, self.table, self._bind(params, batch.get("label")), x, keys
        if self._frames is not None:
            _, frames = recorded_chain(*chain, self._frames, **options)
            frames = jnp.concatenate([x[None], frames]) if self._frames.what == "x_t" else frames
            return jnp.moveaxis(frames, 0, 1)
        if self._repaint is not None:
            step = Stepper(*chain[:3], clip, rederive_eps)
            return inpaint_chain(step, x, keys, batch["known"], batch["mask"], self._repaint, on_visit=self._on_row)
        span = (batch["first"], batch["end"]) if "first" in batch else None
        return reverse_chain(*chain, span=span, **options)

    def _report(self, rows: np.ndarray) -> None:
        """Called from inside the chain, once for each device, in no promised order: only news counts."""
        news = self._rows_before + int(rows) - self._progress.count
        if news > 0:
            self._progress.update(news)


def sample_keys(seeds: jax.Array, indices: jax.Array) -> jax.Array:
    """The keys [b] of samples number `indices` [b] under `seeds` [b]."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(stream_key(seed, Stream.SAMPLES), index))(seeds, indices)


def frames_of(steps: int, what: str, count: int) -> Frames:
    """`count` frames at equal distances along `steps` rows; x_T is one of them for x_t. ConfigError if there are not as many."""
    most = min(MAX_FRAMES, steps + 1 if what == "x_t" else steps)
    if not 2 <= count <= most:
        raise ConfigError(f"frames={count}: must be in 2..{most} for {steps} steps")
    after = np.rint(np.linspace(-1, steps - 1, count))[1:] if what == "x_t" else np.rint(np.linspace(0, steps - 1, count))
    return Frames(what, after.astype(int))


def check_guidance(config: Config) -> None:
    """ConfigError unless the network of `config` knows labels, and how to do without."""
    if not config.model.num_classes:
        raise ConfigError("guidance: this run has no classes")
    if not config.model.label_dropout:
        raise ConfigError("guidance: this run was trained with model.label_dropout=0 and knows no images without a label")
