"""CelebA-HQ at 256x256, unconditional, as in Ho et al. 2020: Figure 1.

Command:   python scripts/prepare_data.py --dataset=celeb_a_hq/256 --source=FOLDER --data_dir=data
           (with data256x256.tar in it, and the extra tensorflow; or its images as --dataset=folder)
           python scripts/train.py --config=configs/celebahq256.py --workdir=runs/celebahq256
Hardware:  a TPU v3-8 and larger, or several GPUs that divide the batch of 64; the paper measured
           2.2 steps/s on a TPU v3-8
Expect:    faces as in the paper's Figure 1, which gives no FID
Source:    section 4 and appendix B of the paper; run_celebahq.py of its code
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
            name="celeb_a_hq/256",
            image_size=256,
            channels=3,
            flip=True,
            crop="none",
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
        train=TrainConfig(steps=500_000, batch_size=64, ema_decays=(0.9999,), sample_images=16),
    )
