r"""Faces at 32x32 with a network that two CPU cores can train.

Command:   ddpm prepare-data --dataset=folder --source=FOLDER --name=celeba32 --crop=celeba64 \
               --image_size=32
           ddpm train --config=configs/faces_small.py --workdir=runs/faces
Hardware:  two CPU cores: faces after an hour, better ones for each night more
Expect:    docs/gallery.md shows what the weights that ship draw
Source:    no paper. The cosine schedule, v and min-SNR weights draw faces after 2,000 steps, where
           the paper's linear schedule and eps still draw noise (docs/diagnosis.md)
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
        data=DataConfig(name="celeba32", image_size=32, channels=3, flip=True),
        model=UNetConfig(
            base_channels=32,
            channel_mult=(1, 2, 3, 3),
            blocks_per_level=1,
            attention_resolutions=(8,),
            group_norm_groups=16,
            dropout=0.0,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        loss=LossConfig(weighting="min_snr"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        train=TrainConfig(
            steps=50_000,
            batch_size=32,
            ema_decays=(0.9995, 0.9999),
            ema_warmup=True,
            log_every=50,
            eval_every=2000,
            eval_images=200,
            checkpoint_every=500,
            sample_every=0,
        ),
    )
