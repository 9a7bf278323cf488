"""Lower the programs of a run for devices that may be absent: the arguments are shapes.

They are the step of `training.step.build_train_step`, the chain of `sampling.generate.Generator`
and the terms of the bound of `evaluation.nll`, mapped over the devices by the `jax.pmap` of
`parallel.devices.Devices` that maps them on a machine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddpm_jax.build import abstract_params, image_shape
from ddpm_jax.config import Config
from ddpm_jax.evaluation.nll import CHUNK, Protocol, chunk_of_terms
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.sampling.sampler import chain_steps
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import abstract_state
from ddpm_jax.training.step import build_train_step


def lower_train_step(config: Config, devices: Devices, batch_size: int) -> jax.stages.Lowered:
    """Lower the training step of a global batch of `batch_size` for `devices`."""
    chips = len(devices.devices)
    rows = chips, batch_size // chips
    batch = {"image": jax.ShapeDtypeStruct((*rows, *image_shape(config)), jnp.uint8)}
    if config.model.num_classes:
        batch["label"] = jax.ShapeDtypeStruct(rows, jnp.int32)
    form = state_form(config, devices)
    step = devices.map_step(build_train_step(config, form))
    state = jax.eval_shape(form.pack, abstract_state(config))
    return step.lower(devices.abstract_replicated(state), batch)


def lower_sampler(config: Config, devices: Devices, batch_size: int) -> jax.stages.Lowered:
    """Lower the chain of `config.sampling` for `batch_size` samples at once over `devices`."""
    generator = build_generator(config, devices, batch_size=batch_size)
    params = devices.abstract_replicated(abstract_params(config))
    return generator.lower(params, labels=config.model.num_classes > 0)


def lower_evaluation(config: Config, devices: Devices, batch_size: int) -> jax.stages.Lowered:
    """Lower a call of the likelihood's evaluation, CHUNK terms of `batch_size` images' bounds."""
    rows = len(devices.devices), batch_size // len(devices.devices)
    columns = {"index": (jnp.uint32, ()), "mask": (jnp.float32, ())}
    columns |= {"image": (jnp.uint8, image_shape(config))}
    columns |= {"label": (jnp.int32, ())} if config.model.num_classes else {}
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype)
        for name, (dtype, shape) in columns.items()
    }
    params = devices.abstract_replicated(abstract_params(config))
    strata = jax.ShapeDtypeStruct((terms_a_call(config),), jnp.int32)
    terms = devices.map_batch(chunk_of_terms(config, Protocol()))
    return terms.lower((params, strata, strata), batch)


def terms_a_call(config: Config) -> int:
    """Return how many terms of the bound a call of the likelihood's evaluation has."""
    return min(CHUNK, config.diffusion.timesteps)


LOWER = {"train": lower_train_step, "sample": lower_sampler, "evaluate": lower_evaluation}
PROGRAMS = tuple(LOWER)


def steps_a_call(config: Config, what: str) -> int:
    """Return how many steps a call of a program has: the network goes over each image as often.

    Args:
      what: one of PROGRAMS.
    """
    if what == "sample":
        return chain_steps(config)
    return terms_a_call(config) if what == "evaluate" else 1
