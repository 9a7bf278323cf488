"""Fashion-MNIST at 32x32, a small network: a set that is neither toy nor hours away.

Command:   ddpm prepare-data --dataset=fashion_mnist --data_dir=data
           ddpm train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
Hardware:  two CPU cores, about an hour; seconds to minutes on a GPU
Expect:    shirts, shoes and bags one can name; the figures measured are in the README
Source:    no paper; the paper's network in small, its 28x28 images padded to 32x32. Schedule,
           prediction and weights are those of configs/faces_small.py, for the same reason
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
        data=DataConfig(name="fashion_mnist", image_size=32, channels=1, flip=True, padding=2),
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
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, schedule="linear"),
        train=TrainConfig(
            steps=2500,
            batch_size=32,
            ema_decays=(0.998, 0.9995),
            ema_warmup=True,
            log_every=50,
            eval_every=500,
            eval_images=512,
            checkpoint_every=500,
            sample_every=0,
        ),
    )
