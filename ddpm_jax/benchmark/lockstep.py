"""Train one config here and with diffusers in lock step, and measure how far the two come apart.

Both sides start from our parameters of the seed. At every step they see the same images, with the
flips, timesteps and noise that our training step draws, and each takes a step of its own: ours is
the compiled one; theirs is PyTorch's gradient, clip, Adam and warm-up. Rounding parts them, and
training makes any difference larger. The scale for it is our own step beside itself, with its batch
in two halves, which is the same mean summed in another order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.benchmark.apart import Record, Side
from ddpm_jax.benchmark.quality import SIDES, check_comparable, check_fields, versions
from ddpm_jax.benchmark.theirs import DiffusersTraining, network_from
from ddpm_jax.build import Params, init_params
from ddpm_jax.config import Config
from ddpm_jax.data.batches import train_batches
from ddpm_jax.data.load import load_source
from ddpm_jax.data.source import Batch
from ddpm_jax.diffusion.randomness import Stream, example_keys, normal_per_example, stream_key
from ddpm_jax.diffusion.timesteps import uniform_timesteps
from ddpm_jax.errors import UserError, check
from ddpm_jax.images import scale_images
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.training.state import init_state, sampling_params
from ddpm_jax.training.step import build_train_step, random_flips
from ddpm_jax.training.stopping import StopRequest

OURS, THEIRS = SIDES
HALVES = "ddpm_jax in halves"
# What both sides cannot draw alike.
UNDRAWN = {"model.dropout": 0.0}


@dataclass(frozen=True)
class LockstepOptions:
    """How the two sides are watched, and where the record goes.

    Attributes:
      output: the record, .json; the plot lies beside it as .png.
      data_dir: the prepared data sets.
      every: steps between two measurements of the distance; both files are written at each.
      rounding: train a third side, ours with each batch in halves: how far rounding alone goes.
    """

    output: Path
    data_dir: Path = Path("data")
    every: int = 50
    rounding: bool = False


class Ours:
    """Our training from `start`, on one device."""

    def __init__(self, config: Config, start: Params) -> None:
        self._config = config
        self._state = init_state(config, jax.tree.map(jnp.array, start))  # copies: it is donated
        self._step = jax.jit(build_train_step(config), donate_argnums=0)

    def step(self, batch: Batch) -> float:
        """Take a step and return the loss before it."""
        self._state, metrics = self._step(self._state, {"image": batch["image"]})
        return float(metrics["loss"])

    def params(self) -> Params:
        """Return a copy of the parameters."""
        return jax.tree.map(np.array, self._state.params)

    def averaged(self) -> Params:
        """Return a copy of their first average."""
        return jax.tree.map(np.array, sampling_params(self._config, self._state))


class Theirs:
    """The training of diffusers' network from `start`, on what our training step draws."""

    def __init__(self, config: Config, start: Params) -> None:
        self._training = DiffusersTraining(config, network_from(config, start))
        self._draw = jax.jit(functools.partial(draw, config))
        self._steps = 0

    def step(self, batch: Batch) -> float:
        """Take a step and return the loss before it."""
        import torch

        drawn = self._draw(np.int32(self._steps), batch["image"])
        x0, t, eps = (torch.tensor(np.asarray(array)) for array in drawn)
        self._steps += 1
        return self._training.step(x0.permute(0, 3, 1, 2), t.long(), eps.permute(0, 3, 1, 2))

    def params(self) -> Params:
        """Return a copy of the parameters."""
        return self._training.params()

    def averaged(self) -> Params:
        """Return a copy of their first average."""
        return self._training.averaged()


def draw(
    config: Config, step: jax.Array, image: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw what our training step draws at `step`, for a whole batch of uint8 images [b,h,w,c].

    Returns:
      x_0 with its flips, t and eps.
    """

    def keys(stream: Stream) -> jax.Array:
        return example_keys(stream_key(config.seed, stream, step), jnp.arange(len(image)))

    x0 = scale_images(image)
    if config.data.flip:
        x0 = random_flips(keys(Stream.FLIPS), x0)
    t = uniform_timesteps(keys(Stream.TIMESTEPS), config.diffusion.timesteps)
    return x0, t, normal_per_example(keys(Stream.NOISE), x0.shape[1:])


def train_in_lock_step(config: Config, options: LockstepOptions) -> int:
    """Train `config` here and in PyTorch in lock step; write the record and its plot.

    Returns:
      0 when done, 128 + the signal's number when stopped by SIGTERM, SIGINT or SIGHUP.

    Raises:
      UserError: PyTorch is not installed, or its side cannot train this config, or not in lock
        step; or a loss is not finite. What was measured before that is written.
    """
    size = config.train.batch_size
    check(options.every >= 1, f"every={options.every}: must be at least 1")
    check(
        not (options.rounding and size % 2),
        f"train.batch_size={size}: rounding takes its halves: --config.train.batch_size={size + 1}",
    )
    check_fields(config, UNDRAWN, "lock step, in which both sides draw the same, knows")
    check_comparable(config)
    source = load_source(config.data, options.data_dir, "train")
    start = jax.tree.map(np.array, init_params(config))
    sides: dict[str, Side] = {OURS: Ours(config, start), THEIRS: Theirs(config, start)}
    if options.rounding:
        halves = dataclasses.replace(config.train, accumulation=2)
        sides[HALVES] = Ours(dataclasses.replace(config, train=halves), start)
    about = {"config": dataclasses.asdict(config), "versions": versions()}
    record = Record(options.output, sides, start, about)
    return walk(config, sides, train_batches(source, config.seed, size, 0, 1), record, options)


def walk(
    config: Config,
    sides: Mapping[str, Side],
    batches: Callable[[int], Batch],
    record: Record,
    options: LockstepOptions,
) -> int:
    """Take the steps of all sides and keep the record; returns and raises as the one above."""
    steps, size = config.train.steps, config.train.batch_size
    try:
        with StopRequest(Devices()) as stop, Progress(steps, scale=size) as shown:
            for step in range(1, steps + 1):
                batch, losses, seconds = batches(step - 1), {}, {}
                for name, side in sides.items():
                    began = time.monotonic()
                    losses[name] = side.step(batch)
                    seconds[name] = time.monotonic() - began
                if bad := [name for name, loss in losses.items() if not math.isfinite(loss)]:
                    raise UserError(f"step {step:,}: the loss of {', '.join(bad)} is not finite")
                record.add(losses, seconds)
                shown.update(1, **losses)
                stop.listen()
                signal = stop.agreed()
                if signal or step == steps or step % options.every == 0:
                    shown.write(record.measure())
                    record.save()
                if signal:
                    break
        print(record.summary(), flush=True)
        return 128 + signal if signal else 0
    finally:
        if record.steps:  # whatever ended it
            record.save()
            done = f"{record.steps:,} of {steps:,} steps"
            print(f"wrote {record.output} and {record.picture}: {done}", flush=True)
