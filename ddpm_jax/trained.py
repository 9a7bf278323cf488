"""Open trained networks: a run directory, one that ships, or a published checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from ddpm_jax.build import Params, build_network
from ddpm_jax.config import Config, listed
from ddpm_jax.data.classes import names_of_run
from ddpm_jax.data.load import load_source, origin_of
from ddpm_jax.data.source import Source
from ddpm_jax.errors import WorkdirError
from ddpm_jax.files import MOST_DIGITS, read_json, shipped
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.data_origin import check_split, read_origin
from ddpm_jax.runs.workdir import (
    LABELS,
    RECORD,
    check_free,
    check_owner,
    check_path,
    checkpoint_folders,
    imported_weights,
    load_workdir_config,
)
from ddpm_jax.training.imported import save_imported
from ddpm_jax.training.origin import Origin
from ddpm_jax.training.state import abstract_state, average_note, ema_name
from ddpm_jax.weights.detect import AUTO
from ddpm_jax.weights.files import fingerprint
from ddpm_jax.weights.importing import Imported, import_weights

# Orbax, behind runs.checkpoints, takes seconds to import. It is imported where a checkpoint is read
# or written: what ships needs none.

SHIPPED = shipped("pretrained")
RUNS = Path("runs/pretrained")
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      params: replicated on the devices.
      weights: "ema 0.9999", "raw" or, where they were imported, what their file holds.
      step: of the checkpoint; 0 where they were imported.
      notes: what there is to say: of an import, where the settings come from; warnings.
      classes: the names of its classes, in their order; () where they are not known.
      data_origin: what its run remembers of its data; {} where it has none.
    """

    config: Config
    params: Params
    weights: str
    step: int
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    data_origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    def open_split(self, data_dir: Path, split: str) -> Source:
        """Open a split of the data set of its run.

        Raises:
          UserError: it cannot be opened, or is not what the run trained on or held out.
        """
        data = self.config.data
        source = load_source(data, data_dir, split)
        origin = origin_of(data, data_dir, {split: source} if len(source) else {})
        check_split(self.data_origin, origin, split, data.path or data.name)
        return source

    @property
    def tag(self) -> str:
        """Return what names of files call these weights, such as step800000_ema0.9999."""
        return f"step{self.step}_{self.weights.replace(' ', '')}"


