"""Test that metrics measure: distances to real images grow with blur, noise and JPEG.

Every set has as many images, so that the bias of few images is alike. docs/evaluation.md has the
numbers of a larger run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import inception_of, load_inception
from ddpm_jax.evaluation.metrics.frechet import Gaussian, frechet_distance
from ddpm_jax.evaluation.metrics.kid import kernel_inception_distance
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.evaluation.quality import extract
from ddpm_jax.parallel.devices import Devices
from tests.support.damage import DAMAGES, add_noise, blur
from tests.support.inception import pictures, random_layers

# The real sets lie beside a checkout, or nowhere.
UNPACK = Path(__file__).resolve().parents[3] / "shared" / "data" / "unpack.py"

BATCH = 40  # images at once, which fill the sets below without a rest; KID asks for no fewer


def photo_crops(count: int, size: int = 32) -> np.ndarray:
    """Cut uint8 [count, size, size, 3] at random from scikit-learn's two photos."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    crops = np.empty((count, size, size, 3), np.uint8)
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (rng.integers(0, length - size) for length in photo.shape[:2])
        crops[number] = photo[top : top + size, left : left + size]
    return crops


def random_network(folder: Path) -> tuple[Extractor, str, np.ndarray, np.ndarray]:
    """Return the first five layers with random weights, and crops of photos as both sets.

    Such features see mild damage less than they see that two sets show other things.
    """
    weights, crops = inception_of(random_layers("192"), "five.npz"), photo_crops(BATCH)
    extractor = Extractor(weights, Devices(jax.devices()[:1]), batch_size=BATCH)
    return extractor, "192", crops, crops


def trained_trunk(folder: Path) -> tuple[Extractor, str, np.ndarray, np.ndarray]:
    """Return Inception up to Mixed_6e as published, and two sets of images of CIFAR-10."""
    spec = importlib.util.spec_from_file_location("unpack", UNPACK)
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    unpack.inception(folder)
    (path,) = (folder / "inception").iterdir()
    images = unpack.decode_images((unpack.PACKED / "cifar10_test.medx").read_bytes())
    weights = load_inception(path, folder)
    extractor = Extractor(weights, Devices(jax.devices()[:1]), batch_size=BATCH)
    return extractor, "768", images[:BATCH], images[100 : 100 + 2 * BATCH]


@pytest.mark.slow
def test_distances_grow_with_every_damage(tmp_path: Path, compiled_in_full) -> None:
    """FID and KID, without the FID's limit, which costs ten times as much as the FID."""
    network = trained_trunk if UNPACK.exists() else random_network
    extractor, tap, clean, real = network(tmp_path)

    def features(images: np.ndarray) -> np.ndarray:
        return extract(extractor, of_array(images, {}), ("fid", "kid"), tap).rows[tap]

    seen = features(real)
    reference = Gaussian.of(Moments.of(seen))

    def distances(samples: np.ndarray) -> list[float]:
        """FID and KID of `samples`."""
        rows = features(samples)
        fid = frechet_distance(Gaussian.of(Moments.of(rows)), reference)
        return [fid, kernel_inception_distance(rows, seen).mean]

    undamaged = distances(clean)
    for kind, (damage, strengths) in DAMAGES.items():
        rows = [undamaged, *(distances(damage(clean, strength)) for strength in strengths)]
        assert np.all(np.diff(rows, axis=0) > 0), (kind, rows)


def test_damage_grows_and_keeps_the_mean() -> None:
    images = pictures(4, 16)
    for damage, strengths in DAMAGES.values():
        errors = [
            np.square(damage(images, strength).astype(float) - images).mean()
            for strength in strengths
        ]
        assert np.all(np.diff([0, *errors]) > 0)
        assert damage(images, strengths[0]).shape == images.shape
    grey = np.full((1, 32, 32, 3), 128, np.uint8)
    noisy = add_noise(grey, 10)
    assert noisy.std() == pytest.approx(10, rel=0.05)
    np.testing.assert_array_equal(noisy, add_noise(grey, 10))
    np.testing.assert_array_equal(blur(grey, 2), grey)
    dot = np.zeros((1, 31, 31, 1), np.uint8)
    dot[0, 15, 15] = 255
    profile = blur(dot, 1.0)[0, 15, 13:18, 0] / 255
    expected = np.exp(-(np.arange(-2, 3) ** 2) / 2) / (2 * np.pi)
    np.testing.assert_allclose(profile, expected, atol=3e-3)
