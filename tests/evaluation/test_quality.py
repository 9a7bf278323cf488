"""Which features the numbers of an evaluation are made of."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats

from ddpm_jax.evaluation import quality
from ddpm_jax.evaluation.inception.features import Block
from ddpm_jax.evaluation.metrics.frechet import Gaussian
from ddpm_jax.evaluation.metrics.inception_score import inception_score
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.evaluation.quality import Features
from ddpm_jax.evaluation.quality_report import Number
from ddpm_jax.evaluation.references import Reference


def cubes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def score(rows: np.ndarray, real: np.ndarray, metric: str) -> list[Number]:
    reference = Reference(Gaussian.of(Moments.of(real)), None, real, {})
    return quality.score(Features({"64": rows}, Moments()), reference, [metric], "64")


def classes_in_turn(count: int, classes: int, seed: int) -> np.ndarray:
    """Draw features of which number i is of class i % classes: the classes lie far apart."""
    rng = np.random.default_rng(seed)
    means = 4 * np.random.default_rng(9).normal(size=(classes, 6))
    return (rng.normal(size=(count, 6)) + means[np.arange(count) % classes]).astype(np.float32)


def test_numbers_of_all_pairs_are_of_all_classes(monkeypatch) -> None:
    """Of samples with ten classes in turn, where a tenth are the most: KID and coverage."""
    rows, real = classes_in_turn(500, 10, 0), classes_in_turn(50, 10, 1)
    monkeypatch.setattr(quality, "MOST_FEATURES", 50)
    (kid,) = score(rows, real, "kid")
    chosen = np.random.Generator(np.random.Philox(0)).permutation(500)[:50]
    assert set(chosen % 10) == set(range(10))
    x, y = rows[chosen].astype(np.float64), real.astype(np.float64)
    inside = [(cubes(z, z).sum() - np.trace(cubes(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(inside) - 2 * cubes(x, y).mean()
    assert kid.metric == "KID-64"
    np.testing.assert_allclose(kid.value, expected, rtol=1e-6)
    coverage = score(rows, real, "prdc")[-1]
    assert coverage.metric == "coverage-64" and coverage.value > 0.9


@pytest.mark.parametrize("order", [np.arange(200), np.random.default_rng(5).permutation(200)])
def test_the_error_of_the_kid_does_not_know_the_order_of_classes(order: np.ndarray) -> None:
    """Twenty groups, and twenty classes in turn: of the samples alone, or of the real images too."""
    sets = [classes_in_turn(200, 20, 0), classes_in_turn(200, 20, 1)[order]]
    (kid,) = score(*sets, "kid")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        (other,) = score(*(rng.permutation(rows) for rows in sets), "kid")
        np.testing.assert_allclose(other.value, kid.value, rtol=1e-9)
        ratio = other.extra["standard_error"] / kid.extra["standard_error"]
        assert 0.5 < ratio < 2


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
