"""The Frechet distance of pixels, where it has a closed form."""

from __future__ import annotations

import numpy as np

from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.pixels import pixel_distance


def test_distance_of_single_pixels_is_that_of_means_and_deviations() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2 for one pixel, with levels scaled to [-1, 1]."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 200, (700, 1, 1, 1)), rng.integers(90, 256, (1200, 1, 1, 1))
    sets = [of_array(levels.astype(np.uint8), {}) for levels in (first, second)]
    means, deviations = (
        [function(levels) / 127.5 for levels in (first, second)]
        for function in (np.mean, lambda x: np.std(x, ddof=1))
    )
    expected = (means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2
    np.testing.assert_allclose(pixel_distance(*sets), expected, rtol=1e-6)
    np.testing.assert_allclose(pixel_distance(*sets[::-1]), expected, rtol=1e-6)
    assert pixel_distance(sets[0], sets[0]) < 1e-9
