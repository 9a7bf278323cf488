"""Build what a config describes: the process, the objective, the network as a denoiser."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.diffusion.losses import Objective
from ddpm_jax.diffusion.process import Denoiser, GaussianDiffusion
from ddpm_jax.diffusion.randomness import Stream, stream_key
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.errors import ConfigError
from ddpm_jax.network.adapt import Dropout, Network, Params, adapt, check_network
from ddpm_jax.network.flops import count_flops
from ddpm_jax.network.unet import UNet, cast_params

Bind = Callable[[Params, jax.Array | None], Denoiser]


def network_key(config: Config) -> str:
    """Return what two configs share if their networks have the same parameters and operations."""
    return repr((config.model, image_shape(config), config.output_channels))


def once_a_network(compute: Callable[[Config], Any]) -> Callable[[Config], Any]:
    """Remember what `compute` returns of each network: tracing one takes seconds."""
    known: dict[str, Any] = {}

    @functools.wraps(compute)
    def remembered(config: Config) -> Any:
        network = network_key(config)
        if network not in known:
            known[network] = compute(config)
        return known[network]

    return remembered


def build_process(config: Config) -> GaussianDiffusion:
    """Build the process of `config.diffusion`.

    Raises:
      ConfigError: its betas leave (0, 1].
    """
    options = config.diffusion
    try:
        betas = beta_schedule(
            options.schedule,
            options.timesteps,
            beta_start=options.beta_start,
            beta_end=options.beta_end,
            rescale=options.rescale_betas,
            zero_terminal_snr=options.zero_terminal_snr,
        )
        schedule = NoiseSchedule.from_betas(betas)
        return GaussianDiffusion(schedule, options.prediction, options.variance)
    except ValueError as error:
        raise ConfigError(f"config.diffusion: {error}") from error


def signal_note(config: Config) -> str | None:
    """Return one line for a chain that ends long before it is noise; None for all others.

    Sampling starts from noise alone, which such a network has never seen.
    """
    left = float(build_process(config).schedule.alphas_cumprod[-1])
    if left < 0.01:
        return None
    return (
        f"note: a chain of {config.diffusion.timesteps} steps with these betas leaves "
        f"{100 * left:.0f} % of the signal at its end, and samples start from noise alone: "
        "config.diffusion.rescale_betas=true, or a larger beta_end"
    )


def build_objective(config: Config) -> Objective:
    """Build the training objective of `config.loss`."""
    names = [field.name for field in dataclasses.fields(Objective)]
    return Objective(**{name: getattr(config.loss, name) for name in names})


def build_model(config: Config) -> UNet:
    """Build the network of `config.model`."""
    return UNet(config.model, config.output_channels)


def image_shape(config: Config) -> tuple[int, int, int]:
    """Return the shape of one image, (h, w, c)."""
    return *config.data.sides, config.data.channels


def build_network(config: Config, own: Any = None) -> Network:
    """Build the network that a run trains: the UNet of `config.model`, or one's own.

    Args:
      own: what `adapt` takes; None for the UNet.

    Raises:
      ConfigError: see `adapt` and `check_network`.
    """
    shape, classes = image_shape(config), config.model.num_classes
    if own is not None:
        network = adapt(own, shape, classes)
        check_network(network, shape, config.output_channels, classes)
        return network
    model = build_model(config)

    def init(key: jax.Array) -> Params:
        x = jnp.zeros((1, *shape), jnp.float32)
        t = jnp.zeros(1, jnp.int32)
        labels = jnp.zeros(1, jnp.int32) if classes else None
        return model.init(key, x, t, labels)["params"]

    def apply(
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        labels: jax.Array | None,
        dropout: Dropout | None,
    ) -> jax.Array:
        if dropout is None:
            return model.apply({"params": params}, x_t, t, labels)
        return model.apply(
            {"params": params},
            x_t,
            t,
            labels,
            train=True,
            examples=dropout.examples,
            rngs={"dropout": dropout.key},
        )

    return Network(init, apply, lambda params: cast_params(params, config.model))


def init_params(config: Config, network: Network | None = None) -> Params:
    """Draw the network's parameters at the start of a run, float32, from the seed alone."""
    # Hundreds of small draws, each run once: on a CPU, optimising them takes four times as long as
    # drawing them.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else {}
    # The seed is an argument, or the compiler would draw all the numbers itself, one by one.
    draw = jax.jit(functools.partial(_init, config, network), compiler_options=options)
    return draw(np.uint32(config.seed))


def abstract_params(config: Config, network: Network | None = None) -> Params:
    """Return the tree of `init_params` as shapes and types, with nothing computed."""
    if network is not None:
        return jax.eval_shape(functools.partial(_init, config, network), np.uint32(config.seed))
    shapes, _ = _traced(config)
    return jax.tree.map(lambda leaf: leaf, shapes)  # dicts that the caller may change


def forward_flops(config: Config) -> int:
    """Count the operations of one image going through the network once.

    A training step, by convention, is three times as much an image.
    """
    _, flops = _traced(config)
    return flops


@once_a_network
def _traced(config: Config) -> tuple[Params, int]:
    """Trace how the UNet is made: one image goes through it once, which draws its parameters."""
    make = jax.make_jaxpr(functools.partial(_init, config, None), return_shape=True)
    program, shapes = make(np.uint32(config.seed))
    return shapes, count_flops(program.jaxpr)


def _init(config: Config, network: Network | None, seed: jax.Array) -> Params:
    network = build_network(config) if network is None else network
    return network.init(stream_key(seed, Stream.PARAMETERS))


def denoiser(config: Config, network: Network | None = None) -> Bind:
    """Bind the network to parameters and labels, without dropout, as the maths layer wants it."""
    network = build_network(config) if network is None else network
    none = config.model.num_classes

    def bind(params: Params, labels: jax.Array | None = None) -> Denoiser:
        ready = network.prepare(params)

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            of_none = none and labels is None
            given = jnp.full(t.shape, none, jnp.int32) if of_none else labels
            # One's own may compute in less: the maths, and what a chain carries, are float32.
            return network.apply(ready, x_t, t, given, None).astype(jnp.float32)

        return denoise

    return bind
