"""Test distances and scores: closed forms, brute force over pairs, limits, blocks and order."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from sklearn.neighbors import NearestNeighbors

from ddpm_jax.errors import EvaluationError
from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.memorisation import Audit, AuditSets, audit_pixels
from ddpm_jax.evaluation.metrics.frechet import Gaussian, frechet_distance, frechet_infinity
from ddpm_jax.evaluation.metrics.inception_score import inception_score
from ddpm_jax.evaluation.metrics.kid import kernel_inception_distance
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.evaluation.metrics.neighbours import Nearest
from ddpm_jax.evaluation.metrics.prdc import precision_recall_density_coverage, squared_distances


def covariance(width: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(width, rank or width))
    return factor @ factor.T / width


def features(count: int, width: int, seed: int, *, shift: float = 0.0) -> np.ndarray:
    """Draw features like a network's: correlated, never negative and unevenly scaled."""
    rng = np.random.default_rng(seed)
    mixed = (
        rng.normal(size=(count, width))
        @ np.random.default_rng(99).normal(size=(width, width))
        / np.sqrt(width)
    )
    return (np.maximum(mixed + shift, 0) * np.linspace(0.05, 1, width)).astype(np.float32)


# ------------------------------------------------------------------------------------------ moments


def test_moments_do_not_depend_on_blocks_or_their_order() -> None:
    x = (
        features(1000, 12, 0) + 1000
    )  # a mean far from 0: sums of squares in float32 would lose the covariance
    whole = Moments.of(x)
    np.testing.assert_allclose(whole.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        whole.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )
    for sizes, seed in (((1, 999), 1), ((500, 500), 2), ((3, 7, 490, 250, 250), 3)):
        blocks = np.split(np.random.default_rng(seed).permutation(x), np.cumsum(sizes)[:-1])
        merged = Moments.over(blocks)
        assert merged.count == 1000
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_one_block_is_summed_up_bit_for_bit() -> None:
    x = features(50, 5, 1)
    for summed in (Moments.over([x]), Moments() + Moments.of(x)):
        assert summed.count == 50
        np.testing.assert_array_equal(summed.mean, Moments.of(x).mean)
        np.testing.assert_array_equal(summed.scatter, Moments.of(x).scatter)


def test_one_image_has_no_covariance() -> None:
    for blocks, count in (([np.zeros((1, 3))], 1), ([], 0)):
        with pytest.raises(EvaluationError, match=f"at least two images, there is {count}"):
            _ = Moments.over(blocks).covariance


# --------------------------------------------------------------------------------- Frechet distance


def test_distance_of_gaussians_is_the_closed_form() -> None:
    """Take diagonal covariances, and others that commute: (sqrt l1 - sqrt l2)^2 along each axis."""
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.1, 4, (2, 20))
    means = rng.normal(size=(2, 20))
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    for axes in (np.eye(20), scipy.stats.ortho_group.rvs(20, random_state=1)):
        result = frechet_distance(
            Gaussian(means[0], axes @ np.diag(first) @ axes.T),
            Gaussian(means[1], axes @ np.diag(second) @ axes.T),
        )
        np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_distance_is_that_of_the_usual_formula_with_sqrtm() -> None:
    """Compare with tr (S1 S2)^1/2 by a Schur decomposition, as all public code has it.

    It has nothing in common with singular values of roots.
    """
    for seed in range(3):
        x, y = features(400, 30, seed), features(300, 30, seed + 10, shift=0.3)
        statistics = [
            (z.astype(np.float64).mean(0), np.cov(z.astype(np.float64), rowvar=False))
            for z in (x, y)
        ]
        (m1, s1), (m2, s2) = statistics
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        result = frechet_distance(Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y)))
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 40, 200])
def test_a_set_has_no_distance_to_itself_whatever_its_rank(count: int) -> None:
    x = features(count, 64, 3)
    own = Gaussian.of(Moments.of(x))
    assert 0 <= frechet_distance(own, own) < 1e-6
    shuffled = Gaussian.of(Moments.of(x[np.random.default_rng(0).permutation(count)]))
    assert 0 <= frechet_distance(own, shuffled) < 1e-6


def test_rank_deficient_covariances() -> None:
    """Take N below the width: against s I the closed form needs the eigenvalues alone.

    Those of the null space are 0.
    """
    x = features(20, 50, 4)
    deficient = Gaussian.of(Moments.of(x))
    values = np.append(
        np.linalg.svd(x - x.mean(0, dtype=np.float64), compute_uv=False) ** 2 / 19, np.zeros(30)
    )
    expected = ((np.sqrt(np.maximum(values, 0)) - np.sqrt(0.7)) ** 2).sum() + (
        deficient.mean**2
    ).sum()
    for pair in (
        (deficient, Gaussian(np.zeros(50), 0.7 * np.eye(50))),
        (Gaussian(np.zeros(50), 0.7 * np.eye(50)), deficient),
    ):
        np.testing.assert_allclose(frechet_distance(*pair), expected, rtol=1e-6)
    planes = [
        np.diag([1.0, 1, 0, 0]),
        np.diag([0, 0, 1.0, 1]),
    ]  # no direction in common: nothing to subtract
    np.testing.assert_allclose(
        frechet_distance(*(Gaussian(np.zeros(4), plane) for plane in planes)), 4, rtol=1e-12
    )
    assert frechet_distance(*[Gaussian(np.zeros(4), np.zeros((4, 4)))] * 2) == 0


