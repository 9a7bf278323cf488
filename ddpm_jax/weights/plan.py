"""List a UNet's modules in their order, without widths: every layout derives its names from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ddpm_jax.config import Config


@dataclass(frozen=True)
class Plan:
    """Numbers of levels and blocks of a UNet, and the places of attention."""

    levels: int
    blocks: int  # a level, on the way down; the way up has one more
    attention_levels: frozenset[int]
    attention_in_mid: bool = True
    resampling: str = "conv"  # conv, pool or residual

    @classmethod
    def of(cls, config: Config) -> Plan:
        """Read the plan off a config."""
        model, levels = config.model, len(config.model.channel_mult)
        sizes = [config.data.sides[0] // 2**level for level in range(levels)]
        return cls(
            levels,
            model.blocks_per_level,
            frozenset(
                level for level, size in enumerate(sizes) if size in model.attention_resolutions
            ),
            model.attention_in_mid,
            model.resampling,
        )


class Place(NamedTuple):
    """One module; `name` is ours.

    `index` counts the blocks of a level. In the middle 0 and 1 are the two blocks.
    """

    name: str
    side: str  # down, mid, up
    kind: str  # block, attn, resample
    level: int
    index: int


def places(plan: Plan) -> Iterator[Place]:
    """List all modules between conv_in and norm_out in the order of execution.

    A "resample" of pooling has no weights.
    """
    for level in range(plan.levels):
        for index in range(plan.blocks):
            yield Place(f"down_{level}_block_{index}", "down", "block", level, index)
            if level in plan.attention_levels:
                yield Place(f"down_{level}_attn_{index}", "down", "attn", level, index)
        if level < plan.levels - 1:
            yield Place(f"down_{level}_downsample", "down", "resample", level, plan.blocks)
    yield Place("mid_block_1", "mid", "block", plan.levels - 1, 0)
    if plan.attention_in_mid:
        yield Place("mid_attn", "mid", "attn", plan.levels - 1, 0)
    yield Place("mid_block_2", "mid", "block", plan.levels - 1, 1)
    for level in reversed(range(plan.levels)):
        for index in range(plan.blocks + 1):
            yield Place(f"up_{level}_block_{index}", "up", "block", level, index)
            if level in plan.attention_levels:
                yield Place(f"up_{level}_attn_{index}", "up", "attn", level, index)
        if level > 0:
            yield Place(f"up_{level}_upsample", "up", "resample", level, plan.blocks + 1)
