"""Tell the storage library under the checkpoints what stays, check what it wrote, keep it quiet."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import checkpoint_managers as policies

from ddpm_jax.files import parse_json, read_json

ITEM = "default"  # the folder that Orbax gives the one item of a checkpoint
HEADER = b"/.zarray"  # behind the name of an array: its header
WHOLE = ""  # the name of a whole state among its parts
# Packages whose threads are quiet; no other part of this project uses the last.
STORAGE = ("orbax", "tensorstore", "asyncio")


class LowestLoss(policies.PreservationPolicy):
    """Keeps the `count` checkpoints with the lowest of `losses`, of those that have one."""

    def __init__(self, count: int, losses: dict[int, float]) -> None:
        self._count, self._losses = count, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint whether it stays; Orbax asks before it removes any."""
        steps = [info.step for info in checkpoints]
        ranked = sorted(
            (step for step in steps if step in self._losses), key=self._losses.__getitem__
        )
        return [step in ranked[: self._count] for step in steps]


def custom_metadata(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself beside its arrays, such as its hashes.

    Asked through Orbax, it looks into every array as well, which is a third of a restore.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged.
    """
    return read_json(folder / "_CHECKPOINT_METADATA").get("custom_metadata") or {}


def check_written(folder: Path, leaves: int | None = None) -> None:
    """Check that the folder of a checkpoint holds every piece that reading it takes.

    It parses both metadata files and finds the header of each array through the manifest. The
    numbers themselves are not read: that would cost as much as the save.

    Args:
      folder: the checkpoint, under its final or its temporary name.
      leaves: how many arrays were saved; None where only the metadata can say.

    Raises:
      ValueError: a piece is missing or damaged; the message names it.
    """
    try:
        about = custom_metadata(folder)
        entries = read_json(folder / ITEM / "_METADATA")["tree_metadata"].values()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"its metadata cannot be read ({reason(error)})") from error
    # Checkpoints of earlier versions have none.
    if leaves is not None and "sha256" not in about:
        raise ValueError("its metadata has no SHA-256")
    arrays = [entry for entry in entries if entry["value_metadata"]["value_type"] != "None"]
    expected = len(arrays) if leaves is None else leaves
    count = sum(key.endswith(HEADER) for key in _open_store(folder).list().result())
    if count != expected:
        raise ValueError(f"its manifest lists {count} of {expected} arrays")


def await_hash(folder: Path, seconds: float = 60) -> None:
    """Wait until the metadata of a checkpoint being written holds its SHA-256.

    Orbax writes it in a thread of its own, for which its commit does not wait. On a busy machine
    the arrays are there first. When the time is over it is for `check_written` to complain.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if "sha256" in custom_metadata(folder):
                return
        time.sleep(0.01)


def _open_store(folder: Path) -> tensorstore.KvStore:
    """Open the pieces of a checkpoint's arrays: a header and chunks for each, by its name."""
    base = {"driver": "file", "path": f"{folder / ITEM}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def misfit(folder: Path, like: Any) -> str | None:
    """Say where the weights of a checkpoint are not those that `like` asks for.

    Args:
      folder: the checkpoint.
      like: a state, as arrays or shapes.

    Returns:
      The first difference in words; None where they fit, or where the checkpoint does not tell.
    """
    try:
        store = _open_store(folder)
        keys = [key.decode() for key in store.list().result() if key.endswith(HEADER)]
        headers = [store.read(key).result().value for key in keys]
        names = [key.removesuffix(HEADER.decode()) for key in keys]
        saved = {name: parse_json(header)["shape"] for name, header in zip(names, headers)}
    except Exception:  # damaged, in the storage library's many words
        return None
    leaves = jax.tree_util.tree_leaves_with_path(like)
    asked = {
        jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape)
        for path, leaf in leaves
    }
    for name in sorted({*saved, *asked}):
        before, now = saved.get(name), asked.get(name)
        if saved and before != now and name.startswith(("params.", "ema.")):
            return f"{name} is {before or 'not there'}, and would be {now or 'absent'}"
    return None


def remedy(error: BaseException, folder: Path) -> str:
    """Return what to do about a checkpoint that could not be written into `folder`."""
    if not folder.is_dir():
        return "the folder was moved or deleted during the run: put it back, and run it again"
    full = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or reason(error) in full:
        return "make room and run the command again"
    return "mend that and run the command again"


def free_place(path: Path) -> Path:
    """Return `path`, or where something is there already, the first free of PATH.1, PATH.2, ..."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(place for place in itertools.chain([path], numbered) if not place.exists())


def content_hashes(state: Any) -> dict[str, str]:
    """Return the SHA-256 of a tree of arrays, named WHOLE, and that of each of its parts.

    It covers the paths, types, shapes and bytes of the leaves. Compression and index of the files
    on disk are not all covered by checksums; a flipped bit could come back as a weight.

    With the hashes of the parts one can be read and checked without the others, which are `...`
    then.
    """

    def of_leaf(item: tuple[Any, Any]) -> bytes:
        path, leaf = item
        array = np.asarray(leaf)
        digest = hashlib.sha256(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return digest.digest()

    items = jax.tree_util.tree_leaves_with_path(state)
    items = [(path, leaf) for path, leaf in items if leaf is not ...]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        leaves = list(pool.map(of_leaf, items))
    digests: dict[str, list[bytes]] = {WHOLE: leaves}
    for (path, _), leaf in zip(items, leaves):
        digests.setdefault(part_of(path), []).append(leaf)
    return {name: hashlib.sha256(b"".join(some)).hexdigest() for name, some in digests.items()}


def part_of(path: Sequence[Any]) -> str:
    """Return the part of a state that a leaf belongs to, such as "params" or "ema.0.9999"."""
    first, *rest = (jax.tree_util.keystr((key,), simple=True) for key in path[:2])
    return f"{first}.{rest[0]}" if first == "ema" else first


@functools.cache
def quiet_storage_threads() -> None:
    """Silence the tracebacks of the storage library's threads, a hundred lines on a full disk.

    A failure of theirs comes back from the save or the restore that asked, which reports it. Some
    threads outlive their save: the hooks stay for good. All other failures go to the hooks that
    were there before.
    """
    thread_hook, callback_hook = threading.excepthook, sys.unraisablehook

    def is_ours(failure: Any) -> bool:
        modules = (
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(failure.exc_traceback)
        )
        return not any(module.partition(".")[0] in STORAGE for module in modules)

    threading.excepthook = lambda failure: thread_hook(failure) if is_ours(failure) else None
    sys.unraisablehook = lambda failure: callback_hook(failure) if is_ours(failure) else None


@functools.cache
def quiet_storage_log() -> None:
    """Drop what Orbax logs: settings that it corrects, and tracebacks of what it raises as well."""

    def is_ours(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    # The logger is absl's, which others may use: the place in the code tells the records apart.
    logging.getLogger("absl").addFilter(is_ours)


def reason(error: BaseException) -> str:
    """Return the cause in a few words: the operating system's, or the message's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    # tensorstore writes it this way, after several paths.
    code = re.search(r"os_error_code='(\d+)'", text)
    if code:
        return os.strerror(int(code[1]))
    return text.splitlines()[0][:160] if text else type(error).__name__
