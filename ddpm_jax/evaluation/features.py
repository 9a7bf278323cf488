"""Inception features of any set of images, over all devices, block by block; what has been computed once is looked up.

Features of an image depend on its pixels, the weights and the resize alone: not on batches, devices or hosts. The rows that fill
up the last batch are cut off before anyone counts them. Blocks are kept under the hash of their pixels, so no block of other
images can be mistaken for them, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.devices import Devices
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception import WIDTHS, Inception
from ddpm_jax.evaluation.inception_weights import InceptionWeights
from ddpm_jax.evaluation.resize import RESIZES, to_inception
from ddpm_jax.images import replacing
from ddpm_jax.progress import Progress

BLOCK = 500  # images whose features are stored together: minutes on a laptop, a moment on a GPU


@dataclass(frozen=True)
class Block:
    """Features of images `start` to `start + len(self)`: {tap: float32 [b, width]}, and the SHA-256 of their pixels."""

    start: int
    features: dict[str, np.ndarray]
    pixels: str

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))


def block_digest(pixels: np.ndarray) -> str:
    """SHA-256 of uint8 [b,h,w,c], their shape included."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


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
            raise EvaluationError(f"--resize={resize}: one of {', '.join(RESIZES)}")
        self.weights, self.devices, self.resize = weights, devices, resize
        self._cache = None if cache is None else cache / f"{weights.sha256[:16]}_{resize}"
        parts = len(devices.devices)
        calls = -(-BLOCK // batch_size)  # batches of equal size, so that little of the last one is filling
        self.batch_size = -(-BLOCK // (calls * parts)) * parts
        self._params = devices.replicate(weights.params)
        self._networks: dict[tuple[str, ...], object] = {}
        self._progress = progress and devices.is_main

    def provenance(self) -> dict:
        return {"inception": self.weights.provenance(), "resize": self.resize}

    def blocks(self, images: ImageSet, taps: Sequence[str], what: str = "") -> Iterator[Block]:
        """The features of `images` in their order, on every host.

        Raises:
          EvaluationError: weights that lack a tap, or features that are not finite.
        """
        for tap in taps:
            self.weights.require(tap, what or "this")
        with Progress(images.count, "image", enabled=self._progress) as bar:
            for start in range(0, images.count, BLOCK):
                pixels = images.read(np.arange(start, min(start + BLOCK, images.count)))
                digest = block_digest(pixels)
                yield Block(start, self._block(pixels, digest, taps, bar, what), digest)

    def _block(self, pixels: np.ndarray, digest: str, taps: Sequence[str], bar: Progress, what: str) -> dict[str, np.ndarray]:
        found = self._looked_up(digest, taps, len(pixels))
        missing = tuple(tap for tap in taps if tap not in found)
        if not missing:
            bar.update(len(pixels), of=what)
            return {tap: found[tap] for tap in taps}
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            rows = np.minimum(np.arange(start, start + self.batch_size), len(pixels) - 1)
            batch = self.devices.place(self.devices.own_rows(pixels[rows]))
            valid = min(self.batch_size, len(pixels) - start)
            features = self.devices.rows(self._network(missing)(self._params, batch))
            parts.append({tap: features[tap][:valid] for tap in missing})
            bar.update(valid, of=what)
        for tap in missing:
            found[tap] = np.concatenate([part[tap] for part in parts])
            if not np.isfinite(found[tap]).all():
                raise EvaluationError(f"{what}: features are not finite: the weights of {self.weights.name} are damaged")
            if self._cache is not None and self.devices.is_main:
                with replacing(self._path(digest, tap)) as file:
                    np.save(file, found[tap])
        return {tap: found[tap] for tap in taps}

    def _looked_up(self, digest: str, taps: Sequence[str], count: int) -> dict[str, np.ndarray]:
        """What lies in the cache of the first host, on every host."""
        there = [self._cache is not None and self.devices.is_main and self._path(digest, tap).exists() for tap in taps]
        found = {}
        for tap, known in zip(taps, self.devices.from_main(np.array(there))):
            if known:
                stored = self._load(digest, tap) if self.devices.is_main else np.zeros((count, WIDTHS[tap]), np.float32)
                found[tap] = self.devices.from_main(stored)
        return found

    def _load(self, digest: str, tap: str) -> np.ndarray:
        path = self._path(digest, tap)
        try:
            return np.load(path)
        except (ValueError, EOFError) as error:
            raise EvaluationError(f"{path} is damaged ({error}): delete it") from error

    def _path(self, digest: str, tap: str) -> Path:
        return self._cache / f"{digest}_{tap}.npy"

    def _network(self, taps: tuple[str, ...]):
        if taps not in self._networks:
            network, resize = Inception(taps), self.resize

            def features(params, images: jax.Array) -> dict[str, jax.Array]:
                return network.apply({"params": params}, to_inception(images, resize))

            self._networks[taps] = self.devices.map_batch(features)
        return self._networks[taps]
