"""Compute the network's convolutions in the form that suits the platform they are compiled for.

GPUs and TPUs get XLA's own convolution and nothing else. On CPUs XLA's is slow, above all its
filter gradient, and 3x3 convolutions of wide layers take another form: F(2x2, 3x3) of Winograd
(Lavin & Gray 2016), the same polynomial with 16 multiplications where the definition has 36. A 4x4
patch d of the input, which overlaps its neighbours by two, and a filter w give the 2x2 outputs

    y = A' [ (G w G') * (B' d B) ] A

where * is elementwise and sums over input channels, which makes it 16 matrix products over all
patches at once. The input gradient is the same convolution with the filter turned round, and the
filter gradient is the transpose of the equation in w:

    dw = G' [ (B' d B) * (A dy A') ] G

The small matrices add, subtract and halve, no more, so the result differs by rounding alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Below these the work of transforming outweighs what it saves (docs/performance.md).
LEAST_CHANNELS, LEAST_PIXELS = 64, 1024
# From so many pixels of a batch on, half the channels out are enough.
MANY_PIXELS = 2**14
# Patches are transformed, multiplied and transformed back a few images at a time, so as not to
# leave the cache in between.
CHUNK = 2**20  # elements: pixels of a chunk times channels in and out

NHWC = ("NHWC", "HWIO", "NHWC")
Strides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array,
    w: jax.Array,
    strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    **options: Any,
) -> jax.Array:
    """Convolve images [b,h,w,c] with filters [kh,kw,c,o], as flax's `conv_general_dilated`.

    Dilations and groups are left to XLA altogether. The rest has reverse mode only: `jax.jvp`
    raises TypeError.
    """
    ones = all(set(options.get(name) or (1, 1)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    if not ones or options.get("feature_group_count", 1) != 1:
        return jax.lax.conv_general_dilated(x, w, strides, padding, **options)
    (top, bottom), (left, right) = padding
    return _convolve(x, w, tuple(strides), ((top, bottom), (left, right)), options.get("precision"))


def suits_winograd(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any = None
) -> bool:
    """Return whether a CPU computes this by Winograd's form.

    It does for 3x3 with stride 1, float32, even maps, and sizes that are large enough to pay.
    """
    batch, height, width, channels = x.shape
    pixels = batch * height * width
    least_out = LEAST_CHANNELS if pixels < MANY_PIXELS else LEAST_CHANNELS // 2
    return (
        w.shape[:2] == (3, 3)
        and strides == (1, 1)
        and padding == ((1, 1), (1, 1))
        and precision is None
        and x.dtype == w.dtype == jnp.float32
        and height % 2 == width % 2 == 0
        and channels >= LEAST_CHANNELS
        and w.shape[3] >= least_out
        and pixels >= LEAST_PIXELS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any
) -> jax.Array:
    plain = functools.partial(direct, strides=strides, padding=padding, precision=precision)
    if not suits_winograd(x, w, strides, padding, precision):
        return plain(x, w)
    return jax.lax.platform_dependent(x, w, cpu=winograd, default=plain)


def _forward(
    x: jax.Array, w: jax.Array, *how: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, w, *how), (x, w)


def _backward(
    strides: Strides,
    padding: Padding,
    precision: Any,
    inputs: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    how = {"strides": strides, "padding": padding, "precision": precision}
    suits = suits_winograd(*inputs, **how)
    return jax.lax.platform_dependent(
        *inputs,
        dy,
        cpu=winograd_gradients if suits else functools.partial(cpu_gradients, **how),
        default=functools.partial(direct_gradients, **how),
    )


_convolve.defvjp(_forward, _backward)


def direct(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any = None
) -> jax.Array:
    """Convolve by XLA: [b,h,w,c] and [kh,kw,c,o] to [b,h',w',o]."""
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=NHWC, precision=precision
    )


def direct_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, **how: Any
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients in x and w from the gradient dy of the output, by XLA."""
    return jax.vjp(functools.partial(direct, **how), x, w)[1](dy)


