"""A trained network, opened from its run directory: what sampling and evaluation start from. And run directories of imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from ddpm_jax.build import Params
from ddpm_jax.checkpoints import Checkpoints, WorkdirError, load_workdir_config
from ddpm_jax.config import Config
from ddpm_jax.devices import Devices
from ddpm_jax.training import abstract_state, ema_name, init_state
from ddpm_jax.weights.importing import Imported
from ddpm_jax.weights.workdir import imported_weights, write_workdir


@dataclass(frozen=True)
class Trained:
    """params lie replicated on the devices; `weights` names them: "ema 0.9999", "raw", or, imported, what their file held."""

    config: Config
    params: Params
    weights: str
    step: int


def open_trained(workdir: Path, devices: Devices, *, weights: str = "ema", step: int | None = None) -> Trained:
    """Reads config.json and the newest checkpoint (or that of `step`).

    Args:
      weights: "ema", the first average of the config; "raw"; or one of its decays, such as "0.9999".

    Raises:
      WorkdirError: not a run directory, no such checkpoint, no such weights, or one that cannot be read.
    """
    config = load_workdir_config(workdir)
    decays = [ema_name(decay) for decay in config.train.ema_decays]
    name = decays[0] if weights == "ema" else weights
    if name not in (*decays, "raw"):
        raise WorkdirError(f"--weights={weights}: this run has ema, raw, {', '.join(decays)}")
    abstract = devices.abstract_replicated(abstract_state(config))
    with Checkpoints.reading(workdir) as checkpoints:
        state = checkpoints.restore(abstract, step)
    params = state.params if name == "raw" else state.ema[name]
    label = name if name == "raw" else f"ema {name}"
    if int(state.step) == 0:  # after training, the averages are averages whatever they began as
        label = imported_weights(workdir, "params" if name == "raw" else "ema") or label
    return Trained(config, params, label, int(state.step))


def save_imported(workdir: Path, imported: Imported) -> None:
    """The run directory of imported weights, at step 0; WorkdirError as `write_workdir`."""
    state = init_state(imported.config, imported.params)
    state = state.replace(ema={name: imported.ema for name in state.ema})
    write_workdir(workdir, imported.config, jax.device_put(state), imported.record)
