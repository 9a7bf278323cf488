"""Place arrays on devices and map functions over them; no other file names devices.

State is replicated and un-stacked: one logical array a leaf, without a leading device axis.
Batches are stacked: [devices, examples each, ...], host by host, device by device, so that row i
of the concatenation is example i of the global batch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import ConfigError, HostError
from ddpm_jax.parallel import hosts

AXIS = "batch"  # the name of the one mapped axis: data parallelism


def why_none() -> str | None:
    """Return in one line why JAX has no devices here, or None where it has."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms}" if jax.config.jax_platforms else ""
        reason = (str(error).splitlines() or ["no such devices, or no plugin for them"])[0]
        return f"{asked or 'JAX'} has no devices here: {reason}"
    return None


def by_pmap(
    function: Callable[..., Any], devices: Sequence[jax.Device], *, out: int | None, donate: bool
) -> Callable[..., Any]:
    """Map `function(replicated, rows)` over devices, all of them of this host.

    Args:
      out: 0 for a stacked result, None for one that is the same on every device.
      donate: whether the replicated argument gives its memory to the result.

    Returns:
      `f(replicated, stacked) -> result`, compiled at its first call.
    """
    donated = (0,) if donate else ()
    return jax.pmap(
        function, AXIS, in_axes=(None, 0), out_axes=out, devices=devices, donate_argnums=donated
    )


def by_shard_map(
    function: Callable[..., Any], devices: Sequence[jax.Device], *, out: int | None, donate: bool
) -> Callable[..., Any]:
    """Map as `by_pmap` does, over devices of any hosts: arrays are those of all of them.

    It is what pmap is made of, and the same program. But on several hosts pmap wraps every leaf
    anew, on its way in and on its way out, in Python: docs/performance.md has what that costs.
    """
    mesh = Mesh(np.array(devices), (AXIS,))
    replicated, stacked = PartitionSpec(), PartitionSpec(AXIS)
    ins, outs = (replicated, stacked), replicated if out is None else stacked

    def on_one_device(same: Any, rows: Any) -> Any:
        result = function(same, jax.tree.map(lambda x: x[0], rows))
        return result if out is None else jax.tree.map(lambda x: x[None], result)

    # With check_vma a gradient would be the sum over all devices: the step has pmean for that.
    return jax.jit(
        jax.shard_map(on_one_device, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in ins),
        out_shardings=NamedSharding(mesh, outs),
        donate_argnums=(0,) if donate else (),
    )


