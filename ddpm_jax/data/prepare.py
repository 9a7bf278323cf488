"""Original archives and folders of images into prepared sets, without TensorFlow.

The stock TFDS builders of CIFAR-10 and the MNIST family need TensorFlow to open files and to encode PNG, nothing else.
A subclass that keeps the stock name, version and features but reads local files and yields PNG bytes writes the very
set that the stock `tfds.data_source` reads, in the same order of examples. CelebA, CelebA-HQ and LSUN go through their
stock builders, which do need TensorFlow, once. A folder of images becomes a set of its own, cropped and shrunk, with
the recipe in its metadata.

Preparing is atomic: TFDS writes into incomplete.* and renames it when all is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.data import decoding, formats
from ddpm_jax.data.download import download
from ddpm_jax.data.errors import DataError
from ddpm_jax.data.prepared import KNOWN, find_prepared, unfinished
from ddpm_jax.data.sources import SPLITS, decode_file, list_images, split_folder
from ddpm_jax.progress import Progress

_CIFAR10_FILES = {"https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"}
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_MNIST_FILES = {
    _MNIST + "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    _MNIST + "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    _MNIST + "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    _MNIST + "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_FILES = {
    _FASHION + "train-images-idx3-ubyte.gz": "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    _FASHION + "train-labels-idx1-ubyte.gz": "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    _FASHION + "t10k-images-idx3-ubyte.gz": "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    _FASHION + "t10k-labels-idx1-ubyte.gz": "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# set -> (reader of its original files, where they are published, MiB of disk that the prepared set takes)
_ORIGINALS = {
    "cifar10": (formats.read_cifar10, _CIFAR10_FILES, 160),
    "mnist": (formats.read_mnist, _MNIST_FILES, 40),
    "fashion_mnist": (formats.read_mnist, _FASHION_FILES, 50),
}
Examples = Iterable[tuple[Any, dict[str, Any]]]  # (key, features), as TFDS wants them


def prepare(dataset: str, data_dir: str | Path, source: str | Path | None = None) -> Path:
    """Prepares one of the standard sets; what is there already is left alone.

    Args:
      dataset: cifar10, mnist, fashion_mnist, celeb_a, celeb_a_hq/256, lsun/bedroom, ...
      data_dir: where prepared sets live; downloads go to data_dir/downloads.
      source: the original archive or folder; None downloads it.

    Returns:
      The folder of the prepared set.

    Raises:
      DataError: an unknown set, damaged files, no network, no TensorFlow where it is needed, a full disk.
    """
    data_dir, family = Path(data_dir), dataset.split("/")[0]
    if family not in KNOWN or (family in _ORIGINALS and family != dataset):
        raise DataError(f"--dataset={dataset}: one of {', '.join(KNOWN)}, folder (digits need no preparing)")
    if family in ("celeb_a_hq", "lsun") and family == dataset:
        example = {"celeb_a_hq": "256", "lsun": "bedroom"}[family]
        raise DataError(f"--dataset={dataset} has configurations: name one, as in {dataset}/{example}")
    if source is not None and not Path(source).exists():
        raise DataError(f"--source={source}: no such file or folder")
    with _exclusive(dataset, data_dir):
        if is_prepared(dataset, data_dir):
            return find_prepared(dataset, data_dir)
        _sweep(dataset, data_dir)
        if family not in _ORIGINALS:
            _through_tfds(dataset, data_dir, source)
            return find_prepared(dataset, data_dir)
        read, files, mebibytes = _ORIGINALS[dataset]
        _check_disk(data_dir, mebibytes)
        if source is None:
            folder = data_dir / "downloads" / dataset
            paths = [download(url, folder, checksum) for url, checksum in files.items()]
            source = paths[0] if len(paths) == 1 else folder
        splits = read(source)
        examples = {split: _labelled(dataset, split, *arrays) for split, arrays in splits.items()}
        builder = _local_builder(tfds.builder_cls(dataset), examples)(data_dir=data_dir, file_format="array_record")
        if dataset == "cifar10":  # the stock builder reads the names from the archive
            builder.info.features["label"].names = list(formats.CIFAR10_LABELS)
        _write(builder)
    return find_prepared(dataset, data_dir)


def prepare_folder(
    source: str | Path, data_dir: str | Path, name: str, image_size: int, channels: int = 3, crop: str = "none"
) -> Path:
    """Prepares a folder of images as the set `name`: cropped and shrunk to image_size x image_size, stored as PNG.

    Every fiftieth image, in the order of the sorted paths, makes the test split. How the images were made is in
    metadata.json.

    Raises:
      DataError: no images, or one that does not decode or does not fit; a full disk; a name that is taken.
    """
    data_dir, source = Path(data_dir), Path(source)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in (*KNOWN, "digits", "folder", "downloads"):
        raise DataError(f"--name={name}: lower-case letters, digits and '_', and not the name of a standard set")
    if image_size < 1 or channels not in (1, 3):
        raise DataError(f"--image_size={image_size} --channels={channels}: a size of at least 1, and 1 or 3 channels")
    with _exclusive(name, data_dir):
        if is_prepared(name, data_dir):
            return find_prepared(name, data_dir)
        _sweep(name, data_dir)
        paths = list_images(source)
        _check_disk(data_dir, len(paths) * image_size**2 * channels // 2**20)
        recipe = {
            "source": source.resolve().name,
            "images": len(paths),
            "crop": crop,
            "resize": f"{decoding.RESIZE} to {image_size}x{image_size}",
            "channels": channels,
        }
        shape = (image_size, image_size, channels)

        def examples(split: str) -> Examples:
            for path in _counted(split_folder(paths, split), f"{name} {split}"):
                key = path.relative_to(source).as_posix()
                yield key, {"image": _png(decode_file(path, crop, image_size, channels)), "filename": key}

        stock = _folder_builder(name, shape, recipe)
        local = _local_builder(stock, {split: examples(split) for split in SPLITS})
        _write(local(data_dir=data_dir, file_format="array_record"))
    return find_prepared(name, data_dir)


def is_prepared(dataset: str, data_dir: str | Path) -> bool:
    try:
        find_prepared(dataset, data_dir)
    except DataError:
        return False
    return True


def _labelled(dataset: str, split: str, images: np.ndarray, labels: np.ndarray) -> Examples:
    """Keys and features as the stock builders give them, whence the same order of examples."""
    for index, image in enumerate(_counted(images, f"{dataset} {split}")):
        features = {"image": _png(Image.fromarray(image.squeeze())), "label": int(labels[index])}
        if dataset == "cifar10":
            features["id"] = f"{split}_{index:05d}"
        yield index, features


def _counted(images: Sequence[Any], title: str) -> Iterator[Any]:
    with Progress(len(images), unit="image") as progress:
        for image in images:
            yield image
            progress.update(of=title)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # twice as fast as the default, and 2 % larger
    return buffer.getvalue()


def _local_builder(stock: type, examples: dict[str, Examples]) -> type:
    """The stock builder, taking its examples from here."""

    class LocalBuilder(stock, skip_registration=True):
        name = stock.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
            return examples

    return LocalBuilder


def _folder_builder(set_name: str, shape: tuple[int, int, int], recipe: dict[str, Any]) -> type:
    class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="; ".join(f"{key}: {value}" for key, value in recipe.items()),
                features=tfds.features.FeaturesDict(
                    {"image": tfds.features.Image(shape=shape, encoding_format="png"), "filename": tfds.features.Text()}
                ),
                metadata=tfds.core.MetadataDict(recipe),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
            raise NotImplementedError("LocalBuilder gives the examples")

        def _generate_examples(self) -> Examples:
            raise NotImplementedError("LocalBuilder gives the examples")

    return FolderBuilder


def _write(builder: Any, manual_dir: Path | None = None) -> None:
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir, try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    tfds.disable_progress_bar()  # ours counts images
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size, whatever it does
            builder.download_and_prepare(download_config=config)
    except RuntimeError as error:  # array_record's word for whatever the file system refuses
        raise DataError(f"{builder.name} cannot be written, nothing of it is kept: {error}") from error


def _through_tfds(dataset: str, data_dir: Path, source: str | Path | None) -> None:
    needed = ["tensorflow", "tensorflow_io"] if dataset.startswith("lsun") else ["tensorflow"]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise DataError(
            f"preparing {dataset} takes {' and '.join(missing)}, once: pip install -r requirements-tensorflow.txt"
            f"{' tensorflow-io' if 'tensorflow_io' in missing else ''}, or prepare its images with --dataset=folder"
        )
    manual_dir = None if source is None else Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        if builder.name == "celeb_a_hq":  # TFDS does not download it, and says so with a TypeError
            archive = builder.builder_config.file_name
            if manual_dir is None or not (manual_dir / archive).is_file():
                raise DataError(f"{dataset} cannot be downloaded: --source must be the folder with {archive}")
        _write(builder, manual_dir)
    except DataError:
        raise
    except (AssertionError, ValueError, ImportError, tfds.download.DownloadError) as error:
        raise DataError(f"TFDS cannot prepare {dataset}: {error}") from error


def _check_disk(data_dir: Path, mebibytes: int) -> None:
    free = shutil.disk_usage(data_dir).free >> 20
    if free < mebibytes:
        raise DataError(f"{data_dir}/ has {free} MiB free, the set takes about {mebibytes}: make room or move --data_dir")


def _sweep(dataset: str, data_dir: Path) -> None:
    """Removes what an interrupted preparation left; nobody else is writing, since the caller holds the lock."""
    for path in unfinished(dataset, data_dir):
        shutil.rmtree(path)


@contextlib.contextmanager
def _exclusive(dataset: str, data_dir: Path) -> Iterator[None]:
    """One preparation of a set at a time; the lock dies with the process that holds it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / f".{dataset.replace('/', '.')}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is preparing {dataset} in {data_dir}/: wait for it to end") from error
        yield
