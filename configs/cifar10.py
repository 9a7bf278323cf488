"""CIFAR-10, unconditional, as in Ho et al. 2020: Table 1, row "Ours (L_simple)".

Command:   python scripts/prepare_data.py --dataset=cifar10 --data_dir=data
           python scripts/train.py --config=configs/cifar10.py --workdir=runs/cifar10
Hardware:  one GPU, a TPU v3-8, or anything larger that divides the batch of 128; on a CPU add
           --config.model.dtype=float32
Expect:    FID 3.17 (50,000 samples against the training set), IS 9.46, NLL <= 3.75 bits/dim after
           800,000 steps; the mean squared error settles near 0.028
Source:    section 4 and appendix B of the paper; run_cifar.py of its code
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
        data=DataConfig(name="cifar10", image_size=32, channels=3, flip=True),
        model=UNetConfig(
            base_channels=128,
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=2,
            attention_resolutions=(16,),
            dropout=0.1,
            dtype="bfloat16",
        ),
        diffusion=DiffusionConfig(timesteps=1000, schedule="linear", variance="fixed_large"),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=5000, gradient_clip=1.0),
        train=TrainConfig(steps=800_000, batch_size=128, ema_decays=(0.9999,)),
    )
