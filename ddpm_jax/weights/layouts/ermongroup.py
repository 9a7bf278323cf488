"""Declare the layout of the DDIM authors' checkpoints, a list around the layout of `pesser`.

The list is [model, optimiser, epoch, step, averaged weights]. The model's names begin with
"module."; the average holds parameters under their plain names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layout import WeightSets, flat_tensors
from ddpm_jax.weights.layouts import pesser


def unpack(contents: Any) -> WeightSets:
    """Return the first and the fifth item of the list."""
    if not isinstance(contents, list) or len(contents) < 4:
        raise WeightsError(
            "is not the list [model, optimizer, epoch, step, ema] of layout ermongroup; "
            "a flat one is layout pesser"
        )
    ema = (
        flat_tensors(contents[4], "averaged weights in its fifth place")
        if len(contents) > 4
        else None
    )
    return WeightSets(raw=flat_tensors(contents[0], "state dict in its first place"), ema=ema)


LAYOUT = dataclasses.replace(pesser.LAYOUT, name="ermongroup", unpack=unpack)
