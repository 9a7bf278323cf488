"""Run directories: config.json, and checkpoints/ through Orbax.

A run directory describes itself: every command needs only `--workdir`. A checkpoint is complete or absent (Orbax renames a
finished folder into place, and out of it before it is deleted) and carries the SHA-256 of what it holds, a resumed run repeats
the interrupted one bit for bit, and nothing here deletes what it could not read.

On several hosts every method is called by all of them; they share the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ddpm_jax import config as configs
from ddpm_jax import hosts
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError

# Fields that may change when a run goes on: none of them touches what a training step computes.
FREE_TO_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_images",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.sample_every",
    "train.sample_images",
    "train.max_nonfinite_steps",
    "sampling.",
    "data.in_memory",
)


REMOVED = "removed"  # inside checkpoints/: what is about to be deleted
HELD_OUT = "held_out_loss"
STORAGE = ("orbax", "tensorstore", "asyncio")  # packages; no other part of this project uses the last


class WorkdirError(UserError):
    """A run directory that cannot be used as asked."""


def claim_workdir(workdir: Path, config: Config) -> None:
    """Makes `workdir` the directory of this run, or checks that it is.

    Raises:
      WorkdirError: it belongs to a run of another config, or cannot be written.
    """
    path = workdir / "config.json"
    if path.exists():
        changed = configs.differences(load_workdir_config(workdir), config)
        fixed = [line for line in changed if not line.startswith(FREE_TO_CHANGE)]
        if fixed:
            more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
            raise WorkdirError(
                f"{workdir} holds a run of another config ({'; '.join(fixed[:3])}{more}): take another --workdir, "
                "or the config it was started with"
            )
    elif (workdir / "checkpoints").exists():
        raise WorkdirError(f"{workdir} has checkpoints but no config.json: put it back, or take another --workdir")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(configs.save_json(config))
            os.replace(part, path)
        except OSError as error:
            raise WorkdirError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def sole_trainer(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of `workdir` while this one trains; the lock ends with the process, however that ends.

    Raises:
      WorkdirError: another process of this machine is training there.
    """
    if jax.process_index() != 0:
        yield
        return
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirError(f"{workdir}: another process is training there; stop it, or take another --workdir") from error
        except OSError:
            pass  # some network file systems have no locks: then there is none to keep
        yield


def load_workdir_config(workdir: Path) -> Config:
    """The config a run directory was made with; WorkdirError if there is none or it cannot be read."""
    path = workdir / "config.json"
    if not path.is_file():
        raise WorkdirError(f"--workdir={workdir}: not a run directory, it has no config.json; make one with scripts/train.py")
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WorkdirError(f"{path} is damaged ({error}): restore it from the config file of the run") from error
    return configs.from_dict(values, str(path))


class LowestLoss(policies.PreservationPolicy):
    """Keeps the `count` checkpoints with the lowest of `losses`, of those that have one."""

    def __init__(self, count: int, losses: dict[int, float]) -> None:
        self._count, self._losses = count, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        ranked = sorted((step for step in steps if step in self._losses), key=self._losses.__getitem__)
        return [step in ranked[: self._count] for step in steps]


