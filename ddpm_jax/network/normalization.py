"""Compute GroupNorm in the form that suits the platform it is compiled for.

Flax's sums over the pixels and the channels of a group at once, which XLA does badly. So on CPUs,
TPUs and NVIDIA GPUs the pixels are summed first, one sum a channel, and then the few sums of each
group; on TPUs by a matrix product, as each of several small operations would have a price of its
own. The gradient is written out, in one pass for its sums and one for itself.

E[x^2] - E[x]^2 would lose the variance to a large mean. CPUs and TPUs take it around the mean, in a
second pass, as flax does. A GPU would wait for memory, and for twice as many kernels: there both
sums come from one pass over the differences from a pixel of the channel, its first. The pixel is
one of those that are summed, so that its distance from their mean is at most sqrt(n) deviations,
and n = h w roundings are the most that the variance can lose; few, unless the pixel is far from all
others.

Statistics are float32 whatever x is. The results of all forms differ by rounding alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Gradients = tuple[jax.Array, jax.Array, jax.Array]
Average = Callable[[jax.Array, int], jax.Array]


class GroupNorm(nn.Module):
    """Normalisation over the pixels and channels of each of `groups`.

        (x - mean) / sqrt(variance + epsilon) * scale + bias

    It has reverse mode only: `jax.jvp` raises TypeError.
    """

    groups: int
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [b,h,w,c] to the same shape."""
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(f"{c} channels do not make {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return _normalize(x, scale, bias, self.groups, self.epsilon, jnp.dtype(self.dtype))


# This and its gradient are traced once a shape, and inlined wherever they stand: a network has
# dozens of norms of few shapes.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float, dtype: jnp.dtype
) -> jax.Array:
    how = {"groups": groups, "epsilon": epsilon, "dtype": dtype}
    return jax.lax.platform_dependent(
        x,
        scale,
        bias,
        cpu=functools.partial(by_channels, average=_group_mean, **how),
        tpu=functools.partial(by_channels, average=_product_mean, **how),
        cuda=functools.partial(in_one_pass, **how),
        default=functools.partial(plain, **how),
    )


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *how: object
) -> tuple[jax.Array, Gradients]:
    return _normalize(x, scale, bias, *how), (x, scale, bias)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(
    groups: int, epsilon: float, dtype: jnp.dtype, inputs: Gradients, dy: jax.Array
) -> Gradients:
    how = {"groups": groups, "epsilon": epsilon, "dtype": dtype}
    return jax.lax.platform_dependent(
        *inputs,
        dy,
        cpu=functools.partial(gradients_by_channels, average=_group_mean, **how),
        tpu=functools.partial(gradients_by_channels, average=_product_mean, **how),
        cuda=functools.partial(gradients_in_one_pass, **how),
        default=functools.partial(plain_gradients, **how),
    )


_normalize.defvjp(_forward, _backward)


def plain(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    groups: int,
    epsilon: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Normalise by flax's GroupNorm."""
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)


def plain_gradients(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array, **how: object
) -> Gradients:
    """Compute the gradients of `plain` in x, scale and bias."""
    return jax.vjp(functools.partial(plain, **how), x, scale, bias)[1](dy)


def by_channels(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    groups: int,
    epsilon: float,
    dtype: DTypeLike,
    average: Average,
) -> jax.Array:
    """Normalise with sums by channels, the form for CPUs and TPUs.

    Args:
      average: means over groups, as `_group_mean` takes them.
    """
    centred, rsqrt = _standardize(x, groups, epsilon, average)
    return (centred * _over_pixels(rsqrt * scale[None]) + bias[None, None, None]).astype(dtype)


def gradients_by_channels(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dy: jax.Array,
    *,
    groups: int,
    epsilon: float,
    dtype: DTypeLike,
    average: Average,
) -> Gradients:
    """Compute the gradients of `by_channels` in x, scale and bias.

        dx = r (scale dy - mean(scale dy) - r^2 (x - mean(x)) mean(scale dy (x - mean(x))))

    with r = 1/sqrt(variance + epsilon) and means over a group.
    """
    centred, r = _standardize(x, groups, epsilon, average)
    dy = dy.astype(jnp.float32)
    total, moment = dy.sum(axis=(1, 2)), (dy * centred).sum(axis=(1, 2))
    pixels = x.shape[1] * x.shape[2]
    mean, slope = (average(scale[None] * sums, groups) / pixels for sums in (total, moment))
    dx = (
        _over_pixels(r * scale[None]) * dy
        - _over_pixels(r * mean)
        - _over_pixels(r**3 * slope) * centred
    )
    return dx.astype(x.dtype), (moment * r).sum(axis=0), total.sum(axis=0)


