"""Typed configs: everything a run is, read from files and command lines, and checked."""

from ddpm_jax.config.checking import validate
from ddpm_jax.config.reading import (
    differences,
    from_dict,
    listed,
    load_config,
    override,
    save_json,
    to_dict,
)
from ddpm_jax.config.schema import (
    Config,
    DataConfig,
    DiffusionConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    UNetConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "LossConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "TrainConfig",
    "UNetConfig",
    "differences",
    "from_dict",
    "listed",
    "load_config",
    "override",
    "save_json",
    "to_dict",
    "validate",
]