class Devices:
    """The devices of a run, on this host and on the others.

    Args:
      devices: which; all of JAX's by default.

    Attributes:
      devices: all of them, host by host: the order in which the rows of a batch are dealt out.
      local: those of this host, in that order.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        # Host by host: the rows of a batch are dealt out in this order, and a pod may number its
        # chips in another.
        self.devices = tuple(
            sorted(
                jax.devices() if devices is None else devices,
                key=lambda device: device.process_index,
            )
        )
        self.local = tuple(
            device for device in self.devices if device.process_index == jax.process_index()
        )
        mesh, local = (Mesh(np.array(some), (AXIS,)) for some in (self.devices, self.local))
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._replicated_here = NamedSharding(local, PartitionSpec())
        self._map = by_pmap if jax.process_count() == 1 else by_shard_map
        self._largest = self._map(
            lambda _, x: jax.lax.pmax(x[0], AXIS), self.devices, out=None, donate=False
        )

    @property
    def is_main(self) -> bool:
        """Return whether this process writes logs and pictures; exactly one of all hosts does."""
        return jax.process_index() == 0

    @property
    def platform(self) -> str:
        """Return the platform that all of them are of: cpu, gpu, cuda or tpu."""
        return self.devices[0].platform

    def check_batch(self, batch_size: int, accumulation: int, name: str) -> None:
        """Check that `batch_size` splits evenly over all devices and microbatches.

        Each host reads an equal share of it.

        Args:
          name: the field of the config, for the message.

        Raises:
          ConfigError: it does not; the message names the nearest sizes that do.
          HostError: the hosts have unlike numbers of devices.
        """
        counts = Counter(device.process_index for device in self.devices)
        if len(set(counts.values())) > 1:
            listing = ", ".join(str(counts[host]) for host in sorted(counts))
            raise HostError(
                f"the hosts have {listing} devices: "
                "start each with as many as the others, as CUDA_VISIBLE_DEVICES=0,1 does"
            )
        parts = len(self.devices) * accumulation
        if batch_size % parts:
            lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
            near = " or ".join(str(size) for size in (lower, upper) if size)
            what = f"{len(self.devices)} devices" + (
                f" x {accumulation} microbatches" if accumulation > 1 else ""
            )
            raise ConfigError(
                f"config.{name}={batch_size}: must be divisible by {what}; try {near}"
            )

    def replicate(self, tree: Any) -> Any:
        """Copy every leaf of `tree` to every device.

        Every host gives the same values.

        Returns:
          A tree of one logical array a leaf, without a device axis, which `map_step` takes as its
          state and may donate.
        """

        def join(x: jax.Array) -> jax.Array:
            here = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, self._replicated, here)

        # JAX would compare the values of all hosts before it put them on devices of others.
        return jax.tree.map(join, jax.device_put(tree, self._replicated_here))

    def abstract_replicated(self, tree: Any) -> Any:
        """Return the shapes and types of `tree` with the placement of `replicate`.

        A checkpoint is restored into it. Nothing is computed or moved.
        """
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), tree
        )

    def own_rows(self, batch: Any) -> Any:
        """Cut the rows of this host's devices out of a whole global batch [n, ...].

        n is divisible by the number of all devices; the result is contiguous in the batch.
        """
        first = self.devices.index(self.local[0])

        def cut(rows: np.ndarray) -> np.ndarray:
            each = len(rows) // len(self.devices)
            return rows[first * each : (first + len(self.local)) * each]

        return jax.tree.map(cut, batch)

    def place(self, batch: Any) -> Any:
        """Split this host's rows [n, ...] of a batch over its devices.

        n is divisible by the number of local devices.

        Returns:
          Arrays [devices, n / local devices, ...], each row of the first axis on its device, as
          `map_step` and `map_batch` take them.
        """

        def stack(rows: np.ndarray) -> jax.Array:
            stacked = rows.reshape(len(self.local), -1, *rows.shape[1:])
            return jax.make_array_from_process_local_data(self._split, stacked)

        return jax.tree.map(stack, batch)

    def map_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Map a training step over all devices.

        JAX takes our word that the result is the same on every device: the step must average
        whatever it returns over `axis_name`, as the tests check shard by shard.

        Args:
          step: `step(state, batch, axis_name=...) -> (state, metrics)`, for one device's share.

        Returns:
          `f(state, batch) -> (state, metrics)`, compiled at its first call. It takes a state of
          `replicate` or of its own, which it donates, and a batch of `place`; all hosts call it
          together.
        """
        mapped = functools.partial(step, axis_name=AXIS)
        return self._map(mapped, self.devices, out=None, donate=True)

    def map_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Map a function of parameters and batch over all devices, without exchange between them.

        Args:
          function: `function(params, batch) -> rows`, for one device's share.

        Returns:
          `f(params, batch) -> rows`, compiled at its first call. Parameters are replicated, the
          batch is of `place`, and the rows come back stacked as the batch is: see `rows`.
        """
        return self._map(function, self.devices, out=0, donate=False)

    def rows(self, stacked: Any) -> Any:
        """Gather a stacked result as NumPy rows [n, ...] of the whole global batch.

        All hosts call it together, and each gets all rows, once, in the order of the batch.
        """
        hosts.meeting("rows")
        if jax.process_count() > 1:
            # Ctrl-C waits for what JAX waits for: let that be this host's own work, not the others,
            # who may have had it before and be gone.
            jax.block_until_ready(stacked)
            stacked = multihost_utils.process_allgather(stacked, tiled=True)
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), stacked)

    def largest(self, value: int) -> Any:
        """Start finding the largest `value` of all hosts; all of them call it together.

        Returns:
          An int on one host. On several an array that `int` waits for, so that the caller need
          not.
        """
        hosts.meeting("largest")
        if jax.process_count() == 1:
            return value
        return self._largest(None, self.place(np.full(len(self.local), value, np.int32)))

    def meet(self) -> None:
        """Connect all devices of all hosts, while the hosts are in step.

        The first collective makes the connections, and gloo gives that half a minute: less than
        one host may compile longer than another. Once connected they wait for one another.
        """
        int(self.largest(0))

    def from_main(self, values: np.ndarray) -> np.ndarray:
        """Return `values` as the first process has them, on every host.

        It serves decisions that depend on what is on a disk.
        """
        return hosts.from_main(values)
