"""Hold the devices against the CPU: the same tiny network, the same numbers, two processes.

Each process computes with a small network of a config's kind, from weights that NumPy drew: losses,
gradients, three training steps in the form that the device gets, and a chain of ten sampling steps.
It writes them to a file; `differences` compares two such files.

The measure is |a - b| / |b| over all numbers of a kind, Euclidean norms. In float32 the matrix
products are those of the highest precision: a GPU would take TF32, which keeps 10 bits, by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import build_process, denoiser, image_shape
from ddpm_jax.config import Config, load_config
from ddpm_jax.diffusion.chain import initial_noise, reverse_chain
from ddpm_jax.diffusion.randomness import sample_keys
from ddpm_jax.diffusion.samplers import sampler_table
from ddpm_jax.files import open_npz, replacing
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import Batch, init_state
from ddpm_jax.training.step import build_held_out_loss, build_train_step

# Of |a - b| / |b|. float32: sums of some thousand terms in another order. bfloat16: its 8 bits,
# rounded at other places, as a GPU keeps in registers what the CPU writes down.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}

BATCH, STEPS, ROWS = 8, 3, 10

TINY = (
    "data.name=digits",
    "data.image_size=8",
    "data.channels=1",
    "data.crop=none",
    "model.base_channels=32",
    "model.channel_mult=(1,2)",
    "model.blocks_per_level=1",
    "model.attention_resolutions=(4,)",
    "model.group_norm_groups=8",
    f"train.batch_size={BATCH}",
    "train.accumulation=1",
    "optimizer.warmup_steps=0",
    # Adam divides a gradient by its size. One that is zero but for rounding, as that of the biases
    # of attention's keys, would become a whole step with the sign of the rounding.
    "optimizer.epsilon=1e-3",
)


def tiny_config(config: str, overrides: tuple[str, ...], dtype: str) -> Config:
    """Read a config and shrink it to the network that is compared."""
    return load_config(config, [*overrides, *TINY, f"model.dtype={dtype}"])


def compute(config: Config, devices: Devices) -> dict[str, np.ndarray]:
    """Compute what is compared, on all devices.

    Returns:
      losses [8]; gradients, all of them in one vector; updates, what three training steps changed;
      metrics of the last step; samples [8,h,w,c].
    """
    random = np.random.default_rng(1)
    state = init_state(config)
    # The last convolution starts from zero, through which no gradient would come.
    params = jax.tree.map(
        lambda leaf: (
            np.float32(0.05) * random.standard_normal(leaf.shape, np.float32)
            + (leaf.ndim == 1 and bool((leaf == 1).all()))
        ),
        state.params,
    )
    state = init_state(config, jax.tree.map(jnp.asarray, params))
    classes = config.model.num_classes
    labels = {"label": np.arange(BATCH, dtype=np.int32) % classes} if classes else {}
    pixels = random.integers(0, 256, (BATCH, *image_shape(config)), np.uint8)
    batch = {"image": pixels} | labels
    held_out = build_held_out_loss(config)
    judged = batch | {"index": np.arange(BATCH, dtype=np.int32)}

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        losses = held_out(params, judged)
        return losses.mean(), losses

    gradients, losses = jax.jit(jax.grad(mean_loss, has_aux=True))(params)

    form = state_form(config, devices)
    step = devices.map_step(build_train_step(config, form))
    after, placed = form.pack(devices.replicate(state)), devices.place(batch)
    for _ in range(STEPS):
        after, metrics = step(after, placed)
    updates = jax.tree.map(
        lambda new, old: np.asarray(new) - old, form.unpack(after).params, params
    )

    process, bind = build_process(config), denoiser(config)
    table = sampler_table(process, "ancestral", ROWS)

    def chain(params: Any, batch: Batch) -> jax.Array:
        keys = sample_keys(batch["seed"], batch["index"])
        x = initial_noise(keys, image_shape(config), process.schedule.timesteps)
        return reverse_chain(process, table, bind(params, batch.get("label")), x, keys)

    columns = {"seed": np.zeros(BATCH, np.uint32), "index": np.arange(BATCH, dtype=np.uint32)}
    columns = devices.place(columns | labels)
    samples = devices.map_batch(chain)(devices.replicate(params), columns)
    return {
        "losses": np.asarray(losses),
        "gradients": vector(gradients),
        "updates": vector(updates),
        "metrics": np.array([float(metrics[name]) for name in ("loss", "gradient_norm")]),
        "samples": devices.rows(samples),
    }


def vector(tree: Any) -> np.ndarray:
    """Join the leaves of a tree, in its order."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def write(path: Path, config: str, overrides: tuple[str, ...] = ()) -> None:
    """Compute in both types, on the devices that this process has, and write the numbers.

    Args:
      path: the .npz.
      config: of the network's kind, as `load_config` takes it.
      overrides: of its fields, each "section.field=value".
    """
    devices = local_share(Devices())
    numbers = {}
    for dtype in TOLERANCES:
        with highest_precision(dtype == "float32"):
            for name, values in compute(tiny_config(config, overrides, dtype), devices).items():
                numbers[f"{dtype} {name}"] = np.asarray(values, np.float32)
    with replacing(path) as file:
        np.savez(file, **numbers)


def local_share(devices: Devices) -> Devices:
    """Return the largest number of devices, the first ones, that divides the batch."""
    count = max(n for n in range(1, BATCH + 1) if BATCH % n == 0 and n <= len(devices.devices))
    return Devices(devices.devices[:count])


@contextlib.contextmanager
def highest_precision(wanted: bool) -> Iterator[None]:
    """Have matrix products and convolutions of the block in float32 throughout, where `wanted`."""
    with jax.default_matmul_precision("highest") if wanted else contextlib.nullcontext():
        yield


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one kind of numbers is from the same on a CPU.

    Attributes:
      name: type and kind, "float32 gradients".
      value: |a - b| / |b|; infinite where a number is not finite.
      tolerance: what it may be.
    """

    name: str
    value: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Return whether it is within the tolerance."""
        return self.value <= self.tolerance


def differences(ours: Path, reference: Path) -> list[Difference]:
    """Compare two files of `write`, kind by kind."""
    with open_npz(ours) as a, open_npz(reference) as b:
        result = []
        for name in b.files:
            distance = np.linalg.norm(a[name].astype(np.float64) - b[name])
            value = float(distance / np.linalg.norm(b[name].astype(np.float64)))
            value = value if np.isfinite(value) else float("inf")
            result.append(Difference(name, value, TOLERANCES[name.split()[0]]))
        return result


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
