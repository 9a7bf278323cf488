"""Build the network's blocks: residual, attention, resampling, dropout, and their layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jax.typing import DTypeLike

from ddpm_jax.config import UNetConfig
from ddpm_jax.network.convolution import convolve
from ddpm_jax.network.normalization import GroupNorm

# Scale of the last layer of every branch: blocks start as the identity, if not at an exact 0, as in
# the paper's code.
NEAR_ZERO = 1e-10


# Zeros before and after, along height and width.
SYMMETRIC, ASYMMETRIC = ((1, 1), (1, 1)), ((0, 1), (0, 1))


class ResidualBlock(nn.Module):
    """A residual block that hears the time, appendix B.

        x + conv(dropout(silu(norm(conv(silu(norm(x))) + time))))

    x goes through a 1x1 convolution where the widths differ. With `conditioning="scale_shift"` the
    time enters after the second norm instead, as norm(h) * (1 + scale) + shift. With `resample`
    both branches change size, h just before its first convolution.
    """

    config: UNetConfig
    features: int
    dropout_rate: float = 0.0
    resample: Resample | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array,
        examples: jax.Array | None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Map [b,h,w,c] and the activated embedding [b, 4*base_channels] to [b,h',w',features].

        `key` is that of the dropout, by default that of `make_rng`.
        """
        config, dtype = self.config, x.dtype
        h = nn.silu(group_norm(config, dtype, "norm1")(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(self.features, dtype, "conv1")(h)
        norm2 = group_norm(config, dtype, "norm2")
        if config.conditioning == "add":
            h = norm2(h + dense(self.features, dtype, "temb_proj")(condition)[:, None, None, :])
        else:
            projection = dense(2 * self.features, dtype, "temb_proj")(condition)[:, None, None, :]
            scale, shift = jnp.split(projection, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        h = nn.silu(h)
        if self.dropout_rate > 0:
            key = self.make_rng("dropout") if key is None else key
            h = dropout(key, h, self.dropout_rate, examples)
        h = conv(self.features, dtype, "conv2", scale=NEAR_ZERO)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, dtype, "shortcut")(x)
        return (x + h) * config.skip_scale


class AttentionBlock(nn.Module):
    """Self-attention over all positions of the map, with d = c / heads and softmax in float32.

        x + proj_out(softmax(q k^T / sqrt(d)) v)

    A head owns d neighbouring channels of q, k and v. The 3c outputs of the fused layouts read
    [3, heads, d] ("fused") or [heads, 3, d] ("fused_by_head").
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b,h,w,c] to the same shape."""
        config, dtype = self.config, x.dtype
        b, height, width, c = x.shape
        heads = c // config.head_channels if config.head_channels else config.heads
        tokens = height * width
        h = group_norm(config, dtype, "norm")(x)
        if config.qkv_layout == "separate":
            q, k, v = (
                dense(c, dtype, name)(h).reshape(b, tokens, heads, c // heads) for name in "qkv"
            )
        else:
            by_head = config.qkv_layout == "fused_by_head"
            split = (heads, 3, c // heads) if by_head else (3, heads, c // heads)
            qkv = dense(3 * c, dtype, "qkv")(h).reshape(b, tokens, *split)
            q, k, v = jnp.moveaxis(qkv, 3 if by_head else 2, 0)
        # XLA for CPUs (jaxlib 0.10.2) ends the process over bfloat16 products of a single channel.
        wide = jnp.promote_types(dtype, jnp.float32) if c == heads else dtype
        h = jax.nn.dot_product_attention(*(part.astype(wide) for part in (q, k, v)))
        h = h.astype(dtype).reshape(x.shape)
        return (x + dense(c, dtype, "proj_out", scale=NEAR_ZERO)(h)) * config.skip_scale


def dropout_keys(rng: LazyRng, names: Sequence[str]) -> dict[str, jax.Array]:
    """Derive the keys that `make_rng("dropout")` gives in blocks of these names, all at once.

    One by one, each would be two kernels of a GPU that compute a single number.

    Args:
      rng: that of the network.
      names: of its blocks.
    """

    def number(name: str) -> int:
        separator = b"\00" if flax.config.flax_fix_rng_separator else b""
        parts = [*rng.suffix, name, 1]  # 1: the first key that the block asks for
        data = (
            part.encode() if isinstance(part, str) else part.to_bytes(-(-part.bit_length() // 8))
            for part in parts
        )
        digest = hashlib.sha1(b"".join(separator + text for text in data)).digest()
        return int.from_bytes(digest[:4])

    numbers = np.array([number(name) for name in names], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng.rng, numbers)
    return {name: keys[place] for place, name in enumerate(names)}


def dropout(key: jax.Array, x: jax.Array, rate: float, examples: jax.Array) -> jax.Array:
    """Zero each element with probability `rate` and divide the rest by the probability of staying.

    The rate is taken to 1/65536, and that of staying is exact for it. The mask of an image depends
    on the key and its entry of `examples` alone, so that it does not matter how a batch is spread
    over devices. Random bits are most of the cost, so one 32-bit word decides twice: its upper
    half for the upper half of the image, its lower half for the lower.

    Args:
      key: a key of its own for each layer and step.
      x: [b, h, w, c].
      rate: in (0, 1).
      examples: [b], integers.
    """
    height = x.shape[1]
    threshold = min(round(rate * 65536), 65535)

    def keep(example: jax.Array) -> jax.Array:
        words = jax.random.bits(
            jax.random.fold_in(key, example), ((height + 1) // 2, *x.shape[2:]), jnp.uint32
        )
        return jnp.concatenate([words >> 16, words & 0xFFFF])[:height] >= threshold

    return jnp.where(jax.vmap(keep)(examples), x * (65536 / (65536 - threshold)), 0)


def average_pool(x: jax.Array) -> jax.Array:
    """Average 2x2 squares: [b, h, w, c] to [b, h/2, w/2, c]."""
    b, height, width, c = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, c).mean(axis=(2, 4))


def nearest_upsample(x: jax.Array) -> jax.Array:
    """Repeat each pixel four times: [b, h, w, c] to [b, 2h, 2w, c].

    A broadcast is faster than a gather.
    """
    b, height, width, c = x.shape
    repeated = jnp.broadcast_to(x[:, :, None, :, None, :], (b, height, 2, width, 2, c))
    return repeated.reshape(b, 2 * height, 2 * width, c)


def kernel_init(scale: float = 1.0) -> nn.initializers.Initializer:
    """Return the initializer of all kernels, that of the paper's code."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def conv(features: int, dtype: DTypeLike, name: str, scale: float = 1.0, **options: Any) -> nn.Conv:
    """Build a 3x3 convolution, padded by one on each side unless `options` say otherwise."""
    options = {"padding": SYMMETRIC, "conv_general_dilated": convolve} | options
    return nn.Conv(
        features, (3, 3), dtype=dtype, kernel_init=kernel_init(scale), name=name, **options
    )


def dense(features: int, dtype: DTypeLike, name: str, scale: float = 1.0) -> nn.Dense:
    """Build a dense layer; over the channels of a map it is the paper's 1x1 convolution."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init(scale), name=name)


def group_norm(config: UNetConfig, dtype: DTypeLike, name: str) -> GroupNorm:
    """Build a GroupNorm with the groups and epsilon of `config`."""
    return GroupNorm(config.group_norm_groups, config.group_norm_epsilon, dtype, name=name)


Resample = Callable[[jax.Array], jax.Array]
