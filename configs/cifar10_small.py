"""CIFAR-10 with a network that two CPU cores can train: the paper's recipe in small.

Command:   python scripts/prepare_data.py --dataset=cifar10 --data_dir=data
           python scripts/train.py --config=configs/cifar10_small.py --workdir=runs/cifar10_small
Hardware:  two CPU cores, about half an hour
Expect:    blurred scenes with the right colours; the figures measured are in the README
Source:    configs/cifar10.py with a quarter of the width, one block a level and three levels; the
           EMA is short and warmed up because 0.9999 would still be mostly initialisation after
           3,000 steps
"""

from ddpm_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig, UNetConfig


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
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        train=TrainConfig(
            steps=3000,
            batch_size=32,
            ema_decays=(0.998,),
            ema_warmup=True,
            log_every=50,
            eval_every=500,
            eval_images=512,
            checkpoint_every=500,
            sample_every=0,
        ),
    )