def cpu_gradients(
    x: jax.Array,
    w: jax.Array,
    dy: jax.Array,
    strides: Strides,
    padding: Padding,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients in x and w, both laid out as the convolutions that they are.

    They are those of dy with the filter turned round, and of channels by the pixels of dy. XLA
    does that by itself, but not inside a loop, where its own take up to a hundred times as long:
    with `train.accumulation`, that is.
    """
    convolution = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=NHWC, precision=precision
    )
    from_x, from_w = [], []
    for taps, out, stride, full, (low, _) in zip(
        w.shape[:2], dy.shape[1:3], strides, x.shape[1:3], padding
    ):
        spread = (out - 1) * stride + 1  # dy with zeros in between
        from_x.append((low, spread + taps - 1 - full - low))
        from_w.append((taps - 1 - low, full + low - spread))
    dx = convolution(dy, w[::-1, ::-1].swapaxes(2, 3), (1, 1), from_w, lhs_dilation=strides)
    dw = convolution(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), from_x, rhs_dilation=strides
    )
    return dx, dw.transpose(1, 2, 0, 3)


def winograd(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolve [b,h,w,c] with [3,3,c,o] to [b,h,w,o] by Winograd's form.

    The stride is 1, with one row of zeros around; h and w are even.
    """
    return _by_patches(x, filter_patches(w), contracted=1)


def winograd_gradients(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients in x and w from the gradient dy of the output, by Winograd's form."""
    c, o = w.shape[2:]

    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, dy = chunk
        return total + jax.lax.dot_general(
            input_patches(x), output_patches(dy), (((1,), (1,)), ((0,), (0,)))
        ), None

    chunks = _chunks(x, c + o), _chunks(dy, c + o)
    total, _ = jax.lax.scan(add_chunk, jnp.zeros((16, c, o)), chunks)
    return _by_patches(dy, filter_patches(w[::-1, ::-1]), contracted=2), filter_from_patches(total)


def _by_patches(x: jax.Array, filters: jax.Array, contracted: int) -> jax.Array:
    """Convolve x with [16,c,o], summed over c (contracted=1) or over o (2)."""
    c, o = filters.shape[1:]

    def convolve_chunk(x: jax.Array) -> jax.Array:
        products = jax.lax.dot_general(
            input_patches(x), filters, (((2,), (contracted,)), ((0,), (0,)))
        )
        return from_patches(products, x.shape[:3])

    return jax.lax.map(convolve_chunk, _chunks(x, c + o)).reshape(*x.shape[:3], -1)


def filter_patches(w: jax.Array) -> jax.Array:
    """Compute G w G' of every filter: [3,3,c,o] to [16,c,o]."""
    return _times_g(_times_g(w).swapaxes(0, 1)).reshape(16, *w.shape[2:])


def filter_from_patches(products: jax.Array) -> jax.Array:
    """Compute G' m G of every 4x4 patch m: [16,c,o] to [3,3,c,o]."""
    m = products.reshape(4, 4, *products.shape[1:])
    return _times_g_transposed(_times_g_transposed(m).swapaxes(0, 1))


def input_patches(x: jax.Array) -> jax.Array:
    """Compute B' d B of every patch d: [b,h,w,c] to [16, b*h/2*w/2, c]."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, h // 2 + 1, 2, w // 2 + 1, 2, c)
    rows = _times_b([x[:, :-1, 0], x[:, :-1, 1], x[:, 1:, 0], x[:, 1:, 1]])
    both = _times_b(
        [rows[..., :-1, 0, :], rows[..., :-1, 1, :], rows[..., 1:, 0, :], rows[..., 1:, 1, :]]
    )
    return both.reshape(16, -1, c)


def output_patches(y: jax.Array) -> jax.Array:
    """Compute A y A' of every 2x2 square y: [b,h,w,o] to [16, b*h/2*w/2, o]."""
    b, h, w, o = y.shape
    y = y.reshape(b, h // 2, 2, w // 2, 2, o)
    rows = _times_a(y[:, :, 0], y[:, :, 1])
    return _times_a(rows[..., 0, :], rows[..., 1, :]).reshape(16, -1, o)


def from_patches(products: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Compute A' m A of every 4x4 patch m: [16, b*h/2*w/2, o] to [b,h,w,o], shape (b,h,w)."""
    b, h, w = shape
    m = products.reshape(4, 4, b, h // 2, w // 2, -1)
    columns = _times_a_transposed(m, axis=4)  # [4, b, h/2, w/2, 2, o]
    return _times_a_transposed(columns, axis=2).reshape(b, h, w, -1)


def _times_g(w: jax.Array) -> jax.Array:
    ends, middle = 0.5 * (w[0] + w[2]), 0.5 * w[1]
    return jnp.stack([w[0], ends + middle, ends - middle, w[2]])


def _times_g_transposed(m: jax.Array) -> jax.Array:
    total, difference = 0.5 * (m[1] + m[2]), 0.5 * (m[1] - m[2])
    return jnp.stack([m[0] + total, difference, total + m[3]])


def _times_b(d: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])


def _times_a(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack([first, first + second, first - second, -second])


def _times_a_transposed(m: jax.Array, axis: int) -> jax.Array:
    return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)


def _chunks(images: jax.Array, channels: int) -> jax.Array:
    """Split [b,h,w,c] to [chunks, b / chunks, h, w, c], as few as hold CHUNK elements at most."""
    b, h, w, _ = images.shape
    most = max(1, CHUNK // (h * w * channels))
    each = max(size for size in range(1, min(b, most) + 1) if b % size == 0)
    return images.reshape(b // each, each, *images.shape[1:])
