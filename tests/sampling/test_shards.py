"""Samples kept on disk: none drawn twice, each at its number, none of another protocol."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.errors import ShardError
from ddpm_jax.images import load_png
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling import shards

ONE = Devices(jax.devices()[:1])


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_a_set_grows_block_by_block(tmp_path: Path, name: str) -> None:
    """Sample i has level i. Blocks of ten: those that are there are not drawn again."""
    place, drawn = tmp_path / name, []

    def draw(numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        drawn.extend(zip(numbers.tolist(), labels.tolist()))
        return np.broadcast_to((numbers / 127.5 - 1)[:, None, None, None], (len(numbers), 2, 2, 1))

    def fill(count: int, **protocol) -> int:
        numbers = 4 + np.arange(count)
        return shards.fill(place, {"seed": 1} | protocol, numbers, numbers % 3, draw, ONE, size=10)

    assert fill(20) == 20
    assert drawn == [(number, number % 3) for number in range(4, 24)]
    assert fill(20) == 0 and fill(35) == 15
    assert drawn == [(number, number % 3) for number in range(4, 39)]
    if name == "folder":
        levels = [load_png(place / f"{number:06d}.png") for number in range(4, 39)]
        levels = np.stack(levels)[:, 0, 0, 0]
    else:
        with np.load(place) as stored:
            levels = stored["arr_0"][:, 0, 0, 0]
            np.testing.assert_array_equal(stored["arr_1"], np.arange(4, 39) % 3)
    np.testing.assert_array_equal(levels, np.arange(4, 39))
    with pytest.raises(ShardError, match=r"another protocol \(seed: 1, now 2\)"):
        fill(35, seed=2)
    with pytest.raises(ShardError, match=r"another protocol \(step: None, now 5\)"):
        fill(35, step=5)
