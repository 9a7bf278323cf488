"""Code images with a trained network into files, and decode them again.

Whoever decodes needs the run directory, and a machine that computes the network exactly as the
encoder's did: the file names checkpoint, weights, their fingerprint, software and device, and
`decompress` refuses another. The network always sees batches of `group` images, filled up with
zeros, because another batch size is another program whose last bits differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import build_process, denoiser, image_shape
from ddpm_jax.coding.ans import Stack
from ddpm_jax.coding.bits_back import ChainCoder, Network, Reverse
from ddpm_jax.coding.container import MOST_IMAGES, Coded, Settings
from ddpm_jax.coding.progressive import ProgressiveCoder, Received
from ddpm_jax.diffusion.process import p_mean_variance
from ddpm_jax.errors import CodingError
from ddpm_jax.trained import Trained

DIFFERENT = (
    "the images are not those encoded: "
    "this machine computes the network differently from the encoder's"
)


def compress(
    trained: Trained,
    images: np.ndarray,
    settings: Settings,
    on_step: Callable[[], None] = lambda: None,
) -> Coded:
    """Code uint8 images [n,h,w,c].

    Raises:
      CodingError: no images or too many, images of another kind than the network's, a network with
        classes or non-finite output.
    """
    expected = image_shape(trained.config)
    if images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
        raise CodingError(
            f"images: expected uint8 {[*expected]}, at least one, "
            f"got {images.dtype} {[*images.shape]}"
        )
    if len(images) > MOST_IMAGES:
        raise CodingError(f"{len(images):,} images: a file holds at most {MOST_IMAGES:,}")
    header = {"shape": images.shape, "settings": asdict(settings), "model": identity(trained)}
    groups = _groups(len(images), settings.group)
    if settings.method == "lossless":
        coder = _chain_coder(trained, settings, on_step)
        stack = Stack(settings.lanes, settings.seed)
        for rows in groups:
            coder.encode(stack, images[rows])
        bits = {
            "net_bits": stack.bits - stack.initial_bits,
            "initial_bits": stack.initial_bits,
            "borrowed": stack.borrowed,
        }
        return Coded(header | bits, _stack_sections(stack))
    progressive, sections = _progressive_coder(trained, settings, on_step), []
    for rows in groups:
        bits, stack = progressive.encode(images[rows])
        sections += [np.packbits(bits).tobytes(), *_stack_sections(stack)]
    return Coded(header, sections)


def decompress(
    trained: Trained, coded: Coded, on_step: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Decode the images, uint8 [n,h,w,c], bit for bit.

    Raises:
      CodingError: the file is of another network or kind of machine, or the network was computed
        differently after all.
    """
    settings, (count, *shape) = _open(trained, coded), coded.header["shape"]
    groups, parts = _groups(count, settings.group), []
    if settings.method == "lossless":
        coder, stack = _chain_coder(trained, settings, on_step), _stack(coded.sections)
        for rows in reversed(groups):
            parts.insert(0, coder.decode(stack, (rows.stop - rows.start, *shape)))
        if not stack.is_initial(coded.header["borrowed"], settings.seed):
            raise CodingError(DIFFERENT)
        return np.concatenate(parts)
    progressive = _progressive_coder(trained, settings, on_step)
    for number, rows in enumerate(groups):
        bits, stack = _progressive_sections(coded, number)
        parts.append(progressive.decode(bits, stack, (rows.stop - rows.start, *shape)))
        if not stack.is_initial(0, settings.seed):
            raise CodingError(DIFFERENT)
    return np.concatenate(parts)


def receive(
    trained: Trained, coded: Coded, on_step: Callable[[], None] = lambda: None
) -> Iterator[tuple[slice, Received]]:
    """Decode the pictures of a progressive file, step by step, one group after the other.

    Yields:
      Which images, and what has been received of them.

    Raises:
      CodingError: as `decompress`; or a lossless file, which has no such prefixes.
    """
    settings, (count, *shape) = _open(trained, coded), coded.header["shape"]
    if settings.method != "progressive":
        raise CodingError(
            "a lossless file can only be decoded whole: "
            "encode with method=progressive to stop early"
        )
    progressive = _progressive_coder(trained, settings, on_step)
    for number, rows in enumerate(_groups(count, settings.group)):
        bits, _ = _progressive_sections(coded, number)
        for received in progressive.receive(bits, (rows.stop - rows.start, *shape)):
            yield rows, received


