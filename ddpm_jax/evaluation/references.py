"""Statistics of real images, kept with all that they depend on, and never compared with samples that were seen another way.

A file of ours is an .npz that pytorch-fid reads as well:

    mu, sigma       mean and covariance of the features, float64
    mu_s, sigma_s   of the spatial features, for sFID
    features        float32 [k,d] of k images at equal distances along the set, for KID, precision and recall
    provenance      JSON: data set, split, crop, count, hash of the pixels, tap, resize, Inception and its hash

Of files by others, pytorch-fid's (mu, sigma) load as they are, with nothing known about them but their own hash;
guided-diffusion's batches have mu, sigma, mu_s, sigma_s, or else images (arr_0), which are seen like any others.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import hosts
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import BLOCK, Extractor, block_digest
from ddpm_jax.evaluation.frechet import Gaussian
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.moments import Moments
from ddpm_jax.images import replacing
from ddpm_jax.weights.files import fingerprint

KEPT = 10_000  # images whose features are kept
SMALL = 2**30  # bytes of pixels that are hashed in seconds
_REBUILD = "build one that fits with evaluate.py --build_reference"


@dataclass(frozen=True, eq=False)
class Reference:
    """gaussian: of the tap's features; spatial, features: None where unknown; file: name and hash, once it has one."""

    gaussian: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    provenance: dict[str, Any]
    file: dict[str, Any] | None = None

    def describe(self) -> str:
        """One line for people."""
        known, images = self.provenance, self.provenance.get("images", {})
        what = " ".join(str(images[name]) for name in ("data", "folder", "file", "split") if name in images)
        count = f", {known['count']:,} images" if "count" in known else ""
        of = f" in {self.file['name']}" if self.file else ""
        return (what or "statistics of others, whose images, Inception and resize nobody noted") + count + of


