"""From a config to the things it describes: the diffusion process, the objective, the network as a denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config, ConfigError
from ddpm_jax.diffusion import Denoiser, GaussianDiffusion
from ddpm_jax.losses import Objective
from ddpm_jax.randomness import Stream, stream_key
from ddpm_jax.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.unet import UNet

Params = Any


def build_process(config: Config) -> GaussianDiffusion:
    """The process of `config.diffusion`; ConfigError where its betas leave (0, 1]."""
    options = config.diffusion
    try:
        betas = beta_schedule(
            options.schedule,
            options.timesteps,
            beta_start=options.beta_start,
            beta_end=options.beta_end,
            rescale=options.rescale_betas,
        )
        return GaussianDiffusion(NoiseSchedule.from_betas(betas), options.prediction, options.variance)
    except ValueError as error:
        raise ConfigError(f"config.diffusion: {error}") from error


def build_objective(config: Config) -> Objective:
    loss = config.loss
    return Objective(loss.kind, loss.weighting, loss.vlb_weight, loss.min_snr_gamma, loss.p2_gamma, loss.p2_k)


def build_model(config: Config) -> UNet:
    return UNet(config.model, config.output_channels)


def image_shape(config: Config) -> tuple[int, int, int]:
    return config.data.image_size, config.data.image_size, config.data.channels


def init_params(config: Config) -> Params:
    """The network's parameters at the start of a run, float32, a function of the seed alone."""
    # Hundreds of small draws, each run once: on a CPU, optimising them takes four times as long as drawing them.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if on_cpu else {}
    # The seed is an argument, or the compiler would draw all the numbers itself, one by one.
    return jax.jit(functools.partial(_init, config), compiler_options=options)(np.uint32(config.seed))


def abstract_params(config: Config) -> Params:
    """The tree of `init_params` as shapes and types, with nothing computed."""
    return jax.eval_shape(functools.partial(_init, config), np.uint32(config.seed))


def _init(config: Config, seed: jax.Array) -> Params:
    x = jnp.zeros((1, *image_shape(config)), jnp.float32)
    t = jnp.zeros(1, jnp.int32)
    labels = jnp.zeros(1, jnp.int32) if config.model.num_classes else None
    return build_model(config).init(stream_key(seed, Stream.PARAMETERS), x, t, labels)["params"]


def denoiser(config: Config) -> Callable[[Params, jax.Array | None], Denoiser]:
    """`denoiser(config)(params, labels)` is the network without dropout, as the maths layer wants it."""
    model = build_model(config)

    def bind(params: Params, labels: jax.Array | None = None) -> Denoiser:
        return lambda x_t, t: model.apply({"params": params}, x_t, t, labels)

    return bind
