"""Hold the programs of training and sampling ready to be timed, as they run there."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from ddpm_jax.benchmark.timing import seconds
from ddpm_jax.build import build_process, denoiser, forward_flops, image_shape
from ddpm_jax.config import Config
from ddpm_jax.diffusion.chain import initial_noise, reverse_chain
from ddpm_jax.diffusion.randomness import sample_keys
from ddpm_jax.diffusion.samplers import sampler_table
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import Batch, Metrics, TrainState, init_state
from ddpm_jax.training.step import build_train_step

CHAIN = 8  # rows of the sampler's table in one call


class TrainStep:
    """The step of the training loop on all devices, with its state and one batch of noise.

    Attributes:
      build: seconds to trace and to compile, and the sizes of the program in bytes.
    """

    def __init__(self, config: Config, devices: Devices) -> None:
        self.config, self.devices = config, devices
        batch = random_batch(config, config.train.batch_size)
        self._batch = devices.place(batch)
        form = state_form(config, devices)
        self._state = form.pack(devices.replicate(init_state(config)))
        self._step, self.build = compile_timed(
            devices.map_step(build_train_step(config, form)), self._state, self._batch
        )

    def __call__(self, steps: int = 1) -> float:
        """Return the seconds a step, of `steps` that are in flight together."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / steps

    def host_seconds(self) -> float:
        """Return the seconds until the call comes back, which it may before the step is done.

        It is what Python and the runtime need for a step.
        """
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        seconds = time.perf_counter() - start
        jax.block_until_ready((self._state, metrics))
        return seconds

    def flops(self) -> int:
        """Return the FLOPs of one step: three times the forward pass, by convention."""
        return 3 * self.config.train.batch_size * forward_flops(self.config)


class DeviceLoop:
    """A compiled loop of training steps: what a step takes when no host is in the way."""

    def __init__(self, config: Config, devices: Devices, steps: int = CHAIN) -> None:
        form = state_form(config, devices)
        step, self._steps = build_train_step(config, form), steps

        def loop(state: TrainState, batch: Batch, axis_name: str) -> tuple[TrainState, Metrics]:
            state, metrics = jax.lax.scan(
                lambda state, _: step(state, batch, axis_name=axis_name), state, length=steps
            )
            return state, jax.tree.map(lambda values: values[-1], metrics)

        self._batch = devices.place(random_batch(config, config.train.batch_size))
        self._loop = devices.map_step(loop)
        self._state = form.pack(devices.replicate(init_state(config)))

    def __call__(self) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._loop(self._state, self._batch))
        return (time.perf_counter() - start) / self._steps


class SamplingSteps:
    """The first rows of the ancestral chain on all devices, in one loop as `generate` has it."""

    def __init__(
        self, config: Config, devices: Devices, batch_size: int, rows: int = CHAIN
    ) -> None:
        self.config, self.rows, self.batch_size = config, rows, batch_size
        process, bind = build_process(config), denoiser(config)
        whole = sampler_table(process, "ancestral", process.schedule.timesteps)
        table = whole.rows(slice(rows))

        def chain(params: Any, batch: Batch) -> jax.Array:
            keys = sample_keys(batch["seed"], batch["index"])
            x = initial_noise(keys, image_shape(config), process.schedule.timesteps)
            return reverse_chain(process, table, bind(params, batch.get("label")), x, keys)

        self._params = devices.replicate(init_state(config).params)
        self._batch = devices.place(random_columns(config, batch_size))
        self._chain, self.build = compile_timed(devices.map_batch(chain), self._params, self._batch)

    def __call__(self) -> float:
        """Return the seconds a denoising step."""
        return seconds(self._chain, self._params, self._batch) / self.rows

    def flops(self) -> int:
        """Return the FLOPs of one denoising step of the whole batch."""
        return self.batch_size * forward_flops(self.config)


class ForwardPasses:
    """The network alone, on x_t of all devices: what the steps of the chain are measured by."""

    def __init__(
        self, config: Config, devices: Devices, batch_size: int, passes: int = CHAIN
    ) -> None:
        bind, self._passes = denoiser(config), passes

        def forward(params: Any, batch: Batch) -> Batch:
            output = bind(params, batch.get("label"))(batch["x"], batch["t"])
            # The next pass waits for it, as in the chain.
            return batch | {"x": output[..., : batch["x"].shape[-1]]}

        random = np.random.default_rng(0)
        x = random.standard_normal((batch_size, *image_shape(config)), np.float32)
        columns = {
            "x": x,
            "t": np.full(batch_size, config.diffusion.timesteps // 2, np.int32),
        } | _labels(config, batch_size)
        self._params = devices.replicate(init_state(config).params)
        self._batch = devices.place(columns)
        self._forward, _ = compile_timed(devices.map_batch(forward), self._params, self._batch)

    def __call__(self) -> float:
        """Return the seconds a pass, of as many one after the other as the chain has rows."""
        start, batch = time.perf_counter(), self._batch
        for _ in range(self._passes):
            batch = self._forward(self._params, batch)
        jax.block_until_ready(batch)
        return (time.perf_counter() - start) / self._passes


def compile_timed(mapped: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """Compile a program for `args`, and return it with how long that took and what it needs."""
    start = time.perf_counter()
    lowered = mapped.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    build = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    memory = compiled.memory_analysis()
    if memory is not None:
        sizes = {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp")
        }
        build |= {f"{name}_bytes": size for name, size in sizes.items()}
        build["peak_bytes"] = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return compiled, build


def random_batch(config: Config, size: int) -> dict[str, np.ndarray]:
    """Draw a training batch of random images."""
    random = np.random.default_rng(0)
    batch = {"image": random.integers(0, 256, (size, *image_shape(config)), np.uint8)}
    return batch | _labels(config, size)


def random_columns(config: Config, size: int) -> dict[str, np.ndarray]:
    """Return the columns that a batch of samples is drawn from."""
    return {"seed": np.zeros(size, np.uint32), "index": np.arange(size, dtype=np.uint32)} | _labels(
        config, size
    )


def _labels(config: Config, size: int) -> dict[str, np.ndarray]:
    classes = config.model.num_classes
    return {"label": np.arange(size, dtype=np.int32) % classes} if classes else {}
