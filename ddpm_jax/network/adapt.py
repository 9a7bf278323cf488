"""Adapt networks of one's own: any function, Flax linen module or nnx module as the denoiser.

The training step and the sampler need two functions of a network, `Network.init` and
`Network.apply`. What is not a pair of them already becomes one here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.errors import ConfigError, check

Params = Any


class Dropout(NamedTuple):
    """What the dropout of a training step is drawn from.

    Attributes:
      key: of this step, the same on all devices.
      examples: int32 [b], the place of each image in the global batch. A mask drawn from both does
        not depend on the number of devices.
    """

    key: jax.Array
    examples: jax.Array


@dataclass(frozen=True, eq=False)
class Network:
    """A network as two pure functions.

    Attributes:
      init: `init(key) -> params`, a dict or another tree of float32 arrays.
      apply: `apply(params, x_t, t, labels, dropout) -> output`. x_t is [b,h,w,c], t int32 [b];
        labels is int32 [b], or None where the network has no classes; dropout is None outside of
        training. The output is [b,h,w,c], what `config.diffusion.prediction` says, with twice the
        channels where the variance is learned.
      prepare: `prepare(params) -> params` is called once before a loop of passes without dropout,
        such as a reverse chain: what each pass would do alike is done there. By default nothing.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    prepare: Callable[[Params], Params] = lambda params: params


def adapt(network: Any, shape: tuple[int, int, int], classes: int) -> Network:
    """Return `network` as a `Network`.

    Args:
      network: a Network; a linen module, called as `module(x_t, t)`; or an nnx module, called the
        same, whose parameters are where training starts. A network with classes is called as
        `module(x_t, t, labels)`. A `__call__` of linen that has an argument `train` is told.
      shape: of one image, (h, w, c).
      classes: how many the network has; 0 for none.

    Raises:
      ConfigError: it is none of these, or carries state beside its parameters.
    """
    if isinstance(network, Network):
        return network
    if isinstance(network, nn.Module):
        return _from_linen(network, shape, classes)
    from flax import nnx  # half a second that only these networks need

    if isinstance(network, nnx.Module):
        return _from_nnx(network)
    raise ConfigError(
        f"network={type(network).__name__}: must be a Flax module (linen or nnx), or "
        "Network(init, apply) of two functions"
    )


def check_network(
    network: Network, shape: tuple[int, int, int], channels: int, classes: int
) -> None:
    """Check the shapes and types of what the network holds and returns; nothing is computed.

    Args:
      shape: of one image, (h, w, c).
      channels: of the output.
      classes: how many the network has; 0 for none.

    Raises:
      ConfigError: a bare array in place of a tree, a parameter that is not float32, or an output of
        another shape.
    """
    params = jax.eval_shape(network.init, jax.random.key(0))
    bare = jax.tree.structure(params) == jax.tree.structure(0)
    check(not bare, 'network: its parameters are one bare array: wrap it in a dict, {"w": array}')
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # An average of fewer bits stands still: what a step adds to it is rounded away.
        check(
            leaf.dtype == jnp.float32,
            f"network: parameter {jax.tree_util.keystr(path)} is {leaf.dtype}, must be float32: "
            "cast it where the network uses it",
        )
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    out = jax.eval_shape(
        lambda params, x, t: network.apply(params, x, t, t if classes else None, None), params, x, t
    )
    expected = (2, *shape[:2], channels)
    got = getattr(out, "shape", type(out).__name__)
    check(got == expected, f"network: its output for 2 images is {got}, must be {expected}")


def _inputs(x_t: jax.Array, t: jax.Array, labels: jax.Array | None) -> tuple[jax.Array, ...]:
    return (x_t, t) if labels is None else (x_t, t, labels)


def _device_key(dropout: Dropout) -> jax.Array:
    """Return a key that differs between devices: the masks of a library's own dropout must."""
    return jax.random.fold_in(dropout.key, dropout.examples[0])


def _from_linen(module: nn.Module, shape: tuple[int, int, int], classes: int) -> Network:
    told = "train" in inspect.signature(type(module).__call__).parameters

    def init(key: jax.Array) -> Params:
        one = jnp.zeros(1, jnp.int32)
        inputs = _inputs(jnp.zeros((1, *shape), jnp.float32), one, one if classes else None)
        variables = module.init(key, *inputs, **({"train": False} if told else {}))
        other = sorted(set(variables) - {"params"})
        check(
            not other,
            f"network: {type(module).__name__} carries {', '.join(other)} beside its parameters, "
            "which no step would update: use GroupNorm or LayerNorm in place of BatchNorm",
        )
        return variables["params"]

    def apply(
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        labels: jax.Array | None,
        dropout: Dropout | None,
    ) -> jax.Array:
        mode = {"train": dropout is not None} if told else {}
        rngs = None if dropout is None else {"dropout": _device_key(dropout)}
        return module.apply({"params": params}, *_inputs(x_t, t, labels), rngs=rngs, **mode)

    return Network(init, apply)


def _from_nnx(module: Any) -> Network:
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    rest = list(nnx.to_flat_state(rest))
    other = sorted({type(v).__name__ for _, v in rest if not isinstance(v, nnx.RngState)})
    check(
        not other,
        f"network: {type(module).__name__} carries {', '.join(other)} beside its parameters, "
        "which no step would update: use GroupNorm or LayerNorm in place of BatchNorm",
    )

    def init(key: jax.Array) -> Params:
        del key  # the module came with its parameters
        flat = dict(nnx.to_flat_state(params))
        return {name: jnp.array(flat[path].get_value()) for name, path in paths.items()}

    def apply(
        values: Params,
        x_t: jax.Array,
        t: jax.Array,
        labels: jax.Array | None,
        dropout: Dropout | None,
    ) -> jax.Array:
        flat = dict(nnx.to_flat_state(params))
        state = [(path, flat[path].replace(values[name])) for name, path in paths.items()]
        state += rest if dropout is None else _reseeded(rest, _device_key(dropout))
        model = nnx.merge(graph, nnx.from_flat_state(state))
        model.train() if dropout is not None else model.eval()
        return model(*_inputs(x_t, t, labels))

    return Network(init, apply)


def _reseeded(state: list[tuple[Any, Any]], key: jax.Array) -> list[tuple[Any, Any]]:
    """Return the random streams of a module as they start from a key of this step."""
    from flax import nnx

    def value(number: int, variable: Any) -> jax.Array:
        if isinstance(variable, nnx.RngKey):
            return jax.random.fold_in(key, number)
        return jnp.zeros_like(variable.get_value())  # how often it was drawn from

    return [
        (path, variable.replace(value(number, variable)))
        for number, (path, variable) in enumerate(state)
    ]