def test_no_nonsense_is_taken_for_statistics() -> None:
    good = Gaussian(np.zeros(3), np.eye(3))
    with pytest.raises(EvaluationError, match="features of 3 and of 2 numbers"):
        frechet_distance(good, Gaussian(np.zeros(2), np.eye(2)))
    for mean, matrix, message in (
        (np.zeros(2), np.eye(3), r"mean \[2\] and covariance \[3, 3\] do not fit"),
        (np.full(3, np.nan), np.eye(3), "not finite"),
        (np.zeros(2), np.diag([1.0, -0.5]), "is no covariance"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.1, 1.0]]), "is no covariance"),
    ):
        with pytest.raises(EvaluationError, match=message):
            Gaussian(mean, matrix)


def test_infinity_takes_the_bias_of_few_samples_away() -> None:
    """Draw samples from the reference itself: the truth is 0, the distance of 400 is not."""
    width = 30
    reference = Gaussian(np.zeros(width), np.eye(width))
    raw, limits = [], []
    for seed in range(6):
        x = np.random.default_rng(seed).normal(size=(400, width))
        limit = frechet_infinity(x, reference)
        raw.append(frechet_distance(Gaussian.of(Moments.of(x)), reference))
        limits.append(limit.distance)
        assert (
            limit.counts[0] == 100 and limit.counts[-1] == 400 and np.all(np.diff(limit.counts) > 0)
        )
        np.testing.assert_allclose(limit.distances[-1], raw[-1], rtol=1e-9)
        assert 0 < limit.standard_error < 0.2 * raw[-1]
        line = scipy.stats.linregress(1 / limit.counts, limit.distances)
        np.testing.assert_allclose(limit.distance, line.intercept, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(limit.standard_error, line.intercept_stderr, rtol=1e-6)
    # To first order the bias is (d + d (d + 1) / 4) / N: of the mean, and of eigenvalues l, a sum
    # of (l^1/2 - 1)^2.
    np.testing.assert_allclose(np.mean(raw), (width + width * (width + 1) / 4) / 400, rtol=0.1)
    assert abs(np.mean(limits)) < 0.15 * np.mean(raw)
    with pytest.raises(EvaluationError, match="19 images; at least 20"):
        frechet_infinity(np.zeros((19, 3)), Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.slow
def test_statistics_of_50000_images_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    x = features(50_000, 768, 0)
    started = time.monotonic()
    total = Moments.over(np.split(x, range(500, len(x), 500)))
    summed = time.monotonic()
    own = Gaussian.of(total)
    assert frechet_distance(own, own) < 1e-6
    ended = time.monotonic()
    with capsys.disabled():
        print(f"\n50,000 x 768: moments {summed - started:.1f} s, distance {ended - summed:.1f} s")
    assert ended - started < 60


# ---------------------------------------------------------------------------------------------- KID


def test_kid_is_the_sum_over_pairs() -> None:
    x, y = features(45, 6, 0), features(52, 6, 1, shift=0.4)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a.astype(float), b.astype(float)) / 6 + 1) ** 3)

    inside = [
        np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (x, y)
    ]
    across = np.mean([kernel(a, b) for a in x for b in y])
    np.testing.assert_allclose(
        kernel_inception_distance(x, y).mean, sum(inside) - 2 * across, rtol=1e-9
    )


def test_kid_has_no_bias_and_an_honest_error() -> None:
    """Draw 80 pairs of sets: the spread is what the standard errors say.

    Of one and the same distribution the mean is 0, and the error too large by 2^1/2, as jackknives
    of degenerate statistics are.
    """
    for shift, factor in ((0.0, np.sqrt(2)), (0.5, 1.0)):
        result = [
            kernel_inception_distance(
                features(80, 8, seed), features(80, 8, seed + 1000, shift=shift)
            )
            for seed in range(80)
        ]
        means, errors = (
            np.array([getattr(kid, name) for kid in result]) for name in ("mean", "standard_error")
        )
        np.testing.assert_allclose(np.sqrt((errors**2).mean()), factor * means.std(), rtol=0.2)
        if shift:
            assert means.min() > 0
        else:
            assert abs(means.mean()) < 3 * means.std() / np.sqrt(80)
    with pytest.raises(EvaluationError, match="39 images; at least 40 of each"):
        kernel_inception_distance(np.zeros((39, 2)), np.zeros((100, 2)))


# ---------------------------------------------------------------------------------- Inception Score