class Checkpoints:
    """The checkpoints of a run directory, newest last; a context manager that waits for saves under way.

    Args:
      keep: how many of the newest are kept. keep_every: besides, every one whose step it divides (0: none). keep_best: besides,
        so many with the lowest held-out loss.
      writable: False for a look without a trace, also while another process trains there.
    """

    def __init__(self, workdir: Path, *, keep: int = 3, keep_every: int = 0, keep_best: int = 0, writable: bool = True) -> None:
        quiet_storage_threads()
        self.folder = (workdir / "checkpoints").absolute()
        self._writable, self._failed = writable, False
        self._losses: dict[int, float] = {}
        options: dict[str, Any] = {"read_only": True}
        if writable:
            preserved = [policies.LatestN(keep), LowestLoss(keep_best, self._losses)]
            preserved += [policies.EveryNSteps(keep_every)] if keep_every else []
            options = {
                "preservation_policy": policies.AnyPreservationPolicy(preserved),
                # Whether to save is the training loop's decision.
                "save_decision_policy": policies.FixedIntervalPolicy(1),
                "todelete_subdir": REMOVED,
            }
            self._tidy(f"*{ocp.utils.TMP_DIR_SUFFIX}*", REMOVED)  # what a killed run left half-written or half-deleted
            hosts.barrier("tidied")
        # Lightweight: a damaged checkpoint must not keep us from opening the others.
        options = ocp.CheckpointManagerOptions(lightweight_initialize=True, **options)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._losses |= self._saved_losses() if keep_best else {}

    @classmethod
    def reading(cls, workdir: Path) -> Checkpoints:
        """For a look without a trace: nothing is created where there is nothing."""
        if not (workdir / "checkpoints").is_dir():
            raise WorkdirError(f"--workdir={workdir}: no checkpoint yet; train one with scripts/train.py")
        return cls(workdir, writable=False)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._failed:  # closing waits for the saves under way, and would raise the same failure again
            self._manager.close()
            if self._writable:
                self._tidy(REMOVED)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the lowest held-out loss of those that are there; None where none was measured."""
        losses = self._saved_losses()
        return min(losses, key=losses.__getitem__) if losses else None

    def save(self, step: int, state: Any, held_out: float | None = None) -> None:
        """Starts writing `state` as checkpoint `step`; training may go on at once, also with a donated state.

        Args:
          held_out: the held-out loss at this step, if it was measured.

        Raises:
          WorkdirError: this save, or one still under way, cannot be written; the checkpoints before it stay as they are.
        """
        if step in self._manager.all_steps():
            return
        with self._saving(step):
            self._manager.wait_until_finished()
            self._tidy(REMOVED)
            # Asked first, because a write that fails half-way has cost the time of all hosts.
            needed = 1_000_000 + 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free on this disk")
            about: dict[str, Any] = {"sha256": content_hash(state)}
            if held_out is not None and np.isfinite(held_out):
                about[HELD_OUT] = self._losses[step] = float(held_out)
            self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=about, force=True)

    def wait(self) -> None:
        """Returns when every save has ended; WorkdirError as in `save`."""
        with self._saving(None):
            self._manager.wait_until_finished()

    def _tidy(self, *patterns: str) -> None:
        """Deletes for good what is no checkpoint any more, or not yet; by its own name it would look like one."""
        if jax.process_index() == 0:
            for path in (path for pattern in patterns for path in self.folder.glob(pattern)):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from a thread and a storage library of Orbax's, under many names
            self._failed = True
            whole = [other for other in self.steps() if other != step]
            good = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
            raise WorkdirError(
                f"{self.folder}: a checkpoint cannot be written ({reason(error)}); {good}: make room and run the command again"
            ) from error

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state of checkpoint `step` (the newest by default).

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`s with shardings: structure, shapes, types and placement of what is
            wanted. The machine that saved need not look like this one.

        Raises:
          WorkdirError: no such checkpoint; or it cannot be read, with the command to go on from the one before it.
        """
        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        if step is None:
            raise WorkdirError(f"{self.folder}: no checkpoint yet; train one with scripts/train.py")
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise WorkdirError(f"{self.folder}: no checkpoint of step {step}; there are: {have}")
        try:
            return self._read(like, step)
        except Exception as error:  # Orbax raises whatever its storage layer raised; the cause is kept and quoted
            before = (other for other in reversed(steps) if other < step)
            whole = next((other for other in before if self._is_whole(like, other)), None)
            remedy = "no other before it can be read" if whole is None else f"go on from the one before with --step={whole}"
            damaged = WorkdirError(f"checkpoint {step} in {self.folder} cannot be read ({reason(error)}); {remedy}")
            damaged.step = whole
            raise damaged from error

    def _read(self, like: Any, step: int) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        saved = self._about(step).get("sha256")  # those of earlier versions have none
        if saved not in (None, content_hash(state)):
            raise ValueError("its content is not what was saved")
        return state

    def _about(self, step: int) -> dict[str, Any]:
        return self._manager.metadata(step).custom_metadata or {}

    def _saved_losses(self) -> dict[int, float]:
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Exception):  # a damaged one, in Orbax's many words, is not the best
                losses[step] = self._about(step)[HELD_OUT]
        return losses

    def _is_whole(self, like: Any, step: int) -> bool:
        try:
            self._read(like, step)
        except Exception:  # as above; what is asked is only whether
            return False
        return True

    def set_aside_after(self, step: int) -> list[int]:
        """Moves checkpoints newer than `step` to checkpoints.aside/, so that a run can go on from `step`; their steps."""
        newer = [other for other in self.steps() if other > step]
        if newer and jax.process_index() == 0:
            aside = self.folder.with_name("checkpoints.aside")
            aside.mkdir(exist_ok=True)
            for other in newer:
                target = aside / str(other)
                if target.exists():
                    shutil.rmtree(target)
                shutil.move(self.folder / str(other), target)
        hosts.barrier("set_aside")
        self._manager.reload()
        return newer


def content_hash(state: Any) -> str:
    """The SHA-256 of a tree of arrays: of the paths, types, shapes and bytes of its leaves.

    Compression and index of the files on disk are not all covered by checksums; a flipped bit could come back as a weight.
    """

    def of_leaf(item: tuple[Any, Any]) -> bytes:
        path, leaf = item
        array = np.asarray(leaf)
        digest = hashlib.sha256(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        leaves = list(pool.map(of_leaf, jax.tree_util.tree_leaves_with_path(state)))
    return hashlib.sha256(b"".join(leaves)).hexdigest()


@functools.cache
def quiet_storage_threads() -> None:
    """From here on no tracebacks of the storage library's own threads, a hundred lines where a disk is full.

    What fails there comes back from the save or the restore that asked, which tells it. Some threads outlive their save: the
    hooks stay for good, and leave all other failures to those that were there before.
    """
    of_thread, of_callback = threading.excepthook, sys.unraisablehook

    def heard(failure: Any) -> bool:
        modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(failure.exc_traceback))
        return not any(module.partition(".")[0] in STORAGE for module in modules)

    threading.excepthook = lambda failure: of_thread(failure) if heard(failure) else None
    sys.unraisablehook = lambda failure: of_callback(failure) if heard(failure) else None


def reason(error: BaseException) -> str:
    """The cause in a few words: the operating system's where there is one, or the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    code = re.search(r"os_error_code='(\d+)'", text)  # the way tensorstore tells it, after several paths
    if code:
        return os.strerror(int(code[1]))
    return text.splitlines()[0][:160] if text else type(error).__name__
