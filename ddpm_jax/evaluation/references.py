"""Keep statistics of real images with all that they depend on.

They are never compared with samples that were seen another way. A file of ours is an .npz that
pytorch-fid reads as well:

    mu, sigma       mean and covariance of the features, float64
    mu_s, sigma_s   of the spatial features, for sFID
    features        float32 [k,d] of k images drawn at random, for KID, precision and recall
    provenance      JSON: data set, split, crop, count, hash of the pixels and of eight images, tap,
                    resize, Inception and its hash

Files by others load as they are: pytorch-fid's have mu and sigma, with nothing known about them but
their own hash; guided-diffusion's have mu, sigma, mu_s, sigma_s, or else images (arr_0), which are
seen like any others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.inception.features import BLOCK, Extractor, block_digest
from ddpm_jax.evaluation.metrics.frechet import Gaussian
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.files import NpzError, open_npz, parse_json, replacing
from ddpm_jax.parallel import hosts
from ddpm_jax.weights.files import fingerprint

MOST_FEATURES = 10_000  # images whose features go into a reference
SMALL = 2**30  # bytes of pixels that are hashed in seconds
REBUILD = "build one that fits with build_reference"


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images.

    Attributes:
      gaussian: of the tap's features.
      spatial, features: None where unknown.
      provenance: what they depend on; empty for files by others.
      file: name and hash, once it has one.
      whole: they are known to be of all images of a split.
    """

    gaussian: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    provenance: dict[str, Any]
    file: dict[str, Any] | None = None
    whole: bool = False

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return self.file["name"] if self.file else "the reference"

    def describe(self) -> str:
        """Return one line for people."""
        images = self.provenance.get("images", {})
        parts = [str(images[key]) for key in ("data", "folder", "file", "split") if key in images]
        what = " ".join(parts) or (
            "statistics of others, whose images, Inception and resize nobody noted"
        )
        count = f", {self.provenance['count']:,} images" if "count" in self.provenance else ""
        return what + count + (f" in {self.file['name']}" if self.file else "")


def build(
    extractor: Extractor,
    images: ImageSet,
    tap: str,
    *,
    most_features: int = MOST_FEATURES,
    what: str = "reference",
) -> Reference:
    """Compute the statistics of all of `images`, on every host; errors as `Extractor.blocks`."""
    images.check_count(what)
    taps = (tap, "spatial") if "spatial" in extractor.weights.taps else (tap,)
    chosen = np.sort(choose(images.count, most_features))
    moments = {name: Moments() for name in taps}
    features, digest = [], hashlib.sha256()
    with hosts.together():
        eight = _digest_of_eight(images)
    for block in extractor.blocks(images, taps, what):
        for name in taps:
            moments[name] += Moments.of(block.features[name])
        here = chosen[(chosen >= block.start) & (chosen < block.start + len(block))] - block.start
        features.append(block.features[tap][here])
        digest.update(block.pixels.encode())
    provenance = extractor.provenance() | {
        "images": images.description,
        "count": images.count,
        "pixels_sha256": digest.hexdigest(),
        "eight_sha256": eight,
        "features": tap,
    }
    spatial = Gaussian.of(moments["spatial"]) if "spatial" in moments else None
    return Reference(Gaussian.of(moments[tap]), spatial, np.concatenate(features), provenance)


