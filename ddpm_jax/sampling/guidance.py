"""Guide a conditional network towards its label (Ho & Salimans 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddpm_jax.build import Bind, Params
from ddpm_jax.config import Config
from ddpm_jax.diffusion.process import Denoiser, GaussianDiffusion, split_output
from ddpm_jax.errors import ConfigError


def guided(bind: Bind, process: GaussianDiffusion, num_classes: int, scale: float) -> Bind:
    """Guide a denoiser without a classifier, eq. 6 of Ho & Salimans 2022.

        output = u + scale (c - u), c with the label, u without

    scale is 1 + w of the paper: 1 is the plain conditional model, 0 the unconditional one. Where
    the variance is learned, that with the label counts.
    """

    def guided_bind(params: Params, labels: jax.Array) -> Denoiser:
        both = bind(params, jnp.concatenate([labels, jnp.full_like(labels, num_classes)]))

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            output = both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
            with_label, without = jnp.split(output, 2)
            c, raw = split_output(process, with_label)
            u, _ = split_output(process, without)
            mean = u + scale * (c - u)
            return mean if raw is None else jnp.concatenate([mean, raw], axis=-1)

        return denoise

    return guided_bind


def check_guidance(config: Config) -> None:
    """Check that the network of `config` knows labels, and how to do without.

    Raises:
      ConfigError: it does not.
    """
    if not config.model.num_classes:
        raise ConfigError("guidance: this run has no classes")
    if not config.model.label_dropout:
        raise ConfigError(
            "guidance: this run was trained with model.label_dropout=0 and knows no images without "
            "a label"
        )
