"""Train the same network here and in PyTorch, and compare how good both become."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.benchmark.theirs import DiffusersTraining, initialise
from ddpm_jax.build import Params, build_process, denoiser, image_shape
from ddpm_jax.config import Config
from ddpm_jax.data.load import load_source
from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.errors import ConfigError
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.files import read_json
from ddpm_jax.images import scale_images
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.trained import open_trained
from ddpm_jax.training.loop import train
from ddpm_jax.training.stopping import raise_if_stopped
from ddpm_jax.weights.layouts.diffusers_config import network_config, scheduler_config

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.999)  # of T: where eps is judged
SIDES = ("ddpm_jax", "diffusers")
# What the loop on PyTorch's side can train, by the names of a config's fields.
COMPARABLE = {
    "diffusion.prediction": "eps",
    "loss.kind": "simple",
    "loss.weighting": "none",
    "loss.timestep_sampling": "uniform",
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.0,
    "train.accumulation": 1,
    "model.num_classes": 0,
}


@dataclass(frozen=True)
class ComparisonOptions:
    """What is compared, and by which images.

    Attributes:
      workdir: of the runs, a folder a seed; a run that is done is not repeated.
      data_dir: the prepared data sets.
      seeds: each trains both sides.
      num_images: held-out images that judge, at most.
      num_timesteps: terms of the bound an image.
    """

    workdir: Path
    data_dir: Path = Path("data")
    seeds: Sequence[int] = (0,)
    num_images: int = 1000
    num_timesteps: int = 50


def compare(config: Config, options: ComparisonOptions) -> dict[str, Any]:
    """Train `config` on both sides with each seed, and judge both by one evaluation.

    Returns:
      The config, the versions, the figures of each run and their summary, ready for JSON.

    Raises:
      ConfigError: PyTorch is not installed, or its side cannot train this config.
    """
    check_comparable(config)
    rows = [
        measure(dataclasses.replace(config, seed=seed), side, options)
        for seed in options.seeds
        for side in SIDES
    ]
    return {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "runs": rows,
        "summary": summarise(rows),
    }


def check_comparable(config: Config) -> None:
    """Check that PyTorch's side can train this config, before anything is trained.

    Raises:
      ConfigError, WeightsError: it cannot, or it is not installed.
    """
    check_fields(config, COMPARABLE, "the loop on PyTorch's side knows")
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        raise ConfigError("PyTorch or diffusers is not installed: pip install 'ddpm_jax[torch]'")
    network_config(config), scheduler_config(config)


def check_fields(config: Config, fields: Mapping[str, Any], whose: str) -> None:
    """Check the values of fields, by their names in a config such as "train.accumulation".

    Args:
      whose: these values are, the subject and verb of the message.

    Raises:
      ConfigError: one is another.
    """
    for name, value in fields.items():
        if (found := attrgetter(name)(config)) != value:
            raise ConfigError(f"{name}={found}: {whose} {value} only: --config.{name}={value}")


def measure(config: Config, side: str, options: ComparisonOptions) -> dict[str, Any]:
    """Train one side and judge it, or read its record where there is one of the same protocol.

    Raises:
      KeyboardInterrupt, SystemExit: on SIGINT and SIGTERM, once our training is saved.
    """
    folder = options.workdir / f"seed{config.seed}"
    path = folder / f"{side}.json"
    protocol = {
        "num_images": options.num_images,
        "num_timesteps": options.num_timesteps,
        "config": dataclasses.asdict(config),
    }
    if path.is_file():
        try:
            record = dict(read_json(path))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}): remove it") from error
        if record.get("protocol") == json.loads(json.dumps(protocol)):
            return record
    print(f"seed {config.seed}: {side}", flush=True)
    devices, start = Devices(), time.monotonic()
    if side == "ddpm_jax":
        code = train(config, folder / side, data_dir=options.data_dir)
        raise_if_stopped(code, folder / side)  # half trained is not what is compared
        params = open_trained(folder / side, devices).params
    else:
        source = load_source(config.data, options.data_dir, "train")
        params = devices.replicate(train_with_diffusers(config, source))
    seconds = time.monotonic() - start
    held_out = load_source(config.data, options.data_dir, "test")
    nll = evaluate_nll(
        config,
        params,
        held_out,
        devices,
        protocol=Protocol(options.num_timesteps),
        num_images=options.num_images,
    )
    record = {
        "side": side,
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "nll": nll.total.mean,
        "nll_standard_error": nll.total.standard_error,
        "eps_error": eps_errors(config, params, held_out, options.num_images),
        "protocol": protocol,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
    return record


def eps_errors(config: Config, params: Params, source: Source, count: int) -> dict[str, float]:
    """Return the mean squared error of eps_hat at LEVELS of T, by timestep.

    It is over the first `count` images, with one draw of noise for each level.
    """
    process, bind = build_process(config), denoiser(config)
    images = source.read(np.arange(min(count, len(source))))["image"]

    @jax.jit
    def errors(params: Params, image: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        x_t = q_sample(process.schedule, scale_images(image), t, eps)
        return jnp.mean((bind(params, None)(x_t, t) - eps) ** 2, axis=(1, 2, 3))

    by_timestep = {}
    for level in LEVELS:
        t = int(level * config.diffusion.timesteps)
        eps = np.random.default_rng(t).standard_normal(
            (len(images), *image_shape(config)), np.float32
        )
        parts = [
            errors(params, images[rows], np.full(len(rows), t), eps[rows])
            for rows in np.array_split(np.arange(len(images)), -(-len(images) // 128))
        ]
        by_timestep[str(t)] = float(np.mean(np.concatenate(parts)))
    return by_timestep


def train_with_diffusers(config: Config, source: Source) -> Params:
    """Train with PyTorch for `config.train.steps`; return the averaged weights by our names."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(config.seed)
    network = UNet2DModel.from_config(network_config(config))
    initialise(network)
    training = DiffusersTraining(config, network)
    steps, size = config.train.steps, config.train.batch_size
    images = torch.from_numpy(source.read(np.arange(len(source)))["image"]).permute(0, 3, 1, 2)

    order = torch.randperm(len(images))
    with Progress(steps, "step", enabled=True, scale=size) as shown:
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(images))])
            chosen, order = order[:size], order[size:]
            x0 = images[chosen].float() / 127.5 - 1
            if config.data.flip:
                x0 = torch.where((torch.rand(size) < 0.5)[:, None, None, None], x0.flip(3), x0)
            eps, t = torch.randn_like(x0), torch.randint(config.diffusion.timesteps, (size,))
            training.step(x0, t, eps)
            shown.update(1)
    return training.averaged()


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each figure's mean over seeds on both sides, and the difference.

    With more than one seed each has its standard error.
    """
    figures = {"bound, bits/dim": lambda row: row["nll"]}
    for t in rows[0]["eps_error"]:
        figures[f"eps at t={t}"] = lambda row, t=t: row["eps_error"][t]
    summary = []
    for name, of in figures.items():
        ours, theirs = (
            np.array([of(row) for row in rows if row["side"] == side]) for side in SIDES
        )
        line = {
            "figure": name,
            "ddpm_jax": ours.mean(),
            "diffusers": theirs.mean(),
            "difference": ours.mean() - theirs.mean(),
        }
        if len(ours) > 1:
            errors = {
                side: runs.std(ddof=1) / np.sqrt(len(runs))
                for side, runs in zip(SIDES, (ours, theirs))
            }
            line |= {f"{side}_error": error for side, error in errors.items()}
            line["difference_error"] = float(np.hypot(*errors.values()))
        summary.append(line)
    return summary


def table(summary: list[dict[str, Any]], seeds: int) -> str:
    """Lay the summary out as text, with the number of seeds in its head."""
    heads = "".join(f" {head:>20}" for head in (*SIDES, "difference"))
    lines = [f"{'':18}{heads}   ({seeds} seed{'s' * (seeds > 1)})"]
    for line in summary:
        cells = []
        for name in (*SIDES, "difference"):
            error = line.get(f"{name}_error")
            cells.append(f"{line[name]:.5f}" + (f" +- {error:.5f}" if error is not None else ""))
        lines.append(f"{line['figure']:18} " + " ".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of what took part, and the device."""
    packages = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "diffusers")
    }
    return packages | {
        "python": platform.python_version(),
        "device": Devices().devices[0].device_kind,
    }
