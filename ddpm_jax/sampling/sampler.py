"""Build what a config samples with: the table of its sampler, and how the chain runs down it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import build_process
from ddpm_jax.config import Config, validate
from ddpm_jax.diffusion.chain import Frames, Update, recorded_chain, reverse_chain
from ddpm_jax.diffusion.inpainting import Repaint, inpaint_chain
from ddpm_jax.diffusion.process import Denoiser, GaussianDiffusion
from ddpm_jax.diffusion.samplers import SamplerTable, ddim_inversion_table, sampler_table
from ddpm_jax.diffusion.spacing import spaced_timesteps
from ddpm_jax.errors import ConfigError

MAX_FRAMES = 500


@dataclass(frozen=True, eq=False)
class Sampler:
    """A chain that is ready to run, for any denoiser of its process.

    Attributes:
      clip, rederive_eps, dynamic_threshold: see `diffusion.chain.Update`.
      frames: keep these states, and return them in place of the samples, [b, K, h, w, c]; those of
        x_t have x_T before them.
      repaint: fill in images with holes; calls take `known` and `mask`.
    """

    process: GaussianDiffusion
    table: SamplerTable
    clip: bool = True
    rederive_eps: bool = True
    dynamic_threshold: float = 0.0
    frames: Frames | None = None
    repaint: Repaint | None = None

    @property
    def rows(self) -> int:
        """Return how many rows a chain goes through, repeated visits included."""
        return self.table.steps if self.repaint is None else len(self.repaint.visits(self.steps)[0])

    @property
    def steps(self) -> int:
        """Return how many rows the table has."""
        return self.table.steps

    def __call__(
        self,
        denoise: Denoiser,
        x_T: jax.Array,
        keys: jax.Array,
        batch: dict[str, jax.Array],
        on_row: Callable[[jax.Array], None] | None = None,
    ) -> jax.Array:
        """Run the chain.

        Args:
          x_T: [b,h,w,c]. keys: typed keys [b].
          batch: with repaint `known` and `mask`; where samples go through a part of the chain
            `first` and `end`, int [b]. See `Generator`.
          on_row: see `reverse_chain`.
        """
        names = ("clip", "rederive_eps", "dynamic_threshold")
        options = {name: getattr(self, name) for name in names}
        chain = self.process, self.table, denoise, x_T, keys
        if self.frames is not None:
            _, frames = recorded_chain(*chain, self.frames, **options, on_row=on_row)
            if self.frames.what == "x_t":
                frames = jnp.concatenate([x_T[None], frames])
            return jnp.moveaxis(frames, 0, 1)
        if self.repaint is not None:
            update = Update(self.process, self.table, denoise, **options)
            known, mask = batch["known"], batch["mask"]
            return inpaint_chain(update, x_T, keys, known, mask, self.repaint, on_visit=on_row)
        span = (batch["first"], batch["end"]) if "first" in batch else None
        return reverse_chain(*chain, span=span, on_row=on_row, **options)


def build_sampler(
    config: Config,
    *,
    inverted: bool = False,
    record: str | None = None,
    num_frames: int = 0,
    repaint: Repaint | None = None,
) -> Sampler:
    """Build the sampler that `config.sampling` names.

    Args:
      inverted: take DDIM's table from images to x_T, in as many steps.
      record: "x_t" (with x_T first) or "x0" keeps `num_frames` frames, at equal distances.
      repaint: fill in images with holes.

    Raises:
      ConfigError: an unknown sampler or spacing, an eta or order that the sampler has not, more
        steps than timesteps, more frames than steps or than MAX_FRAMES, repaint with a multistep
        sampler.
    """
    process, options = build_process(config), config.sampling
    try:
        if inverted:
            table = ddim_inversion_table(process, options.steps, options.spacing)
        else:
            table = sampler_table(
                process,
                options.sampler,
                options.steps,
                options.spacing,
                options.eta,
                options.order,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if repaint is not None and table.multistep:
        raise ConfigError(
            f"sampler={options.sampler}: a multistep sampler cannot inpaint; take ancestral or ddim"
        )
    frames = None if record is None else equidistant_frames(table.steps, record, num_frames)
    limits = options.clip, options.rederive_eps, options.dynamic_threshold
    return Sampler(process, table, *limits, frames, repaint)


def chain_steps(config: Config) -> int:
    """Count the steps of the chain of `config.sampling`, whose own `steps` may leave that open.

    Raises:
      ConfigError: an unknown spacing, or steps that it has not.
    """
    schedule, options = build_process(config).schedule, config.sampling
    try:
        return len(spaced_timesteps(schedule, options.steps, options.spacing))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def with_sampling(config: Config, **changes: Any) -> Config:
    """Replace fields of `config.sampling`, those that are not None.

    Raises:
      ConfigError: see `validate`.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **changes)
    return validate(dataclasses.replace(config, sampling=sampling))


def codes_config(config: Config, *, clip: bool = False, **changes: Any) -> Config:
    """Have a config sample by DDIM as images become codes x_T and come back: without noise.

    Args:
      clip: clipped, neither direction undoes the other.
      changes: as of `with_sampling`.

    Raises:
      ConfigError: see `validate`.
    """
    ddim = {"sampler": "ddim", "eta": 0.0, "order": 0, "clip": clip}
    threshold = None if clip else 0.0
    return with_sampling(config, **ddim, dynamic_threshold=threshold, **changes)


def equidistant_frames(steps: int, what: str, count: int) -> Frames:
    """Choose `count` frames at equal distances along `steps` rows; for x_t, x_T is one of them.

    Raises:
      ConfigError: there are not as many.
    """
    most = min(MAX_FRAMES, steps + 1 if what == "x_t" else steps)
    if not 2 <= count <= most:
        raise ConfigError(f"frames={count}: must be in 2..{most} for {steps} steps")
    first = -1 if what == "x_t" else 0
    after = np.rint(np.linspace(first, steps - 1, count)).astype(int)
    return Frames(what, after[1:] if what == "x_t" else after)
