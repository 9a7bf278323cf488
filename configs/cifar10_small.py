"""CIFAR-10 with a network that two CPU cores can train.

Command:   ddpm prepare-data --dataset=cifar10 --data_dir=data
           ddpm train --config=configs/cifar10_small.py --workdir=runs/cifar10_small
Hardware:  two CPU cores: scenes in their colours after an hour, things in them after a night
Expect:    the README shows what the weights that ship draw
Source:    configs/cifar10.py with a quarter of the width, one block a level and three levels.
           Schedule, prediction and weights are those of configs/faces_small.py, for the same reason
"""

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    UNetConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", image_size=32, channels=3, flip=True),
        model=UNetConfig(
            base_channels=32,
            channel_mult=(1, 2, 4),
            blocks_per_level=1,
            attention_resolutions=(8,),
            group_norm_groups=16,
            dropout=0.0,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        loss=LossConfig(weighting="min_snr"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        train=TrainConfig(
            steps=50_000,
            batch_size=32,
            ema_decays=(0.998, 0.9995),
            ema_warmup=True,
            log_every=50,
            eval_every=1000,
            eval_images=512,
            checkpoint_every=500,
            sample_every=0,
        ),
    )
