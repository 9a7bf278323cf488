"""GroupNorm, in the form that suits the platform it is compiled for.

GPUs and TPUs get flax's and nothing else. It sums over the pixels and the channels of a group at once, which XLA does badly on
CPUs: there the pixels are summed first, one sum a channel, and of those few numbers each group's come together. The gradient is
written out, in one pass for its sums and one for itself. Both forms take the variance around the mean, in two passes, since
E[x^2] - E[x]^2 loses it to a large mean; statistics are float32 whatever x is. The results differ by rounding alone.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Gradients = tuple[jax.Array, jax.Array, jax.Array]


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the pixels and channels of each of `groups`; [b,h,w,c] to same.

    Reverse mode only: `jax.jvp` raises TypeError.
    """

    groups: int
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        if c % self.groups:
            raise ValueError(f"{c} channels do not make {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return _normalize(x, scale, bias, self.groups, self.epsilon, jnp.dtype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    how = {"groups": groups, "epsilon": epsilon, "dtype": dtype}
    return jax.lax.platform_dependent(
        x, scale, bias, cpu=functools.partial(by_channels, **how), default=functools.partial(plain, **how)
    )


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, *how: object) -> tuple[jax.Array, Gradients]:
    return _normalize(x, scale, bias, *how), (x, scale, bias)


def _backward(groups: int, epsilon: float, dtype: jnp.dtype, inputs: Gradients, dy: jax.Array) -> Gradients:
    how = {"groups": groups, "epsilon": epsilon, "dtype": dtype}
    return jax.lax.platform_dependent(
        *inputs, dy, cpu=functools.partial(gradients_by_channels, **how), default=functools.partial(plain_gradients, **how)
    )


_normalize.defvjp(_forward, _backward)


def plain(x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, epsilon: float, dtype: DTypeLike) -> jax.Array:
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False)
    return norm.apply({"params": {"scale": scale, "bias": bias}}, x)


def plain_gradients(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array, **how: object) -> Gradients:
    return jax.vjp(functools.partial(plain, **how), x, scale, bias)[1](dy)


def by_channels(x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, epsilon: float, dtype: DTypeLike) -> jax.Array:
    centred, rsqrt = _standardize(x, groups, epsilon)
    return (centred * _over_pixels(rsqrt * scale[None]) + bias[None, None, None]).astype(dtype)


def gradients_by_channels(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array, *, groups: int, epsilon: float, dtype: DTypeLike
) -> Gradients:
    """Of x, scale and bias. With r = 1/sqrt(variance + epsilon) and means over a group,

    dx = r (scale dy - mean(scale dy) - r^2 (x - mean(x)) mean(scale dy (x - mean(x))))
    """
    centred, r = _standardize(x, groups, epsilon)
    dy = dy.astype(jnp.float32)
    total, moment = dy.sum(axis=(1, 2)), (dy * centred).sum(axis=(1, 2))
    pixels = x.shape[1] * x.shape[2]
    mean, slope = (_group_mean(scale[None] * sums, groups) / pixels for sums in (total, moment))
    dx = _over_pixels(r * scale[None]) * dy - _over_pixels(r * mean) - _over_pixels(r**3 * slope) * centred
    return dx.astype(x.dtype), (moment * r).sum(axis=0), total.sum(axis=0)


def _standardize(x: jax.Array, groups: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x less its group's mean, and 1/sqrt(variance + epsilon) of each channel's group [b,c], float32."""
    x = x.astype(jnp.float32)
    centred = x - _over_pixels(_group_mean(x.mean(axis=(1, 2)), groups))
    return centred, jax.lax.rsqrt(_group_mean(jnp.square(centred).mean(axis=(1, 2)), groups) + epsilon)


def _group_mean(values: jax.Array, groups: int) -> jax.Array:
    """Each of [b,c] replaced by the mean of its group."""
    b, c = values.shape
    return jnp.repeat(values.reshape(b, groups, c // groups).mean(axis=-1), c // groups, axis=1)


def _over_pixels(values: jax.Array) -> jax.Array:
    return values[:, None, None, :]
