"""Which features the numbers of an evaluation are made of."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import scipy.special
import scipy.stats

from ddpm_jax.evaluation import quality
from ddpm_jax.evaluation.inception.features import Block
from ddpm_jax.evaluation.metrics.frechet import Gaussian
from ddpm_jax.evaluation.metrics.inception_score import inception_score
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.evaluation.quality import Features
from ddpm_jax.evaluation.references import Reference


def cubes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def test_numbers_of_all_pairs_take_rows_at_equal_distances(monkeypatch) -> None:
    """Of 150 samples every third, where 50 are the most: KID sees a drift in their order."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(150, 6)) + np.linspace(0, 2, 150)[:, None]).astype(np.float32)
    real = rng.normal(size=(60, 6)).astype(np.float32)
    monkeypatch.setattr(quality, "MOST_FEATURES", 50)
    reference = Reference(Gaussian.of(Moments.of(real)), None, real, {})
    features = Features({"64": rows}, Moments())
    (kid,) = quality.score(features, reference, ["kid"], "64")
    x, y = rows[::3].astype(np.float64), real.astype(np.float64)
    inside = [(cubes(z, z).sum() - np.trace(cubes(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(inside) - 2 * cubes(x, y).mean()
    assert kid.metric == "KID-64"
    np.testing.assert_allclose(kid.value, expected, rtol=1e-6)


def test_the_fid_is_that_of_all_rows() -> None:
    """Of more than a thousand, which come in blocks; the closed form with diagonal roots."""
    rng = np.random.default_rng(1)
    rows = rng.normal(1, 2, (1500, 2)).astype(np.float32)
    real = Gaussian(np.zeros(2), np.eye(2))
    (fid,) = quality.score(
        Features({"64": rows}, Moments()), Reference(real, None, None, {}), ["fid"], "64"
    )
    wide = rows.astype(np.float64)
    roots = np.sqrt(np.linalg.eigvalsh(np.cov(wide.T)))
    expected = np.sum(wide.mean(axis=0) ** 2) + np.sum((roots - 1) ** 2)
    np.testing.assert_allclose(fid.value, expected, rtol=1e-6)


def test_the_inception_score_is_of_logits_without_their_bias(monkeypatch) -> None:
    """As the papers' code has it; a bias that favours classes would lower the score."""
    rng = np.random.default_rng(2)
    products = rng.normal(size=(40, 7)).astype(np.float32)
    bias = rng.normal(size=7).astype(np.float32)
    monkeypatch.setattr(quality, "inception_score", functools.partial(inception_score, splits=1))
    extractor = SimpleNamespace(
        weights=SimpleNamespace(params={"softmax": {"bias": bias}}),
        blocks=lambda images, taps, what: [
            Block(start, {"logits": products[start : start + 20] + bias}, "") for start in (0, 20)
        ],
    )
    features = quality.extract(extractor, None, ["is"], "2048")
    (score,) = quality.score(features, None, ["is"], "2048")
    p = scipy.special.softmax(products.astype(np.float64), axis=1)
    divergence = np.mean([scipy.stats.entropy(row, p.mean(axis=0)) for row in p])
    np.testing.assert_allclose(score.value, np.exp(divergence), rtol=1e-6)


def test_the_sfid_is_that_of_all_rows() -> None:
    """Of the spatial features, which come in blocks; the closed form with diagonal roots."""
    rows = np.random.default_rng(3).normal(1, 2, (60, 3)).astype(np.float32)
    extractor = SimpleNamespace(
        blocks=lambda images, taps, what: [
            Block(start, {"spatial": rows[start : start + 20] + start}, "") for start in (0, 20, 40)
        ]
    )
    real = Gaussian(np.zeros(3), np.eye(3))
    features = quality.extract(extractor, None, ["sfid"], "2048")
    (sfid,) = quality.score(features, Reference(None, real, None, {}), ["sfid"], "2048")
    wide = rows.astype(np.float64) + np.repeat([0, 20, 40], 20)[:, None]
    roots = np.sqrt(np.linalg.eigvalsh(np.cov(wide.T)))
    expected = np.sum(wide.mean(axis=0) ** 2) + np.sum((roots - 1) ** 2)
    assert sfid.metric == "sFID"
    np.testing.assert_allclose(sfid.value, expected, rtol=1e-6)
