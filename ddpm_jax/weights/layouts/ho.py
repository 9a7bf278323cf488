"""Declare the layout of the paper's own TensorFlow variables, `model/down_0/block_0/conv1/W`.

It is the layout of its PyTorch port, `pesser`, with other spellings; kernels are as they are here,
nothing to transpose. Averages have the names of their variables with
"/ExponentialMovingAverage" behind. Adam's slots and counters are left out.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.forms import AS_IS
from ddpm_jax.weights.layout import WeightSets, flat_tensors
from ddpm_jax.weights.layouts import pesser
from ddpm_jax.weights.plan import Plan

_SLOT = re.compile(
    r"/Adam(_\d+)?$|^(beta\d_power|global_step)(_\d+)?$|/(beta\d_power|global_step)$"
)
_AVERAGE = "/ExponentialMovingAverage"


def modules(plan: Plan) -> dict[str, str]:
    """Return where each module of `plan` is over there: pesser's names, in its own spelling.

    "down.1.block.0" is "down_1/block_0" here, and "temb.dense.0" is "temb/dense0".
    """
    return {
        ours: re.sub(r"\.(\d+)", r"_\1", name).replace("dense_", "dense").replace(".", "/")
        for ours, name in pesser.modules(plan).items()
    }


def unpack(contents: Any) -> WeightSets:
    """Return raw and averaged variables without what their names share.

    That is the scope in front ("model/") and the ":0" that exported names may end in.
    """
    variables = {
        name.removesuffix(":0"): x for name, x in flat_tensors(contents, "variables").items()
    }
    variables = {name: x for name, x in variables.items() if not _SLOT.search(name)}
    scopes = {name.removesuffix("conv_in/W") for name in variables if name.endswith("conv_in/W")}
    scopes |= {
        name.removesuffix(f"conv_in/W{_AVERAGE}")
        for name in variables
        if name.endswith(f"conv_in/W{_AVERAGE}")
    }
    if len(scopes) != 1:
        raise WeightsError(
            f"is not of layout ho: {len(scopes)} variables are called conv_in/W, in place of one"
        )
    scope = scopes.pop()
    names = {name: name.removeprefix(scope) for name in variables}
    ema = {
        names[name].removesuffix(_AVERAGE): x
        for name, x in variables.items()
        if name.endswith(_AVERAGE)
    }
    raw = {names[name]: x for name, x in variables.items() if not name.endswith(_AVERAGE)}
    return WeightSets(raw=raw or None, ema=ema or None)


LAYOUT = dataclasses.replace(
    pesser.LAYOUT,
    name="ho",
    modules=modules,
    unpack=unpack,
    leaves=("W", "gamma", "beta", "b"),
    separator="/",
    conv=AS_IS,
    dense=AS_IS,
    forms={},
)
