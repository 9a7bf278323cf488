"""Save and restore the state of a run in checkpoints/ of its directory, through Orbax.

A checkpoint is complete or absent: Orbax renames a finished folder into place, and out of it
before it is deleted. It carries the SHA-256 of what it holds, and an older one goes only after the
new one was seen to be whole. A resumed run repeats the interrupted one bit for bit, and nothing
here deletes what it could not read.

On several hosts every method is called by all of them; they share the disk.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ddpm_jax.errors import WorkdirError
from ddpm_jax.parallel import hosts
from ddpm_jax.runs.parts import describe_content, read_parts
from ddpm_jax.runs.storage import (
    LowestLoss,
    await_hash,
    check_written,
    custom_metadata,
    free_place,
    misfit,
    quiet_storage_log,
    quiet_storage_threads,
    reason,
    remedy,
)
from ddpm_jax.runs.workdir import check_path

REMOVED = "removed"  # inside checkpoints/: what is about to be deleted
HELD_OUT = "held_out_loss"


class Checkpoints:
    """The checkpoints of a run directory, newest last; as a context it waits for saves under way.

    Args:
      keep: how many of the newest are kept.
      keep_every: besides, every one whose step it divides; 0 for none.
      keep_best: besides, so many with the lowest held-out loss.
      writable: False for a look without a trace, also while another process trains there.

    Raises:
      WorkdirError: checkpoints cannot be kept under this path, see `check_path`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 3,
        keep_every: int = 0,
        keep_best: int = 0,
        writable: bool = True,
    ) -> None:
        check_path(workdir)
        quiet_storage_threads()
        quiet_storage_log()
        self.folder = (workdir / "checkpoints").resolve()  # the library writes no path with ".."
        self._writable, self._failed = writable, False
        self._pending: tuple[int, int] | None = None  # step and number of arrays of the last save
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
                # It runs before the rename; its error keeps all older checkpoints.
                "async_options": ocp.AsyncOptions(post_finalization_callback=self._check_pending),
            }
            # What a killed run left half-written or half-deleted.
            self._tidy(f"*{ocp.utils.TMP_DIR_SUFFIX}*", REMOVED)
            hosts.barrier("tidied")
        # Lightweight, and with a handler, which Orbax would otherwise infer from the newest
        # checkpoint: a damaged one must not keep us from opening the others.
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(lightweight_initialize=True, **options),
            item_handlers=ocp.PyTreeCheckpointHandler(),
        )
        self._losses |= self._saved_losses() if keep_best else {}

    @classmethod
    def reading(cls, workdir: Path) -> Checkpoints:
        """Open the checkpoints for a look without a trace.

        Raises:
          WorkdirError: there are none; nothing is created.
        """
        if not (workdir / "checkpoints").is_dir():
            raise WorkdirError(f"workdir={workdir}: no checkpoint yet; train one with ddpm train")
        return cls(workdir, writable=False)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Closing waits for the saves under way, and would raise the same failure again.
        if not self._failed:
            # A disk that is full for another file is for these too: the first failure is the cause.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                self._manager.close()
                if self._writable:
                    self._tidy(REMOVED)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, rising."""
        return sorted(self._manager.all_steps())

    def best(self) -> int:
        """Return the step of the checkpoint whose held-out loss is the lowest of those here.

        Raises:
          WorkdirError: no checkpoint has a held-out loss.
        """
        losses = self._saved_losses()
        if not losses:
            raise WorkdirError(
                f"{self.folder}: step=best: no checkpoint has a held-out loss, which "
                "train.eval_images and an eval_every that divides checkpoint_every give; "
                f"there are: {self._listing()}"
            )
        return min(losses, key=losses.__getitem__)

    def save(self, step: int, state: Any, held_out: float | None = None) -> None:
        """Start writing `state` as checkpoint `step`; it may be given to the next step at once.

        Args:
          held_out: the held-out loss at this step, if it was measured.

        Raises:
          WorkdirError: this save, or one still under way, cannot be written, or what was written
            is not whole; the checkpoints before it stay as they are.
        """
        hosts.meeting("saving a checkpoint")
        if step in self._manager.all_steps():
            return
        with self._saving(step):
            self._manager.wait_until_finished()
            self._tidy(REMOVED)
            # Asked first, because a write that fails half-way has cost the time of all hosts.
            needed = 1_000_000 + 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    errno.ENOSPC,
                    f"it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free on this disk",
                )
            about = describe_content(state)
            if held_out is not None and np.isfinite(held_out):
                about[HELD_OUT] = self._losses[step] = float(held_out)
            self._pending = step, len(jax.tree.leaves(state))
            self._manager.save(
                step, args=ocp.args.PyTreeSave(state), custom_metadata=about, force=True
            )

    def wait(self) -> None:
        """Return when every save has ended.

        Raises:
          WorkdirError: as `save`.
        """
        with self._saving(None):
            self._manager.wait_until_finished()

    def _check_pending(self) -> None:
        """Check the checkpoint that Orbax is about to rename into place; a failed check ends it."""
        if jax.process_index() == 0:
            assert self._pending is not None
            step, leaves = self._pending
            temporary = self.folder.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*")
            folder = next(temporary, self.folder / str(step))
            await_hash(folder)
            check_written(folder, leaves)

    def _tidy(self, *patterns: str) -> None:
        """Delete for good what is no checkpoint any more, or not yet, but has the name of one."""
        if jax.process_index() == 0:
            for path in (path for pattern in patterns for path in self.folder.glob(pattern)):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        try:
            yield
        # It comes from a thread and a storage library of Orbax's, under many names.
        except Exception as error:
            self._failed = True
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # another host was lost while they met over this save, and no disk failed
            raise WorkdirError(
                f"{self.folder}: a checkpoint cannot be written ({reason(error)}); "
                f"{self._last_good(step)}: {remedy(error, self.folder)}"
            ) from error

    def _last_good(self, failed: int | None) -> str:
        """Describe the newest checkpoint on disk that has every piece, whatever Orbax remembers."""
        folders = {int(path.name): path for path in self.folder.glob("*") if path.name.isdecimal()}
        for step in sorted(folders.keys() - {failed}, reverse=True):
            with contextlib.suppress(Exception):  # damaged, in the storage library's many words
                check_written(folders[step])
                return f"the last good checkpoint is {step}"
        damaged = "no checkpoint before it is known to be whole"
        return damaged if folders.keys() - {failed} else "there is no checkpoint yet"

    def check(self, step: int | Literal["best"] | None) -> int:
        """Return the number of the checkpoint that `restore` would read; nothing is read.

        Raises:
          WorkdirError: there is no such checkpoint.
        """
        step = self.best() if step == "best" else step
        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        if step is None:
            raise WorkdirError(f"{self.folder}: no checkpoint yet; train one with ddpm train")
        if step not in steps:
            raise WorkdirError(
                f"{self.folder}: no checkpoint of step {step}; there are: {self._listing()}"
            )
        return step

    def restore(
        self,
        like: Any,
        step: int | Literal["best"] | None = None,
        parts: Collection[str] | None = None,
    ) -> Any:
        """Read the state of a checkpoint, or parts of it.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`s with shardings: structure, shapes,
            types and placement of the result. The machine that saved need not look like this one.
          step: which checkpoint; "best" is `best`, None the newest.
          parts: those that are wanted, by the names of `part_of` in runs/storage.py; None for all.

        Returns:
          A tree as `like`, whose content is that of the state saved; with `...` for each leaf
          of another part.

        Raises:
          WorkdirError: no such checkpoint; or one of another network; or it cannot be read. The
            message and `error.step` then name the newest before it that can, which was tried.
        """
        hosts.meeting("reading a checkpoint")
        step, steps = self.check(step), self.steps()
        try:
            return self._read(like, step, parts)
        # Orbax raises whatever its storage layer raised; the cause is kept and quoted.
        except Exception as error:
            if difference := misfit(self.folder / str(step), like):
                raise WorkdirError(
                    f"checkpoint {step} in {self.folder} is of another network than config.json "
                    f"({difference}): make config.json what it was when the run began"
                ) from error
            before = (other for other in reversed(steps) if other < step)
            whole = next((other for other in before if self._is_whole(like, other, parts)), None)
            remedy = "no other before it can be read"
            if whole is not None:
                remedy = f"go on from the one before with step={whole}"
            damaged = WorkdirError(
                f"checkpoint {step} in {self.folder} cannot be read ({reason(error)}); {remedy}"
            )
            damaged.step = whole
            raise damaged from error

    def sha256(self, step: int) -> str | None:
        """Return the hash of checkpoint `step`; None if an early version wrote it, or damaged."""
        with contextlib.suppress(Exception):
            return self._about(step).get("sha256")

    def _listing(self) -> str:
        return ", ".join(map(str, self.steps())) or "none"

    def _read(self, like: Any, step: int, parts: Collection[str] | None) -> Any:
        return read_parts(self._manager, step, like, self._about(step), parts)

    def _about(self, step: int) -> dict[str, Any]:
        return custom_metadata(self.folder / str(step))

    def _saved_losses(self) -> dict[int, float]:
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Exception):  # one that is damaged is not the best
                losses[step] = self._about(step)[HELD_OUT]
        return losses

    def _is_whole(self, like: Any, step: int, parts: Collection[str] | None) -> bool:
        try:
            if jax.process_count() > 1:  # reading waits for hosts that may have read the first one
                check_written(self.folder / str(step))
            else:
                self._read(like, step, parts)
        except Exception:  # as above; what is asked is only whether
            return False
        return True

    def set_aside_after(self, step: int) -> list[int]:
        """Move checkpoints newer than `step` to checkpoints.aside/, so that a run can go on there.

        Where one of the same step lies there, such as 6, it stays, and the other becomes 6.1.

        Returns:
          The steps of the checkpoints moved.
        """
        newer = [other for other in self.steps() if other > step]
        if newer and jax.process_index() == 0:
            aside = self.folder.with_name("checkpoints.aside")
            aside.mkdir(exist_ok=True)
            for other in newer:
                shutil.move(self.folder / str(other), free_place(aside / str(other)))
        hosts.barrier("set_aside")
        self._manager.reload()
        return newer
