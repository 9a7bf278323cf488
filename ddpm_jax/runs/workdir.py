"""Claim a run directory for one run, and read the config that it was made with."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from ddpm_jax.config import Config, SamplingConfig, differences, from_dict, save_json
from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import read_json
from ddpm_jax.runs.data_origin import read_origin

# Fields that may change when a run goes on: none of them touches what a training step computes.
# Accumulation and remat change its rounding alone, as another number of devices does; skip_bad
# leaves out what has gone bad since, and what is held out stays held out then.
FREE_TO_CHANGE = (
    "model.remat",
    "train.accumulation",
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
    *(f"sampling.{field.name}" for field in dataclasses.fields(SamplingConfig)),
    "data.in_memory",
    "data.skip_bad",
)
OWN_NETWORK = "own_network.txt"  # stands in the run of a network that config.json does not describe
CONFIG = "config.json"
LABELS = {  # by what weights.json says of a set of weights
    "ema": "ema, imported",
    "raw": "raw, imported",
    "unknown": "imported, raw or ema is not known",
}
GLOB_CHARACTERS = "*?[\\"
RECORD = "weights.json"  # where the weights of an imported run come from


def check_path(workdir: Path) -> None:
    """Check that checkpoints written under `workdir` can be read back.

    The checkpoint library passes the absolute path to `glob` as it is: it would find none of its
    own files, or those of another run.

    Raises:
      WorkdirError: the absolute path holds a character that `glob` or the library reads as another.
    """
    try:
        str(workdir.resolve()).encode()
    except UnicodeEncodeError as error:
        raise WorkdirError(
            f"workdir={workdir}: the checkpoint library takes no path whose letters are not known "
            "here: set PYTHONUTF8=1 or LANG=C.UTF-8, or name another workdir"
        ) from error
    special = sorted(set(GLOB_CHARACTERS) & set(str(workdir.resolve())))
    if special:
        raise WorkdirError(
            f"workdir={workdir}: checkpoints cannot be read back from a path with "
            f"{' '.join(special)} in it, such as {workdir.resolve()}: name another workdir"
        )


def check_free(workdir: Path) -> bool:
    """Check that an import may write `workdir`, and that its path serves.

    It may where there is nothing, and in the place of an import on which nothing was trained, drawn
    or measured yet, so that a wrong guess of a setting can be put right.

    Returns:
      Whether such an import lies there.

    Raises:
      WorkdirError: there is something else.
    """
    check_path(workdir)
    if not workdir.exists():
        return False
    entries = {path.name for path in workdir.iterdir()} if workdir.is_dir() else {""}
    if entries == {"config.json", "checkpoints", RECORD}:
        if checkpoint_folders(workdir) <= {"0"}:
            return True
    if entries:
        raise WorkdirError(f"workdir={workdir} is not empty: take another")
    return False


def checkpoint_folders(workdir: Path) -> set[str]:
    """Return the names of the checkpoints' folders, those of unfinished saves included."""
    return {path.name for path in (workdir / "checkpoints").glob("[0-9]*")}


def free_to_change(config: Config) -> tuple[str, ...]:
    """List the fields that may change when a run of `config` goes on.

    A learning rate that decays towards train.steps depends on it at every step. The loss of a
    student clips what its teacher predicts as sampling does.
    """
    fixed = () if config.optimizer.schedule == "constant" else ("train.steps",)
    fixed += ("sampling.clip",) if config.distillation.steps else ()
    return tuple(name for name in FREE_TO_CHANGE if name not in fixed)


def check_workdir(workdir: Path, config: Config) -> None:
    """Check that `workdir` is free for a run of `config`, or belongs to it. Nothing is written.

    Raises:
      WorkdirError: it belongs to a run of another config, or its path does not serve (see
        `check_path`).
    """
    check_path(workdir)
    if (workdir / CONFIG).exists():
        fixed = fixed_differences(workdir, config)
        if fixed:
            more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
            raise WorkdirError(
                f"{workdir} holds a run of another config ({'; '.join(fixed[:3])}{more}): "
                "name another workdir, or the config it was started with"
            )
    elif (workdir / "checkpoints").exists():
        raise WorkdirError(
            f"{workdir} has checkpoints but no config.json: put it back, or name another workdir"
        )


