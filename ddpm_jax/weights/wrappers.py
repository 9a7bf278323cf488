"""Take weights out of what training loops put around them: wrappers, prefixes, buffers.

A loop saves a network under a key ("model", "state_dict", "ema") and in front of every name what
wraps it ("module.", "_orig_mod.", "ema_model."), several of each inside one another. All of them
lead to a name that ends as a name of the layout does. For layout pesser:

    {"state_dict": {"model.conv_in.bias": ..., "ema_model.conv_in.bias": ..., "betas": ...}}
    raw        state_dict.model.       conv_in.bias, ...
    averaged   state_dict.ema_model.   conv_in.bias, ...
    buffers    betas: kept apart, they tell the process
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layout import Layout, Tensors, WeightSets
from ddpm_jax.weights.plan import Plan

_AVERAGED = re.compile(r"(?<![a-z])(ema|shadow|average|averaged|swa)(?![a-z])")
_BUFFERS = re.compile(
    r"(^|\.)((log_|sqrt_|sqrt_recip_|sqrt_recipm1_|sqrt_one_minus_|log_one_minus_|one_minus_)?"
    r"(alphas?|alphas?_(bars?|cumprod)(_prev|_next)?)|betas?|sigmas?|timesteps|num_timesteps|snr"
    r"|posterior_\w+|loss_weights?|p2_loss_weight|lvlb_weights|decay|num_updates|initted|step)$"
)
_MOST_DIMENSIONS = 1  # of a buffer


class AmbiguousWeights(WeightsError):
    """Several networks in one file, of which any could be meant."""


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """The weights of a file, by the names of a layout.

    Attributes:
      direct: the file is as the layout has it, without a wrapper.
      notes: where the weights were, and what was left out.
      betas: of the process, if the file holds them.
    """

    sets: WeightSets
    direct: bool
    notes: tuple[str, ...] = ()
    betas: np.ndarray | None = None


def unwrap(layout: Layout, contents: Any) -> Unwrapped:
    """Return the sets of weights in the contents of a file, wherever in it they are.

    Raises:
      WeightsError: nothing in it has a name of this layout.
      AmbiguousWeights: several sets could be meant.
    """
    try:
        sets, error = layout.unpack(contents), None
    except WeightsError as caught:
        sets, error = None, caught
    if sets is not None and all_marked(layout, sets):
        return _without_buffers(Unwrapped(sets, direct=True))
    found = _search(layout, contents)
    if found is not None:
        return found
    if sets is None:
        raise error
    return _without_buffers(Unwrapped(sets, direct=True))


def tensors_of(sets: WeightSets) -> list[Tensors]:
    """List the sets that are there, averaged ones first."""
    return [x for x in (sets.ema, sets.raw, sets.unlabelled) if x is not None]


def flat_names(contents: Any) -> list[str]:
    """List the names of all arrays in the largest dict of the contents."""
    return max((list(names) for _, names in _dicts(contents)), key=len, default=[])


def _marker(layout: Layout) -> str:
    """Return the one name that every network of the layout has, and nothing else."""
    where = layout.modules(Plan(1, 1, frozenset()))
    return layout.leaf(where["conv_in"], ours="bias")


def all_marked(layout: Layout, sets: WeightSets) -> bool:
    """Tell whether every set has the name without which it is no network of the layout."""
    marker = _marker(layout)
    return all(marker in tensors for tensors in tensors_of(sets))


def _dicts(contents: Any, path: str = "") -> Iterator[tuple[str, Tensors]]:
    """Yield every dict that holds arrays, with its path in front of their names."""
    if isinstance(contents, dict):
        arrays = {str(key): x for key, x in contents.items() if isinstance(x, np.ndarray)}
        if arrays:
            yield path, arrays
        for key, value in contents.items():
            yield from _dicts(value, f"{path}{key}.")
    elif isinstance(contents, list):
        for index, value in enumerate(contents):
            yield from _dicts(value, f"{path}{index}.")


def _search(layout: Layout, contents: Any) -> Unwrapped | None:
    """Find networks of the layout behind any prefix, in any dict; None if there is none."""
    marker, sets, buffers = _marker(layout), {}, {}
    for path, arrays in _dicts(contents):
        prefixes = [
            name.removesuffix(marker)
            for name in arrays
            if name == marker or name.endswith((f".{marker}", f"/{marker}"))
        ]
        parts: dict[str, Tensors] = {prefix: {} for prefix in prefixes}
        for name, array in arrays.items() if prefixes else ():
            prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
            if prefix is not None:
                parts[prefix][name.removeprefix(prefix)] = array
            elif _is_buffer(name, array):
                buffers[name] = array
            else:  # the layout does not know it, and will say so
                parts[prefixes[0]][name] = array
        for prefix, tensors in parts.items():
            try:
                unpacked = layout.unpack(tensors)
            except WeightsError:
                continue
            (sets[path + prefix],) = tensors_of(unpacked)[:1]
    if not sets:
        return None
    averaged = _only({name: x for name, x in sets.items() if _is_averaged(name)}, layout)
    raw = _only({name: x for name, x in sets.items() if not _is_averaged(name)}, layout)
    both = bool(raw and averaged)
    kinds = WeightSets(
        raw=sets[raw[0]] if both else None,
        ema=sets[averaged[0]] if averaged else None,
        unlabelled=sets[raw[0]] if raw and not both else None,
    )
    lists = _without_names(contents, sets[raw[0]]) if raw and not averaged else None
    if lists is not None:
        path, named = lists
        kinds, averaged = WeightSets(raw=sets[raw[0]], ema=named), [path]
    kind = "raw weights" if averaged else "weights"
    where = [f"{kind} in {raw[0].rstrip('./') or 'the file itself'}"] if raw else []
    where += [f"averaged weights in {averaged[0].rstrip('./')}"] if averaged else []
    whole = Unwrapped(kinds, direct=False, notes=(f"unwrapped: {', '.join(where)}",))
    return _without_buffers(whole, buffers)


def _is_averaged(path: str) -> bool:
    """Tell by its path; what keeps an average often keeps the weights themselves, "online"."""
    return bool(_AVERAGED.search(path.lower())) and "online" not in path.lower()


def _only(sets: dict[str, Tensors], layout: Layout) -> list[str]:
    """Return the path of the one set there is, or of the first of several that are equal.

    Raises:
      AmbiguousWeights: there are several.
    """
    first, *others = sorted(sets) or [""]
    if any(not _equal(sets[first], sets[other]) for other in others):
        names = ", ".join(path.rstrip("./") or "the file itself" for path in sorted(sets))
        raise AmbiguousWeights(
            f"holds several sets of weights of layout {layout.name} ({names}): "
            "save the one that is meant as a file of its own"
        )
    return [first] if sets else []


def _equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _without_names(contents: Any, raw: Tensors) -> tuple[str, Tensors] | None:
    """Find averages that are a list in the order of the parameters, as torch_ema saves them."""
    shapes = [x.shape for name, x in raw.items() if not _is_buffer(name, x)]

    def visit(value: Any, path: str) -> Iterator[tuple[str, list[np.ndarray]]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from visit(item, f"{path}{key}.")
        elif isinstance(value, list) and value and all(isinstance(x, np.ndarray) for x in value):
            yield path, value

    for path, arrays in visit(contents, ""):
        if _AVERAGED.search(path.lower()) and [x.shape for x in arrays] == shapes:
            names = [name for name, x in raw.items() if not _is_buffer(name, x)]
            return path, dict(zip(names, arrays, strict=True))
    return None


def _is_buffer(name: str, array: np.ndarray) -> bool:
    """Tell a constant of the process, or a counter, from a parameter."""
    return array.ndim == 0 or (array.ndim <= _MOST_DIMENSIONS and bool(_BUFFERS.search(name)))


def _without_buffers(found: Unwrapped, buffers: Tensors | None = None) -> Unwrapped:
    """Leave constants of the process out of all sets, and keep its betas."""
    buffers, kept = dict(buffers or {}), {}
    for kind in ("raw", "ema", "unlabelled"):
        tensors = getattr(found.sets, kind)
        if tensors is not None:
            buffers |= {name: x for name, x in tensors.items() if _is_buffer(name, x)}
            kept[kind] = {name: x for name, x in tensors.items() if not _is_buffer(name, x)}
    if not buffers:
        return found
    betas = next((x for name, x in buffers.items() if re.search(r"(^|\.)betas$", name)), None)
    names = sorted(buffers)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    note = f"left out, as no parameters of a network: {', '.join(names[:3])}{more}"
    return dataclasses.replace(
        found, sets=WeightSets(**kept), notes=(*found.notes, note), betas=betas
    )
