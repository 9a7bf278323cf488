"""From a foreign file to a config and parameters: read, recognise, settle the config, map, and say aloud what was loaded.

The config has three sources. What the weights themselves say (widths, levels, where attention is) and what their code base
fixes is binding. What neither says (the size of the image, heads, the process) comes from the published recipe, or whole from
`--config`. Overrides come last, and may not contradict what is binding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax import config as configs
from ddpm_jax.build import Params, build_process
from ddpm_jax.config import Config
from ddpm_jax.weights import diffusers, diffusers_config, files
from ddpm_jax.weights.errors import WeightsError
from ddpm_jax.weights.layout import Layout, Tensors, WeightSets, check_switches, read_params
from ddpm_jax.weights.layouts import LAYOUTS
from ddpm_jax.weights.recognise import Architecture, recognise, resembles

CONFIG_KEY, WEIGHTS_KEY = "ddpm_jax.config", "ddpm_jax.weights"  # in the header of what export writes

# The set that a file of this name was trained on, as prepare_data.py calls it; the first that fits.
_DATA_SETS = {
    "cifar": "cifar10",
    "bedroom": "lsun/bedroom",
    "church": "lsun/church_outdoor",
    "horse": "lsun/horse",
    "lsun": "lsun/bedroom",
    "celeba_?hq": "celeb_a_hq/256",
    "celeba": "celeb_a",
    r"(?<![a-z])cat(?![a-z])": "lsun/cat",
}


@dataclass(frozen=True)
class Imported:
    """params and ema are what the checkpoint's two kinds of weights become; record is weights.json; messages, what to print."""

    config: Config
    params: Params
    ema: Params
    record: dict[str, Any]
    messages: list[str]


def import_weights(
    layout_name: str,
    path: Path,
    *,
    config_file: str | Path | None = None,
    overrides: Iterable[str] = (),
    weights: str | None = None,
) -> Imported:
    """Reads `path` (for diffusers a folder) as a file of layout `layout_name`.

    Args:
      config_file: a file of configs/ in place of the published recipe.
      overrides: "section.field=value", as on command lines.
      weights: "raw" or "ema", for files that hold one set and do not say which.

    Raises:
      UserError: a file that is damaged, of another layout, or not whole; a config that contradicts it.
    """
    layout, overrides = LAYOUTS[layout_name], list(overrides)
    if layout_name == "diffusers":
        file, unet_file, scheduler_file = diffusers.find_folder(path)
        unet = diffusers.read_config(unet_file)
        layout = diffusers_config.layout_of(unet)
    else:
        file = _only_file(path)
    source = files.read(file)
    sets = _unpack(layout, source, file)
    some = next(tensors for tensors in (sets.ema, sets.raw, sets.unlabelled) if tensors is not None)
    if layout_name == "diffusers":
        scheduler = None if scheduler_file is None else diffusers.read_config(scheduler_file)
        config, notes = _settle_diffusers(unet_file, unet, scheduler_file, scheduler, path, config_file, overrides)
    else:
        architecture = _recognise(layout, some, file)
        config, notes = _settle(layout, architecture, source, path, config_file, overrides)
    build_process(config)
    loaded = {
        kind: read_params(layout, config, tensors, str(file))
        for kind, tensors in (("raw", sets.raw), ("ema", sets.ema), ("unlabelled", sets.unlabelled))
        if tensors is not None
    }
    names = f"{path.name} {file.name}"
    if layout_name == "diffusers":
        names += f" {unet.get('_name_or_path')}"  # where its weights came from
    kinds, told = _which_weights(sets, source.metadata.get(WEIGHTS_KEY), names, weights, str(file))
    params = loaded.get("raw", loaded.get("unlabelled", loaded.get("ema")))
    ema = loaded.get("ema", loaded.get("unlabelled", loaded.get("raw")))
    assert params is not None and ema is not None
    count = sum(tensor.size for tensor in some.values())
    described = f"{layout_name}: {count:,} parameters, {_describe(config)}"
    record = {
        "layout": layout_name,
        "source": str(path),
        "files": [files.fingerprint(one) for one in source.files],
        "parameters": count,
        **kinds,
        "said": [described, told, *notes],
    }
    return Imported(config, params, ema, record, record["said"])


# ---------------------------------------------------------------------------------------------- the file


def _only_file(path: Path) -> Path:
    """`path`, or the one file of weights in a folder."""
    if not path.is_dir():
        return path
    suffixes = (".safetensors", ".npz", ".index", ".pt", ".pth", ".ckpt", ".bin")
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise WeightsError(f"--input={path}: name the file in this folder; files of weights there: {names}")
    return found[0]


