"""Import a foreign file of weights: read, recognise, settle the config, map, and say what it was.

A file passes through the other modules of this folder in the order of `import_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax.build import Params, build_process
from ddpm_jax.config import Config
from ddpm_jax.errors import WeightsError
from ddpm_jax.weights import files, settings
from ddpm_jax.weights.averages import which_weights
from ddpm_jax.weights.detect import AUTO, describe_misfit, layout_of, matching_layouts
from ddpm_jax.weights.layout import Layout, Tensors, read_params
from ddpm_jax.weights.layouts import diffusers, diffusers_config
from ddpm_jax.weights.layouts.registry import LAYOUTS
from ddpm_jax.weights.recognise import Architecture, recognise
from ddpm_jax.weights.wrappers import AmbiguousWeights, Unwrapped, tensors_of, unwrap


@dataclass(frozen=True)
class Imported:
    """Imported weights.

    Attributes:
      config: the run that they belong to.
      params: what the checkpoint has as its raw weights.
      ema: what the checkpoint has as its averages.
      record: the contents of weights.json.
      messages: the lines to print.
    """

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
    """Read `path` as a file (for diffusers, a folder) of layout `layout_name`.

    Args:
      layout_name: one of `registry.LAYOUTS`, or "auto" for the one that fits.
      path: a file, a folder with one file of weights, or the prefix of a TensorFlow checkpoint.
      config_file: a file of configs/ in place of the published recipe.
      overrides: "section.field=value", as on command lines.
      weights: "raw" or "ema", for files that hold one set and do not say which.

    Raises:
      UserError: a file that is damaged, of another layout, or not whole; a config that contradicts
        it.
    """
    overrides, folder = list(overrides), None
    if layout_name == "diffusers" or layout_name == AUTO and diffusers.is_folder(path):
        folder = diffusers.read_folder(path)
    file = files.find_file(path) if folder is None else folder.weights
    source = files.read(file)
    name, choice = layout_name, []
    if layout_name == AUTO:
        name = "diffusers" if folder is not None else layout_of(source.contents, file)
        choice = [
            f"layout: {name}, by {'its config.json' if folder else 'the names of its tensors'}"
        ]
    if name == "diffusers":
        folder = folder or diffusers.read_folder(path)
        layout = diffusers_config.layout_of(folder.unet)
        names = f"{path.name} {file.name} {folder.unet.get('_name_or_path')}"
    else:
        layout, names = LAYOUTS[name], f"{path.name} {file.name}"
    found = _unwrap(layout, source, file)
    sets = found.sets
    some = tensors_of(sets)[0]
    if folder is not None:
        config, notes = settings.settle_diffusers(folder, path, config_file, overrides)
    else:
        config, notes = settings.settle(
            layout,
            _recognise(layout, some, file),
            path,
            header=source.metadata.get(files.CONFIG_KEY),
            config_file=config_file,
            overrides=overrides,
            betas=found.betas,
        )
    build_process(config)  # which refuses what no process can be
    loaded = {
        kind: read_params(layout, config, tensors, str(file))
        for kind, tensors in (("raw", sets.raw), ("ema", sets.ema), ("unlabelled", sets.unlabelled))
        if tensors is not None
    }
    header = source.metadata.get(files.WEIGHTS_KEY)
    kinds, sentence = which_weights(sets, header, names, weights, str(file))
    params = loaded.get("raw", loaded.get("unlabelled", loaded.get("ema")))
    ema = loaded.get("ema", loaded.get("unlabelled", loaded.get("raw")))
    assert params is not None and ema is not None
    count = sum(tensor.size for tensor in some.values())
    network = f"{name}: {count:,} parameters, {settings.describe_network(config)}"
    record = {
        "layout": name,
        "source": str(path),
        "files": [files.fingerprint(one) for one in source.files],
        "parameters": count,
        **kinds,
        "said": [*choice, network, sentence, *found.notes, *notes],
    }
    return Imported(config, params, ema, record, record["said"])


def _unwrap(layout: Layout, source: files.Source, file: Path) -> Unwrapped:
    try:
        return unwrap(layout, source.contents)
    except AmbiguousWeights as error:
        raise WeightsError(f"{file} {error}") from error
    except WeightsError as error:
        raise WeightsError(f"{file} {error}{_hint(layout, source.contents)}") from error


def _recognise(layout: Layout, tensors: Tensors, file: Path) -> Architecture:
    try:
        return recognise(layout, tensors)
    except WeightsError as error:
        raise WeightsError(f"{file} {error}{_hint(layout, tensors)}") from error


def _hint(layout: Layout, contents: Any) -> str:
    """Return the end of a message: the layout that would have read this, or that none would."""
    try:
        names = matching_layouts(contents)
    except AmbiguousWeights as error:
        return f"; it {error}"
    others = [name for name in names if name != layout.name]
    if others:
        return f"; it looks like layout={others[0]}"
    return "" if names else f"; it {describe_misfit(contents)}"
