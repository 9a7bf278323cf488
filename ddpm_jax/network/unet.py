"""Build the network of DDPM (Ho et al. 2020, appendix B).

It is a UNet of residual blocks that hear the time, with attention on small maps. With the defaults
of `UNetConfig` it is the paper's, operation for operation. Most switches are differences between
checkpoint families that no rearrangement of weights can absorb; a few could be, but are cheaper to
say than to convert.

Levels are counted from the full resolution; up_0 is therefore executed last. The parameters are a
plain dict:

    time_embedding_0, time_embedding_1, [label_embedding]
    conv_in
    down_{i}_block_{j} / norm1 conv1 temb_proj norm2 conv2 [shortcut]
    down_{i}_attn_{j} / norm, q k v or qkv, proj_out
    down_{i}_downsample                a convolution, or a whole block with resampling="residual"
    mid_block_1, mid_attn, mid_block_2
    up_{i}_block_{j}, up_{i}_attn_{j}, up_{i}_upsample
    norm_out, conv_out

Kernels are [h, w, in, out] and [in, out]; the paper's 1x1 convolutions (q, k, v, proj_out,
shortcut) are of the second kind.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import UNetConfig
from ddpm_jax.errors import ConfigError
from ddpm_jax.network.blocks import (
    ASYMMETRIC,
    NEAR_ZERO,
    SYMMETRIC,
    AttentionBlock,
    Resample,
    ResidualBlock,
    average_pool,
    conv,
    dense,
    dropout_keys,
    group_norm,
    kernel_init,
    nearest_upsample,
)

# The ends of the network, and what it knows about t, stay in float32 whatever it computes in.
FLOAT32_LAYERS = ("time_embedding_0", "time_embedding_1", "conv_in", "conv_out")


class UNet(nn.Module):
    """The denoiser, which predicts noise, an image, v or a mean, and perhaps a variance."""

    config: UNetConfig
    out_channels: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        examples: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the network's output at x_t and t.

        Args:
          x: [b, h, w, c], images at their noise level, of data scaled to [-1, 1]; h and w
            divisible by 2^(levels-1).
          t: [b], timesteps counted from 0, as integers or floats; `config.timestep_scale` is
            applied here.
          labels: [b], classes 0..num_classes-1; num_classes itself means "no label", as None does
            for the whole batch. Anything else gives NaN.
          train: switches dropout on, which needs `rngs={"dropout": key}` and `examples` unless
            `config.dropout` is 0.
          examples: [b], place of each example in the global batch: with the key, all that its
            dropout masks depend on.

        Returns:
          [b, h, w, out_channels], float32 whatever `config.dtype`.

        Raises:
          ConfigError: the shapes of x, t or labels do not fit the config or each other.
          ValueError: train without `examples` or without the dropout key.
        """
        config = self.config
        self._check(x, t, labels, train, examples)
        rate = config.dropout if train else 0.0
        levels, blocks, width = (
            len(config.channel_mult),
            config.blocks_per_level,
            config.base_channels,
        )
        widths = [width * factor for factor in config.channel_mult]
        dtype = jnp.dtype(config.dtype)

        # The embedding stays in float32: it is cheap, and everything the network knows about t
        # passes through it.
        embedding = timestep_embedding(t, config)
        embedding = dense(4 * width, jnp.float32, "time_embedding_0")(embedding)
        embedding = dense(4 * width, jnp.float32, "time_embedding_1")(nn.silu(embedding))
        if config.num_classes:
            table = self.param("label_embedding", kernel_init(), (config.num_classes, 4 * width))
            if labels is not None:
                # "No label" is the row of zeros.
                table = jnp.concatenate([table, jnp.zeros((1, 4 * width))])
                embedding += table.at[labels].get(
                    mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
                )
        condition = nn.silu(embedding).astype(dtype)

        residual_block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
        keys = dropout_keys(self.scope.rngs["dropout"], block_names(config)) if rate else {}

        def block(
            h: jax.Array, features: int, name: str, resample: Resample | None = None
        ) -> jax.Array:
            return residual_block(config, features, rate, resample, name=name)(
                h, condition, examples, keys.get(name)
            )

        def attention(h: jax.Array, name: str) -> jax.Array:
            return AttentionBlock(config, name=name)(h)

        # The ends of the network stay in float32, where one side of the convolution is the image.
        # In bfloat16 the pixels of x would be rounded by up to a quarter of a grey level, a fifth
        # of the noise there is to find at t=0; a TPU would do that to a float32 convolution as
        # well, unless its precision is set.
        h = conv(width, jnp.float32, "conv_in", precision=jax.lax.Precision.HIGH)(x).astype(dtype)

        skips = [h]
        for i in range(levels):
            for j in range(blocks):
                h = block(h, widths[i], f"down_{i}_block_{j}")
                if h.shape[1] in config.attention_resolutions:
                    h = attention(h, f"down_{i}_attn_{j}")
                skips.append(h)
            if i < levels - 1:
                name = f"down_{i}_downsample"
                if config.resampling == "conv":
                    padding = ASYMMETRIC if config.down_padding == "asymmetric" else SYMMETRIC
                    h = conv(widths[i], dtype, name, strides=2, padding=padding)(h)
                elif config.resampling == "pool":
                    h = average_pool(h)
                else:
                    h = block(h, widths[i], name, average_pool)
                skips.append(h)

        h = block(h, widths[-1], "mid_block_1")
        if config.attention_in_mid:
            h = attention(h, "mid_attn")
        h = block(h, widths[-1], "mid_block_2")

        for i in reversed(range(levels)):
            for j in range(blocks + 1):
                h = block(
                    jnp.concatenate([h, skips.pop()], axis=-1), widths[i], f"up_{i}_block_{j}"
                )
                here = config.attention_placement == "block" or j == blocks
                if here and h.shape[1] in config.attention_resolutions:
                    h = attention(h, f"up_{i}_attn_{j}")
            if i > 0:
                name = f"up_{i}_upsample"
                if config.resampling == "conv":
                    h = conv(widths[i], dtype, name)(nearest_upsample(h))
                elif config.resampling == "pool":
                    h = nearest_upsample(h)
                else:
                    h = block(h, widths[i], name, nearest_upsample)
        assert not skips

        h = nn.silu(group_norm(config, jnp.float32, "norm_out")(h))
        return conv(self.out_channels, jnp.float32, "conv_out", scale=NEAR_ZERO)(h)

    def _check(
        self,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array | None,
        train: bool,
        examples: jax.Array | None,
    ) -> None:
        config = self.config
        if x.ndim != 4:
            raise ConfigError(f"x has shape {x.shape}: it must be a batch of images, [b, h, w, c]")
        levels = len(config.channel_mult)
        factor = 2 ** (levels - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ConfigError(
                f"x is {x.shape[1]}x{x.shape[2]} pixels: both sides must be divisible by {factor},"
                f" for the {levels} levels of config.model.channel_mult"
            )
        if t.shape != x.shape[:1]:
            raise ConfigError(
                f"t has shape {t.shape}: it must be {x.shape[:1]}, one timestep an image"
            )
        if labels is not None and not config.num_classes:
            raise ConfigError(
                "labels were given, but config.model.num_classes=0: set it to the number of classes"
            )
        if labels is not None and labels.shape != x.shape[:1]:
            raise ConfigError(
                f"labels has shape {labels.shape}: it must be {x.shape[:1]}, one class an image"
            )
        if train and config.dropout > 0:
            if examples is None or examples.shape != x.shape[:1]:
                raise ValueError(
                    f"train=True with dropout needs examples, global indices of shape {x.shape[:1]}"
                )
            if not self.has_rng("dropout"):
                raise ValueError('train=True with dropout needs rngs={"dropout": key}')


def block_names(config: UNetConfig) -> list[str]:
    """List the residual blocks of the network by the names of their parameters."""
    levels, blocks = len(config.channel_mult), config.blocks_per_level
    down = [f"down_{i}_block_{j}" for i in range(levels) for j in range(blocks)]
    up = [f"up_{i}_block_{j}" for i in range(levels) for j in range(blocks + 1)]
    resampling = [f"down_{i}_downsample" for i in range(levels - 1)]
    resampling += [f"up_{i}_upsample" for i in range(1, levels)]
    middle = ["mid_block_1", "mid_block_2"]
    return down + middle + up + (resampling if config.resampling == "residual" else [])


def cast_params(params: dict[str, Any], config: UNetConfig) -> dict[str, Any]:
    """Cast parameters to the types in which the network uses them; its values stay the same.

    The network does so by itself in each pass. Before a loop of passes it is done once for all.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(name: str, node: Any) -> Any:
        if not isinstance(node, dict) or name in FLOAT32_LAYERS:
            return node
        if "kernel" in node:  # a convolution or dense layer; a norm computes in float32
            return {leaf: value.astype(dtype) for leaf, value in node.items()}
        return {inner: cast(inner, value) for inner, value in node.items()}

    return cast("", params)


def timestep_embedding(t: jax.Array, config: UNetConfig) -> jax.Array:
    """Compute sinusoids of the timestep, [b] to [b, base_channels], float32.

    With s = t * timestep_scale and half = base_channels // 2, the angles are

        s * 10000^(-i / (half - 1)),  i = 0..half-1

    (`half` instead of `half - 1` for embedding_denominator="half"), and the output is [sin, cos],
    [cos, sin] or sin and cos in turn. An odd width ends in a 0.

    Raises:
      ConfigError: base_channels below 4 leave half - 1 = 0.
    """
    half = config.base_channels // 2
    denominator = half - 1 if config.embedding_denominator == "half_minus_one" else half
    if denominator == 0:
        raise ConfigError(
            f"config.model.base_channels={config.base_channels}: "
            "embedding_denominator=half_minus_one needs at least 4"
        )
    frequencies = (1e4 ** (-np.arange(half) / denominator)).astype(np.float32)
    angles = (t.astype(jnp.float32) * config.timestep_scale)[:, None] * frequencies[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if config.embedding_order == "interleaved":
        embedding = jnp.stack([sin, cos], axis=-1).reshape(t.shape[0], 2 * half)
    else:
        embedding = jnp.concatenate(
            [sin, cos] if config.embedding_order == "sin_cos" else [cos, sin], axis=-1
        )
    return jnp.pad(embedding, ((0, 0), (0, config.base_channels % 2)))
