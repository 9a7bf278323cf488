"""Tell of which layout the contents of a file of weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layouts.registry import LAYOUTS
from ddpm_jax.weights.recognise import resemblance
from ddpm_jax.weights.wrappers import AmbiguousWeights, all_marked, flat_names, tensors_of, unwrap

AUTO = "auto"  # in the place of a layout's name: the one that fits


def layout_of(contents: Any, file: Path) -> str:
    """Return the name of the one layout that fits the contents of `file`.

    Raises:
      WeightsError: none fits, or several do.
    """
    try:
        names = matching_layouts(contents)
    except AmbiguousWeights as error:
        raise WeightsError(f"{file} {error}") from error
    if not names:
        raise WeightsError(f"{file} {describe_misfit(contents)}")
    if len(names) > 1:
        raise WeightsError(f"{file} may be of layout {' or '.join(names)}: say layout=NAME")
    return names[0]


def matching_layouts(contents: Any) -> list[str]:
    """List the layouts some network of which has all its modules in the contents of a file.

    Those that have their names as they stand come alone; else those that do behind a wrapper. A
    bare state dict of w86763777 could be one of kimrass, which is the same network: it counts as
    the former.

    Raises:
      AmbiguousWeights: networks of a layout are there, more than one.
    """
    direct, wrapped, ambiguous = [], [], None
    for name, layout in LAYOUTS.items():
        try:
            found = unwrap(layout, contents)
        except AmbiguousWeights as error:
            ambiguous = error
            continue
        except WeightsError:
            continue
        tensors = tensors_of(found.sets)
        marked = tensors and all_marked(layout, found.sets)
        if marked and len(set(resemblance(layout, tensors[0]))) == 1:
            (direct if found.direct else wrapped).append(name)
    names = direct or wrapped
    if ambiguous is not None and not names:
        raise ambiguous
    return [name for name in names if name != "kimrass"] if "w86763777" in names else names


def describe_misfit(contents: Any) -> str:
    """Say that no layout fits, what the names are, and which layout is nearest."""
    names, nearest = flat_names(contents), []
    for name, layout in LAYOUTS.items():
        try:
            tensors = tensors_of(unwrap(layout, contents).sets)
        except WeightsError:
            continue
        if tensors:
            there, modules = resemblance(layout, tensors[0])
            nearest.append((there / modules, there, modules, name))
    line = f"fits none of the {len(LAYOUTS)} layouts ({', '.join(sorted(LAYOUTS))})"
    if not names:
        return f"{line}: there are no named tensors in it"
    line += f": its {len(names)} tensors are called {', '.join(names[:3])}"
    _, there, modules, name = max(nearest, default=(0, 0, 0, ""))
    if not there:
        return f"{line}, as in no layout"
    return f"{line}; nearest is {name}, with {there} of {modules} modules in place"
