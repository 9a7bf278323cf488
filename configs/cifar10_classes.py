"""CIFAR-10 with its classes, for classifier-free guidance (Ho & Salimans 2022).

Command:   python scripts/prepare_data.py --dataset=cifar10 --data_dir=data
           python scripts/train.py --config=configs/cifar10_classes.py --workdir=runs/classes
           python scripts/sample.py --workdir=runs/classes --mode=classes --output=classes.png
Hardware:  as configs/cifar10.py
Expect:    no number of the paper's, which has no classes; with a guidance above 1 pictures are
           clearer and less varied
Source:    configs/cifar10.py with labels, of which one in ten is hidden in training
"""

from ddpm_jax.config import Config, DataConfig, UNetConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10"),
        model=UNetConfig(num_classes=10, label_dropout=0.1, dtype="bfloat16"),
    )
