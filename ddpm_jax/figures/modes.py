"""List the figures by the names that users know them by."""

from __future__ import annotations

from collections.abc import Callable

from ddpm_jax.figures.classes import draw_classes
from ddpm_jax.figures.films import FILMS, draw_film, draw_grid
from ddpm_jax.figures.inpainting import draw_inpainting
from ddpm_jax.figures.interpolation import draw_coarse_to_fine, draw_interpolation
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.neighbours import draw_neighbours
from ddpm_jax.figures.reconstruction import draw_reconstruction
from ddpm_jax.figures.shared_latents import draw_shared_latents

MODES: dict[str, Callable[[Job], None]] = {
    "grid": draw_grid,
    "denoising": lambda job: draw_film(job, "x_t", 16, 40),
    "progressive": lambda job: draw_film(job, "x0", 8, 12),
    "shared_latents": draw_shared_latents,
    "interpolation": draw_interpolation,
    "coarse_to_fine": draw_coarse_to_fine,
    "classes": draw_classes,
    "neighbours": draw_neighbours,
    "inpaint": draw_inpainting,
    "reconstruction": draw_reconstruction,
}
# The endings that a mode's output may have, where they are not just .png; "" is a folder.
OUTPUTS = {"grid": (".png", ".npz", ""), "denoising": FILMS, "progressive": (".png", *FILMS)}
