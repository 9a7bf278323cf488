"""Declare layouts: how another code base names and shapes the tensors of this network.

The declaration is used to read, to write and to recognise a file: nothing is said twice. As an
example, one tensor of pytorch_diffusion (`layouts/pesser.py`), the kernel of the convolution that
takes the input of a block past it, in the first block of the second level:

    ours     down_1_block_0/shortcut/kernel            [128, 256]         [in, out]
    theirs   down.1.block.0.nin_shortcut.weight        [256, 128, 1, 1]   [out, in, 1, 1]

Its layout gives the pieces of that name and its form:

    layout.modules(plan)["down_1_block_0"]             "down.1.block.0"
    layout.layers["shortcut"]                          "nin_shortcut"
    layout.leaves, of a kernel                         "weight"
    layout.forms["shortcut"]                           CONV_1X1: x[:, :, 0, 0].T, and back

`entries` joins them to an Entry for each tensor of a network: `read` is theirs to ours, `write` is
ours to theirs. `read_params` and `write_tensors` apply them to whole sets:

    layout, config = LAYOUTS["pesser"], Config()       # the network of CIFAR-10
    tensors = write_tensors(layout, config, params)
    tensors["down.1.block.0.nin_shortcut.weight"].shape             # (256, 128, 1, 1)
    read_params(layout, config, tensors, "file")                    # params again, bit for bit
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.build import Params, abstract_params
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, UNetConfig
from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.forms import (
    AS_IS,
    CONV,
    LINEAR,
    Flat,
    Form,
    embedding_rows,
    from_standard,
    heads_of,
    join_qkv,
    split_qkv,
    to_standard,
)
from ddpm_jax.weights.plan import Plan

Tensors = dict[str, np.ndarray]  # by their names
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class WeightSets:
    """Weights of a file: raw and averaged ones where it tells them apart, else unlabelled."""

    raw: Tensors | None = None
    ema: Tensors | None = None
    unlabelled: Tensors | None = None


@dataclass(frozen=True)
class Layout:
    """Declaration of one code base's checkpoints.

    Attributes:
      modules: a plan to where each of our modules is over there, {"mid_block_1": "mid.block_1"}.
      layers: inside a block or an attention block, ours to theirs; "qkv" stands for fused q, k
        and v.
      unpack: the contents of a file to its sets of weights; WeightsError if they are of another
        kind.
      switches: for fields of UNetConfig that this code base fixes, the values it can express; the
        first is what an import has.
      conv, dense, forms: of 3x3 kernels, of all others, and of the others that differ, by our name
        of the layer.
      leaves: kernel, scale, bias (of a normalisation) and bias (of anything else) over there.
      qkv_order: of its fused q, k and v under a config, as UNetConfig.qkv_layout says it.
      embedding_order: as in UNetConfig, which the weights absorb.
      smallest_attention: how many attention levels a network has -> pixels of the smallest, in
        what was published. It leads from weights, which do not know the size of the image, to that
        size.
      recipe: the published settings for a network of this architecture, as overrides of
        `Config()`.
    """

    name: str
    modules: Callable[[Plan], dict[str, str]]
    layers: Mapping[str, str]
    unpack: Callable[[Any], WeightSets]
    switches: Mapping[str, tuple[Any, ...]]
    recipe: Callable[[Any], Mapping[str, Any]] | None = None
    smallest_attention: Callable[[int], int] = lambda levels: 16
    leaves: tuple[str, str, str, str] = ("weight", "weight", "bias", "bias")
    separator: str = "."
    conv: Form = CONV
    dense: Form = LINEAR
    forms: Mapping[str, Form] = field(default_factory=dict)
    qkv_order: Callable[[UNetConfig], str] = lambda model: "fused"
    embedding_order: str = "sin_cos"

    def form(self, layer: str, leaf: str, dimensions: int) -> Form:
        """Return the form of a tensor, by our names of its layer and leaf."""
        if leaf != "kernel":
            return AS_IS
        return self.conv if dimensions == 4 else self.forms.get(layer, self.dense)

    def leaf(self, *path: str, ours: str, norm: bool = False) -> str:
        """Return their name of a tensor, by the path of its module and our name of the leaf."""
        kernel, scale, shift, bias = self.leaves
        name = {"kernel": kernel, "table": kernel, "scale": scale, "bias": shift if norm else bias}[
            ours
        ]
        return self.separator.join([*filter(None, path), name])


@dataclass(frozen=True)
class Entry:
    """One tensor over there and the one (or, fused, three) of ours that it is."""

    theirs: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], list[np.ndarray]]
    write: Callable[[list[np.ndarray]], np.ndarray]


def entries(layout: Layout, config: Config) -> Iterator[Entry]:
    """List every tensor of the network of `config` as the layout has it."""
    standard = dataclasses.replace(config.model, qkv_layout="separate", embedding_order="sin_cos")
    data = config.data
    model = tuple(vars(standard).items())
    shapes = _shapes(model, data.image_size, data.channels, config.diffusion.variance)
    where = layout.modules(Plan.of(config))
    order = layout.qkv_order(config.model)

    def one(name: str, theirs: str, form: Form) -> Entry:
        return _entry(
            theirs, (name,), shapes, lambda x: [form.read(x)], lambda parts: form.write(parts[0])
        )

    for name in shapes:
        module, *inside, leaf = name.split("/") if "/" in name else (name, "table")
        layer, width = "".join(inside), shapes[name].shape[-1]
        norm = f"{name.rpartition('/')[0]}/scale" in shapes
        fused = "qkv" in layout.layers and layer in ("q", "k", "v")
        form = layout.form("qkv" if fused else layer, leaf, len(shapes[name].shape))
        if name == "time_embedding_0/kernel":
            form = _reordered(form, embedding_rows(shapes[name].shape[0], layout.embedding_order))
        if not fused:
            theirs = layout.leaf(
                where[module], layout.layers[layer] if layer else "", ours=leaf, norm=norm
            )
            yield one(name, theirs, form)
        elif layer == "q":  # k and v come with it
            heads = heads_of(config.model, width)
            yield _entry(
                layout.leaf(where[module], layout.layers["qkv"], ours=leaf),
                tuple(f"{module}/{part}/{leaf}" for part in "qkv"),
                shapes,
                lambda x, form=form, heads=heads: split_qkv(form.read(x), order, heads),
                lambda parts, form=form, heads=heads: form.write(join_qkv(parts, order, heads)),
            )


@functools.lru_cache(maxsize=8)
def _shapes(
    model: tuple[tuple[str, Any], ...], image_size: int, channels: int, variance: str
) -> dict[str, Any]:
    """Return the shapes of our parameters by their names; each import asks several times."""
    config = Config(
        data=DataConfig(image_size=image_size, channels=channels),
        model=UNetConfig(**dict(model)),
        diffusion=DiffusionConfig(variance=variance),
    )
    return flatten_dict(abstract_params(config), sep="/")


def read_params(layout: Layout, config: Config, tensors: Tensors, what: str) -> Params:
    """Read our parameters, as `config` has them, from a whole set of theirs.

    Raises:
      WeightsError: tensors missing, surplus, of another shape, or not finite, named in part.
    """
    expected = {entry.theirs: entry for entry in entries(layout, config)}
    faults = []
    if missing := [f"{name} {expected[name].shape}" for name in expected if name not in tensors]:
        faults.append(f"lacks {_few(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        faults.append(f"has {_few(surplus)}, which layout {layout.name} does not know")
    shapes = {
        name: (tensors[name].shape, entry.shape)
        for name, entry in expected.items()
        if name in tensors
    }
    if other := [
        f"{name} is {have}, not {want}" for name, (have, want) in shapes.items() if have != want
    ]:
        faults.append(f"does not fit the config: {_few(other)}")
    if not faults:
        bad = [name for name in expected if not np.isfinite(tensors[name]).all()]
        if bad:
            faults.append(f"is damaged: NaN or infinity in {_few(bad)}")
    if faults:
        raise WeightsError(f"{what} {'; it '.join(faults)}")
    flat: Flat = {}
    for name, entry in expected.items():
        flat.update(zip(entry.ours, entry.read(tensors[name])))
    flat = {
        name: np.ascontiguousarray(array, np.float32)
        for name, array in from_standard(flat, config.model).items()
    }
    return unflatten_dict(flat, sep="/")


def write_tensors(layout: Layout, config: Config, params: Params) -> Tensors:
    """Write their tensors from our parameters.

    Raises:
      WeightsError: the layout has no way to express a switch of config.model.
    """
    check_switches(layout, config, f"layout {layout.name} cannot express")
    flat = {name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items()}
    flat = to_standard(flat, config.model)
    return {
        entry.theirs: np.ascontiguousarray(entry.write([flat[name] for name in entry.ours]))
        for entry in entries(layout, config)
    }


def check_switches(layout: Layout, config: Config, complaint: str) -> None:
    """Raise WeightsError naming every switch of the config that the layout does not have."""
    switches = dict(layout.switches)
    if config.model.resampling != "conv":
        switches.pop("down_padding", None)  # of the strided convolution, and there is none
    other = [
        f"config.model.{name}={getattr(config.model, name)} (only {' or '.join(map(str, values))})"
        for name, values in switches.items()
        if getattr(config.model, name) not in values
    ]
    if other:
        raise WeightsError(f"{complaint} {', '.join(other)}")


def flat_tensors(contents: Any, kind: str) -> Tensors:
    """Return `contents` if it is a flat dict of arrays, without the `module.` of parallel wrappers.

    Raises:
      WeightsError: it is something else than the `kind` that messages call it.
    """
    if (
        not isinstance(contents, dict)
        or not contents
        or not all(isinstance(x, np.ndarray) for x in contents.values())
    ):
        raise WeightsError(f"holds no {kind}: {_describe(contents)}")
    return without_prefix(contents, "module.")


def without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Take `prefix` off every name, if all have it."""
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _entry(
    theirs: str, ours: tuple[str, ...], shapes: Mapping[str, Any], read: Any, write: Any
) -> Entry:
    blank = [np.broadcast_to(np.float32(0), shapes[name].shape) for name in ours]
    return Entry(theirs, ours, write(blank).shape, read, write)


def _reordered(form: Form, rows: np.ndarray) -> Form:
    return Form(lambda x: form.read(x)[np.argsort(rows)], lambda x: form.write(x[rows]))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _describe(contents: Any) -> str:
    if isinstance(contents, dict):
        return f"a dict of {_few([repr(key) for key in contents])}" if contents else "an empty dict"
    return (
        f"a {type(contents).__name__} of {len(contents)}"
        if isinstance(contents, (list, tuple))
        else f"a {type(contents).__name__}"
    )
