"""The paper's own TensorFlow variables, `model/down_0/block_0/conv1/W`: kernels as they are here, nothing to transpose.

Averages have the names of their variables with "/ExponentialMovingAverage" behind; Adam's slots and counters are left out.
"""

from __future__ import annotations

import re
from typing import Any

from ddpm_jax.weights import pesser
from ddpm_jax.weights.errors import WeightsError
from ddpm_jax.weights.forms import AS_IS
from ddpm_jax.weights.layout import Layout, WeightSets, flat_tensors
from ddpm_jax.weights.plan import Plan, places

_SLOT = re.compile(r"/Adam(_\d+)?$|^(beta\d_power|global_step)(_\d+)?$|/(beta\d_power|global_step)$")
_AVERAGE = "/ExponentialMovingAverage"


def modules(plan: Plan) -> dict[str, str]:
    where = {
        "time_embedding_0": "temb/dense0",
        "time_embedding_1": "temb/dense1",
        "conv_in": "conv_in",
        "mid_block_1": "mid/block_1",
        "mid_attn": "mid/attn_1",
        "mid_block_2": "mid/block_2",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    for name, side, kind, level, index in places(plan):
        if side != "mid":
            resample = "downsample" if side == "down" else "upsample"
            where[name] = f"{side}_{level}/{resample}/conv" if kind == "resample" else f"{side}_{level}/{kind}_{index}"
    return where


def unpack(contents: Any) -> WeightSets:
    """Raw and averaged variables, without the scope they share ("model") and the ":0" that exported names may end in."""
    variables = {name.removesuffix(":0"): x for name, x in flat_tensors(contents, "variables").items()}
    variables = {name: x for name, x in variables.items() if not _SLOT.search(name)}
    scopes = {name.removesuffix("conv_in/W") for name in variables if name.endswith("conv_in/W")}
    scopes |= {name.removesuffix(f"conv_in/W{_AVERAGE}") for name in variables if name.endswith(f"conv_in/W{_AVERAGE}")}
    if len(scopes) != 1:
        raise WeightsError(f"is not of layout ho: {len(scopes)} variables are called conv_in/W, in place of one")
    scope = scopes.pop()
    names = {name: name.removeprefix(scope) for name in variables}
    ema = {names[name].removesuffix(_AVERAGE): x for name, x in variables.items() if name.endswith(_AVERAGE)}
    raw = {names[name]: x for name, x in variables.items() if not name.endswith(_AVERAGE)}
    return WeightSets(raw=raw or None, ema=ema or None)


LAYOUT = Layout(
    name="ho",
    modules=modules,
    layers={
        **{name: name for name in ("norm1", "conv1", "temb_proj", "norm2", "conv2", "norm", "q", "k", "v", "proj_out")},
        "shortcut": "nin_shortcut",
    },
    unpack=unpack,
    switches=pesser.PAPER_SWITCHES,
    recipe=pesser.paper_recipe,
    leaves=("W", "gamma", "beta", "b"),
    separator="/",
    conv=AS_IS,
    dense=AS_IS,
)
