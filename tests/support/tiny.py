"""The smallest run that has every part of a step: attention, dropout, flips, several averages, classes where asked."""

from __future__ import annotations

import numpy as np

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    TrainConfig,
    UNetConfig,
    validate,
)


def tiny_config(**sections) -> Config:
    """`tiny_config(train={"steps": 3}, loss={"kind": "vlb"})`: fields of sections replaced, then validated."""
    config = Config(
        data=DataConfig(name="digits", image_size=8, channels=1, flip=True),
        model=UNetConfig(
            base_channels=8,
            channel_mult=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            group_norm_groups=4,
            dropout=0.3,
        ),
        diffusion=DiffusionConfig(timesteps=20, beta_end=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(
            steps=6,
            batch_size=16,
            ema_decays=(0.9, 0.99),
            log_every=2,
            eval_every=3,
            eval_images=20,
            checkpoint_every=2,
            sample_every=0,
            sample_images=4,
        ),
    )
    for section, fields in sections.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
    return validate(config)


def images(config: Config, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (count, *config.data.sides, config.data.channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)
