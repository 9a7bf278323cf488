"""Recognise a network by the names and shapes of its tensors, and a process by its betas."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ddpm_jax.config import DiffusionConfig
from ddpm_jax.diffusion.schedule import SCHEDULES, beta_schedule
from ddpm_jax.errors import WeightsError
from ddpm_jax.weights.layout import Layout, Tensors
from ddpm_jax.weights.plan import Plan, places

MOST_LEVELS, MOST_BLOCKS = 7, 6


@dataclass(frozen=True)
class Architecture:
    """What the weights themselves say of a network; the size of its image is not among it."""

    plan: Plan
    base_channels: int
    channel_mult: tuple[int, ...]
    in_channels: int
    out_channels: int
    conditioning: str
    num_classes: int

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    def model_fields(self) -> dict[str, object]:
        """Return the fields of UNetConfig that are settled.

        The field attention_resolutions is not: it takes the size of the image.
        """
        return {
            "base_channels": self.base_channels,
            "channel_mult": self.channel_mult,
            "blocks_per_level": self.plan.blocks,
            "attention_in_mid": self.plan.attention_in_mid,
            "resampling": self.plan.resampling,
            "conditioning": self.conditioning,
            "num_classes": self.num_classes,
        }

    def attention_resolutions(self, height: int) -> tuple[int, ...]:
        """Return the heights of the levels with attention, for images of this height."""
        return tuple(height // 2**level for level in sorted(self.plan.attention_levels))


def recognise(layout: Layout, tensors: Tensors) -> Architecture:
    """Return the network that explains most of the names.

    Every module is looked for by one name of its own. A plan gains a point for each that is there
    and loses one for each that is not, so a missing tensor or two do not mislead it: `read_params`
    will name them.

    Raises:
      WeightsError: the names are not those of this layout, or the shapes not those of such a
        network.
    """
    score, plan = _best(layout, tensors)
    markers = _markers(layout, plan)
    if score <= len(markers) // 2:
        some = ", ".join(list(tensors)[:3])
        raise WeightsError(
            f"is not of layout {layout.name}: its tensors are called {some}, "
            f"not {', '.join(markers[:3])}"
        )
    where = layout.modules(plan)

    def shape(*path: str) -> tuple[int, ...]:
        name = layout.leaf(*path, ours="kernel")
        if name not in tensors:
            raise WeightsError(f"lacks {name}")
        return tensors[name].shape

    def out_in(*path: str) -> tuple[int, int]:
        """Return the widths of a layer, whichever way round the layout writes them."""
        kernel = shape(*path)
        forms = {4: layout.conv, 2: layout.dense}
        if len(kernel) not in forms:
            raise WeightsError(
                f"has {layout.leaf(*path, ours='kernel')} of shape {kernel}: "
                f"no kernel of layout {layout.name}"
            )
        ours = forms[len(kernel)].read(tensors[layout.leaf(*path, ours="kernel")]).shape
        return ours[-1], ours[-2]

    base = out_in(where["time_embedding_0"])[1]
    widths = [
        out_in(where[f"down_{level}_block_0"], layout.layers["conv1"])[0]
        for level in range(plan.levels)
    ]
    if any(width % base for width in widths):
        raise WeightsError(
            f"has levels {widths} channels wide, not multiples of the time embedding's {base}: "
            "no such network here"
        )
    first = where["down_0_block_0"]
    projected = out_in(first, layout.layers["temb_proj"])[0]
    out_channels, in_channels = out_in(where["conv_out"])[0], out_in(where["conv_in"])[1]
    if out_channels not in (in_channels, 2 * in_channels):
        raise WeightsError(
            f"maps {in_channels} channels to {out_channels}: "
            "neither an image nor an image and its variance"
        )
    labels = where.get("label_embedding")
    labelled = labels is not None and layout.leaf(labels, ours="kernel") in tensors
    return Architecture(
        plan,
        base,
        tuple(width // base for width in widths),
        in_channels,
        out_channels,
        "scale_shift" if projected == 2 * widths[0] else "add",
        shape(labels)[0] if labelled else 0,
    )


def resemblance(layout: Layout, tensors: Tensors) -> tuple[int, int]:
    """Count the modules of the layout's best plan that are there, and all that it has."""
    score, plan = _best(layout, tensors)
    modules = len(_markers(layout, plan))
    return (score + modules) // 2, modules


def recognise_process(betas: Any) -> dict[str, Any]:
    """Return the fields of config.diffusion whose schedule has these betas.

    The usual ends are tried first, then those of the list itself.

    Raises:
      WeightsError: no schedule has them.
    """
    betas, usual = np.asarray(betas, np.float64).reshape(-1), DiffusionConfig()
    own = tuple(float(f"{x:.6g}") for x in (betas[[0, -1]] if len(betas) else (0.0, 0.0)))
    for (start, end), rescale, schedule in product(
        ((usual.beta_start, usual.beta_end), own), (False, True), SCHEDULES
    ):
        try:
            candidate = beta_schedule(
                schedule, len(betas), beta_start=start, beta_end=end, rescale=rescale
            )
        except ValueError:  # of no steps, or with ends outside (0, 1]
            continue
        if np.allclose(betas, candidate, rtol=1e-4, atol=1e-9):
            return {
                "diffusion.timesteps": len(betas),
                "diffusion.schedule": schedule,
                "diffusion.beta_start": start,
                "diffusion.beta_end": end,
                "diffusion.rescale_betas": rescale,
            }
    raise WeightsError(
        f"its {len(betas)} betas, from {own[0]} to {own[1]}, are of no schedule that is known "
        f"here: {', '.join(SCHEDULES)}"
    )


def _best(layout: Layout, tensors: Tensors) -> tuple[int, Plan]:
    """Find the plan with the most points, and return both.

    Attention at a level changes names at that level alone, in every layout. So each level is
    decided by itself.
    """
    best = None
    for levels, blocks, mid, resampling in product(
        range(1, MOST_LEVELS + 1),
        range(1, MOST_BLOCKS + 1),
        layout.switches["attention_in_mid"],
        layout.switches["resampling"],
    ):
        plain = Plan(levels, blocks, frozenset(), mid, resampling)
        points = _score(layout, plain, tensors)
        with_attention = [
            dataclasses.replace(plain, attention_levels=frozenset({level}))
            for level in range(levels)
        ]
        attention = [
            level
            for level, plan in enumerate(with_attention)
            if _score(layout, plan, tensors) > points
        ]
        plan = dataclasses.replace(plain, attention_levels=frozenset(attention))
        points = _score(layout, plan, tensors)
        if best is None or points > best[0]:
            best = points, plan
    assert best is not None
    return best


def _markers(layout: Layout, plan: Plan) -> list[str]:
    """Return one name of a tensor for each module of the plan."""
    where = layout.modules(plan)
    names = [layout.leaf(where["conv_in"], ours="bias")]
    for place in places(plan):
        block = place.kind == "block" or (
            place.kind == "resample" and plan.resampling == "residual"
        )
        if block or place.kind == "attn":
            layer = layout.layers["norm1" if block else "norm"]
            names.append(layout.leaf(where[place.name], layer, ours="bias", norm=True))
        elif plan.resampling == "conv":
            names.append(layout.leaf(where[place.name], ours="bias"))
    return names


def _score(layout: Layout, plan: Plan, tensors: Tensors) -> int:
    """Count the points of a plan."""
    names = _markers(layout, plan)
    present = sum(name in tensors for name in names)
    return 2 * present - len(names)