def _unpack(layout: Layout, source: files.Source, file: Path) -> WeightSets:
    try:
        return layout.unpack(source.contents)
    except WeightsError as error:
        raise WeightsError(f"{file} {error}{_looks_like(layout, source.contents)}") from error


def _recognise(layout: Layout, tensors: Tensors, file: Path) -> Architecture:
    try:
        return recognise(layout, tensors)
    except WeightsError as error:
        raise WeightsError(f"{file} {error}{_looks_like(layout, tensors)}") from error


def _looks_like(layout: Layout, contents: Any) -> str:
    """Which other layout would have read this, as the end of a message."""
    for name, other in LAYOUTS.items():
        if name != layout.name:
            try:
                sets = other.unpack(contents)
            except WeightsError:
                continue
            tensors = sets.raw or sets.ema or sets.unlabelled
            if tensors is not None and resembles(other, tensors):
                return f"; it looks like --layout={name}"
    return ""


# ---------------------------------------------------------------------------------------------- the config


def _settle(
    layout: Layout,
    architecture: Architecture,
    source: files.Source,
    path: Path,
    config_file: str | Path | None,
    overrides: list[str],
) -> tuple[Config, list[str]]:
    """The config of a layout that does not name its settings, and what was assumed."""
    facts = {f"model.{name}": value for name, value in architecture.model_fields().items()}
    facts["data.channels"] = architecture.in_channels
    notes, embedded = [], source.metadata.get(CONFIG_KEY)
    if config_file is not None:
        config = configs.load_config(config_file, overrides)
    elif embedded is not None:
        try:
            config = configs.from_dict(json.loads(embedded), f"the header of {path}")
        except json.JSONDecodeError as error:
            raise WeightsError(f"the header of {path} is damaged ({error}): fetch it again") from error
        notes.append("settings: from the header of the file")
        _override(config, overrides)
    else:
        config = Config()
        assert layout.recipe is not None
        recipe = dict(layout.recipe(architecture))
        _set(config, {f"model.{name}": values[0] for name, values in layout.switches.items()} | facts | recipe)
        given = {item.partition("=")[0] for item in overrides}
        if "data.image_size" not in given:
            config.data.image_size = _guess_image_size(layout, architecture, path)
            notes.append(
                f"image size: {config.data.image_size}, with the smallest attention of a published network of this kind; "
                "--config.data.image_size=N says otherwise"
            )
        _override(config, overrides)
        if "model.attention_resolutions" not in given:
            config.model.attention_resolutions = architecture.attention_resolutions(config.data.image_size)
        if "data.name" not in given:
            config.data.name, note = _guess_data(path, config)
            notes.append(note)
        assumed = [
            f"{name}={value}" for name, value in recipe.items() if name.startswith(("model.", "diffusion.")) and name not in given
        ]
        notes.append(f"not in the file, from the published recipe: {', '.join(assumed)}")
    facts["model.attention_resolutions"] = architecture.attention_resolutions(config.data.image_size)
    _agree(config, facts)
    if config.output_channels != architecture.out_channels:
        raise WeightsError(
            f"config.diffusion.variance={config.diffusion.variance} contradicts the file, "
            f"whose network turns {architecture.in_channels} channels into {architecture.out_channels}"
        )
    check_switches(layout, config, f"a network of layout {layout.name} cannot have")
    return configs.validate(config), notes


def _settle_diffusers(
    unet_file: Path,
    unet: Mapping[str, Any],
    scheduler_file: Path | None,
    scheduler: Mapping[str, Any] | None,
    path: Path,
    config_file: str | Path | None,
    overrides: list[str],
) -> tuple[Config, list[str]]:
    """The config of a diffusers folder, which names everything; `config_file` supplies what is not the network's."""
    facts, notes = diffusers_config.network_facts(unet_file, unet), []
    if "attention_head_dim" not in unet:
        notes.append("attention_head_dim is absent: taken as one head, as null is")
    if config_file is not None:
        config = configs.load_config(config_file, overrides)
    else:
        config = Config()
        _set(config, facts | {"model.dropout": float(unet.get("dropout", 0.0))})
        config.model.embedding_order = "sin_cos"
        if scheduler_file is None or scheduler is None:
            notes.append("no scheduler_config.json: the paper's process, 1000 linear steps, is assumed")
        else:
            settings = diffusers_config.scheduler_settings(scheduler_file, scheduler)
            _set(config, settings)
            _align_loss(config)
            notes.append("process: " + ", ".join(f"{name.split('.')[1]}={value}" for name, value in settings.items()))
            # Of strided chains: where the last step leads to, and a shift of all timesteps.
            ignored = {"set_alpha_to_one": True, "steps_offset": 0}
            ignored = [f"{name}={scheduler[name]}" for name, usual in ignored.items() if scheduler.get(name, usual) != usual]
            notes += [f"not taken over from the scheduler: {', '.join(ignored)}"] if ignored else []
        if config.data.image_size >= 256:
            config.optimizer.learning_rate, config.train.batch_size = 2e-5, 64
        _override(config, overrides)
        if "data.name" not in {item.partition("=")[0] for item in overrides}:
            config.data.name, note = _guess_data(path, config)
            notes.append(note)
    if config.model.head_channels:  # then `heads` is not looked at
        facts.pop("model.heads")
    _agree(config, facts)
    return configs.validate(config), notes


