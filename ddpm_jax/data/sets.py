"""Make prepared sets, one process at a time: their lock, their names, their recipes, their images.

Preparing is atomic: TFDS writes into incomplete.* and renames it when all is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.config import DataConfig
from ddpm_jax.data import builders
from ddpm_jax.data.builders import Examples
from ddpm_jax.data.prepared import KNOWN, METADATA, find_prepared, unfinished
from ddpm_jax.errors import BadImages, DataError
from ddpm_jax.files import read_json
from ddpm_jax.progress import Progress, say


def is_prepared(dataset: str, data_dir: str | Path) -> bool:
    """Tell whether a set is there, whole."""
    try:
        find_prepared(dataset, data_dir)
    except DataError:
        return False
    return True


@contextlib.contextmanager
def exclusive(dataset: str, data_dir: Path) -> Iterator[None]:
    """Hold the lock of a set, which dies with the process that holds it.

    After an error the folders that were made for the set are gone, unless there is something in
    them.

    Raises:
      DataError: another process holds it.
    """
    new = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / f".{dataset.replace('/', '.')}.lock"
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is preparing {dataset} in {data_dir}/: wait for it to end"
            ) from error
        except OSError:
            pass  # some network file systems have no locks: then there is none to hold
        try:
            yield
        except BaseException:
            if new:
                path.unlink(missing_ok=True)
            downloads = data_dir / "downloads"
            own = [data_dir / dataset, downloads / dataset, downloads / "extracted", downloads]
            for folder in (*own, own[0].parent, *new):
                with contextlib.suppress(OSError):  # not empty, or not there
                    folder.rmdir()
            raise


def sweep(dataset: str, data_dir: Path) -> None:
    """Remove what an interrupted preparation left.

    Nobody else is writing, since the caller holds the lock.
    """
    for path in unfinished(dataset, data_dir):
        shutil.rmtree(path)


def check_name(name: str) -> None:
    """Raise DataError unless a set of one's own can have this name."""
    reserved = (*KNOWN, "digits", "folder", "downloads")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in reserved:
        raise DataError(
            f"name={name}: lower-case letters, digits and '_', and not the name of a standard set"
        )


def sides_of(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width; DataError unless they are positive."""
    sides = DataConfig(image_size=image_size).sides
    if min(sides) < 1:
        raise DataError(f"image_size={image_size}: at least 1")
    return sides


def check_recipe(name: str, path: Path, recipe: dict[str, Any]) -> None:
    """Raise DataError naming what differs between `recipe` and that of the prepared set.

    A set prepared before an entry existed does not have it, and then it is not compared; without
    "classes" it has none.
    """
    recipe = {"classes": False} | recipe
    try:
        stored = {"classes": False} | dict(read_json(path / METADATA))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"data set {name!r} is damaged ({METADATA}: {error}): delete {path} and prepare it anew"
        ) from error
    words = {"files": "the names or sizes of the files"}
    other = [
        words.get(key) or f"{key}={stored[key]}, not {value}"
        for key, value in recipe.items()
        if key in stored and stored[key] != value
    ]
    if other:
        raise DataError(
            f"name={name}: this set is prepared in {path} already, and differs in "
            f"{'; '.join(other)}: take another name, or delete {path} to prepare it anew"
        )


def check_disk(data_dir: Path, mebibytes: int) -> None:
    """Raise DataError unless `data_dir` has room for a set of so many MiB."""
    free = shutil.disk_usage(data_dir).free >> 20
    if free < mebibytes:
        raise DataError(
            f"data_dir={data_dir} has {free} MiB free, the set takes about {mebibytes}: "
            "make room or name another data_dir"
        )


def write_parts(
    stock: type,
    data_dir: Path,
    parts: Mapping[str, Sequence[Any]],
    example: Callable[[Any], tuple[str, dict[str, Any]]],
    source: Path,
    skip_bad: bool,
) -> None:
    """Write a set whose splits are `parts`, and collect what is bad in all of them.

    Args:
      stock: from `builders.folder_builder`.
      example: (entry of a part) -> key and features.
      source: how messages call where they are from.

    Raises:
      BadImages: naming all for which `example` has raised DataError, unless `skip_bad`; and where
        nothing else is left of a split.
    """
    bad: dict[str, list[str]] = {split: [] for split in parts}
    *_, last = parts

    def examples(split: str) -> Examples:
        for entry in counted(parts[split], f"{stock.name} {split}"):
            try:
                pair = example(entry)
            except DataError as error:
                bad[split].append(str(error))
            else:
                yield pair
        reasons = [reason for part in bad.values() for reason in part]
        if len(bad[split]) == len(parts[split]) or (reasons and not skip_bad and split == last):
            raise BadImages(reasons, sum(map(len, parts.values())))

    splits = {split: examples(split) for split in parts}
    builders.write(builders.local_builder(stock, splits, data_dir))
    if any(bad.values()):
        say(f"{source}: {sum(map(len, bad.values())):,} images cannot be used, left out")


def counted(images: Sequence[Any], title: str) -> Iterator[Any]:
    """Yield images one by one, and show how many are done."""
    with Progress(len(images), unit="image") as progress:
        for image in images:
            yield image
            progress.update(of=title)
