"""Time the parts of the network, one by one, at the sizes that they have in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.benchmark.timing import in_turn, seconds, summary
from ddpm_jax.config import Config
from ddpm_jax.network.blocks import AttentionBlock, dropout, group_norm
from ddpm_jax.network.convolution import convolve

NHWC = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def measure_components(config: Config, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Time each part of the network in turn.

    Returns:
      A row for each: part, map, milliseconds, and GFLOP/s where it is made of products.
    """
    parts = {
        (name, place): (call, flops) for name, place, call, flops in components(config, batch_size)
    }
    calls = {key: lambda call=call: seconds(call) for key, (call, _) in parts.items()}
    rows = []
    for (name, place), times in in_turn(calls, rounds, warmup=2).items():
        flops = parts[name, place][1]
        median = float(sorted(times)[len(times) // 2])
        rate = {"gflops_per_s": flops / median / 1e9} if flops else {}
        rows.append({"part": name, "map": place, **summary(times), **rate})
    return rows


def components(
    config: Config, batch_size: int
) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """Compile the parts of the network, level by level, as the network itself has them.

    The FLOPs of a backward pass are its own, without those of the forward pass.

    Yields:
      The part's name, the size of its map, a call of it, and its FLOPs, or 0.
    """
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    for level, factor in enumerate(model.channel_mult):
        (tall, wide), width = config.data.sides, factor * model.base_channels
        tall, wide = tall // 2**level, wide // 2**level
        place = f"{wide}x{tall}x{width}"
        key = jax.random.key(level)
        x = jax.random.normal(key, (batch_size, tall, wide, width)).astype(dtype)
        w = (0.05 * jax.random.normal(key, (3, 3, width, width))).astype(dtype)
        flops = 2 * 9 * x.size * width

        def conv(x: jax.Array, w: jax.Array) -> jax.Array:
            return convolve(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)

        yield "convolution", place, _compiled(conv, x, w), flops
        yield (
            "convolution, both gradients",
            place,
            _compiled(lambda x, w, dy: jax.vjp(conv, x, w)[1](dy), x, w, x),
            2 * flops,
        )

        norm = group_norm(model, dtype, "norm")
        variables = norm.init(key, x)

        def norm_silu(variables: Any, x: jax.Array, norm: nn.Module = norm) -> jax.Array:
            return nn.silu(norm.apply(variables, x))

        yield "GroupNorm and SiLU", place, _compiled(norm_silu, variables, x), 0
        yield (
            "GroupNorm and SiLU, gradients",
            place,
            _compiled(_gradients(norm_silu), variables, x, x),
            0,
        )
        if tall in model.attention_resolutions:
            block = AttentionBlock(config.model)
            weights = block.init(key, x)
            products = 8 * x.size * width + 4 * x.size * tall * wide
            yield "attention", place, _compiled(block.apply, weights, x), products
            yield (
                "attention, gradients",
                place,
                _compiled(_gradients(block.apply), weights, x, x),
                2 * products,
            )
        if model.dropout:

            def masked(key: jax.Array, x: jax.Array) -> jax.Array:
                return dropout(key, x, model.dropout, jnp.arange(batch_size))

            yield "dropout", place, _compiled(masked, key, x), 0


def _gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda variables, x, dy: jax.vjp(function, variables, x)[1](dy)


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    program = jax.jit(function).lower(*args).compile()
    return lambda: program(*args)
