"""Collect all layouts by name."""

from __future__ import annotations

from ddpm_jax.weights.layout import Layout
from ddpm_jax.weights.layouts import (
    diffusers,
    ermongroup,
    ho,
    kimrass,
    openai,
    pesser,
    tqch,
    w86763777,
)

LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT
    for module in (ho, pesser, ermongroup, diffusers, openai, w86763777, kimrass, tqch)
}
EXPORTS = ("diffusers", "pesser", "openai")
