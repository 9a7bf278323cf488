"""The levels of a set's pixels, where the set does not have 256 of its own."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from ddpm_jax.config import DataConfig
from ddpm_jax.data.load import load_source


def test_levels_of_digits_are_the_nearest_to_sixteenths_of_255(tmp_path):
    """Level k of 0..16 becomes the whole number nearest to 255 k / 16, at its own place."""
    nearest = np.array(
        [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    )
    stored = load_digits()
    held_out = np.arange(len(stored.images)) % 10 == 9
    data = DataConfig(name="digits", image_size=8, channels=1)
    for split, rows in (("train", ~held_out), ("test", held_out)):
        source = load_source(data, tmp_path, split)
        expected = nearest[stored.images[rows].astype(int)]
        np.testing.assert_array_equal(source.images[..., 0], expected)
        np.testing.assert_array_equal(source.labels, stored.target[rows])
