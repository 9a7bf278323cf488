"""Declare the layout of KimRass's DDPM: that of `w86763777` under the prefix "model.".

A file holds raw weights only. Published are CelebA at 32x32 and 64x64, both with attention at the
second level. That is 16x16 in the one and 32x32 in the other, so the second needs
config.data.image_size=64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ddpm_jax.weights.layout import WeightSets, flat_tensors, without_prefix
from ddpm_jax.weights.layouts import w86763777


def unpack(contents: Any) -> WeightSets:
    """Unpack a state dict, or the checkpoint {epoch, model, optimizer, ...} of a run under way."""
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    return WeightSets(
        raw=w86763777.without_table(without_prefix(flat_tensors(contents, "state dict"), "model."))
    )


LAYOUT = dataclasses.replace(w86763777.LAYOUT, name="kimrass", unpack=unpack)
