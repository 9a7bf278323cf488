"""Lay out figures as panels: float arrays [rows, columns, h, w, c] in [-1, 1].

A level is what the paper calls t, the number of diffusion steps that an image has gone through: 0
is the image, T is noise. On a strided chain the nearest level that it visits is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_jax import images
from ddpm_jax.errors import ConfigError
from ddpm_jax.sampling.generate import Generator

GAP = 2  # pixels between images, and between them and captions


def picture(
    panel: np.ndarray,
    scale: int = 1,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> np.ndarray:
    """Tile a panel into one uint8 picture.

    Args:
      scale: side of a pixel.
      rows: a caption for each row, on the left; none without any.
      columns: a caption for each column, above; upright where all have room, else turned.
    """
    count, across, height, width = panel.shape[:4]
    flat = panel.reshape(-1, *panel.shape[2:])
    tiles = images.grid(images.to_uint8(flat), columns=across, gap=GAP, scale=scale)
    if not (any(rows) or any(columns)):
        return tiles
    left, above = [_text(text) for text in rows], [_text(text) for text in columns]
    pitch_x, pitch_y = width * scale + GAP, height * scale + GAP
    if any(text.shape[1] > pitch_x for text in above):
        above = [np.rot90(text) for text in above]
    x = max((text.shape[1] + GAP for text in left), default=0)
    y = max((text.shape[0] + GAP for text in above), default=0)
    canvas = np.full((y + tiles.shape[0], x + tiles.shape[1], tiles.shape[2]), 255, np.uint8)
    canvas[y:, x:] = tiles
    for i, text in enumerate(left[:count]):
        _put(canvas[:, : x - GAP], text, y + i * pitch_y + (height * scale - text.shape[0]) // 2, 0)
    for i, text in enumerate(above[:across]):
        at = x + i * pitch_x + (width * scale - text.shape[1]) // 2
        _put(canvas[: y - GAP], text, y - GAP - text.shape[0], at)
    return canvas


def _text(text: str) -> np.ndarray:
    """Draw one line in black on white, uint8 [h, w]."""
    font = ImageFont.load_default_imagefont()
    _, _, width, height = map(int, font.getbbox(text or " "))
    image = Image.new("L", (width, height), 255)
    ImageDraw.Draw(image).text((0, 0), text, fill=0, font=font)
    return np.asarray(image)


def _put(canvas: np.ndarray, text: np.ndarray, y: int, x: int) -> None:
    """Draw `text` at a place that it may leave; what has no room is cut off."""
    y, x = max(y, 0), max(x, 0)
    room = canvas[y : y + text.shape[0], x : x + text.shape[1]]
    np.minimum(room, text[: room.shape[0], : room.shape[1], None], out=room)


def start_of(generator: Generator, level: int) -> tuple[int, int]:
    """Return the row that denoises x at `level` 1..T, and the timestep that this row is at.

    Raises:
      ConfigError: a level outside 1..T.
    """
    timesteps = generator.sampler.process.schedule.timesteps
    if not 1 <= level <= timesteps:
        raise ConfigError(f"level={level}: must be in 1..{timesteps}")
    table = generator.sampler.table
    row = table.row_at(level - 1)
    return row, int(table.timesteps[row])


def level_caption(generator: Generator, level: int) -> str:
    """Return the caption of a row at `level`: where the chain, which may skip timesteps, has it."""
    return f"t={start_of(generator, level)[1] + 1 if level else 0}"


def same_labels(label: int | None, count: int) -> np.ndarray | None:
    """Return one class for `count` samples, or None where there is none."""
    return None if label is None else np.full(count, label)