def build(extractor: Extractor, images: ImageSet, tap: str, *, kept: int = KEPT, what: str = "reference") -> Reference:
    """Of all of `images`; errors as `Extractor.blocks`."""
    images.check_count(what)
    taps = (tap, "spatial") if "spatial" in extractor.weights.taps else (tap,)
    wanted = np.unique(np.arange(min(kept, images.count)) * images.count // min(kept, images.count))
    moments: dict[str, Moments] = {}
    features, digest = [], hashlib.sha256()
    for block in extractor.blocks(images, taps, what):
        for name, rows in block.features.items():
            found = Moments.of(rows)
            moments[name] = moments[name] + found if name in moments else found
        here = wanted[(wanted >= block.start) & (wanted < block.start + len(block))] - block.start
        features.append(block.features[tap][here])
        digest.update(block.pixels.encode())
    provenance = extractor.provenance() | {
        "images": images.description,
        "count": images.count,
        "pixels_sha256": digest.hexdigest(),
        "features": tap,
    }
    spatial = Gaussian.of(moments["spatial"]) if "spatial" in moments else None
    return Reference(Gaussian.of(moments[tap]), spatial, np.concatenate(features), provenance)


def file_name(images: ImageSet, extractor: Extractor, tap: str) -> str:
    """Of a split's reference, by all that tells it from others: cifar10_train_32_50000_2048_tf_6726825d.npz."""
    known = images.description
    extras = [f"pad{known['padding']}"] * bool(known["padding"]) + [known["crop"]] * (known["crop"] != "none")
    size = f"{known['image_size']}" + "x1" * (known["channels"] == 1)
    parts = [known["data"], known["split"], size, *extras, images.count, tap, extractor.resize, extractor.weights.sha256[:8]]
    return re.sub(r"[^\w.-]", "-", "_".join(map(str, parts))) + ".npz"


def check_pixels(reference: Reference, images: ImageSet) -> None:
    """EvaluationError where `reference` is of other pixels than `images`, if looking takes seconds: up to SMALL bytes of them."""
    if images.count * np.prod(images.shape) > SMALL:
        return
    digest = hashlib.sha256()
    for start in range(0, images.count, BLOCK):
        digest.update(block_digest(images.read(np.arange(start, min(start + BLOCK, images.count)))).encode())
    if digest.hexdigest() != reference.provenance["pixels_sha256"]:
        raise EvaluationError(
            f"{reference.file['name']} is of other images than the split now has: remove it, and it is built anew"
        )


def kept(folder: Path, extractor: Extractor, images: ImageSet, tap: str) -> Reference | None:
    """The statistics of a split from `folder`, where they go the first time they are asked for; None but on the first host.

    Raises:
      EvaluationError: those that lie there are of other pixels than the split's, or damaged.
    """
    path, devices = folder / file_name(images, extractor, tap), extractor.devices
    there = bool(devices.from_main(np.array(path.exists())))
    built = None if there else build(extractor, images, tap)
    with hosts.together():
        if not devices.is_main:
            return None
        if built is not None:
            save(path, built)
        found = load(path)
        if there:
            check_pixels(found, images)
        return found


def save(path: Path, reference: Reference) -> None:
    """As the head of this file says; OSError where it cannot be written."""
    if path.suffix != ".npz":
        raise EvaluationError(f"--output={path}: must end in .npz")
    arrays = {"mu": reference.gaussian.mean, "sigma": reference.gaussian.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    with replacing(path) as file:
        np.savez(file, **arrays, provenance=np.array(json.dumps(reference.provenance)))


def has_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics, rather than images; EvaluationError if it cannot be read."""
    return {"mu", "sigma"} <= set(_read(path, ()))


def load(path: Path) -> Reference:
    """Statistics of our own or of others.

    Raises:
      EvaluationError: no such file, a damaged one, or one without mu and sigma.
    """
    found = _read(path, ("mu", "sigma", "mu_s", "sigma_s", "features", "provenance"))
    missing = [name for name in ("mu", "sigma") if name not in found]
    if missing:
        raise EvaluationError(f"--reference={path} has no {' and no '.join(missing)}, only {', '.join(found)}")
    try:
        gaussian = Gaussian(found["mu"], found["sigma"])
        spatial = Gaussian(found["mu_s"], found["sigma_s"]) if {"mu_s", "sigma_s"} <= set(found) else None
        provenance = json.loads(str(found["provenance"])) if "provenance" in found else {}
    except ValueError as error:
        raise EvaluationError(f"--reference={path}: {error}") from error
    return Reference(gaussian, spatial, found.get("features"), provenance, fingerprint(path))


def check(reference: Reference, extractor: Extractor, tap: str, data: dict[str, Any] | None) -> None:
    """EvaluationError unless samples seen by `extractor` may be compared with `reference`.

    Args:
      data: the description of the run's own data set (`image_sets.of_split`), None for samples of unknown descent.
    """
    name = reference.file["name"] if reference.file else "the reference"
    width = reference.gaussian.mean.size
    if width != int(tap):
        raise EvaluationError(f"{name} has {width} features, these are {tap}: pass --features={width}, or {_REBUILD}")
    known, own = reference.provenance, extractor.provenance()
    if not known:
        return
    if known["resize"] != own["resize"]:
        wanted = known["resize"]
        raise EvaluationError(f"{name} was made with --resize={wanted}, this is {own['resize']}: pass that one, or {_REBUILD}")
    theirs, ours = known["inception"], own["inception"]
    if theirs["sha256"] != ours["sha256"]:
        raise EvaluationError(
            f"{name} was made with the Inception {theirs['name']} ({theirs['sha256'][:8]}), this is {ours['name']} "
            f"({ours['sha256'][:8]}): pass that one, or {_REBUILD}"
        )
    images = known["images"]
    for field in ("data", "image_size", "channels", "padding", "crop", "resize"):
        if data is not None and "data" in images and images[field] != data[field]:
            raise EvaluationError(f"{name} is of {field}={images[field]}, this run has {field}={data[field]}: {_REBUILD}")


def check_size(reference: Reference, images: ImageSet) -> None:
    """EvaluationError where `images` have another size than those of `reference`, as far as that is known."""
    size = reference.provenance.get("images", {}).get("image_size")
    if size is not None and images.shape[:2] != (size, size):
        height, width, _ = images.shape
        raise EvaluationError(f"samples are {width}x{height}, the reference is of {size}x{size} images: {_REBUILD}")


def _read(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz, None for those that are not wanted."""
    if not path.is_file():
        raise EvaluationError(f"--reference={path}: no such file; {_REBUILD}, or name train or test")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] if name in wanted else None for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise EvaluationError(f"--reference={path} is damaged or no .npz file ({error}): fetch or build it again") from error
