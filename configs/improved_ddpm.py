"""CIFAR-10 as in Nichol & Dhariwal 2021, Improved DDPM.

The rows differ in schedule, objective and variance:

    1k_linear_simple    T = 1000, linear, L_simple     NLL 3.73 bits/dim, FID 3.29
    4k_linear_simple    T = 4000, linear, L_simple     NLL 3.37, FID 2.90
    4k_linear_hybrid    T = 4000, linear, L_hybrid     NLL 3.26, FID 3.07
    4k_cosine_simple    T = 4000, cosine, L_simple     NLL 3.26, FID 3.05
    4k_cosine_hybrid    T = 4000, cosine, L_hybrid     NLL 3.17, FID 3.19
    4k_cosine_vlb       T = 4000, cosine, L_vlb        NLL 2.94, FID 11.47

Command:   python scripts/train.py --config=configs/improved_ddpm.py:4k_cosine_vlb --workdir=runs/4k
Hardware:  as configs/cifar10.py, with a network half as large again
Expect:    the figures above after 500,000 steps, 50,000 samples against the training set
Source:    Table 2 of that paper and its code: no warm-up, no gradient clipping, no mirroring;
           timesteps reach the network as 1000 t / T, the ends of the linear schedule are scaled by
           1000 / T; L_vlb draws timesteps by importance. Its Appendix A has the dropout: of 0.1,
           0.2 and 0.3 the best was 0.1 with the linear schedule, 0.3 with the cosine one
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

VARIANTS = (
    "1k_linear_simple",
    "4k_linear_simple",
    "4k_linear_hybrid",
    "4k_cosine_simple",
    "4k_cosine_hybrid",
    "4k_cosine_vlb",
)


def get_config(variant: str) -> Config:
    length, schedule, loss = variant.split("_")
    timesteps = {"1k": 1000, "4k": 4000}[length]
    return Config(
        data=DataConfig(name="cifar10", image_size=32, channels=3, flip=False),
        model=UNetConfig(
            base_channels=128,
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=3,
            attention_resolutions=(16, 8),
            heads=4,
            qkv_layout="fused_by_head",
            dropout={"linear": 0.1, "cosine": 0.3}[schedule],
            conditioning="scale_shift",
            embedding_order="cos_sin",
            embedding_denominator="half",
            timestep_scale=1000 / timesteps,
            group_norm_epsilon=1e-5,
            down_padding="symmetric",
            dtype="bfloat16",
        ),
        diffusion=DiffusionConfig(
            timesteps=timesteps,
            schedule=schedule,
            rescale_betas=schedule == "linear",
            variance="fixed_large" if loss == "simple" else "learned_range",
        ),
        loss=LossConfig(kind=loss, timestep_sampling="importance" if loss == "vlb" else "uniform"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0, gradient_clip=0.0),
        train=TrainConfig(steps=500_000, batch_size=128, ema_decays=(0.9999,)),
    )