def open_network(
    what: str | Path,
    devices: Devices,
    *,
    weights: str = "ema",
    step: int | Literal["best"] | None = None,
    layout: str | None = None,
    overrides: str | Iterable[str] = (),
    network: Any = None,
) -> Trained:
    """Open a network by its name or path, into memory alone.

    Args:
      what: the name of a network that ships, a run directory, or a published checkpoint: a file, or
        a folder of diffusers.
      weights, network: see `open_trained`.
      step: the checkpoint of a run directory; the newest by default.
      layout: the code base that wrote a published checkpoint, where its tensors leave that open.
      overrides: "section.field=value", for settings that a published checkpoint does not tell.

    Raises:
      UserError: there is no such thing, it may be two things, or it cannot be read as asked.
    """
    path, overrides = Path(os.path.expanduser(what)), listed(overrides)
    ships = isinstance(what, str) and what in names()
    if ships and path.exists():
        raise WorkdirError(
            f"what={what}: a network that ships has this name, and so has a file or folder here: "
            f"write {os.path.join(os.curdir, what)} or {SHIPPED / what}"
        )
    if ships:
        path = SHIPPED / what
    elif not path.exists() and not path.with_name(f"{path.name}.index").is_file():
        near = difflib.get_close_matches(str(what), names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"these ship: {_list_names()}"
        hint = f"as a str, {str(what)!r}, it is one" if str(what) in names() else hint
        raise WorkdirError(
            f"what={what}: no such file or folder, and no network that ships; {hint}"
        )
    if _is_run(path):
        if layout is not None or overrides:
            raise WorkdirError(
                f"{path} is a run directory, whose settings stand: layout and overrides are for "
                "published checkpoints"
            )
        return open_trained(path, devices, weights=weights, step=step, network=network)
    if network is not None:
        raise WorkdirError(f"network: {path} holds imported weights, which belong to our own UNet")
    if step:
        raise WorkdirError(f"step={step}: {path} holds imported weights, which have no steps")
    return _place(_import(path, layout, overrides), devices, weights)


def _is_run(path: Path) -> bool:
    """Tell a run directory from a published checkpoint.

    Raises:
      WorkdirError: it is both.
    """
    run = (path / "checkpoints").is_dir() or _has_own_config(path)
    published = any((path / place).exists() for place in ("unet", WEIGHTS.name))
    if (path / "checkpoints").is_dir() and published:
        raise WorkdirError(
            f"{path} is a run directory and holds weights of diffusers as well: name the file of "
            "weights, or move it"
        )
    return run and not published


def _has_own_config(folder: Path) -> bool:
    """Return whether the folder's config.json is one of ours, not of diffusers."""
    try:
        return "diffusion" in read_json(folder / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def _import(path: Path, layout: str | None, overrides: list[str]) -> Imported:
    # What ships has our config beside the weights of a diffusers folder.
    own = path / "config.json" if _has_own_config(path) else None
    return import_weights(layout or AUTO, path, config_file=own, overrides=overrides)


def _place(imported: Imported, devices: Devices, weights: str) -> Trained:
    """Put imported weights on the devices, without a run directory."""
    kind = "params" if _weights_name(imported.config, weights) == "raw" else "ema"
    params = devices.replicate(getattr(imported, kind))
    label = LABELS[imported.record[kind]]
    config, notes = imported.config, tuple(imported.messages)
    return Trained(config, params, label, 0, notes, _class_names(config, {}))


def _class_names(config: Config, origin: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes of a network, as its data or what is known of it has them."""
    return names_of_run(origin, config.data.name, config.model.num_classes)


def _weights_name(config: Config, weights: str) -> str:
    """Return "raw", or the name of the average that `weights` asks for; see `open_trained`."""
    decays = [ema_name(decay) for decay in config.train.ema_decays]
    name = decays[0] if weights == "ema" else weights
    if name not in (*decays, "raw"):
        raise WorkdirError(f"weights={weights}: this run has ema, raw, {', '.join(decays)}")
    return name


def open_trained(
    workdir: Path,
    devices: Devices,
    *,
    weights: str = "ema",
    step: int | Literal["best"] | None = None,
    network: Any = None,
) -> Trained:
    """Open a run directory: its config.json and a checkpoint, the newest or that of `step`.

    Args:
      weights: "ema", the first average of the config; "raw"; or one of its decays, such as
        "0.9999".
      network: the one that was trained, where it is not the config's; what `build_network` takes.

    Raises:
      WorkdirError: no run directory, no such checkpoint or weights, or one that cannot be read.
    """
    from ddpm_jax.runs.checkpoints import Checkpoints

    with hosts.together(), contextlib.ExitStack() as opening:
        config = load_workdir_config(workdir)
        check_owner(workdir, network is not None)
        built = build_network(config, network)
        name = _weights_name(config, weights)
        origin = read_origin(workdir)
        classes = _class_names(config, origin)
        checkpoints = opening.enter_context(Checkpoints.reading(workdir))
        checkpoints.check(step)
        opening.pop_all()
    with checkpoints:
        like = devices.abstract_replicated(abstract_state(config, built))
        part = "params" if name == "raw" else f"ema.{name}"
        state = checkpoints.restore(like, step, ("step", "updates", part))
    params = state.params if name == "raw" else state.ema[name]
    label = name if name == "raw" else f"ema {name}"
    if int(state.step) == 0:  # after training, the averages are averages whatever they began as
        label = imported_weights(workdir, "params" if name == "raw" else "ema") or label
    note = None if name == "raw" else average_note(config, name, int(state.updates))
    return Trained(config, params, label, int(state.step), (note,) if note else (), classes, origin)


# ------------------------------------------------------------------------------- networks that ship


def names() -> list[str]:
    """List the networks that ship."""
    return sorted(folder.name for folder in SHIPPED.glob("*") if (folder / WEIGHTS).is_file())


def _list_names() -> str:
    return ", ".join(names()) or "none, this installation has no weights"


def find(workdir: Path | None, pretrained: str | None, devices: Devices) -> Path | None:
    """Return the run directory `workdir`, or that of the network `pretrained` in its place."""
    return workdir if pretrained is None else unpack(pretrained, devices)


def find_origin(what: str, devices: Devices) -> Origin:
    """Return the checkpoint of "runs/x", "runs/x:20000", "runs/x:best", or of what ships."""
    head, _, tail = what.rpartition(":")
    number = tail.isdecimal() and len(tail) <= MOST_DIGITS
    step = int(tail) if number else "best" if tail == "best" else None
    name = what if step is None or not head else head
    run = Path(os.path.expanduser(name))
    ships = name in names() and not run.exists()
    return Origin(unpack(name, devices) if ships else run, step if name == head else None)


def unpack(name: str, devices: Devices, runs: Path = RUNS) -> Path:
    """Return the run directory `runs`/NAME of a network that ships, making it where needed.

    It is made at the first call, and again where it came from other weights than those that ship.
    What was trained or measured there since is neither deleted nor taken for what ships.

    Raises:
      WorkdirError: nothing of this name ships, the directory cannot be written, or what it holds
        is in the way.
    """
    if name not in names():
        raise WorkdirError(f"pretrained={name}: one of {_list_names()}")
    source, workdir = SHIPPED / name, runs / name
    several = jax.process_count() > 1
    with hosts.together() if several else contextlib.nullcontext():
        if devices.is_main and not _is_as_shipped(workdir, source / WEIGHTS):
            _check_unused(workdir, name)
            if several:
                _unpack_alone(name, runs)
            else:
                save_imported(workdir, _import(source, "diffusers", []))
    return workdir


def _check_unused(workdir: Path, name: str) -> None:
    """Check that the run directory of a network that ships may be made, or made again.

    Raises:
      WorkdirError: its path does not serve, or something was done with what is there.
    """
    check_path(workdir)
    try:
        check_free(workdir)
    except WorkdirError as error:
        raise WorkdirError(
            f"pretrained={name}: {workdir} was trained on, or used before other weights shipped: "
            f"give workdir={workdir} for what is there, or move it away for what ships"
        ) from error


def _unpack_alone(name: str, runs: Path) -> None:
    """Unpack in a process of its own: to save one here, all hosts would have to take part."""
    code = (
        "import sys; from pathlib import Path; from ddpm_jax.parallel.devices import Devices; "
        "from ddpm_jax.trained import unpack; unpack(sys.argv[1], Devices(), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, name, str(runs)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        *_, last = child.stderr.strip().splitlines() or ["no word"]
        raise WorkdirError(
            f"pretrained={name} cannot be unpacked: {last.partition(': ')[2] or last}"
        )


def _is_as_shipped(workdir: Path, file: Path) -> bool:
    """Return whether the weights of `file` are what opening the run directory gives."""
    try:
        as_imported = checkpoint_folders(workdir) == {"0"}
        return as_imported and read_json(workdir / RECORD)["files"] == [fingerprint(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
