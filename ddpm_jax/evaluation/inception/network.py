"""Inception-v3 of 2015-12-05 in Flax: the network behind every published FID.

(Szegedy et al. 2016; Heusel et al. 2017.) It is not the Inception-v3 of today's model zoos: it has
1008 classes, average pools that leave the padding out of their mean, and a maximum in the last
block's pool. Batch norm is folded into kernel and bias, so that a layer is relu(conv(x) + bias).
Layers have the names of the TensorFlow graph with "/" written "_".

Layers in the order they run, and what can be tapped on the way (means over all positions, but for
the last two):

    299x299 conv .. conv_2, pool          64
     73x73  conv_3, conv_4, pool         192
     35x35  mixed .. mixed_2
     17x17  mixed_3 .. mixed_7           768
      8x8   mixed_8 .. mixed_10         2048
    spatial: 7 channels of mixed_6's first branch at all 17x17 positions
    logits: 1008, from the 2048 by one matrix
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299  # of the images that go in
WIDTHS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "spatial": 7 * 17 * 17, "logits": 1008}
_DEPTHS = {"64": 0, "192": 1, "spatial": 2, "768": 2, "2048": 3, "logits": 4}
_SPATIAL_CHANNELS = 7  # as OpenAI's evaluator of guided-diffusion, which set the custom for sFID
_SEVENS = {4: 128, 5: 160, 6: 160, 7: 192}  # inner width of the 17x17 blocks


class Inception(nn.Module):
    """Inception up to the deepest of `taps`.

    `apply({"params": params}, x)` returns {tap: float32 [b, width]} of images x [b,299,299,3] in
    [-1, 1]. Layers behind the last tap are neither run nor asked for in the parameters.
    """

    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        depth = max(_DEPTHS[tap] for tap in self.taps)
        maps: dict[str, jax.Array] = {}
        x = _conv(x, "conv", 32, 3, stride=2, padding="VALID")
        x = _conv(x, "conv_1", 32, 3, padding="VALID")
        x = _max_pool(_conv(x, "conv_2", 64, 3))
        maps["64"] = x
        if depth >= 1:
            x = _conv(x, "conv_3", 80, 1)
            x = _max_pool(_conv(x, "conv_4", 192, 3, padding="VALID"))
            maps["192"] = x
        if depth >= 2:
            for number, pooled in enumerate((32, 64, 64)):
                x = _block_35(x, _name(number), pooled)
            x = _to_17(x, "mixed_3")
            for number, inner in _SEVENS.items():
                branches = _block_17(x, _name(number), inner)
                if number == 6:
                    spatial = branches[0][..., :_SPATIAL_CHANNELS]
                x = jnp.concatenate(branches, axis=-1)
            maps["768"] = x
        if depth >= 3:
            x = _to_8(x, "mixed_8")
            x = _block_8(x, "mixed_9", _mean_pool)
            x = _block_8(x, "mixed_10", functools.partial(_max_pool, stride=1, padding="SAME"))
            maps["2048"] = x
        features = {name: jnp.mean(x, axis=(1, 2)) for name, x in maps.items()}
        if "spatial" in self.taps:
            features["spatial"] = spatial.reshape(len(spatial), -1)
        if "logits" in self.taps:
            features["logits"] = nn.Dense(WIDTHS["logits"], precision="highest", name="softmax")(
                features["2048"]
            )
        return {tap: features[tap] for tap in self.taps}


def _name(number: int) -> str:
    return f"mixed_{number}" if number else "mixed"


def _conv(
    x: jax.Array,
    name: str,
    width: int,
    size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> jax.Array:
    kernel = (size, size) if isinstance(size, int) else size
    # Where matrix units round their operands, features would move by more than FIDs differ.
    return nn.relu(nn.Conv(width, kernel, stride, padding, precision="highest", name=name)(x))


def _max_pool(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _block_35(x: jax.Array, name: str, pooled: int) -> jax.Array:
    fives = _conv(_conv(x, f"{name}_tower_conv", 48, 1), f"{name}_tower_conv_1", 64, 5)
    threes = _conv(_conv(x, f"{name}_tower_1_conv", 64, 1), f"{name}_tower_1_conv_1", 96, 3)
    branches = [
        _conv(x, f"{name}_conv", 64, 1),
        fives,
        _conv(threes, f"{name}_tower_1_conv_2", 96, 3),
        _conv(_mean_pool(x), f"{name}_tower_2_conv", pooled, 1),
    ]
    return jnp.concatenate(branches, axis=-1)


def _to_17(x: jax.Array, name: str) -> jax.Array:
    threes = _conv(_conv(x, f"{name}_tower_conv", 64, 1), f"{name}_tower_conv_1", 96, 3)
    branches = [
        _conv(x, f"{name}_conv", 384, 3, stride=2, padding="VALID"),
        _conv(threes, f"{name}_tower_conv_2", 96, 3, stride=2, padding="VALID"),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


def _block_17(x: jax.Array, name: str, inner: int) -> list[jax.Array]:
    row, column = (1, 7), (7, 1)
    sevens = _conv(_conv(x, f"{name}_tower_conv", inner, 1), f"{name}_tower_conv_1", inner, row)
    twice = _conv(x, f"{name}_tower_1_conv", inner, 1)
    for number, kernel in enumerate((column, row, column), 1):
        twice = _conv(twice, f"{name}_tower_1_conv_{number}", inner, kernel)
    return [
        _conv(x, f"{name}_conv", 192, 1),
        _conv(sevens, f"{name}_tower_conv_2", 192, column),
        _conv(twice, f"{name}_tower_1_conv_4", 192, row),
        _conv(_mean_pool(x), f"{name}_tower_2_conv", 192, 1),
    ]


def _to_8(x: jax.Array, name: str) -> jax.Array:
    sevens = _conv(x, f"{name}_tower_1_conv", 192, 1)
    for number, kernel in enumerate(((1, 7), (7, 1)), 1):
        sevens = _conv(sevens, f"{name}_tower_1_conv_{number}", 192, kernel)
    branches = [
        _conv(
            _conv(x, f"{name}_tower_conv", 192, 1),
            f"{name}_tower_conv_1",
            320,
            3,
            stride=2,
            padding="VALID",
        ),
        _conv(sevens, f"{name}_tower_1_conv_3", 192, 3, stride=2, padding="VALID"),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


def _block_8(x: jax.Array, name: str, pool) -> jax.Array:
    def fork(x: jax.Array, tower: str) -> list[jax.Array]:
        kernels = (("conv", (1, 3)), ("conv_1", (3, 1)))
        return [_conv(x, f"{name}_{tower}_mixed_{conv}", 384, kernel) for conv, kernel in kernels]

    threes = _conv(_conv(x, f"{name}_tower_1_conv", 448, 1), f"{name}_tower_1_conv_1", 384, 3)
    branches = [
        _conv(x, f"{name}_conv", 320, 1),
        *fork(_conv(x, f"{name}_tower_conv", 384, 1), "tower"),
        *fork(threes, "tower_1"),
        _conv(pool(x), f"{name}_tower_2_conv", 192, 1),
    ]
    return jnp.concatenate(branches, axis=-1)