def _align_loss(config: Config) -> None:
    """The objective that trains the variance which the config has."""
    config.loss.kind = {"learned": "vlb", "learned_range": "hybrid"}.get(config.diffusion.variance, "simple")


def _set(config: Config, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)


def _override(config: Config, overrides: Iterable[str]) -> None:
    for item in overrides:
        configs.override(config, item)


def _agree(config: Config, facts: Mapping[str, Any]) -> None:
    """WeightsError naming every field in which `config` is not what the file says."""
    values = {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in facts}
    other = [f"config.{name}={values[name]} (the file: {fact})" for name, fact in facts.items() if values[name] != fact]
    if other:
        raise WeightsError(f"the config contradicts the file: {', '.join(other)}")


def _guess_image_size(layout: Layout, architecture: Architecture, path: Path) -> int:
    levels = architecture.plan.attention_levels
    if not levels:
        raise WeightsError(f"{path} does not tell the size of its images: add --config.data.image_size=N")
    return layout.smallest_attention(len(levels)) * 2 ** max(levels)


def _guess_data(path: Path, config: Config) -> tuple[str, str]:
    for pattern, name in _DATA_SETS.items():
        if re.search(pattern, path.name.lower()):
            return name, f"data set, by the file's name: {name}"
    if (config.data.image_size, config.data.channels) == (32, 3):
        return "cifar10", "data set, by the size of the images: cifar10; --config.data.name=NAME says otherwise"
    return "unknown", "data set: unknown; to train or evaluate, import again with --config.data.name=NAME"


# ---------------------------------------------------------------------------------------------- raw or averaged


def _which_weights(sets: WeightSets, header: str | None, names: str, said: str | None, file: str) -> tuple[dict[str, str], str]:
    """What params and ema will hold, for the record, and the sentence to print.

    One unlabelled set is what its header says, else what the user says, else averaged if "ema" is a word of its file's name.

    Raises:
      WeightsError: the user says otherwise than the file.
    """
    known = {kind for kind in ("raw", "ema") if getattr(sets, kind) is not None}
    if header is not None:
        known = {kind for kind in ("raw", "ema") if header.startswith(kind)}
    if said is not None:
        if known not in (set(), {said}):
            raise WeightsError(f"--weights={said}: {file} says itself what it holds, {' and '.join(sorted(known))} weights")
        known = {said}
    if not known and header is None and re.search(r"(?<![a-z])ema(?![a-z])", names.lower()):
        known = {"ema"}
    if known == {"raw", "ema"}:
        return {"params": "raw", "ema": "ema"}, "weights: raw and averaged (EMA) ones, each in its place"
    if known == {"ema"}:
        return {"params": "ema", "ema": "ema"}, "weights: averaged (EMA) ones only, taken for the raw ones as well"
    if known == {"raw"}:
        warning = "weights: WARNING, raw ones only, taken for the averages (EMA) as well: expect a several times larger FID"
        return {"params": "raw", "ema": "raw"}, warning
    warning = "weights: WARNING, the file does not say whether they are raw or averaged (EMA), and FID depends on it: "
    warning += "google/ddpm-cifar10-32 holds raw ones, ddpm-ema-* averages; --weights=raw or --weights=ema settles the record"
    return {"params": "unknown", "ema": "unknown"}, warning


def _describe(config: Config) -> str:
    model, size = config.model, config.data.image_size
    attention = ", ".join(map(str, model.attention_resolutions)) or "the middle only"
    return (
        f"{size}x{size}x{config.data.channels}, {model.base_channels} channels x {model.channel_mult}, "
        f"{model.blocks_per_level} blocks a level, attention at {attention}"
    )
