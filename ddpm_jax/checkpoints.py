"""Run directories: config.json, and checkpoints/ through Orbax.

A run directory describes itself: every command needs only `--workdir`. A checkpoint is complete or absent (Orbax renames a
finished folder into place), a resumed run repeats the interrupted one bit for bit, and nothing here deletes what it could
not read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ddpm_jax import config as configs
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
    "train.sample_every",
    "train.sample_images",
    "train.max_nonfinite_steps",
    "sampling.",
    "data.in_memory",
)


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


class Checkpoints:
    """The checkpoints of a run directory, newest last; a context manager that waits for saves under way.

    Args:
      keep: how many of the newest are kept. keep_every: besides, every one whose step it divides (0: none).
    """

    def __init__(self, workdir: Path, *, keep: int = 3, keep_every: int = 0) -> None:
        self.folder = (workdir / "checkpoints").absolute()
        self._failed = False
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                # Whether to save is the training loop's decision.
                save_decision_policy=policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,  # what a killed run left half-written
            ),
        )

    @classmethod
    def reading(cls, workdir: Path) -> Checkpoints:
        """For a look without a trace: nothing is created where there is nothing."""
        if not (workdir / "checkpoints").is_dir():
            raise WorkdirError(f"--workdir={workdir}: no checkpoint yet; train one with scripts/train.py")
        return cls(workdir)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._failed:  # closing waits for the saves under way, and would raise the same failure again
            self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Starts writing `state` as checkpoint `step`; training may go on at once, also with a donated state.

        Raises:
          WorkdirError: this save, or one still under way, cannot be written; the checkpoints before it stay as they are.
        """
        if step in self._manager.all_steps():
            return
        with self._saving(step):
            # Asked first, because a write that fails half-way is told by the storage library's threads in a hundred lines.
            needed = 1_000_000 + 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free on this disk")
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def wait(self) -> None:
        """Returns when every save has ended; WorkdirError as in `save`."""
        with self._saving(None):
            self._manager.wait_until_finished()

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
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises whatever its storage layer raised; the cause is kept and quoted
            before = [other for other in steps if other < step]
            remedy = f"go on from the one before with --step={before[-1]}" if before else "there is none before it"
            raise WorkdirError(f"checkpoint {step} in {self.folder} cannot be read ({reason(error)}); {remedy}") from error

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
        self._manager.reload()
        return newer


def reason(error: BaseException) -> str:
    """The cause in a few words: the operating system's where there is one, or the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    code = re.search(r"os_error_code='(\d+)'", text)  # the way tensorstore tells it, after several paths
    if code:
        return os.strerror(int(code[1]))
    return text.splitlines()[0][:160] if text else type(error).__name__
