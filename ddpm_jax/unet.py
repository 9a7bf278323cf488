"""The network of DDPM (Ho et al. 2020, appendix B): a UNet of residual blocks, told the time, attending on small maps.

With the defaults of `UNetConfig` it is the paper's, operation for operation. Most switches are differences between
checkpoint families that no rearrangement of weights can absorb; a few could be, but are cheaper to say than to convert.

Levels are counted from the full resolution, up_0 is therefore executed last. The parameters are a plain dict:

    time_embedding_0, time_embedding_1, [label_embedding]
    conv_in
    down_{i}_block_{j} / norm1 conv1 temb_proj norm2 conv2 [shortcut]
    down_{i}_attn_{j} / norm, q k v or qkv, proj_out
    down_{i}_downsample                       a convolution, or a whole block with resampling="residual"
    mid_block_1, mid_attn, mid_block_2
    up_{i}_block_{j}, up_{i}_attn_{j}, up_{i}_upsample
    norm_out, conv_out

Kernels are [h, w, in, out] and [in, out]; the paper's 1x1 convolutions (q, k, v, proj_out, shortcut) are of the
second kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ddpm_jax.config import ConfigError, UNetConfig
from ddpm_jax.convolution import convolve
from ddpm_jax.normalization import GroupNorm

Resample = Callable[[jax.Array], jax.Array]

# Scale of the last layer of every branch: blocks start as the identity, if not at an exact 0, as in the paper's code.
NEAR_ZERO = 1e-10

SYMMETRIC, ASYMMETRIC = ((1, 1), (1, 1)), ((0, 1), (0, 1))  # zeros before and after, along height and width


class UNet(nn.Module):
    """The denoiser: what the diffusion process calls to predict noise, an image or a mean, and perhaps a variance."""

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
        """The network's output at x_t and t.

        Args:
          x: [b, h, w, c], images at their noise level, of data scaled to [-1, 1]; h and w divisible by 2^(levels-1).
          t: [b], timesteps counted from 0, as integers or floats; `config.timestep_scale` is applied here.
          labels: [b], classes 0..num_classes-1; num_classes itself means "no label", as None does for the whole batch.
            Anything else gives NaN.
          train: switches dropout on, which needs `rngs={"dropout": key}` and `examples` unless `config.dropout` is 0.
          examples: [b], place of each example in the global batch: with the key, all that its dropout masks depend on.

        Returns:
          [b, h, w, out_channels], float32 whatever `config.dtype`.

        Raises:
          ConfigError: the shapes of x, t or labels do not fit the config or each other.
          ValueError: train without `examples` or without the dropout key.
        """
        config = self.config
        self._check(x, t, labels, train, examples)
        rate = config.dropout if train else 0.0
        levels, blocks, width = len(config.channel_mult), config.blocks_per_level, config.base_channels
        widths = [width * factor for factor in config.channel_mult]
        dtype = jnp.dtype(config.dtype)

        # The embedding stays in float32: it is cheap, and everything the network knows about t passes through it.
        embedding = timestep_embedding(t, config)
        embedding = _dense(4 * width, jnp.float32, "time_embedding_0")(embedding)
        embedding = _dense(4 * width, jnp.float32, "time_embedding_1")(nn.silu(embedding))
        if config.num_classes:
            table = self.param("label_embedding", _kernel_init(), (config.num_classes, 4 * width))
            if labels is not None:
                table = jnp.concatenate([table, jnp.zeros((1, 4 * width))])  # "no label" is the row of zeros
                embedding += table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        condition = nn.silu(embedding).astype(dtype)

        residual_block = nn.remat(ResidualBlock) if config.remat else ResidualBlock

        def block(h: jax.Array, features: int, name: str, resample: Resample | None = None) -> jax.Array:
            return residual_block(config, features, rate, resample, name=name)(h, condition, examples)

        def attention(h: jax.Array, name: str) -> jax.Array:
            return AttentionBlock(config, name=name)(h)

        # The ends of the network stay in float32, where one side of the convolution is the image. In bfloat16 the
        # pixels of x would be rounded by up to a quarter of a grey level, a fifth of the noise there is to find at t=0;
        # a TPU would do that to a float32 convolution as well, unless told not to.
        h = _conv(width, jnp.float32, "conv_in", precision=jax.lax.Precision.HIGH)(x).astype(dtype)

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
                    h = _conv(widths[i], dtype, name, strides=2, padding=padding)(h)
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
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), widths[i], f"up_{i}_block_{j}")
                here = config.attention_placement == "block" or j == blocks
                if here and h.shape[1] in config.attention_resolutions:
                    h = attention(h, f"up_{i}_attn_{j}")
            if i > 0:
                name = f"up_{i}_upsample"
                if config.resampling == "conv":
                    h = _conv(widths[i], dtype, name)(nearest_upsample(h))
                elif config.resampling == "pool":
                    h = nearest_upsample(h)
                else:
                    h = block(h, widths[i], name, nearest_upsample)
        assert not skips

        h = nn.silu(_group_norm(config, jnp.float32, "norm_out")(h))
        return _conv(self.out_channels, jnp.float32, "conv_out", scale=NEAR_ZERO)(h)

    def _check(self, x: jax.Array, t: jax.Array, labels: jax.Array | None, train: bool, examples: jax.Array | None) -> None:
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
            raise ConfigError(f"t has shape {t.shape}: it must be {x.shape[:1]}, one timestep an image")
        if labels is not None and not config.num_classes:
            raise ConfigError("labels were given, but config.model.num_classes=0: set it to the number of classes")
        if labels is not None and labels.shape != x.shape[:1]:
            raise ConfigError(f"labels has shape {labels.shape}: it must be {x.shape[:1]}, one class an image")
        if train and config.dropout > 0:
            if examples is None or examples.shape != x.shape[:1]:
                raise ValueError(f"train=True with dropout needs examples, global indices of shape {x.shape[:1]}")
            if not self.has_rng("dropout"):
                raise ValueError('train=True with dropout needs rngs={"dropout": key}')


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))), x through a 1x1 convolution where the widths differ.

    With `conditioning="scale_shift"` the time enters after the second norm instead, as norm(h) * (1 + scale) + shift;
    with `resample` both branches change size, h just before its first convolution.
    """

    config: UNetConfig
    features: int
    dropout_rate: float = 0.0
    resample: Resample | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, examples: jax.Array | None) -> jax.Array:
        """[b, h, w, c] and the activated embedding [b, 4*base_channels] to [b, h', w', features]."""
        config, dtype = self.config, x.dtype
        h = nn.silu(_group_norm(config, dtype, "norm1")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = _conv(self.features, dtype, "conv1")(h)
        norm2 = _group_norm(config, dtype, "norm2")
        if config.conditioning == "add":
            h = norm2(h + _dense(self.features, dtype, "temb_proj")(condition)[:, None, None, :])
        else:
            projection = _dense(2 * self.features, dtype, "temb_proj")(condition)[:, None, None, :]
            scale, shift = jnp.split(projection, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        h = nn.silu(h)
        if self.dropout_rate > 0:
            h = dropout(self.make_rng("dropout"), h, self.dropout_rate, examples)
        h = _conv(self.features, dtype, "conv2", scale=NEAR_ZERO)(h)
        if x.shape[-1] != self.features:
            x = _dense(self.features, dtype, "shortcut")(x)
        return (x + h) * config.skip_scale


class AttentionBlock(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(d)) v) over all positions of the map, d = c / heads, softmax in float32.

    A head owns d neighbouring channels of q, k and v. The 3c outputs of the fused layouts read [3, heads, d] ("fused")
    or [heads, 3, d] ("fused_by_head").
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, x.dtype
        b, height, width, c = x.shape
        heads = c // config.head_channels if config.head_channels else config.heads
        tokens = height * width
        h = _group_norm(config, dtype, "norm")(x)
        if config.qkv_layout == "separate":
            q, k, v = (_dense(c, dtype, name)(h).reshape(b, tokens, heads, c // heads) for name in "qkv")
        else:
            by_head = config.qkv_layout == "fused_by_head"
            split = (heads, 3, c // heads) if by_head else (3, heads, c // heads)
            qkv = _dense(3 * c, dtype, "qkv")(h).reshape(b, tokens, *split)
            q, k, v = jnp.moveaxis(qkv, 3 if by_head else 2, 0)
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return (x + _dense(c, dtype, "proj_out", scale=NEAR_ZERO)(h)) * config.skip_scale


def timestep_embedding(t: jax.Array, config: UNetConfig) -> jax.Array:
    """Sinusoids of the timestep, [b] -> [b, base_channels], float32.

    With s = t * timestep_scale and half = base_channels // 2, the angles are s * 10000^(-i / (half - 1)), i = 0..half-1
    (`half` instead of `half - 1` for embedding_denominator="half"), and the output is [sin, cos], [cos, sin] or sin and
    cos in turn. An odd width ends in a 0.

    Raises:
      ConfigError: base_channels below 4 leave half - 1 = 0.
    """
    half = config.base_channels // 2
    denominator = half - 1 if config.embedding_denominator == "half_minus_one" else half
    if denominator == 0:
        raise ConfigError(
            f"config.model.base_channels={config.base_channels}: embedding_denominator=half_minus_one needs at least 4"
        )
    frequencies = (1e4 ** (-np.arange(half) / denominator)).astype(np.float32)
    angles = (t.astype(jnp.float32) * config.timestep_scale)[:, None] * frequencies[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if config.embedding_order == "interleaved":
        embedding = jnp.stack([sin, cos], axis=-1).reshape(t.shape[0], 2 * half)
    else:
        embedding = jnp.concatenate([sin, cos] if config.embedding_order == "sin_cos" else [cos, sin], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, config.base_channels % 2)))


def dropout(key: jax.Array, x: jax.Array, rate: float, examples: jax.Array) -> jax.Array:
    """Zeroes each element with probability `rate` to 1/65536, and divides the rest by the exact probability of staying.

    The mask of an image depends on the key and its entry of `examples` alone, so that it does not matter how a batch
    is spread over devices. Random bits are most of the cost, so one 32-bit word decides twice: its upper half for the
    upper half of the image, its lower half for the lower.

    Args:
      key: a key of its own for each layer and step.
      x: [b, h, w, c].
      rate: in (0, 1).
      examples: [b], integers.
    """
    height = x.shape[1]
    threshold = min(round(rate * 65536), 65535)

    def keep(example: jax.Array) -> jax.Array:
        words = jax.random.bits(jax.random.fold_in(key, example), ((height + 1) // 2, *x.shape[2:]), jnp.uint32)
        return jnp.concatenate([words >> 16, words & 0xFFFF])[:height] >= threshold

    return jnp.where(jax.vmap(keep)(examples), x * (65536 / (65536 - threshold)), 0)


def average_pool(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h/2, w/2, c], means of 2x2 squares."""
    b, height, width, c = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, c).mean(axis=(2, 4))


def nearest_upsample(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, 2h, 2w, c], each pixel four times; by broadcast, which is faster than a gather."""
    b, height, width, c = x.shape
    repeated = jnp.broadcast_to(x[:, :, None, :, None, :], (b, height, 2, width, 2, c))
    return repeated.reshape(b, 2 * height, 2 * width, c)


def _kernel_init(scale: float = 1.0) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def _conv(features: int, dtype: DTypeLike, name: str, scale: float = 1.0, **options: Any) -> nn.Conv:
    options = {"padding": SYMMETRIC, "conv_general_dilated": convolve} | options
    return nn.Conv(features, (3, 3), dtype=dtype, kernel_init=_kernel_init(scale), name=name, **options)


def _dense(features: int, dtype: DTypeLike, name: str, scale: float = 1.0) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_kernel_init(scale), name=name)


def _group_norm(config: UNetConfig, dtype: DTypeLike, name: str) -> GroupNorm:
    return GroupNorm(config.group_norm_groups, config.group_norm_epsilon, dtype, name=name)