def in_one_pass(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    groups: int,
    epsilon: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Normalise with both sums from one pass, the form for GPUs."""
    x = x.astype(jnp.float32)
    mean, r = _statistics(x, groups, epsilon)
    scale, bias = scale[None, None, None], bias[None, None, None]
    return ((x - mean) * (r * scale) + bias).astype(dtype)


def gradients_in_one_pass(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dy: jax.Array,
    *,
    groups: int,
    epsilon: float,
    dtype: DTypeLike,
) -> Gradients:
    """Compute the gradients of `in_one_pass` in x, scale and bias, as `gradients_by_channels`."""
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    mean, r = _statistics(wide, groups, epsilon)
    normal = (wide - mean) * r
    # The barrier keeps XLA from summing over images and pixels at once, which is another pass.
    total, moment = jax.lax.optimization_barrier(
        (dy.sum(axis=(1, 2)), (dy * normal).sum(axis=(1, 2)))
    )
    pixels = x.shape[1] * x.shape[2]
    along, slope = (_few_means(scale[None] * sums, groups) / pixels for sums in (total, moment))
    scaled = scale[None, None, None] * dy
    dx = r * (scaled - _over_channels(along, x) - normal * _over_channels(slope, x))
    # In one reduction of two sums: XLA would make two kernels of two reductions.
    zero = jnp.zeros((), jnp.float32)
    by_scale, by_bias = jax.lax.reduce(
        (moment, total), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,)
    )
    return dx.astype(x.dtype), by_scale, by_bias


def _statistics(x: jax.Array, groups: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return mean and 1/sqrt(variance + epsilon) of each channel's group, both [b,1,1,c]."""
    pixels, first = x.shape[1] * x.shape[2], x[:, :1, :1]
    differences = x - first
    mean = differences.sum(axis=(1, 2)) / pixels
    square = jnp.square(differences).sum(axis=(1, 2)) / pixels
    channels = first[:, 0, 0] + mean
    of_group = _few_means(channels, groups)
    apart = channels - jnp.repeat(of_group, channels.shape[1] // groups, axis=1)
    variance = _few_means(square - jnp.square(mean) + jnp.square(apart), groups)
    return _over_channels(of_group, x), _over_channels(jax.lax.rsqrt(variance + epsilon), x)


def _few_means(values: jax.Array, groups: int) -> jax.Array:
    """Average the channels of each group, [b,c] to [b,groups], without a reduction of its own.

    XLA joins a sum that is written out with what is done to it; a reduction is a kernel.
    """
    grouped = values.reshape(len(values), groups, -1)
    size = grouped.shape[-1]
    return sum(grouped[..., channel] for channel in range(size)) / size


def _over_channels(values: jax.Array, x: jax.Array) -> jax.Array:
    """Repeat [b,groups] for the channels of x, [b,1,1,c]."""
    return jnp.repeat(values, x.shape[-1] // values.shape[1], axis=1)[:, None, None]


def _standardize(
    x: jax.Array, groups: int, epsilon: float, average: Average
) -> tuple[jax.Array, jax.Array]:
    """Return x less its group's mean, and 1/sqrt(variance + epsilon) of each channel's group.

    Both are float32, the second [b,c].
    """
    x = x.astype(jnp.float32)
    centred = x - _over_pixels(average(x.mean(axis=(1, 2)), groups))
    return centred, jax.lax.rsqrt(average(jnp.square(centred).mean(axis=(1, 2)), groups) + epsilon)


def _group_mean(values: jax.Array, groups: int) -> jax.Array:
    """Replace each of [b,c] by the mean of its group."""
    b, c = values.shape
    return jnp.repeat(values.reshape(b, groups, c // groups).mean(axis=-1), c // groups, axis=1)


def _product_mean(values: jax.Array, groups: int) -> jax.Array:
    """Replace each of [b,c] by the mean of its group, as a product with a constant matrix."""
    size = values.shape[1] // groups
    group = jnp.arange(values.shape[1]) // size
    weights = jnp.where(group[:, None] == group[None], jnp.float32(1 / size), 0)
    return jnp.dot(values, weights, precision=jax.lax.Precision.HIGHEST)


def _over_pixels(values: jax.Array) -> jax.Array:
    return values[:, None, None, :]
