"""LSUN Church at 256x256, unconditional, as in Ho et al. 2020: Table 3.

Command:   python scripts/prepare_data.py --dataset=folder --source=FOLDER --data_dir=data \
               --name=church256 --crop=center --image_size=256
           (FOLDER has its images, exported from the lmdb that it is published as)
           python scripts/train.py --config=configs/lsun_church.py --workdir=runs/lsun_church \
               --config.data.name=church256
Hardware:  a TPU v3-8 and larger, or several GPUs that divide the batch of 64; the paper measured
           2.2 steps/s on a TPU v3-8
Expect:    FID 7.89 (50,000 samples) after 1,200,000 steps
Source:    section 4 and appendix B of the paper; run_lsun.py of its code. The released
           checkpoint is of step 4,432,000 all the same
"""

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    TrainConfig,
    UNetConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(
            name="lsun/church_outdoor",
            image_size=256,
            channels=3,
            flip=True,
            crop="center",
            in_memory=False,
        ),
        model=UNetConfig(
            base_channels=128,
            channel_mult=(1, 1, 2, 2, 4, 4),
            blocks_per_level=2,
            attention_resolutions=(16,),
            dropout=0.0,
            dtype="bfloat16",
        ),
        diffusion=DiffusionConfig(timesteps=1000, schedule="linear", variance="fixed_small"),
        # 2e-4, the rate for CIFAR-10, was unstable at this size.
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5000, gradient_clip=1.0),
        train=TrainConfig(steps=1_200_000, batch_size=64, ema_decays=(0.9999,), sample_images=16),
    )