def fixed_differences(workdir: Path, config: Config) -> list[str]:
    """List what `config` has otherwise than the run in `workdir`, of what must stay as it is.

    A folder of images may have moved where the run remembers which images were in it.
    """
    free = free_to_change(config)
    free += ("data.path",) if "files" in read_origin(workdir) else ()
    changed = differences(with_full_path(load_workdir_config(workdir)), with_full_path(config))
    return [line for line in changed if not line.startswith(free)]


def with_full_path(config: Config) -> Config:
    """Return `config` with the absolute path of its folder of images, if it has one."""
    if not config.data.path:
        return config
    path = Path(os.path.expanduser(config.data.path)).absolute()
    if ".." in path.parts:  # where link/.. is, only the disk knows
        path = path.resolve()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))


def claim_workdir(workdir: Path, config: Config) -> None:
    """Make `workdir` the directory of this run: check it, and write its config.json.

    Raises:
      WorkdirError: as `check_workdir`, or it cannot be written. Nothing is written then.
    """
    check_workdir(workdir, config)
    path, text = workdir / CONFIG, save_json(config)
    if jax.process_index() == 0 and not (path.exists() and path.read_text() == text):
        with _writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(text)
            os.replace(part, path)


def claim_network(workdir: Path, own: bool) -> None:
    """Note in `workdir` whose network its run trains, or check that it is the same.

    Raises:
      WorkdirError: the run there has a network of one's own, and this one has not, or the reverse.
    """
    begun = (workdir / "checkpoints").exists()
    if begun or not own:
        check_owner(workdir, own)
    elif jax.process_index() == 0:
        (workdir / OWN_NETWORK).write_text("The network of this run is not in its config.json.\n")


def check_owner(workdir: Path, own: bool) -> None:
    """Check that a network of one's own is given where, and only where, the run has one.

    Raises:
      WorkdirError: it is not.
    """
    if (workdir / OWN_NETWORK).exists() and not own:
        raise WorkdirError(
            f"{workdir} holds a run whose network is not in its config: from Python, give network "
            "to ddpm_jax.load or train; what it draws is measured as samples=FILE "
            "(docs/evaluation.md)"
        )
    if own and not (workdir / OWN_NETWORK).exists():
        raise WorkdirError(f"{workdir} holds a run of the network of its config: leave network out")


@contextlib.contextmanager
def sole_trainer(workdir: Path) -> Iterator[None]:
    """Keep a second run out of `workdir`, which is made where needed, while this one trains.

    The lock ends with the process, however that ends.

    Raises:
      WorkdirError: another process of this machine is training there, or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkdirError(
                f"{workdir}: another process is training there; stop it, or name another workdir"
            ) from error
        except OSError:
            pass  # some network file systems have no locks: then there is none to keep
        yield


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"workdir={workdir} cannot be written: {error.strerror}") from error


def load_workdir_config(workdir: Path) -> Config:
    """Read the config that a run directory was made with.

    Raises:
      WorkdirError: there is none, or it cannot be read.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise WorkdirError(
            f"workdir={workdir}: not a run directory, it has no config.json; "
            "make one with ddpm train"
        )
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path} is damaged ({error}): restore it from the config file of the run"
        ) from error
    return from_dict(values, str(path))


def imported_weights(workdir: Path, kind: str) -> str | None:
    """Describe what an imported run directory has as its "params" or its "ema".

    Returns:
      One of LABELS; None if the run was not imported.

    Raises:
      WorkdirError: weights.json is damaged.
    """
    path = workdir / RECORD
    if not path.is_file():
        return None
    try:
        return LABELS[read_json(path)[kind]]
    except (ValueError, KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged ({error}): import the weights again") from error
