"""CelebA at 64x64, as in Song et al. 2021 (DDIM), Table 1.

Its network is Ho et al.'s with one more level.

Command:   python scripts/prepare_data.py --dataset=celeb_a --data_dir=data --source=celeba
           python scripts/train.py --config=configs/celeba64.py --workdir=runs/celeba64
Hardware:  one or more GPUs, or a TPU v3-8 and larger
Expect:    FID 3.26 (1000 ancestral steps, 50,000 samples), about 3.0 in a later public
           reimplementation after 949,000 steps
Source:    section 5 and appendix D of the DDIM paper; configs/celeba.yml of its code. That code
           sums the squared error over pixels, draws timesteps in antithetic pairs and has no
           warm-up; here the paper's recipe for CIFAR-10 is kept
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
        data=DataConfig(name="celeb_a", image_size=64, channels=3, flip=True, crop="celeba64"),
        model=UNetConfig(
            base_channels=128,
            channel_mult=(1, 2, 2, 2, 4),
            blocks_per_level=2,
            attention_resolutions=(16,),
            dropout=0.1,
            dtype="bfloat16",
        ),
        diffusion=DiffusionConfig(timesteps=1000, schedule="linear", variance="fixed_large"),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5000, gradient_clip=1.0),
        train=TrainConfig(steps=500_000, batch_size=128, ema_decays=(0.9999,)),
    )
