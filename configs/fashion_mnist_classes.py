"""Fashion-MNIST at 32x32 with its classes, for classifier-free guidance (Ho & Salimans 2022).

Command:   python scripts/prepare_data.py --dataset=fashion_mnist --data_dir=data
           python scripts/train.py --config=configs/fashion_mnist_classes.py --workdir=runs/clothes
           python scripts/sample.py --workdir=runs/clothes --mode=classes --output=clothes.png
Hardware:  two CPU cores, some hours; minutes on a GPU
Expect:    each row of the picture is one kind of clothing
Source:    configs/fashion_mnist.py with labels, of which one in ten is hidden in training, and
           trained for longer at a constant rate
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
            num_classes=10,
            label_dropout=0.1,
        ),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        loss=LossConfig(weighting="min_snr"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        train=TrainConfig(
            steps=20_000,
            batch_size=32,
            ema_decays=(0.9995,),
            ema_warmup=True,
            log_every=50,
            eval_every=2000,
            eval_images=512,
            checkpoint_every=500,
            sample_every=0,
        ),
    )
