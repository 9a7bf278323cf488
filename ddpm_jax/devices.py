"""The only file that names devices: `jax.pmap`, placement, and what each host owns.

State is replicated and un-stacked: one logical array a leaf, without a leading device axis. Batches are stacked: [local devices,
examples each, ...], host by host, device by device, so that row i of the concatenation is example i of the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax import hosts
from ddpm_jax.config import ConfigError

AXIS = "batch"  # the name of the one mapped axis: data parallelism


class Devices:
    """The devices of a run, all of JAX's unless told otherwise."""

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        # Host by host: the rows of a batch are dealt out in this order, and a pod may number its chips in another.
        self.devices = tuple(sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index))
        self.local = tuple(device for device in self.devices if device.process_index == jax.process_index())
        self._replicated = NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec())
        local = Mesh(np.array(self.local), (AXIS,))
        self._split, self._replicated_here = (NamedSharding(local, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))
        self._largest = jax.pmap(lambda x: jax.lax.pmax(x, AXIS), AXIS, out_axes=None, devices=self.devices)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and pictures."""
        return jax.process_index() == 0

    def check_batch(self, batch_size: int, accumulation: int, name: str) -> None:
        """ConfigError unless `batch_size` splits evenly over devices and microbatches."""
        parts = len(self.devices) * accumulation
        if batch_size % parts:
            lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
            near = " or ".join(str(size) for size in (lower, upper) if size)
            what = f"{len(self.devices)} devices" + (f" x {accumulation} microbatches" if accumulation > 1 else "")
            raise ConfigError(f"config.{name}={batch_size}: must be divisible by {what}; try {near}")

    def replicate(self, tree: Any) -> Any:
        """Every leaf on every device, as one logical array that pmap takes with in_axes=None and may donate."""
        return self.as_global(jax.device_put(tree, self._replicated_here))

    def as_global(self, tree: Any) -> Any:
        """Replicated leaves as arrays of all hosts' devices, without a copy: what checkpoints are written from.

        On several hosts pmap hands back arrays of this host's devices only, which Orbax refuses. The buffers are shared: whoever
        donates one of the two has donated both.
        """
        if jax.process_count() == 1:
            return tree

        def join(x: jax.Array) -> jax.Array:
            if not x.is_fully_addressable:
                return x
            return jax.make_array_from_single_device_arrays(x.shape, self._replicated, [s.data for s in x.addressable_shards])

        return jax.tree.map(join, tree)

    def abstract_replicated(self, tree: Any) -> Any:
        """Shapes and types of `tree` with the placement of `replicate`: what a checkpoint is restored into."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), tree)

    def own_rows(self, batch: Any) -> Any:
        """Of a whole global batch [n, ...], the rows that this host's devices work on."""
        first = self.devices.index(self.local[0])

        def cut(rows: np.ndarray) -> np.ndarray:
            each = len(rows) // len(self.devices)
            return rows[first * each : (first + len(self.local)) * each]

        return jax.tree.map(cut, batch)

    def place(self, batch: Any) -> Any:
        """This host's rows [n, ...] of a batch, split over its devices: [local devices, n / local devices, ...]."""

        def stack(rows: np.ndarray) -> jax.Array:
            return jax.device_put(rows.reshape(len(self.local), -1, *rows.shape[1:]), self._split)

        return jax.tree.map(stack, batch)

    def map_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(state, batch, axis_name=...) -> (state, metrics)` over all devices, compiled; the state is donated.

        out_axes=None says "the same on every device" and pmap takes our word for it: the step must average whatever it
        returns over `axis_name`, as the tests check shard by shard.
        """
        mapped = functools.partial(step, axis_name=AXIS)
        return jax.pmap(mapped, AXIS, in_axes=(None, 0), out_axes=(None, None), devices=self.devices, donate_argnums=(0,))

    def map_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, batch) -> rows` over all devices, compiled; the rows come back stacked as the batch was."""
        return jax.pmap(function, AXIS, in_axes=(None, 0), out_axes=0, devices=self.devices)

    def rows(self, stacked: Any) -> Any:
        """A stacked result as NumPy rows of the whole global batch [n, ...], on every host, each row once."""
        flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), stacked)
        return multihost_utils.process_allgather(flat, tiled=True) if jax.process_count() > 1 else flat

    def largest(self, value: int) -> Any:
        """The largest `value` of all hosts, not waited for: an int on one host, else an array that becomes one (`int`)."""
        if jax.process_count() == 1:
            return value
        return self._largest(np.full(len(self.local), value, np.int32))

    def meet(self) -> None:
        """Connects all devices of all hosts, while the hosts are in step.

        The first collective makes the connections, and gloo gives that half a minute: less than one host may compile longer than
        another. Once connected they wait for one another.
        """
        int(self.largest(0))

    def from_main(self, values: np.ndarray) -> np.ndarray:
        """`values` as the first process has them, on every host: for decisions that depend on its disk."""
        return hosts.from_main(values)
