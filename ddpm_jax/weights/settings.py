"""Settle the config of imported weights from what the file says and what the user says.

The config has three sources. What the weights themselves say (widths, levels, where attention is)
and what their code base fixes is binding. What neither says (the size of the image, heads, the
process) comes from the published recipe of the layout, from the header of a file that we exported,
or whole from the user's config file. Overrides come last. Neither they nor the config file may
contradict what is binding.

Each of the two entries, `settle` for layouts that do not name their settings and
`settle_diffusers` for the one that does, returns the config and notes of what was assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.build import build_process
from ddpm_jax.config import Config, from_dict, load_config, override, validate
from ddpm_jax.errors import WeightsError
from ddpm_jax.files import parse_json
from ddpm_jax.weights.layout import Layout, check_switches
from ddpm_jax.weights.layouts import diffusers, diffusers_config
from ddpm_jax.weights.recognise import Architecture, recognise_process

# The set that a file of this name was trained on, as prepare_data.py calls it; the first that fits.
_DATA_SETS = {
    "cifar": "cifar10",
    "bedroom": "lsun/bedroom",
    "church": "lsun/church_outdoor",
    "horse": "lsun/horse",
    r"(?<![a-z])cat(?![a-z])": "lsun/cat",
    "lsun": "lsun/bedroom",
    "celeba_?hq": "celeb_a_hq/256",
    "celeba": "celeb_a",
}


def settle(
    layout: Layout,
    architecture: Architecture,
    path: Path,
    *,
    header: str | None,
    config_file: str | Path | None,
    overrides: list[str],
    betas: np.ndarray | None = None,
) -> tuple[Config, list[str]]:
    """Settle the config of a layout that does not name its settings.

    Args:
      layout: the code base that wrote the file.
      architecture: what the weights say.
      path: as the user names it, for the data set that its name hints at.
      header: the config, as JSON, of a file that we exported; None for others.
      config_file: replaces header and recipe.
      overrides: "section.field=value".
      betas: of the process, where the file holds them: as binding as the weights.

    Returns:
      The config, and notes of what was assumed.

    Raises:
      UserError: a config that contradicts the file, or the size of the image is not known.
    """
    notes: list[str] = []
    if config_file is not None:
        config = load_config(config_file, overrides)
    elif header is not None:
        try:
            config = from_dict(parse_json(header), f"the header of {path}")
        except ValueError as error:
            raise WeightsError(
                f"the header of {path} is damaged ({error}): fetch it again"
            ) from error
        notes.append("settings: from the header of the file")
        _override(config, overrides)
    else:
        config, notes = _follow_recipe(layout, architecture, path, overrides, betas)
    _check_betas(config, betas)
    facts = _facts(architecture) | {
        "model.attention_resolutions": architecture.attention_resolutions(config.data.sides[0])
    }
    _check_facts(config, facts)
    if config.output_channels != architecture.out_channels:
        raise WeightsError(
            f"config.diffusion.variance={config.diffusion.variance} contradicts the file, whose "
            f"network turns {architecture.in_channels} channels into {architecture.out_channels}"
        )
    check_switches(layout, config, f"a network of layout {layout.name} cannot have")
    return validate(config), notes


def settle_diffusers(
    folder: diffusers.Folder, path: Path, config_file: str | Path | None, overrides: list[str]
) -> tuple[Config, list[str]]:
    """Settle the config of a diffusers folder, which names everything.

    Args:
      folder: the two configs of the folder.
      path: as the user names it, for the data set that its name hints at.
      config_file: supplies what is not the network's.
      overrides: "section.field=value".

    Returns:
      The config, and notes of what was assumed.

    Raises:
      UserError: options that have no counterpart here, or a config that contradicts the folder.
    """
    sizes = [item for item in overrides if item.startswith("data.image_size=")]
    size = None
    if sizes or config_file is not None:
        base = Config() if config_file is None else load_config(config_file)
        for item in sizes:
            override(base, item)
        size = base.data.image_size
    facts, notes = diffusers_config.network_facts(folder.unet_path, folder.unet, size), []
    if "attention_head_dim" not in folder.unet:
        notes.append("attention_head_dim is absent: taken as one head, as null is")
    if config_file is not None:
        config = load_config(config_file, overrides)
    else:
        config = Config()
        dropout = diffusers_config.dropout(folder.unet_path, folder.unet)
        _set(config, facts | {"model.dropout": dropout})
        config.model.embedding_order = "sin_cos"
        notes += _follow_scheduler(config, folder)
        if min(config.data.sides) >= 256:
            config.optimizer.learning_rate, config.train.batch_size = 2e-5, 64
        _override(config, overrides)
        if "data.name" not in _fields(overrides):
            config.data.name, note = _guess_data(path, config)
            notes.append(note)
    if size is not None and folder.unet.get("sample_size") is None:
        notes.append(f"image size: {size}, as the folder does not tell")
    if config.model.head_channels:  # then `heads` is not looked at
        facts.pop("model.heads")
    _check_facts(config, facts)
    return validate(config), notes


def describe_network(config: Config) -> str:
    """Return size, widths, depth and attention of a network, in words."""
    model, (height, width) = config.model, config.data.sides
    attention = ", ".join(map(str, model.attention_resolutions)) or "the middle only"
    return (
        f"{height}x{width}x{config.data.channels}, {model.base_channels} channels x "
        f"{model.channel_mult}, {model.blocks_per_level} blocks a level, attention at {attention}"
    )


def _follow_recipe(
    layout: Layout,
    architecture: Architecture,
    path: Path,
    overrides: list[str],
    betas: np.ndarray | None,
) -> tuple[Config, list[str]]:
    """Build the config from the published recipe of this architecture, and note what it says."""
    assert layout.recipe is not None
    config, notes, fields = Config(), [], _fields(overrides)
    recipe = dict(layout.recipe(architecture))
    switches = {f"model.{name}": values[0] for name, values in layout.switches.items()}
    if betas is not None:
        process = recognise_process(betas)
        recipe = {name: value for name, value in recipe.items() if name not in process}
        notes.append(f"process, from the betas of the file: {_words(process)}")
        switches |= process
    _set(config, switches | _facts(architecture) | recipe)
    if "data.image_size" not in fields:
        config.data.image_size = _guess_image_size(layout, architecture, path)
        notes.append(
            f"image size: {config.data.image_size}, with the smallest attention of a published "
            "network of this kind; config.data.image_size=N says otherwise"
        )
    _override(config, overrides)
    if "model.attention_resolutions" not in fields:
        height = config.data.sides[0]
        config.model.attention_resolutions = architecture.attention_resolutions(height)
    if "data.name" not in fields:
        config.data.name, note = _guess_data(path, config)
        notes.append(note)
    assumptions = [
        f"{name}={value}"
        for name, value in recipe.items()
        if name.startswith(("model.", "diffusion.")) and name not in fields
    ]
    notes.append(f"not in the file, from the published recipe: {', '.join(assumptions)}")
    return config, notes


def _follow_scheduler(config: Config, folder: diffusers.Folder) -> list[str]:
    """Set the process and the sampler as the scheduler of `folder` has them, and note it."""
    if folder.scheduler_path is None or folder.scheduler is None:
        return ["no scheduler_config.json: the paper's process, 1000 linear steps, is assumed"]
    settings = diffusers_config.scheduler_settings(folder.scheduler_path, folder.scheduler)
    _set(config, settings)
    # The objective that trains the variance which the config has.
    objectives = {"learned": "vlb", "learned_range": "hybrid"}
    config.loss.kind = objectives.get(config.diffusion.variance, "simple")
    notes = [f"process: {_words(settings)}"]
    # Of strided chains: where the last step leads to, and a shift of all timesteps.
    usual = {"set_alpha_to_one": True, "steps_offset": 0}
    ignored = [
        f"{name}={folder.scheduler[name]}"
        for name, value in usual.items()
        if folder.scheduler.get(name, value) != value
    ]
    kind = folder.scheduler.get("_class_name", diffusers.SCHEDULERS[0])
    if not kind.startswith(("DDPM", "DDIM")):
        ignored.insert(0, f"the sampler of {kind}")
    return notes + ([f"not taken over from the scheduler: {', '.join(ignored)}"] if ignored else [])


def _facts(architecture: Architecture) -> dict[str, Any]:
    """Return what the weights say, by paths of our config."""
    facts = {f"model.{name}": value for name, value in architecture.model_fields().items()}
    return facts | {"data.channels": architecture.in_channels}


def _check_facts(config: Config, facts: Mapping[str, Any]) -> None:
    """Raise WeightsError naming every field in which `config` is not what the file says."""
    values = {
        name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in facts
    }
    other = [
        f"config.{name}={values[name]} (the file: {fact})"
        for name, fact in facts.items()
        if values[name] != fact
    ]
    if other:
        raise WeightsError(f"the config contradicts the file: {', '.join(other)}")


def _check_betas(config: Config, betas: np.ndarray | None) -> None:
    """Raise WeightsError if the process of `config` has other betas than the file."""
    if betas is None:
        return
    own = build_process(config).schedule.betas
    if own.shape != betas.shape or not np.allclose(own, betas, rtol=1e-3, atol=1e-9):
        raise WeightsError(
            f"config.diffusion contradicts the file, whose {betas.size} betas say "
            f"{_words(recognise_process(betas))}"
        )


def _words(settings: Mapping[str, Any]) -> str:
    """Write settings without their sections, "timesteps=1000, schedule=linear"."""
    return ", ".join(f"{name.split('.')[1]}={value}" for name, value in settings.items())


def _set(config: Config, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)


def _override(config: Config, overrides: Iterable[str]) -> None:
    for item in overrides:
        override(config, item)


def _fields(overrides: Iterable[str]) -> set[str]:
    """Return the names of the fields that the overrides set."""
    return {item.partition("=")[0] for item in overrides}


def _guess_image_size(layout: Layout, architecture: Architecture, path: Path) -> int:
    """Compute the size of the image from the level that the smallest attention is at."""
    levels = architecture.plan.attention_levels
    if not levels:
        raise WeightsError(
            f"{path} does not tell the size of its images: add config.data.image_size=N"
        )
    return layout.smallest_attention(len(levels)) * 2 ** max(levels)


def _guess_data(path: Path, config: Config) -> tuple[str, str]:
    """Guess the data set from the name of the file or the size of the images, and note how."""
    for pattern, name in _DATA_SETS.items():
        if re.search(pattern, path.name.lower()):
            return name, f"data set, by the file's name: {name}"
    if (config.data.image_size, config.data.channels) == (32, 3):
        note = "data set, by the size of the images: cifar10; config.data.name=NAME says otherwise"
        return "cifar10", note
    note = "data set: unknown; to train or evaluate, import again with config.data.name=NAME"
    return "unknown", note
