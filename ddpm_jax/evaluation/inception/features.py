"""Compute Inception features of any set of images, over all devices, block by block.

Features of an image depend on its pixels, the weights and the resize alone: not on batches, devices
or hosts. The rows that fill up the last batch are cut off before anyone counts them. Blocks are
kept under the hash of their pixels, so no block of other images can be mistaken for them, and an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import ImageSet, read_on_all_hosts
from ddpm_jax.evaluation.inception.network import WIDTHS, Inception
from ddpm_jax.evaluation.inception.resize import RESIZES, to_inception
from ddpm_jax.evaluation.inception.weights import InceptionWeights
from ddpm_jax.files import replacing
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress

BLOCK = 500  # images whose features are stored together: minutes on a laptop, a moment on a GPU


@dataclass(frozen=True)
class Block:
    """Features of images `start` to `start + len(self)`.

    Attributes:
      start: the number of the first image.
      features: {tap: float32 [b, width]}.
      pixels: the SHA-256 of the images' pixels.
    """

    start: int
    features: dict[str, np.ndarray]
    pixels: str

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))


def block_digest(pixels: np.ndarray) -> str:
    """Return the SHA-256 of uint8 [b,h,w,c], their shape included."""
    return hashlib.sha256(
        str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
    ).hexdigest()


def check_channels(shape: tuple[int, int, int], what: str = "") -> None:
    """Raise EvaluationError unless Inception sees images of this shape [h,w,c]."""
    if shape[-1] not in (1, 3):
        raise EvaluationError(
            f"{what or 'images'}: {shape[-1]} channels; Inception sees grey and RGB"
        )


class Extractor:
    """Inception on all devices.

    Args:
      resize: one of resize.RESIZES.
      cache: where blocks of features are kept; None keeps none.
      batch_size: images at once, over all devices; rounded up to a multiple of their number.
      progress: show images done, their rate and the time left on stderr.

    Raises:
      EvaluationError: another resize.
    """

    def __init__(
        self,
        weights: InceptionWeights,
        devices: Devices,
        *,
        resize: str = "tf",
        cache: Path | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> None:
        if resize not in RESIZES:
            raise EvaluationError(f"resize={resize}: one of {', '.join(RESIZES)}")
        self.weights, self.devices, self.resize = weights, devices, resize
        self._cache = None if cache is None else cache / f"{weights.sha256[:16]}_{resize}"
        parts = len(devices.devices)
        # Batches of equal size, so that little of the last one is filling.
        calls = -(-BLOCK // batch_size)
        self.batch_size = -(-BLOCK // (calls * parts)) * parts
        self._params = devices.replicate(weights.params)
        self._networks: dict[tuple[str, ...], object] = {}
        self._progress = progress and devices.is_main

    def provenance(self) -> dict[str, Any]:
        """Return what features depend on beside the pixels, for records."""
        return {"inception": self.weights.provenance(), "resize": self.resize}

    def blocks(self, images: ImageSet, taps: Sequence[str], what: str = "") -> Iterator[Block]:
        """Yield the features of `images` in their order, on every host.

        All hosts take part in each block, so it must not run where one of them may leave early,
        such as inside `hosts.together`.

        Raises:
          EvaluationError: weights that lack a tap, images that are neither grey nor RGB, or
            features that are not finite.
        """
        check_channels(images.shape, what)
        for tap in taps:
            self.weights.require(tap, what or "this")
        with Progress(images.count, "image", enabled=self._progress) as bar:
            for start, pixels in read_on_all_hosts(images.blocks(BLOCK)):
                digest = block_digest(pixels)
                yield Block(start, self._block(pixels, digest, taps, bar, what), digest)

    def _block(
        self, pixels: np.ndarray, digest: str, taps: Sequence[str], bar: Progress, what: str
    ) -> dict[str, np.ndarray]:
        features = self._look_up(digest, taps, len(pixels))
        missing = tuple(tap for tap in taps if tap not in features)
        if not missing:
            bar.update(len(pixels), of=what)
            return {tap: features[tap] for tap in taps}
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            rows = np.minimum(np.arange(start, start + self.batch_size), len(pixels) - 1)
            batch = self.devices.place(self.devices.own_rows(pixels[rows]))
            valid = min(self.batch_size, len(pixels) - start)
            outputs = self.devices.rows(self._network(missing)(self._params, batch))
            parts.append({tap: outputs[tap][:valid] for tap in missing})
            bar.update(valid, of=what)
        for tap in missing:
            features[tap] = np.concatenate([part[tap] for part in parts])
            if not np.isfinite(features[tap]).all():
                raise EvaluationError(
                    f"{what}: features are not finite: "
                    f"the weights of {self.weights.name} are damaged"
                )
        with hosts.together():  # a full disk of the first host
            if self._cache is not None and self.devices.is_main:
                for tap in missing:
                    with replacing(self._path(digest, tap)) as file:
                        np.save(file, features[tap])
        return {tap: features[tap] for tap in taps}

    def _look_up(self, digest: str, taps: Sequence[str], count: int) -> dict[str, np.ndarray]:
        """Return what lies in the cache of the first host, on every host."""
        stored: dict[str, np.ndarray] = {}
        with hosts.together():
            if self._cache is not None and self.devices.is_main:
                stored = {
                    tap: self._load(digest, tap) for tap in taps if self._path(digest, tap).exists()
                }
        known = self.devices.from_main(np.array([tap in stored for tap in taps]))
        return {
            tap: self.devices.from_main(stored.get(tap, np.zeros((count, WIDTHS[tap]), np.float32)))
            for tap, there in zip(taps, known)
            if there
        }

    def _load(self, digest: str, tap: str) -> np.ndarray:
        path = self._path(digest, tap)
        try:
            return np.load(path)
        except (ValueError, EOFError) as error:
            raise EvaluationError(f"{path} is damaged ({error}): delete it") from error

    def _path(self, digest: str, tap: str) -> Path:
        return self._cache / f"{digest}_{tap}.npy"

    def _network(self, taps: tuple[str, ...]):
        """Return the program that computes `taps` on all devices, compiled at its first call."""
        if taps not in self._networks:
            network, resize = Inception(taps), self.resize

            def features(params, images: jax.Array) -> dict[str, jax.Array]:
                return network.apply({"params": params}, to_inception(images, resize))

            self._networks[taps] = self.devices.map_batch(features)
        return self._networks[taps]
