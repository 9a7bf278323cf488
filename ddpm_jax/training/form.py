"""Hold the training state in the form that suits the platform.

Norms, clip, Adam and averages of a tree are a kernel or more for each leaf, of which a network has
hundreds. A GPU is kept waiting: each kernel has to be launched by its host, and most of these end
before the next one is there. A CPU runs them as fast as others, but compiles them longer than the
network of a small run. So on both parameters, moments and averages lie in a few long vectors, the
buckets, from step to step, and the network gets slices of them. The gradients of a bucket travel
between devices together.

A TPU lays arrays out in tiles, and would have to lay filters and matrices anew wherever they are
cut out of a vector. There biases and scales alone are joined: two leaves in three, with 0.2 % of
the numbers.

All forms hold the same numbers. Checkpoints, samples and held-out losses see the tree alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.state import TrainState, abstract_state

BUCKET = 2**24  # elements: 64 MiB of gradients, by when an exchange is as fast as it gets


class TreeForm:
    """The state as it is: a tree of leaves."""

    def pack(self, state: TrainState) -> TrainState:
        """Return the state in the form that steps carry."""
        return state

    def unpack(self, state: TrainState) -> TrainState:
        """Return the state as a tree, which is what `pack` took."""
        return state

    def tree(self, params: Params) -> Params:
        """Return parameters or an average of them, as the state holds it, as a tree."""
        return params

    def join(self, params: Params) -> Params:
        """Return a tree like the parameters in the form that the state holds, inside of a step."""
        return params

    def split(self, params: Params) -> Params:
        """Return the tree of what `join` returned, inside of a step."""
        return params


class JoinedForm(TreeForm):
    """The state with each tree of parameters as a tuple of float32 arrays, fewer than its leaves.

    How, `join` and `split` of a subclass say. Forms of the same layout are equal, and share their
    compiled conversions.

    Args:
      config: of the run, whose network and optimizer say what the state is.
      network: as `build_train_step` takes it.
    """

    def __init__(self, config: Config, network: Network | None = None) -> None:
        self._state = abstract_state(config, network)
        leaves, self._tree = jax.tree.flatten(self._state.params)
        self._shapes = [leaf.shape for leaf in leaves]
        self._sizes = [leaf.size for leaf in leaves]
        self._layout: tuple[Hashable, ...] = (
            type(self),
            jax.tree.structure(self._state),
            tuple(self._shapes),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JoinedForm) and self._layout == other._layout

    def __hash__(self) -> int:
        return hash(self._layout)

    def pack(self, state: TrainState) -> TrainState:
        """Return the state with its trees of parameters joined, as a copy."""
        return self._of_state(functools.partial(_joined, self), state)

    def unpack(self, state: TrainState) -> TrainState:
        """Return the state with its trees of parameters as they were, as a copy."""
        return self._of_state(self.tree, state)

    def tree(self, params: Params) -> Params:
        """Return the tree of what `join` returned, as a copy."""
        return _split(self, params)

    def _of_state(self, convert: Callable[[Params], Params], state: TrainState) -> TrainState:
        """Apply `convert` to whatever in a state is like the parameters: moments and averages.

        Tree by tree, so that one small program does for all of them.
        """

        def is_params(node: Any) -> bool:
            return jax.tree.structure(node) == self._tree

        return jax.tree.map(
            lambda like, part: convert(part) if is_params(like) else jnp.copy(part),
            self._state,
            state,
            is_leaf=is_params,
        )


_joined = jax.jit(lambda form, params: form.join(params), static_argnums=0)
_split = jax.jit(lambda form, params: form.split(params), static_argnums=0)


class FlatForm(JoinedForm):
    """The state with each tree of parameters in buckets: a tuple of float32 vectors.

    The leaves lie one after the other in the order of the tree, and none is torn apart.

    Args:
      config, network: see `JoinedForm`.
      bucket: elements that a bucket holds before the next one begins.
      out_first: whether filters [h,w,in,out] lie as [out,h,w,in], the order that GPUs convolve
        with.
    """

    def __init__(
        self,
        config: Config,
        network: Network | None = None,
        bucket: int = BUCKET,
        *,
        out_first: bool = True,
    ) -> None:
        super().__init__(config, network)
        paths = jax.tree_util.tree_leaves_with_path(self._state.params)
        self._layers = [path[:-1] for path, _ in paths]
        numbers = (np.cumsum(self._sizes) - 1) // bucket
        self._buckets = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self._out_first = out_first
        self._layout += (tuple(len(bucket) for bucket in self._buckets), out_first)

    def join(self, params: Params) -> Params:
        """Join the leaves of a tree like the parameters to buckets."""
        leaves = self._tree.flatten_up_to(params)
        return tuple(
            jnp.concatenate([self._in_memory(leaves[number]).reshape(-1) for number in bucket])
            for bucket in self._buckets
        )

    def split(self, params: Params) -> Params:
        """Cut buckets into the tree of the parameters."""
        leaves = []
        for bucket, vector in zip(self._buckets, params, strict=True):
            start = 0
            for _, layer in itertools.groupby(bucket, self._layers.__getitem__):
                layer = list(layer)
                shapes = [self._shapes[number] for number in layer]
                sizes = [self._sizes[number] for number in layer]
                if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 1:
                    # XLA copies each leaf that it cuts out of a bucket. Bias and scale of a norm
                    # are cut out together, and the barrier keeps that piece as it is.
                    rows = vector[start : start + sum(sizes)].reshape(2, -1)
                    rows = jax.lax.optimization_barrier(rows)
                    leaves += [row.reshape(shapes[0]) for row in rows]
                    start += sum(sizes)
                    continue
                for shape, size in zip(shapes, sizes):
                    leaves.append(self._from_memory(vector[start : start + size], shape))
                    start += size
        return self._tree.unflatten(leaves)

    def _in_memory(self, leaf: jax.Array) -> jax.Array:
        """Give a leaf the order of axes that it has in a bucket."""
        return jnp.moveaxis(leaf, -1, 0) if self._out_first and leaf.ndim == 4 else leaf

    def _from_memory(self, vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Give a piece of a bucket the shape of its leaf again."""
        if self._out_first and len(shape) == 4:
            return jnp.moveaxis(vector.reshape(shape[-1], *shape[:-1]), 0, -1)
        return vector.reshape(shape)


