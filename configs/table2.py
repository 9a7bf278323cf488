"""CIFAR-10 with each objective of Table 2 of Ho et al. 2020.

    mu_l_learned    L, mu prediction, learned diagonal variance      IS 7.28, FID 23.69
    mu_l_fixed      L, mu prediction, fixed isotropic variance       IS 8.06, FID 13.22
    mu_unweighted   |mu~ - mu|^2, unweighted                         unstable
    eps_l_learned   L, eps prediction, learned diagonal variance     unstable
    eps_l_fixed     L, eps prediction, fixed isotropic variance      IS 7.67, FID 13.51, NLL <= 3.70
    eps_simple      L_simple, the paper's choice: configs/cifar10.py IS 9.46, FID 3.17, NLL <= 3.75

Command:   python scripts/train.py --config=configs/table2.py:eps_l_fixed --workdir=runs/eps_l_fixed
Hardware:  as configs/cifar10.py, from which a row differs in nothing but its objective: L here is
           T times the term that the paper's code minimises, and clip and epsilon go with it
Expect:    the figures above (NLL in bits/dim), of 50,000 samples against the training set; two
           rows that diverge
Source:    Table 2 of the paper; its code trains a learned variance by L alone, and calls the
           variances beta_t "fixedlarge"
"""

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    LossConfig,
    OptimizerConfig,
    UNetConfig,
)

VARIANTS = {  # prediction, variance, loss
    "mu_l_learned": ("mu", "learned", "vlb"),
    "mu_l_fixed": ("mu", "fixed_large", "vlb"),
    "mu_unweighted": ("mu", "fixed_large", "simple"),
    "eps_l_learned": ("eps", "learned", "vlb"),
    "eps_l_fixed": ("eps", "fixed_large", "vlb"),
    "eps_simple": ("eps", "fixed_large", "simple"),
}


def get_config(variant: str) -> Config:
    prediction, variance, loss = VARIANTS[variant]
    scaled = OptimizerConfig(gradient_clip=1000.0, epsilon=1e-5)  # by T, as the loss is
    return Config(
        data=DataConfig(name="cifar10"),
        model=UNetConfig(dtype="bfloat16"),
        diffusion=DiffusionConfig(prediction=prediction, variance=variance),
        loss=LossConfig(kind=loss),
        optimizer=scaled if loss == "vlb" else OptimizerConfig(),
    )
