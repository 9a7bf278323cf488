"""Hold the training state in the form that suits the platform: a tree of leaves, or flat vectors.

Norms, clip, Adam and averages of a tree are a kernel or more for each leaf, of which a network has
hundreds. A GPU is kept waiting: each kernel has to be launched by its host, and most of these end
before the next one is there. A CPU runs them as fast as others, but compiles them longer than the
network of a small run. So on both parameters, moments and averages lie in a few long vectors, the
buckets, from step to step, and the network gets slices of them. The gradients of a bucket travel
between devices together. A TPU lays vectors out in tiles and would lose by it.

The two forms hold the same numbers. Checkpoints, samples and held-out losses see the tree alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import Params, abstract_params
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


class FlatForm(TreeForm):
    """The state with each tree of parameters in buckets: a tuple of float32 vectors.

    The leaves lie one after the other in the order of the tree, and none is torn apart. Forms of
    the same layout are equal, and share their compiled conversions.

    Args:
      config: of the run, whose network and optimizer say what the state is.
      network: as `build_train_step` takes it.
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
        params = abstract_params(config, network)
        leaves, self._tree = jax.tree.flatten(params)
        self._layers = [path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self._state = abstract_state(config, network)
        self._shapes = [leaf.shape for leaf in leaves]
        ends = np.cumsum([leaf.size for leaf in leaves])
        numbers = (ends - 1) // bucket
        self._buckets = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self._out_first = out_first
        sizes = tuple(len(bucket) for bucket in self._buckets)
        self._layout = (jax.tree.structure(self._state), tuple(self._shapes), sizes, out_first)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatForm) and self._layout == other._layout

    def __hash__(self) -> int:
        return hash(self._layout)

    def pack(self, state: TrainState) -> TrainState:
        """Return the state with its trees of parameters in buckets, as a copy."""
        return self._of_state(functools.partial(_joined, self), state)

    def unpack(self, state: TrainState) -> TrainState:
        """Return the state with its buckets as trees, as a copy."""
        return self._of_state(self.tree, state)

    def tree(self, params: Params) -> Params:
        """Return the tree of buckets, as a copy."""
        return _cut(self, params)

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
                shapes = [self._shapes[number] for number in layer]
                sizes = [math.prod(shape) for shape in shapes]
                if len(shapes) == 2 and shapes[0] == shapes[1]:
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

    def _in_memory(self, leaf: jax.Array) -> jax.Array:
        """Give a leaf the order of axes that it has in a bucket."""
        return jnp.moveaxis(leaf, -1, 0) if self._out_first and leaf.ndim == 4 else leaf

    def _from_memory(self, vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Give a piece of a bucket the shape of its leaf again."""
        if self._out_first and len(shape) == 4:
            return jnp.moveaxis(vector.reshape(shape[-1], *shape[:-1]), 0, -1)
        return vector.reshape(shape)


_joined = jax.jit(FlatForm.join, static_argnums=0)
_cut = jax.jit(FlatForm.split, static_argnums=0)


def state_form(config: Config, devices: Devices, network: Network | None = None) -> TreeForm:
    """Return the form of the state that suits the platform of `devices`."""
    if devices.platform == "tpu":
        return TreeForm()
    return FlatForm(config, network, out_first=devices.platform != "cpu")
