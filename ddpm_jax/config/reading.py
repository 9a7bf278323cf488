"""Read configs from Python files, JSON and command-line overrides, and write them back."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from ddpm_jax.config.checking import validate
from ddpm_jax.config.rules import INT32, check_name, check_value, short
from ddpm_jax.config.schema import Config
from ddpm_jax.errors import ConfigError
from ddpm_jax.files import read_json, shipped


def load_config(path: str | Path, overrides: str | typing.Iterable[str] = ()) -> Config:
    """Read a config from a Python file, with :VARIANT where it has several, or a config.json.

    Args:
      path: a file, or where there is none the name of a config that ships: "digits",
        "table2:eps_simple", "configs/digits.py".
      overrides: `section.field=value` each, applied in this order, or a single one.

    Raises:
      ConfigError: no such file or variant, no `get_config`, or anything that `override` and
        `validate` refuse.
    """
    name, variant = str(path), ""
    file = _find(name)
    if file is None and ":" in name:  # a path may have one, too
        name, _, variant = name.rpartition(":")
        file = _find(name)
    if file is None:
        near = difflib.get_close_matches(Path(name).stem, _shipped_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"these ship: {', '.join(_shipped_names())}"
        raise ConfigError(f"config={path}: no such file; {hint}")
    config = _from_json(file) if file.suffix == ".json" else _from_python(file, variant)
    overrides = listed(overrides)
    for item in overrides:
        override(config, item)
    return validate(config)


def listed(overrides: str | typing.Iterable[str]) -> list[str]:
    """Return overrides as a list, of one where they are a single text."""
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _find(name: str) -> Path | None:
    """Return the file of that name, or else of the config that ships under it; None without any."""
    file = Path(os.path.expanduser(name))
    if file.is_file():
        return file
    stem = file.name.removesuffix(".py")
    ships = name in (stem, f"{stem}.py", f"configs/{stem}.py") and stem in _shipped_names()
    return shipped(f"configs/{stem}.py") if ships else None


def _shipped_names() -> list[str]:
    return sorted(file.stem for file in shipped("configs").glob("*.py"))


def _from_json(path: Path) -> Config:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config={path}: not JSON: {error}") from error
    return from_dict(values, f"config={path}")


def _from_python(path: Path, variant: str) -> Config:
    what = f"config={path}"
    spec = importlib.util.spec_from_file_location(f"ddpm_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        variants = getattr(module, "VARIANTS", ())
        if variant not in (variants or ("",)):
            raise ConfigError(
                f"{what}:VARIANT, one of {', '.join(variants)}"
                if variants
                else f"{what} has no variants"
            )
        config = module.get_config(variant) if variants else module.get_config()
    except ConfigError:
        raise
    # The file is the user's program: whatever it raises is a fault of the file.
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{what}: get_config() must return a ddpm_jax.config.Config, "
            f"not {type(config).__name__}"
        )
    return _build(Config, to_dict(config), "", what)  # Python checks no types, this does


def override(config: Config, item: str) -> None:
    """Apply one `section.field=value`, the value written as in Python, strings without quotes.

    Raises:
      ConfigError: no such field, or a value of another type.
    """
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"config.{name}: write config.{name}=VALUE")
    *sections, last = name.split(".")
    holder: Any = config
    for depth, section in enumerate(sections):
        _check_field(holder, section, ".".join(sections[:depth]))
        holder = getattr(holder, section)
        if not dataclasses.is_dataclass(holder):
            raise ConfigError(
                f"config.{name}: {'.'.join(sections[: depth + 1])} is a value, it has no fields"
            )
    _check_field(holder, last, ".".join(sections))
    annotation = typing.get_type_hints(type(holder))[last]
    if dataclasses.is_dataclass(annotation):
        names = ", ".join(f.name for f in dataclasses.fields(annotation))
        raise ConfigError(f"config.{name} is a section; set one of its fields: {names}")
    setattr(holder, last, typed(_parse(text, annotation), annotation, f"config.{name}"))


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested dicts of the fields, as config.json has them."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], what: str = "config") -> Config:
    """Build and validate a config from what `to_dict` and config.json have.

    Args:
      what: the name of their source, for messages.

    Raises:
      ConfigError: unknown fields, wrong types, or what `validate` refuses.
    """
    return validate(_build(Config, values, "", what))


def save_json(config: Config) -> str:
    """Return the text of config.json."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """List the fields that differ, each as `path: old -> new`."""
    before, after = (flatten_dict(to_dict(config), sep=".") for config in (old, new))
    return [
        f"{path}: {before[path]!r} -> {after[path]!r}"
        for path in before
        if before[path] != after[path]
    ]


def _build(cls: type, values: Any, path: str, what: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{what}: {path or 'the whole'} must be a JSON object, not {short(values)}"
        )
    hints, built = typing.get_type_hints(cls), cls()
    for name, value in values.items():
        _check_field(built, name, path)
        full = f"{path}.{name}" if path else name
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation):
            setattr(built, name, _build(annotation, value, full, what))
        else:
            setattr(built, name, typed(value, annotation, f"config.{full}"))
    return built


def _check_field(holder: Any, name: str, path: str) -> None:
    check_name(holder, name, f"config{'.' + path if path else ''}")


def _parse(text: str, annotation: Any) -> Any:
    """Convert command-line text to a Python value.

    What does not read as a literal stays text for `typed` to judge.
    """
    if annotation is str or typing.get_origin(annotation) is Literal:
        return text
    if annotation is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            text.lower(), text
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # too deep, the last two
        return text
    if typing.get_origin(annotation) is tuple and not isinstance(value, (tuple, list)):
        return (value,)
    return value


def accept(value: Any, field: str, name: str) -> Any:
    """Return `value` in the type of a config's field, if the rules of that field accept it.

    Args:
      field: "section.field".
      name: what messages call the value, which need not be of a config.

    Raises:
      ConfigError: another type, or a value that the field does not accept.
    """
    section, last = field.split(".")
    kind = type(getattr(Config(), section))
    value = typed(value, typing.get_type_hints(kind)[last], name)
    annotation = typing.get_type_hints(kind, include_extras=True)[last]
    check_value(value, (INT32, *getattr(annotation, "__metadata__", ())), name)
    return value


def typed(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` in the annotated type.

    Ints pass for floats, whole floats for ints and lists for tuples; nothing else is converted.

    Args:
      name: what messages call the value.

    Raises:
      ConfigError: another type.
    """
    if isinstance(value, np.generic):
        value = value.item()  # a number of NumPy's, which config.json would not take
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ConfigError(f"{name}={short(value)}: one of {', '.join(choices)}")
        return value
    if isinstance(annotation, types.UnionType):  # image_size alone
        return _sides(value, name)
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{name}={short(value)}: a tuple of {item.__name__}, such as (1,2)")
        return tuple(typed(element, item, name) for element in value)
    if annotation is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if annotation is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5 is how people write a hundred thousand steps
    if type(value) is not annotation:
        accepts = "true or false" if annotation is bool else annotation.__name__
        raise ConfigError(f"{name}={short(value)}: must be {accepts}")
    if annotation is int and abs(value) >= 2**63:
        raise ConfigError(f"{name}={short(value)}: must be less than 2^63")
    if annotation is float and not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be finite")
    return value


def _sides(value: Any, name: str) -> int | tuple[int, int]:
    """Return the side of a square, or a height and another width."""
    if not isinstance(value, (tuple, list)):
        return typed(value, int, name)
    if len(value) != 2:
        raise ConfigError(f"{name}={value}: one side, or two as HEIGHT,WIDTH")
    height, width = (typed(side, int, name) for side in value)
    return height if height == width else (height, width)
