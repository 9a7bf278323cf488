"""The 8x8 digits embedded in scikit-learn: the whole road in minutes, with nothing to download.

Command:   python scripts/train.py --config=configs/digits.py --workdir=runs/digits
Hardware:  two CPU cores, about 3 minutes
Expect:    held_out_loss 0.085 after 900 steps; digits a person can read
Source:    no paper; the network is the paper's in small
"""

from ddpm_jax.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    UNetConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="digits", image_size=8, channels=1, flip=False),
        model=UNetConfig(
            base_channels=32,
            channel_mult=(1, 2),
            attention_resolutions=(4,),
            group_norm_groups=8,
            dropout=0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        train=TrainConfig(
            steps=900,
            batch_size=128,
            ema_decays=(0.99,),
            ema_warmup=True,
            log_every=50,
            eval_every=300,
            eval_images=256,
            checkpoint_every=300,
            sample_every=0,
        ),
        sampling=SamplingConfig(),
    )
