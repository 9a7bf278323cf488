"""Where a step goes: the parts of the network, one by one, at the sizes that they have in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.benchmark.timing import in_turn, seconds, summary
from ddpm_jax.config import Config
from ddpm_jax.convolution import convolve
from ddpm_jax.unet import AttentionBlock, dropout

NHWC = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def measure_components(config: Config, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """A row each: part, map, milliseconds, and GFLOP/s where it is made of products."""
    parts = {(name, place): (call, flops) for name, place, call, flops in components(config, batch_size)}
    calls = {key: lambda call=call: seconds(call) for key, (call, _) in parts.items()}
    rows = []
    for (name, place), taken in in_turn(calls, rounds, warmup=2).items():
        flops = parts[name, place][1]
        rate = {"gflops_per_s": flops / float(sorted(taken)[len(taken) // 2]) / 1e9} if flops else {}
        rows.append({"part": name, "map": place, **summary(taken), **rate})
    return rows


def components(config: Config, batch_size: int) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """(part, size of its map, a compiled call of it, its FLOPs or 0), level by level; backward passes without the forward's."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    for level, factor in enumerate(model.channel_mult):
        size, width = config.data.image_size // 2**level, factor * model.base_channels
        place = f"{size}x{size}x{width}"
        key = jax.random.key(level)
        x = jax.random.normal(key, (batch_size, size, size, width)).astype(dtype)
        w = (0.05 * jax.random.normal(key, (3, 3, width, width))).astype(dtype)
        flops = 2 * 9 * x.size * width

        def conv(x: jax.Array, w: jax.Array) -> jax.Array:
            return convolve(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)

        yield "convolution", place, _held(conv, x, w), flops
        yield "convolution, both gradients", place, _held(lambda x, w, dy: jax.vjp(conv, x, w)[1](dy), x, w, x), 2 * flops

        norm = nn.GroupNorm(model.group_norm_groups, epsilon=model.group_norm_epsilon, dtype=dtype, use_fast_variance=False)
        variables = norm.init(key, x)

        def norm_silu(variables: Any, x: jax.Array, norm: nn.Module = norm) -> jax.Array:
            return nn.silu(norm.apply(variables, x))

        yield "GroupNorm and SiLU", place, _held(norm_silu, variables, x), 0
        yield "GroupNorm and SiLU, gradients", place, _held(_gradients(norm_silu), variables, x, x), 0
        if size in model.attention_resolutions:
            block = AttentionBlock(config.model)
            weights = block.init(key, x)
            products = 8 * x.size * width + 4 * x.size * size * size
            yield "attention", place, _held(block.apply, weights, x), products
            yield "attention, gradients", place, _held(_gradients(block.apply), weights, x, x), 2 * products
        if model.dropout:
            masked = lambda key, x: dropout(key, x, model.dropout, jnp.arange(batch_size))  # noqa: E731
            yield "dropout", place, _held(masked, key, x), 0


def _gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda variables, x, dy: jax.vjp(function, variables, x)[1](dy)


def _held(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: compiled(*args)