class VectorForm(JoinedForm):
    """The state with biases and scales of each tree in one vector, and the rest as it is.

    A tree of parameters is a tuple of that vector and of all other leaves, in the order of the
    tree.

    Args:
      config, network: see `JoinedForm`.
    """

    def __init__(self, config: Config, network: Network | None = None) -> None:
        super().__init__(config, network)
        self._vectors = [len(shape) < 2 for shape in self._shapes]

    def join(self, params: Params) -> Params:
        """Join the vectors of a tree like the parameters to one."""
        leaves = list(zip(self._vectors, self._tree.flatten_up_to(params)))
        vectors = [leaf.reshape(-1) for is_vector, leaf in leaves if is_vector]
        others = [leaf for is_vector, leaf in leaves if not is_vector]
        return (*([jnp.concatenate(vectors)] if vectors else []), *others)

    def split(self, params: Params) -> Params:
        """Cut the vector into those of the tree of the parameters."""
        rest, start, leaves = iter(params), 0, []
        vector = next(rest) if any(self._vectors) else None
        for is_vector, shape, size in zip(self._vectors, self._shapes, self._sizes):
            if is_vector:
                leaves.append(vector[start : start + size].reshape(shape))
                start += size
            else:
                leaves.append(next(rest))
        return self._tree.unflatten(leaves)


def state_form(config: Config, devices: Devices, network: Network | None = None) -> TreeForm:
    """Return the form of the state that suits the platform of `devices`."""
    if devices.platform == "tpu":
        return VectorForm(config, network)
    return FlatForm(config, network, out_first=devices.platform != "cpu")
