"""CelebA at 32x32: the paper's network and recipe for CIFAR-10, on faces.

Command:   python scripts/prepare_data.py --dataset=celeb_a --data_dir=data --source=celeba
           python scripts/train.py --config=configs/celeba32.py --workdir=runs/celeba32
Hardware:  one GPU, a TPU v3-8, or anything larger that divides the batch of 128; two CPU cores
           take configs/faces_small.py
Expect:    no published number: papers give CelebA at 64x64 (configs/celeba64.py)
Source:    configs/cifar10.py; the crop is that of the DDIM paper's CelebA, at half its size
"""

from ddpm_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig, UNetConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="celeb_a", image_size=32, channels=3, flip=True, crop="celeba64"),
        model=UNetConfig(
            base_channels=128,
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=2,
            attention_resolutions=(16,),
            dropout=0.1,
            dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5000),
        train=TrainConfig(steps=500_000, batch_size=128, ema_decays=(0.9999,)),
    )
