"""Load and check the weights of Inception-v3 2015-12-05, known by the SHA-256 of their numbers.

The hash is that of the folded numbers, so that a .pth and a .pb of the same network are the same.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.originals.download import download
from ddpm_jax.errors import DataError, EvaluationError, WeightsError
from ddpm_jax.evaluation.inception.files import READERS, Layers
from ddpm_jax.evaluation.inception.network import SIZE, WIDTHS, Inception

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
CHECKSUM = "sha256:6726825d"  # its first digits, which the publisher put into the name
FEATURES = ("64", "192", "768", "2048")  # taps that metrics are of, the deepest last


@dataclass(frozen=True, eq=False)
class InceptionWeights:
    """Weights of Inception, or of its first layers.

    Attributes:
      params: float32 {layer: {kernel, bias}}.
      taps: the features that they suffice for.
      name: of their file.
      sha256: of the numbers.
    """

    params: Layers
    taps: tuple[str, ...]
    name: str
    sha256: str

    def deepest(self, most: str = FEATURES[-1]) -> str:
        """Return the deepest of FEATURES that these weights reach, `most` or one before it."""
        return [tap for tap in FEATURES[: FEATURES.index(most) + 1] if tap in self.taps][-1]

    def require(self, tap: str, what: str) -> None:
        """Raise EvaluationError, with the remedy, unless these weights reach `tap`."""
        if tap not in self.taps:
            last = self.deepest()
            instead = (
                f", or ask for features={last}, a number of its own kind" if tap == "2048" else ""
            )
            raise EvaluationError(
                f"{what} needs the {_words(tap)} of Inception, and {self.name} ends at {last}: "
                f"fetch {URL} and name the file, inception={FILE}{instead}"
            )

    def provenance(self) -> dict[str, str]:
        """Return what records say about these weights."""
        return {"name": self.name, "sha256": self.sha256}


def _words(tap: str) -> str:
    return {"logits": "1008 class scores", "spatial": "spatial features"}.get(
        tap, f"{tap} features"
    )


def load_inception(path: Path | None, cache: Path) -> InceptionWeights:
    """Load the weights from `path`, or without one from `cache`, where they are downloaded to.

    Raises:
      EvaluationError: no such file, a damaged one, one that holds no Inception, or no network.
    """
    if path is None:
        try:
            path = download(URL, cache, CHECKSUM, argument="inception")
        except DataError as error:
            raise EvaluationError(f"no Inception weights: {error}") from error
    if not path.is_file():
        raise EvaluationError(f"inception={path}: no such file")
    if path.suffix not in READERS:
        raise EvaluationError(f"inception={path}: must end in {', '.join(READERS)}")
    try:
        layers = READERS[path.suffix](path)
    except WeightsError as error:
        raise EvaluationError(f"inception: {error}") from error
    return inception_of(layers, path.name)


def inception_of(layers: Layers, name: str) -> InceptionWeights:
    """Check folded layers; EvaluationError for shapes that are not Inception's."""
    params: Layers = {}
    digest = hashlib.sha256()
    for layer, shapes in sorted(layer_shapes("logits").items()):
        if layer not in layers:
            continue
        params[layer] = {}
        for part, shape in shapes.items():
            array = np.ascontiguousarray(layers[layer][part], np.float32)
            if array.shape != shape:
                raise EvaluationError(
                    f"{name}: {layer}/{part} is {array.shape}, "
                    f"in Inception-v3 2015-12-05 it is {shape}"
                )
            if not np.isfinite(array).all():
                raise EvaluationError(f"{name}: {layer}/{part} holds numbers that are not finite")
            params[layer][part] = array
            digest.update(f"{layer}/{part}".encode() + array.tobytes())
    taps = tuple(tap for tap in WIDTHS if set(layer_shapes(tap)) <= set(params))
    if not taps:
        missing = next(layer for layer in layer_shapes("64") if layer not in params)
        raise EvaluationError(f"{name} holds no Inception-v3 2015-12-05: it has no layer {missing}")
    return InceptionWeights(params, taps, name, digest.hexdigest())


@functools.cache
def layer_shapes(tap: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return {layer: {"kernel": shape, "bias": shape}} of all that `tap` needs."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    params = jax.eval_shape(Inception((tap,)).init, jax.random.key(0), x)["params"]
    return {
        layer: {part: leaf.shape for part, leaf in parts.items()} for layer, parts in params.items()
    }