def test_inception_score_at_its_limits() -> None:
    """Score 1 for samples all alike, K for K classes evenly, 1 for one class alone."""
    np.testing.assert_allclose(inception_score(np.zeros((100, 7))).mean, 1, rtol=1e-12)
    classes = np.repeat(
        np.arange(4), 500
    )  # sorted: without a shuffle each of 10 parts would hold one or two classes
    certain = inception_score(100.0 * np.eye(8)[classes])
    np.testing.assert_allclose(certain.mean, 4, rtol=0.02)
    assert certain.deviation < 0.05
    np.testing.assert_allclose(
        inception_score(1000.0 * np.eye(8)[np.zeros(100, int)]).mean, 1, rtol=1e-12
    )
    with pytest.raises(EvaluationError, match="19 images; at least 20"):
        inception_score(np.zeros((19, 8)))


def test_inception_score_is_exp_of_the_mutual_information() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    divergence = np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])
    np.testing.assert_allclose(
        inception_score(logits, splits=1).mean, np.exp(divergence), rtol=1e-12
    )


# ---------------------------------------------------------------------------- precision and company


def test_prdc_is_that_of_a_search_by_another_library() -> None:
    x, y = features(700, 10, 0, shift=0.2), features(610, 10, 1)
    result = precision_recall_density_coverage(x, y)

    def radii(z: np.ndarray, k: int) -> np.ndarray:
        return (
            NearestNeighbors(n_neighbors=k + 1, algorithm="kd_tree").fit(z).kneighbors(z)[0][:, k]
        )

    apart = np.linalg.norm(x[:, None].astype(float) - y[None].astype(float), axis=2)
    assert result.precision == pytest.approx((apart <= radii(y, 3)).any(axis=1).mean())
    assert result.recall == pytest.approx((apart.T <= radii(x, 3)).any(axis=1).mean())
    assert result.density == pytest.approx((apart < radii(y, 5)).sum() / 5 / len(x))
    assert result.coverage == pytest.approx((apart < radii(y, 5)).any(axis=0).mean())


def test_prdc_at_its_limits() -> None:
    """Compare a set with itself, with a set far away, and with one of its two modes."""
    features = lambda count, width, seed: np.random.default_rng(seed).normal(size=(count, width))  # noqa: E731
    real = np.concatenate([features(300, 4, 0), features(300, 4, 1) + 100])
    same = precision_recall_density_coverage(real, real)
    assert (same.precision, same.recall, same.coverage) == (
        1,
        1,
        1,
    ) and same.density == pytest.approx(1, abs=0.25)
    far = precision_recall_density_coverage(features(600, 4, 2) - 1000, real)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    half = precision_recall_density_coverage(features(600, 4, 3), real)
    assert half.precision > 0.8 and half.recall < 0.5 and half.coverage < 0.51
    with pytest.raises(EvaluationError, match="5 images; more than 5"):
        precision_recall_density_coverage(real[:5], real)


def test_squared_distances_of_equal_rows_are_not_negative() -> None:
    x = features(50, 8, 0).astype(np.float64) * 1e4
    squares = squared_distances(x, x)
    assert squares.min() == 0 and np.diag(squares).max() < 1e-4


# ------------------------------------------------------------------------------------------- memory


def test_nearest_across_blocks() -> None:
    rng = np.random.default_rng(0)
    stored, queries = rng.normal(size=(230, 5)), rng.normal(size=(9, 5))
    search = Nearest(queries, 3)
    for start in (0, 100, 101):
        search.add(stored[start : {0: 100, 100: 101, 101: 230}[start]], start)
    distances, indices = NearestNeighbors(n_neighbors=3).fit(stored).kneighbors(queries)
    np.testing.assert_array_equal(search.indices, indices)
    np.testing.assert_allclose(search.distances, distances / np.sqrt(5), rtol=1e-9)


def test_audit_tells_a_memory_from_a_model() -> None:
    rng = np.random.default_rng(0)
    train, held_out, honest = (
        rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (1500, 300, 300)
    )
    copied = honest.copy()
    copied[:60] = np.clip(train[1000:1060].astype(int) + rng.integers(-2, 3, (60, 4, 4, 1)), 0, 255)

    def audit(samples: np.ndarray) -> Audit:
        return audit_pixels(AuditSets(*(of_array(a, {}) for a in (samples, train, held_out))))

    fine, caught = audit(honest), audit(copied)
    assert fine.suspects < 0.04 and abs(fine.nearer - 0.5) < 0.06
    assert caught.suspects >= 0.2 and caught.nearer > 0.55
    np.testing.assert_array_equal(caught.nearest[:60], np.arange(1000, 1060))
    assert f"{caught.suspects:.2%} of samples" in caught.table()
    with pytest.raises(EvaluationError, match="8x8x1 and 4x4x1 have no distance"):
        audit(np.full((2, 8, 8, 1), 9, np.uint8))


def test_nearer_is_a_probability() -> None:
    same = Audit(np.ones(5), np.zeros(5, int), np.ones(7))
    assert same.nearer == 0.5 and same.suspects == 0
    assert Audit(np.zeros(5), np.zeros(5, int), np.ones(7)).nearer == 1
    draws = np.random.default_rng(0).normal(size=(2, 40))
    pairs = np.mean(draws[0][:, None] < draws[1])
    assert Audit(draws[0], np.zeros(40, int), draws[1]).nearer == pytest.approx(pairs)
