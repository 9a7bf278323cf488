"""All layouts by name."""

from __future__ import annotations

from ddpm_jax.weights import diffusers, ermongroup, ho, kimrass, openai, pesser, tqch, w86763777
from ddpm_jax.weights.layout import Layout

LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (ho, pesser, ermongroup, diffusers, openai, w86763777, kimrass, tqch)
}
EXPORTS = ("diffusers", "pesser", "openai")