def forward_passes(trained: Trained, count: int, settings: Settings) -> int | None:
    """Return the batches that the network sees to code, or to decode, `count` images.

    None where that is up to the images.
    """
    if settings.method == "progressive":
        return None
    return len(_groups(count, settings.group)) * trained.config.diffusion.timesteps


def identity(trained: Trained) -> dict[str, Any]:
    """Describe the network, and what computes it."""
    digest, leaves = hashlib.sha256(), jax.tree.leaves(trained.params)
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    device = min(leaves[0].devices(), key=lambda device: device.id)
    software = f"jax {jax.__version__} on {device.platform} {device.device_kind}"
    return {
        "weights": trained.weights,
        "step": trained.step,
        "sha256": digest.hexdigest()[:16],
        "computed_by": software,
    }


def _open(trained: Trained, coded: Coded) -> Settings:
    theirs, ours = coded.header["model"], identity(trained)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise CodingError(
                f"the file was coded with {name} {theirs.get(name)!r}, not {value!r}: "
                "decode with the same"
            )
    shape, expected = tuple(coded.header["shape"][1:]), image_shape(trained.config)
    if shape != expected:
        raise CodingError(
            f"the file holds images of {[*shape]}, this run's are {[*expected]}: "
            "decode with the same"
        )
    return Settings(**coded.header["settings"])


def _groups(count: int, group: int) -> list[slice]:
    return [slice(i, min(i + group, count)) for i in range(0, count, group)]


def _network(trained: Trained, settings: Settings) -> Network:
    config = trained.config
    if config.model.num_classes:
        raise CodingError(
            f"config.model.num_classes={config.model.num_classes}: "
            "the codec sends no labels, train without"
        )
    process, bind, shape = build_process(config), denoiser(config), image_shape(config)

    @jax.jit
    def reverse(params: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        timesteps = jnp.full(settings.group, t)
        step = p_mean_variance(
            process, bind(params)(x, timesteps), x, timesteps, clip=settings.clip
        )
        return step.mean, step.log_variance, step.x0

    def network(x: np.ndarray, t: int) -> Reverse:
        batch = np.zeros((settings.group, *shape), np.float32)
        batch[: len(x)] = x
        return Reverse(
            *(rows[: len(x)] for rows in jax.device_get(reverse(trained.params, batch, t)))
        )

    return network


def _chain_coder(trained: Trained, settings: Settings, on_step: Callable[[], None]) -> ChainCoder:
    schedule = build_process(trained.config).schedule
    return ChainCoder(schedule, _network(trained, settings), cdf=settings.cdf, on_step=on_step)


def _progressive_coder(
    trained: Trained, settings: Settings, on_step: Callable[[], None]
) -> ProgressiveCoder:
    schedule, network = build_process(trained.config).schedule, _network(trained, settings)
    return ProgressiveCoder(
        schedule,
        network,
        step_rate=settings.step_rate,
        cdf=settings.cdf,
        seed=settings.seed,
        on_step=on_step,
    )


def _stack_sections(stack: Stack) -> list[bytes]:
    return [stack.heads.astype("<u8").tobytes(), stack.tail.astype("<u2").tobytes()]


def _stack(sections: list[bytes]) -> Stack:
    return Stack.of(np.frombuffer(sections[0], "<u8"), np.frombuffer(sections[1], "<u2"))


def _progressive_sections(coded: Coded, number: int) -> tuple[np.ndarray, Stack]:
    packed, *stack = coded.sections[3 * number : 3 * number + 3]
    return np.unpackbits(np.frombuffer(packed, np.uint8)), _stack(stack)