def choose(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Draw the numbers of at most `most` of `count` images, the same for a seed, in a mixed order.

    Images are often in the order of their classes, or have each class in turn: those at equal
    distances may be of one class alone.
    """
    return np.random.Generator(np.random.Philox(seed)).permutation(count)[:most]


def file_name(images: ImageSet, extractor: Extractor, tap: str) -> str:
    """Name a split's reference by all that tells it from others.

    An example is cifar10_train_32_50000_2048_tf_6726825d.npz.
    """
    split = images.description
    padding = [f"pad{split['padding']}"] * bool(split["padding"])
    crop = [split["crop"]] * (split["crop"] != "none")
    size = "x".join(map(str, np.ravel(split["image_size"])))
    size += f"x{split['channels']}" * (split["channels"] != 3)
    seen = [images.count, tap, extractor.resize, extractor.weights.sha256[:8]]
    parts = [split["data"], split["split"], size, *padding, *crop, *seen]
    return re.sub(r"[^\w.-]", "-", "_".join(map(str, parts))) + ".npz"


def look_up(folder: Path, extractor: Extractor, images: ImageSet, tap: str) -> Reference | None:
    """Load the statistics of a split from `folder`; the first time they are built into it.

    Returns:
      The statistics on the first host, None on the others.

    Raises:
      EvaluationError: those that lie there are of other pixels than the split's, or damaged.
    """
    path, devices = folder / file_name(images, extractor, tap), extractor.devices
    with hosts.together():
        exists = devices.is_main and path.exists()
    exists = bool(devices.from_main(np.array(exists)))
    built = None if exists else build(extractor, images, tap)
    with hosts.together():
        if not devices.is_main:
            return None
        if built is not None:
            save(path, built)
        reference = load(path)
        if exists:
            check_pixels(reference, images)
        return reference


def save(path: Path, reference: Reference) -> None:
    """Write the file that the head of this module describes; OSError where it cannot be written."""
    if path.suffix != ".npz":
        raise EvaluationError(f"output={path}: must end in .npz")
    arrays = {"mu": reference.gaussian.mean, "sigma": reference.gaussian.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    with replacing(path) as file:
        np.savez(file, **arrays, provenance=np.array(json.dumps(reference.provenance)))


def has_statistics(path: Path) -> bool:
    """Tell whether an .npz holds statistics, not images; EvaluationError if it cannot be read."""
    return {"mu", "sigma"} <= set(_read(path, ()))


def load(path: Path) -> Reference:
    """Load statistics of our own or of others.

    Raises:
      EvaluationError: no such file, a damaged one, or one without mu and sigma.
    """
    arrays = _read(path, ("mu", "sigma", "mu_s", "sigma_s", "features", "provenance"))
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise EvaluationError(
            f"reference={path} has no {' and no '.join(missing)}, only {', '.join(arrays)}"
        )
    try:
        gaussian, spatial = Gaussian(arrays["mu"], arrays["sigma"]), None
        if {"mu_s", "sigma_s"} <= set(arrays):
            spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"])
        provenance = parse_json(str(arrays["provenance"])) if "provenance" in arrays else {}
    except ValueError as error:
        raise EvaluationError(f"reference={path}: {error}") from error
    return Reference(gaussian, spatial, arrays.get("features"), provenance, fingerprint(path))


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray | None]:
    """Read the arrays `names` of an .npz; the others are listed with None."""
    if not path.is_file():
        raise EvaluationError(f"reference={path}: no such file; {REBUILD}, or name train or test")
    try:
        with open_npz(path) as file:
            return {name: file[name] if name in names else None for name in file.files}
    except NpzError as error:
        raise EvaluationError(f"reference={error}: fetch or build it again") from error


def check_pixels(reference: Reference, images: ImageSet) -> None:
    """Raise EvaluationError where `reference` is of other pixels than `images`.

    Looking must take seconds: of more than SMALL bytes of pixels it is at eight images.
    """
    known = reference.provenance
    same = known.get("eight_sha256") in (None, _digest_of_eight(images))  # older ones have none
    if same and images.count * np.prod(images.shape) <= SMALL:
        digest = hashlib.sha256()
        for _, pixels in images.blocks(BLOCK):
            digest.update(block_digest(pixels).encode())
        same = digest.hexdigest() == known["pixels_sha256"]
    if not same:
        raise EvaluationError(
            f"{reference.name} is of other images than the split now has: "
            "remove it, and it is built anew"
        )


def _digest_of_eight(images: ImageSet) -> str:
    """Return the hash of eight images, from the first to the last."""
    return block_digest(images.read(np.linspace(0, images.count - 1, 8).astype(np.int64)))


def check(
    reference: Reference, extractor: Extractor, tap: str, data: dict[str, Any] | None
) -> None:
    """Raise EvaluationError unless samples seen by `extractor` may be compared with `reference`.

    Args:
      data: what describes the run's own data set (`image_sets.describe_split`), None for samples
        of unknown descent.
    """
    name, width = reference.name, reference.gaussian.mean.size
    if width != int(tap):
        raise EvaluationError(
            f"{name} has {width} features, these are {tap}: pass features={width}, or {REBUILD}"
        )
    if not reference.provenance:
        return
    own = extractor.provenance()
    resize = reference.provenance["resize"]
    if resize != own["resize"]:
        raise EvaluationError(
            f"{name} was made with resize={resize}, this is {own['resize']}: "
            f"pass that one, or {REBUILD}"
        )
    theirs, ours = reference.provenance["inception"], own["inception"]
    if theirs["sha256"] != ours["sha256"]:
        raise EvaluationError(
            f"{name} was made with the Inception {theirs['name']} ({theirs['sha256'][:8]}), "
            f"this is {ours['name']} ({ours['sha256'][:8]}): pass that one, or {REBUILD}"
        )
    images = reference.provenance["images"]
    for field in ("data", "image_size", "channels", "padding", "crop", "resize"):
        if data is not None and "data" in images and images[field] != data[field]:
            raise EvaluationError(
                f"{name} is of {field}={images[field]}, this run has {field}={data[field]}: "
                f"{REBUILD}"
            )


def check_size(reference: Reference, shape: tuple[int, int, int]) -> None:
    """Raise EvaluationError where images [h,w,c] are known to have another size than these."""
    size = reference.provenance.get("images", {}).get("image_size")
    if size is None:
        return
    (height, width, _), (tall, wide) = shape, np.broadcast_to(size, 2)
    if (height, width) != (tall, wide):
        raise EvaluationError(
            f"samples are {width}x{height}, the reference is of {wide}x{tall} images: {REBUILD}"
        )
