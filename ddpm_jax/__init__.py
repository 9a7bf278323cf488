"""Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020) in JAX and Flax.

    import ddpm_jax as ddpm

    model = ddpm.load("fashion_mnist")
    images = model.sample(16, sampler="ddim", steps=50)
    ddpm.save_png("grid.png", ddpm.grid(images))

Each name is imported from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    # a trained network
    "load": "ddpm_jax.model",
    "train": "ddpm_jax.model",
    "Model": "ddpm_jax.model",
    # what a run is
    "load_config": "ddpm_jax.config",
    "Config": "ddpm_jax.config",
    "DataConfig": "ddpm_jax.config",
    "UNetConfig": "ddpm_jax.config",
    "DiffusionConfig": "ddpm_jax.config",
    "LossConfig": "ddpm_jax.config",
    "OptimizerConfig": "ddpm_jax.config",
    "TrainConfig": "ddpm_jax.config",
    "SamplingConfig": "ddpm_jax.config",
    # the maths, for any denoiser
    "beta_schedule": "ddpm_jax.diffusion.schedule",
    "NoiseSchedule": "ddpm_jax.diffusion.schedule",
    "GaussianDiffusion": "ddpm_jax.diffusion.process",
    "q_sample": "ddpm_jax.diffusion.process",
    "predict_x0": "ddpm_jax.diffusion.process",
    "p_mean_variance": "ddpm_jax.diffusion.process",
    "Objective": "ddpm_jax.diffusion.losses",
    "per_example_loss": "ddpm_jax.diffusion.losses",
    "bound_term": "ddpm_jax.diffusion.bound",
    "prior_term": "ddpm_jax.diffusion.bound",
    "normal_kl": "ddpm_jax.diffusion.gaussians",
    "reverse_chain": "ddpm_jax.diffusion.chain",
    "sampler_table": "ddpm_jax.diffusion.samplers",
    "ancestral_table": "ddpm_jax.diffusion.samplers",
    "ddim_table": "ddpm_jax.diffusion.samplers",
    "dpmpp_2m_table": "ddpm_jax.diffusion.samplers",
    # the network, images, errors
    "UNet": "ddpm_jax.network.unet",
    "Network": "ddpm_jax.network.adapt",
    "ArraySource": "ddpm_jax.data.source",
    "load_source": "ddpm_jax.data.load",
    "grid": "ddpm_jax.images",
    "save_png": "ddpm_jax.images",
    "save_animation": "ddpm_jax.images",
    "UserError": "ddpm_jax.errors",
    # the process
    "tune_cpu": "ddpm_jax.machine",
}
__all__ = sorted(_MODULES)

if TYPE_CHECKING:
    from ddpm_jax.config import (
        Config,
        DataConfig,
        DiffusionConfig,
        LossConfig,
        OptimizerConfig,
        SamplingConfig,
        TrainConfig,
        UNetConfig,
        load_config,
    )
    from ddpm_jax.data.load import load_source
    from ddpm_jax.data.source import ArraySource
    from ddpm_jax.diffusion.bound import bound_term, prior_term
    from ddpm_jax.diffusion.chain import reverse_chain
    from ddpm_jax.diffusion.gaussians import normal_kl
    from ddpm_jax.diffusion.losses import Objective, per_example_loss
    from ddpm_jax.diffusion.process import (
        GaussianDiffusion,
        p_mean_variance,
        predict_x0,
        q_sample,
    )
    from ddpm_jax.diffusion.samplers import (
        ancestral_table,
        ddim_table,
        dpmpp_2m_table,
        sampler_table,
    )
    from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
    from ddpm_jax.errors import UserError
    from ddpm_jax.images import grid, save_animation, save_png
    from ddpm_jax.machine import tune_cpu
    from ddpm_jax.model import Model, load, train
    from ddpm_jax.network.adapt import Network
    from ddpm_jax.network.unet import UNet


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # so that this runs once a name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
