"""Prepare data sets from original archives and folders of images, without TensorFlow.

CIFAR-10 and the MNIST family are read from their publishers' files and written as the stock TFDS
sets that they are (`builders.py`). CelebA's files, and any folder of images, become a set of its
own, cropped and shrunk or whole, with the recipe in its metadata. CelebA-HQ and LSUN go through
their stock builders, which need TensorFlow, once; so does CelebA where it is to be downloaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.data import builders, decoding
from ddpm_jax.data.builders import Examples
from ddpm_jax.data.folder import (
    Listing,
    announce,
    check_training_images,
    class_of,
    decode_file,
    folder_classes,
    scan,
    split_folder,
)
from ddpm_jax.data.originals import celeba, formats
from ddpm_jax.data.originals.download import CIFAR10_FILES, FASHION_FILES, MNIST_FILES, download
from ddpm_jax.data.prepared import KNOWN, METADATA, find_prepared
from ddpm_jax.data.sets import (
    check_disk,
    check_name,
    check_recipe,
    counted,
    exclusive,
    is_prepared,
    sides_of,
    sweep,
    write_parts,
)
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import DataError
from ddpm_jax.progress import say

# set -> (reader of its original files, where they are published, MiB that the prepared set takes)
_ORIGINALS = {
    "cifar10": (formats.read_cifar10, CIFAR10_FILES, 160),
    "mnist": (formats.read_mnist, MNIST_FILES, 40),
    "fashion_mnist": (formats.read_mnist, FASHION_FILES, 50),
}


def prepare(dataset: str, data_dir: str | Path, source: str | Path | None = None) -> Path:
    """Prepare one of the standard sets; one that is there already is left alone.

    Args:
      dataset: cifar10, mnist, fashion_mnist, celeb_a, celeb_a_hq/256, lsun/bedroom, ...
      data_dir: where prepared sets live; downloads go to data_dir/downloads.
      source: the original archive or folder; None downloads it.

    Returns:
      The folder of the prepared set.

    Raises:
      DataError: an unknown set, damaged files, no network, no TensorFlow where it is needed, a
        full disk.
    """
    data_dir, family = Path(data_dir), dataset.split("/")[0]
    if family not in KNOWN or (family in _ORIGINALS and family != dataset):
        raise DataError(
            f"dataset={dataset}: one of {', '.join(KNOWN)}, folder (digits need no preparing)"
        )
    if family in ("celeb_a_hq", "lsun") and family == dataset:
        example = {"celeb_a_hq": "256", "lsun": "bedroom"}[family]
        raise DataError(
            f"dataset={dataset} has configurations: name one, as in {dataset}/{example}"
        )
    if dataset == "celeb_a" and source is not None:
        return prepare_celeba(source, data_dir)
    if source is not None and not Path(source).exists():
        raise DataError(f"source={source}: no such file or folder")
    with exclusive(dataset, data_dir):
        if is_prepared(dataset, data_dir):
            return find_prepared(dataset, data_dir)
        sweep(dataset, data_dir)
        if family not in _ORIGINALS:
            builders.write_stock(dataset, data_dir, source)
            return find_prepared(dataset, data_dir)
        read, files, mebibytes = _ORIGINALS[dataset]
        check_disk(data_dir, mebibytes)
        if source is None:
            folder = data_dir / "downloads" / dataset
            paths = [download(url, folder, checksum) for url, checksum in files.items()]
            source = paths[0] if len(paths) == 1 else folder
        splits = read(source)
        examples = {split: _labelled(dataset, split, *arrays) for split, arrays in splits.items()}
        builder = builders.local_builder(tfds.builder_cls(dataset), examples, data_dir)
        if dataset == "cifar10":  # the stock builder reads the names from the archive
            builder.info.features["label"].names = list(formats.CIFAR10_LABELS)
        builders.write(builder)
    return find_prepared(dataset, data_dir)


def prepare_folder(
    source: str | Path,
    data_dir: str | Path,
    name: str,
    image_size: int | tuple[int, int],
    channels: int = 3,
    crop: str = "none",
    *,
    skip_bad: bool = False,
    classes: bool = False,
) -> Path:
    """Prepare a folder of images as the set `name`; one that is there already is left alone.

    The images are cropped and shrunk to a square of side image_size, or to (height, width), and
    stored as PNG. Every fiftieth, in the order of the sorted paths, makes the test split. How they
    were made is in metadata.json.

    Args:
      skip_bad: leave out images that do not decode or do not fit, and say how many.
      classes: take the folders right below `source` for classes, whose names the set keeps.

    Raises:
      BadImages: naming all that do not decode or do not fit.
      DataError: no images; classes that are none, as `folder_classes`; a full disk; a name that is
        taken, by a standard set or by a set made in another way.
    """
    data_dir, source = Path(data_dir), Path(source)
    check_name(name)
    height, width = sides = sides_of(image_size)
    if channels not in (1, 3, 4):
        raise DataError(f"channels={channels}: 1, 3 or 4")
    recipe = {
        "source": source.resolve().name,
        "crop": crop,
        "resize": f"{decoding.RESIZE} to {width}x{height}",
        "channels": channels,
    } | ({"classes": True} if classes else {})
    with exclusive(name, data_dir):
        if is_prepared(name, data_dir):
            path = find_prepared(name, data_dir)
            # The originals may be gone by now.
            recipe |= _contents(scan(source)) if source.is_dir() else {}
            check_recipe(name, path, recipe)
            return path
        sweep(name, data_dir)
        listing = scan(source)
        announce(listing.describe())
        recipe |= _contents(listing)
        check_disk(data_dir, len(listing.images) * height * width * channels // 2**20)

        parts = {split: split_folder(listing.images, split) for split in SPLITS}
        names = folder_classes(listing) if classes else ()
        check_training_images(listing, names, parts["train"])

        def example(path: Path) -> tuple[str, dict[str, Any]]:
            key = path.relative_to(source).as_posix()
            image = builders.png(decode_file(path, crop, sides, channels))
            label = {"label": class_of(path, source)} if classes else {}
            return key, {"image": image, "filename": key} | label

        stock = builders.folder_builder(name, (*sides, channels), recipe, names)
        write_parts(stock, data_dir, parts, example, source, skip_bad)
    return find_prepared(name, data_dir)


def prepare_celeba(
    source: str | Path,
    data_dir: str | Path,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    crop: str | None = None,
    *,
    skip_bad: bool = False,
) -> Path:
    """Prepare CelebA from its files, in its official split; a set that is there is left alone.

    Whole faces are stored as they are, as the set celeb_a, and a config says how they are cropped
    and shrunk. With `image_size` they are cropped and shrunk here, and stored as PNG.

    Args:
      source: what `open_faces` takes.
      name: of the set; see `celeba_name`.
      crop: celeba64 where there is an image_size, by default.
      skip_bad: leave out faces that are missing, do not decode or do not fit, and say how many.

    Raises:
      BadImages: naming all that do not decode or do not fit.
      DataError: as `open_faces`; faces are missing; a full disk; a name that is taken.
    """
    data_dir, source = Path(data_dir), Path(source)
    crop = crop or ("none" if image_size is None else "celeba64")
    if image_size is None and crop != "none":
        raise DataError(
            f"crop={crop}: to which size? give image_size, or leave the crop to a config"
        )
    sides = None if image_size is None else sides_of(image_size)
    name = celeba_name(name, sides)
    if sides is not None or name != "celeb_a":
        check_name(name)
    recipe: dict[str, Any] = {
        "crop": crop,
        "resize": f"{decoding.RESIZE} to {sides[1]}x{sides[0]}" if sides else "none",
        "channels": 3,
    }
    with exclusive(name, data_dir):
        if is_prepared(name, data_dir):
            path = find_prepared(name, data_dir)
            if source.exists():  # the originals may be gone by now
                with celeba.open_faces(source) as faces:
                    recipe |= faces.contents()
            if (path / METADATA).is_file():  # TFDS's own set celeb_a has none
                check_recipe(name, path, recipe)
            return path
        if not source.exists():
            raise DataError(f"source={source}: no such file or folder")
        sweep(name, data_dir)
        with celeba.open_faces(source) as faces:
            if not skip_bad:
                faces.check_whole()
            say(faces.describe())
            recipe |= faces.contents()
            size = 8192 if sides is None else 3 * sides[0] * sides[1]  # a face's JPEG has 7,000
            check_disk(data_dir, len(faces) * size // 2**20)
            height, width = sides or faces.shape()

            def example(key: str) -> tuple[str, dict[str, Any]]:
                blob = faces.read(key)
                image = faces.decode(key, blob)
                if sides is not None:
                    blob = builders.png(decoding.fit(image, crop, sides, f"{source}: {key}"))
                elif image.size != (width, height):
                    raise DataError(
                        f"{source}: {key} is {image.width}x{image.height}, not {width}x{height} "
                        "as the first: give image_size"
                    )
                return key, {"image": blob, "filename": key}

            encoding = "jpeg" if sides is None else "png"
            stock = builders.folder_builder(name, (height, width, 3), recipe, encoding=encoding)
            write_parts(stock, data_dir, faces.names, example, source, skip_bad)
    return find_prepared(name, data_dir)


def celeba_name(name: str | None, image_size: int | tuple[int, int] | None) -> str:
    """Return the name of a set of CelebA: `name`, or celeb_a whole, celeba64 at 64x64 pixels."""
    if image_size is None:
        return name or "celeb_a"
    return name or f"celeba{'x'.join(map(str, dict.fromkeys(np.ravel(image_size).tolist())))}"


def _contents(listing: Listing) -> dict[str, Any]:
    """Return what tells folders of one name apart: number, names and sizes of the images."""
    digest = hashlib.sha256()
    for key, path in zip(listing.names(), listing.images):
        digest.update(f"{key} {path.stat().st_size}\n".encode())
    return {"images": len(listing.images), "files": digest.hexdigest()[:16]}


def _labelled(dataset: str, split: str, images: np.ndarray, labels: np.ndarray) -> Examples:
    """Yield keys and features as the stock builders do, whence the same order of examples."""
    for index, image in enumerate(counted(images, f"{dataset} {split}")):
        png = builders.png(Image.fromarray(image.squeeze()))
        features = {"image": png, "label": int(labels[index])}
        if dataset == "cifar10":
            features["id"] = f"{split}_{index:05d}"
        yield index, features
