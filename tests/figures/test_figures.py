"""The figures with exact denoisers in place of a network, and the blocks that samples are written in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import images
from ddpm_jax.build import build_process
from ddpm_jax.cli import sample as sample_script
from ddpm_jax.config import Config, to_dict
from ddpm_jax.data.source import ArraySource
from ddpm_jax.diffusion.chain import Update, forward_noise, noise_at
from ddpm_jax.diffusion.inpainting import Repaint, inpaint_chain
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import ancestral_table
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.errors import ConfigError, DataError, ShardError, UserError
from ddpm_jax.figures import interpolation, panels
from ddpm_jax.figures.films import denoising
from ddpm_jax.figures.inpainting import inpainting
from ddpm_jax.figures.job import Job
from ddpm_jax.figures.neighbours import nearest, neighbours
from ddpm_jax.figures.originals import hole, images_from, images_of, mask_from
from ddpm_jax.figures.panels import start_of
from ddpm_jax.figures.reconstruction import reconstruction
from ddpm_jax.figures.shared_latents import shared_latents
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling import shards
from ddpm_jax.sampling.generate import Generator, build_generator
from ddpm_jax.sampling.guidance import guided
from ddpm_jax.sampling.sampler import build_sampler, with_sampling
from ddpm_jax.trained import Trained
from tests.support.tiny import tiny_config

T = 20
CONFIG = tiny_config(diffusion={"timesteps": T, "beta_end": 0.5, "variance": "fixed_small"})
PROCESS = build_process(CONFIG)
SIGNAL, NOISE = PROCESS.schedule.sqrt_alphas_cumprod, PROCESS.schedule.sqrt_one_minus_alphas_cumprod
ONE = Devices(jax.devices()[:1])
PARAMS = np.zeros(1, np.float32)  # exact denoisers have none
PAIR = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 8, 8, 1)).astype(np.float32)


def at(values: np.ndarray, t: jax.Array) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[t][:, None, None, None]


def gaussian(mean: float | jax.Array = 0.1, std: float = 0.4):
    """The exact denoiser of independent pixels N(mean, std^2); `mean` may be one for each image, [b,1,1,1]."""

    def bind(params, labels):
        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            signal, noise = at(SIGNAL, t), at(NOISE, t)
            x0 = mean + std**2 * signal / (std**2 * signal**2 + noise**2) * (x - signal * mean)
            return (x - signal * x0) / noise

        return denoise

    return bind


def of_the_pair(params, labels):
    """The exact denoiser of data that are the two images of PAIR, equally often: E[eps | x_t]."""

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        signal, noise = at(SIGNAL, t), at(NOISE, t)
        one, other = PAIR[:1], PAIR[1:]
        misfit = [
            ((x - signal * point) ** 2).sum((1, 2, 3), keepdims=True) for point in (one, other)
        ]
        share = jax.nn.sigmoid((misfit[1] - misfit[0]) / (2 * noise**2))
        return (x - signal * (share * one + (1 - share) * other)) / noise

    return denoise


def generator(bind, devices: Devices = ONE, config: Config = CONFIG, **options) -> Generator:
    """The generator of `config` with an exact denoiser in place of its network."""
    fields = {name: options.pop(name, None) for name in ("sampler", "steps", "clip")}
    options = {"batch_size": 8} | options
    with mock.patch("ddpm_jax.sampling.generate.denoiser", lambda config, network=None: bind):
        return build_generator(with_sampling(config, **fields), devices, **options)


def sampling(**fields) -> Config:
    return with_sampling(CONFIG, **fields)


# ---------------------------------------------------------------------------------------------- between two images


@pytest.fixture(scope="module")
def between() -> Generator:
    return generator(of_the_pair)


@pytest.mark.parametrize("shared", [True, False])
def test_interpolation_returns_the_end_points(between, shared):
    """At levels where x_t still tells the two apart; one row off would leave noise, or start from the wrong level."""
    for level in (1, 4, 8):
        row = interpolation.interpolation(
            between,
            PARAMS,
            seed=1,
            pair=PAIR,
            level=level,
            weights=[0.0, 0.3, 1.0],
            shared_noise=shared,
        )
        assert row.shape == (1, 5, 8, 8, 1)
        np.testing.assert_array_equal(row[0, [0, -1]], PAIR)
        np.testing.assert_allclose(row[0, [1, -2]], PAIR, atol=2e-5)


def test_coarse_to_fine_has_its_rows_from_the_plain_mix_to_fresh_samples(between):
    weights = [0.0, 0.25, 0.5, 1.0]
    panel = interpolation.coarse_to_fine(
        between, PARAMS, seed=1, pair=PAIR, rows=6, weights=weights
    )
    assert panel.shape == (6, 6, 8, 8, 1)
    np.testing.assert_array_equal(panel[:, 0], np.broadcast_to(PAIR[0], (6, 8, 8, 1)))
    np.testing.assert_array_equal(panel[:, -1], np.broadcast_to(PAIR[1], (6, 8, 8, 1)))
    for column, weight in enumerate(weights, start=1):
        np.testing.assert_allclose(
            panel[0, column], (1 - weight) * PAIR[0] + weight * PAIR[1], atol=1e-6
        )
    for image in panel[1:, 1:-1].reshape(-1, 8, 8, 1):  # everything denoised is one of the two
        assert min(np.abs(image - point).max() for point in PAIR) < 1e-4


def test_the_row_at_t_holds_fresh_samples_and_interpolations_share_their_noise():
    """At T the images are forgotten: what is left in x_T of a signal of 0.09 shows as such. Columns differ by their own noise."""
    made = generator(gaussian())
    options = {"seed": 1, "weights": [0.0, 0.5, 1.0]}
    swapped = interpolation.coarse_to_fine(made, PARAMS, pair=PAIR[::-1], rows=2, **options)[
        1, 1:-1
    ]
    panel = interpolation.coarse_to_fine(made, PARAMS, pair=PAIR, rows=2, **options)[1, 1:-1]
    assert np.abs(panel - swapped).mean() < 0.02 and np.abs(panel[0] - panel[2]).mean() > 0.2
    row = interpolation.interpolation(made, PARAMS, pair=PAIR, level=T, **options)[0, 1:-1]
    assert np.abs(row[0] - row[2]).mean() < 0.02


def test_levels_are_those_of_the_rows(between):
    """Level t is what t diffusion steps make: timestep t-1. Denoising starts there, at the row that is told t-1."""
    assert [start_of(between, level) for level in (1, 7, T)] == [(T - 1, 0), (T - 7, 6), (0, T - 1)]
    strided = generator(of_the_pair, config=sampling(steps=4))  # timesteps 19, 13, 6, 0
    assert [start_of(strided, level) for level in (1, 7, 8, T)] == [
        (3, 0),
        (2, 6),
        (2, 6),
        (0, T - 1),
    ]
    for level in (0, T + 1):
        with pytest.raises(ConfigError, match=rf"level={level}: must be in 1\.\.20"):
            start_of(between, level)


def test_forward_noise_is_one_draw_for_all_weights_and_rows(monkeypatch):
    """The states that are handed to the chain: affine in the weight, and in (signal, noise) of the level."""
    made, starts = generator(gaussian()), {}

    def draw(params, *, x, span, **rest):
        starts["x"] = x.reshape(3, 3, 8, 8, 1).astype(np.float64)
        return x

    monkeypatch.setattr(made, "draw", draw)
    for shared in (True, False):
        options = {"indices": np.arange(3), "shared_noise": shared}
        interpolation.mixes(
            made, PARAMS, seed=3, pair=PAIR, levels=[5, 12, T], weights=[0, 0.5, 1], **options
        )
        x = starts["x"]
        np.testing.assert_allclose(x[:, 1], (x[:, 0] + x[:, 2]) / 2, atol=1e-6)
        noises = np.stack(
            [
                [(x[i, 2 * j] - SIGNAL[t] * PAIR[j]) / NOISE[t] for j in (0, 1)]
                for i, t in enumerate((4, 11, 19))
            ]
        )
        np.testing.assert_allclose(noises, np.broadcast_to(noises[:1], noises.shape), atol=1e-5)
        correlation = np.corrcoef(noises[0].reshape(2, -1))[0, 1]
        assert correlation > 0.9999 if shared else abs(correlation) < 0.5
        assert 0.7 < noises.std() < 1.3


def test_forward_noise_is_apart_from_every_noise_of_the_chain():
    keys = jax.random.split(jax.random.key(0), 1)
    chain = [np.asarray(noise_at(keys, t, (4,))) for t in range(T + 1)]
    forward = [np.asarray(forward_noise(keys, (4,), T, number)) for number in (0, 1)]
    draws = np.concatenate(chain + forward)
    assert len(np.unique(draws, axis=0)) == T + 3


def test_slerp_keeps_the_norm_and_ends_at_its_ends():
    one, other = np.random.default_rng(1).normal(size=(2, 8, 8, 1))
    other *= np.linalg.norm(one) / np.linalg.norm(other)
    path = interpolation.slerp(one, other, [0, 0.2, 0.5, 1])
    np.testing.assert_allclose(path[[0, -1]], [one, other], atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(path.reshape(4, -1), axis=1), np.linalg.norm(one), rtol=1e-12
    )
    angle = np.arccos((one * other).sum() / np.linalg.norm(one) ** 2)
    np.testing.assert_allclose(
        (path[1] * one).sum(), np.linalg.norm(one) ** 2 * np.cos(0.2 * angle), rtol=1e-9
    )
    np.testing.assert_allclose(interpolation.slerp(one, 2 * one, [0.5])[0], 1.5 * one, rtol=1e-9)


@pytest.fixture(scope="module")
def codec() -> tuple[Generator, Generator]:
    config = sampling(sampler="ddim", clip=False)
    return generator(gaussian(), config=config, inverted=True), generator(gaussian(), config=config)


def test_codes_decode_to_their_images(codec):
    panel, error = reconstruction(*codec, PARAMS, originals=PAIR)
    np.testing.assert_array_equal(panel[0], PAIR)
    np.testing.assert_allclose(error, np.mean((panel[1] - PAIR) ** 2) / 4, rtol=1e-5)
    assert error < 0.01
    row = interpolation.latent_interpolation(*codec, PARAMS, pair=PAIR, weights=[0.0, 0.5, 1.0])
    np.testing.assert_allclose(row[0, [1, -2]], panel[1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- from noise


def test_shared_latents_branch_off_one_way_down():
    """The latent at T is x_T of the sample itself, and what follows a latent is a sample of its own chain."""
    made = generator(gaussian())
    levels = [T, 6, 2]
    panel = shared_latents(made, PARAMS, seed=2, index=5, levels=levels, variants=3)
    assert panel.shape == (3, 4, 8, 8, 1)
    parent = made.draw(PARAMS, seed=2, indices=np.array([5]))
    again = shared_latents(made, PARAMS, seed=2, index=5, levels=[6], variants=1)
    np.testing.assert_allclose(again[0, 0], panel[1, 0], atol=1e-6)
    spread = panel[:, 1:].std(axis=1).mean((1, 2, 3))
    assert (
        spread[0] > 1.3 * spread[1] > 1.3**2 * spread[2] > 0
    )  # the later they part, the more they share
    start = np.full(1, made.sampler.table.row_at(5))
    rest = made.draw(
        PARAMS, seed=2, indices=np.array([5]), x=panel[1, :1], span=(start, np.full(1, T))
    )
    np.testing.assert_allclose(rest, parent, atol=1e-5)
    # Variant j has the noise of the sample j + 1 numbers on, in every row.
    for row, level in enumerate(levels):
        start = np.full(3, made.sampler.table.row_at(level - 1))
        others = made.draw(
            PARAMS,
            seed=2,
            indices=np.array([6, 7, 8]),
            x=panel[row, :1].repeat(3, axis=0),
            span=(start, np.full(3, T)),
        )
        np.testing.assert_allclose(panel[row, 1:], others, atol=1e-5)


def test_films_start_at_noise_and_end_at_the_samples():
    plain, indices = generator(gaussian()).draw(PARAMS, seed=4, indices=np.arange(3)), np.arange(3)
    noisy = generator(gaussian(), record="x_t", num_frames=5)
    frames = noisy.draw(PARAMS, seed=4, indices=indices)
    assert frames.shape == (3, 5, 8, 8, 1)
    np.testing.assert_allclose(frames[:, -1], plain, atol=1e-6)
    assert 0.8 < frames[:, 0].std() < 1.2
    film = denoising(noisy, PARAMS, seed=4, indices=indices)
    np.testing.assert_array_equal(film[-1], images.grid(images.to_uint8(plain)))
    clean = generator(gaussian(), record="x0", num_frames=T).draw(PARAMS, seed=4, indices=indices)
    np.testing.assert_allclose(clean[:, -1], plain, atol=1e-6)
    assert clean[:, 0].std() < 0.3 * clean[:, -1].std()  # at T only the mean is known


def test_batches_and_devices_do_not_change_a_panel():
    eight = generator(gaussian(), Devices(jax.devices()), batch_size=16)
    options = {"seed": 2, "index": 0, "levels": [T, 6], "variants": 2}
    expected = shared_latents(generator(gaussian(), batch_size=3), PARAMS, **options)
    np.testing.assert_allclose(shared_latents(eight, PARAMS, **options), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------- guidance


def test_guidance_extrapolates_from_without_to_with_the_label():
    seen = {}

    def bind(params, labels):
        seen["labels"] = labels
        return lambda x, t: jnp.concatenate(
            [x * labels[:, None, None, None], 5.0 * (labels[:, None, None, None] + 0 * x)], -1
        )

    learned = dataclasses.replace(PROCESS, variance="learned_range")
    x = jnp.ones((2, 2, 2, 1))
    out = guided(bind, learned, 10, 3.0)({}, jnp.array([1, 4]))(x, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(seen["labels"], [1, 4, 10, 10])
    np.testing.assert_allclose(out[:, 0, 0, 0], [10 + 3 * (1 - 10), 10 + 3 * (4 - 10)])
    np.testing.assert_allclose(out[:, 0, 0, 1], [5, 20])  # the variance is that with the label
    plain = guided(bind, learned, 10, 1.0)({}, jnp.array([1, 4]))(x, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(plain[:, 0, 0, 0], [1, 4])


def test_guidance_needs_classes_and_dropped_labels():
    with pytest.raises(ConfigError, match="guidance: this run has no classes"):
        generator(gaussian(), guidance=2.0)
    with pytest.raises(ConfigError, match="model.label_dropout=0"):
        generator(gaussian(), config=tiny_config(model={"num_classes": 3}), guidance=2.0)


def test_guidance_of_a_network():
    """Scale 1 is the conditional chain; another one is not."""
    config = tiny_config(model={"num_classes": 3, "label_dropout": 0.1}, diffusion={"timesteps": 2})

    def bind(params, labels):
        return lambda x, t: 0.1 * labels[:, None, None, None].astype(jnp.float32) + 0.5 * x

    def draw(scale: float) -> np.ndarray:
        made = generator(bind, config=config, guidance=scale, clip=False)
        return made.draw(PARAMS, seed=0, indices=np.arange(3), labels=np.array([0, 1, 2]))

    one, two, three = draw(1.0), draw(2.0), draw(3.0)
    np.testing.assert_allclose(
        three - two, two - one, atol=1e-4
    )  # this chain is affine in the output
    assert np.abs(two - one).min() > 1e-3


# ---------------------------------------------------------------------------------------------- inpainting


def test_visits_go_back_up_as_often_as_asked():
    rows, reached = Repaint(resample=3, jump=2).visits(5)
    assert rows.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4]
    assert reached.tolist() == [0, 1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    np.testing.assert_array_equal(Repaint(resample=1, jump=4).visits(6), [np.arange(6)] * 2)
    rows, _ = Repaint().visits(250)
    assert (
        len(rows) == 250 + 24 * 9 * 10 and (np.diff(rows) <= 1).all() and np.diff(rows).min() == -9
    )
    with pytest.raises(ValueError, match="resample=0: must be at least 1"):
        Repaint(resample=0)


def inpainted(covariance: np.ndarray, known: float, repaint: Repaint, count: int) -> np.ndarray:
    """The second of two pixels, the first being known, of data N(0, covariance), with the exact denoiser."""
    vectors = np.linalg.eigh(covariance)
    process = GaussianDiffusion(
        NoiseSchedule.from_betas(beta_schedule("linear", 200, rescale=True)), "eps", "fixed_small"
    )
    levels = process.schedule.sqrt_alphas_cumprod, process.schedule.sqrt_one_minus_alphas_cumprod

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        signal, noise, eigenvalues = at(levels[0], t), at(levels[1], t), vectors[0][None]
        flat = x.reshape(-1, 2) @ vectors[1]
        shrink = (
            eigenvalues
            * signal[:, 0, 0]
            / (eigenvalues * signal[:, 0, 0] ** 2 + noise[:, 0, 0] ** 2)
        )
        x0 = ((flat * shrink) @ vectors[1].T).reshape(x.shape)
        return (x - signal * x0) / noise

    step = Update(process, ancestral_table(process), denoise, clip=False)
    keys = jax.random.split(jax.random.key(0), count)
    mask = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)

    def run(keys: jax.Array) -> jax.Array:
        x = jax.random.normal(jax.random.key(1), (count, 1, 2, 1))
        return inpaint_chain(step, x, keys, jnp.full((count, 1, 2, 1), known), mask, repaint)

    x = np.asarray(jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(keys))
    np.testing.assert_array_equal(x[:, 0, 0], known)
    return x[:, 0, 1, 0]


def test_inpainting_draws_the_missing_given_the_known():
    """Two correlated pixels, whose conditional is known: going back up brings the mean and the variance near it."""
    covariance, known = 0.25 * np.array([[1.0, 0.9], [0.9, 1.0]]), 0.5
    mean, variance = 0.9 * known, 0.25 * (1 - 0.9**2)
    once = inpainted(covariance, known, Repaint(1, 1), 1000)
    often = inpainted(covariance, known, Repaint(10, 10), 1000)
    assert (
        abs(once.mean() - mean) > 0.1 and once.var() > 1.3 * variance
    )  # what the resampling is for
    assert abs(often.mean() - mean) < 0.06 and abs(often.var() / variance - 1) < 0.2


def test_inpainting_panel_keeps_what_is_known():
    made = generator(gaussian(), repaint=Repaint(2, 3))
    mask = hole((8, 8), (2, 1, 3, 4))
    assert mask.sum() == 64 - 12 and not mask[2:5, 1:5].any()
    panel = inpainting(made, PARAMS, seed=0, originals=PAIR, mask=mask, variants=2)
    assert panel.shape == (2, 4, 8, 8, 1)
    kept = mask[..., 0] == 1
    for i in range(2):
        for j in range(4):
            np.testing.assert_array_equal(panel[i, j][kept], PAIR[i][kept])
        assert not panel[i, 0][~kept].any()
        assert np.abs(panel[i, 1] - panel[i, 2])[~kept].mean() > 0.1


def test_inpainting_refuses_multistep_samplers():
    with pytest.raises(ConfigError, match="sampler=dpmpp_2m: a multistep sampler cannot inpaint"):
        generator(gaussian(), sampler="dpmpp_2m", repaint=Repaint())


# ---------------------------------------------------------------------------------------------- neighbours


def test_nearest_are_those_of_a_plain_search():
    rng = np.random.default_rng(5)
    stored = rng.integers(0, 256, (2300, 4, 4, 3), dtype=np.uint8)  # more than two blocks
    samples = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    samples[2] = stored[2100]
    distances, found = nearest(samples, ArraySource(stored), 4)
    every = np.sqrt(((samples[:, None].astype(int) - stored) ** 2).mean((2, 3, 4)))
    np.testing.assert_array_equal(found, np.argsort(every, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :4], atol=1e-9)
    assert found[2, 0] == 2100 and distances[2, 0] == 0
    panel = neighbours(samples, ArraySource(stored), found)
    np.testing.assert_array_equal(images.to_uint8(panel[2, 1]), samples[2])
    with pytest.raises(ConfigError, match=r"columns=2301: must be in 1\.\.2300"):
        nearest(samples, ArraySource(stored), 2301)


# ---------------------------------------------------------------------------------------------- many samples


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_an_interrupted_run_goes_on_and_computes_nothing_twice(tmp_path: Path, name: str):
    place, indices, asked = tmp_path / name, 3 + np.arange(25), []

    def draw(rows: np.ndarray, labels: np.ndarray | None, fail_at: int = -1) -> np.ndarray:
        if fail_at in rows:
            raise KeyboardInterrupt
        asked.extend(rows.tolist())
        return np.broadcast_to((rows / 127.5 - 1)[:, None, None, None], (len(rows), 2, 2, 1))

    def fill(count: int = 25, fail_at: int = -1, **protocol) -> int:
        labels = indices[:count] % 5
        inner = lambda rows, labels: draw(rows, labels, fail_at)  # noqa: E731
        return shards.fill(
            place, {"seed": 0} | protocol, indices[:count], labels, inner, ONE, size=10
        )

    with pytest.raises(KeyboardInterrupt):
        fill(fail_at=15)
    assert asked == list(range(3, 13)) and not (tmp_path / "samples.npz").exists()
    assert fill() == 15
    assert asked == list(range(3, 28))
    assert fill() == 0
    with pytest.raises(ShardError, match=r"samples of another protocol \(seed: 0, now 1\)"):
        fill(seed=1)
    if name == "folder":
        assert len(list(place.glob("*.png"))) == 25
        values = [images.load_png(place / f"{i:06d}.png")[0, 0, 0] for i in indices]
    else:
        with np.load(place) as stored:
            assert stored["arr_0"].shape == (25, 2, 2, 1) and stored["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(stored["arr_1"], indices % 5)
            values = stored["arr_0"][:, 0, 0, 0]
    np.testing.assert_array_equal(values, indices)


def test_an_npz_is_neither_kept_twice_nor_lost(tmp_path: Path):
    """A file of others stays; ours grows, is not rewritten for less, and serves its own blocks."""
    place = tmp_path / "x.npz"

    def fill(first: int, count: int) -> int:
        indices = first + np.arange(count)

        def draw(rows: np.ndarray, labels: None) -> np.ndarray:
            return np.broadcast_to((rows / 127.5 - 1)[:, None, None, None], (len(rows), 2, 2, 1))

        return shards.fill(place, {"seed": 0}, indices, None, draw, ONE, size=10)

    place.write_bytes(b"a year of work")
    with pytest.raises(ShardError, match="x.npz is there, and holds no samples of this program"):
        fill(0, 20)
    assert place.read_bytes() == b"a year of work" and list(tmp_path.iterdir()) == [place]
    place.unlink()
    assert fill(5, 20) == 20 and not list(tmp_path.glob("*.parts/*.npy"))
    content, modified = place.read_bytes(), place.stat().st_mtime_ns
    assert fill(5, 20) == 0 and fill(5, 10) == 0
    for first in (0, 10, 30):
        with pytest.raises(ShardError, match=f"holds samples 5 to 24, not those from {first} on"):
            fill(first, 10)
    assert place.read_bytes() == content and place.stat().st_mtime_ns == modified
    flipped = bytearray(content)
    flipped[content.index(np.repeat(np.arange(5, 25, dtype=np.uint8), 4).tobytes())] ^= 1
    place.write_bytes(flipped)
    with pytest.raises(ShardError, match="x.npz is damaged .*CRC-32.*: remove it and run"):
        fill(5, 35)
    place.write_bytes(content)
    assert fill(5, 35) == 0  # the rest lies beside it, the first two blocks come out of the file
    np.testing.assert_array_equal(np.load(place)["arr_0"][:, 0, 0, 0], np.arange(5, 40))
    (tmp_path / "x.npz.parts" / shards.CONTENTS).write_text("{")  # what cannot be read is redone
    assert fill(5, 35) == 35
    np.testing.assert_array_equal(np.load(place)["arr_0"][:, 0, 0, 0], np.arange(5, 40))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ShardError, match="is not empty and holds no samples of this program"):
        shards.claim(tmp_path, {}, str(tmp_path))
    assert not (tmp_path / shards.PROTOCOL).exists()
    new = tmp_path / "new"
    shards.claim(new, {"levels": (1, 2)}, str(new))
    shards.claim(new, json.loads(json.dumps({"levels": (1, 2)})), str(new))


def test_samples_from_before_a_field_of_the_config_are_of_its_default(tmp_path: Path):
    old = to_dict(sampling(sampler="ddim"))
    del old["sampling"]["order"], old["sampling"]["dynamic_threshold"]
    shards.claim(tmp_path, {"config": old, "seed": 0}, str(tmp_path))
    shards.claim(tmp_path, {"config": to_dict(sampling(sampler="ddim")), "seed": 0}, str(tmp_path))
    changed = {"config": to_dict(sampling(sampler="ddim", dynamic_threshold=0.9)), "seed": 0}
    message = r"another protocol \(config.sampling.dynamic_threshold: 0.0, now 0.9\)"
    with pytest.raises(ShardError, match=message):
        shards.claim(tmp_path, changed, str(tmp_path))


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path: Path):
    """sample.py on digits with the exact denoiser of Gaussian pixels, each class with a mean of its own."""

    def run(*flags: str, **sections) -> np.ndarray | Path:
        config = tiny_config(diffusion={"timesteps": T, "beta_end": 0.5}, **sections)

        def bind(params, labels):
            labels = None if labels is None else 0.1 * labels[:, None, None, None]
            return gaussian(0.1 if labels is None else labels)(params, None)

        monkeypatch.setattr(
            "ddpm_jax.sampling.generate.denoiser", lambda config, network=None: bind
        )
        monkeypatch.setattr(
            sample_script, "open_trained", lambda *_, **__: Trained(config, PARAMS, "exact", 7)
        )
        monkeypatch.setattr(sample_script, "Devices", lambda: ONE)
        output = next(
            (tmp_path / flag.split("=")[1] for flag in flags if flag.startswith("--output")),
            tmp_path / "a.png",
        )
        given = [flag for flag in flags if not flag.startswith("--output")]
        if not any(flag.startswith("--labels") for flag in flags):
            given.append("--labels=false")  # the panels alone
        sample_script.main(["--workdir=x", f"--output={output}", *given])
        return images.load_png(output) if output.suffix == ".png" else output

    return run


@pytest.mark.parametrize("width", [12, 40])
def test_captions_stand_beside_their_rows_and_columns(width):
    """Black is in the margins alone, in the band of each caption; nothing of the tiles moves."""
    panel = np.zeros((3, 2, 16, width, 3), np.float32)  # grey: no other black than the captions'
    tiles = panels.picture(panel)
    rows, columns = ["t=1000", "", "t=7"], ["real", "0.25"]
    picture = panels.picture(panel, rows=rows, columns=columns)
    y, x = np.subtract(picture.shape[:2], tiles.shape[:2])
    np.testing.assert_array_equal(picture[y:, x:], tiles)
    assert y < 20 if width == 40 else y > 20  # turned where there is no room
    black = (picture == 0).all(-1)
    assert not black[:y, :x].any()
    heights = [black[y + i * 18 : y + i * 18 + 16, :x].sum() for i in range(3)]
    assert heights[0] > heights[2] > 0 == heights[1] and black[y:, :x].sum() == sum(heights)
    pitch = width + 2
    widths = [black[:y, x + i * pitch : x + (i + 1) * pitch].sum() for i in range(2)]
    assert min(widths) > 0 and black[:y, x:].sum() == sum(widths)
    np.testing.assert_array_equal(panels.picture(panel, rows=["", "", ""]), tiles)


@pytest.mark.parametrize(
    ("flags", "by_default"),
    [
        (["--mode=grid", "--num_images=5", "--steps=2"], False),
        (["--mode=shared_latents", "--num_images=2", "--levels=20,5"], True),
        (["--mode=progressive", "--num_images=2", "--frames=3"], True),
    ],
)
def test_figures_have_captions_and_grids_where_asked(command, flags, by_default):
    with_labels, without = command(*flags, "--labels=true"), command(*flags, "--labels=false")
    height, width = without.shape[:2]
    assert with_labels.shape[1] > width and with_labels.shape[0] >= height
    np.testing.assert_array_equal(with_labels[-height:, -width:], without)


@pytest.mark.parametrize(
    ("flags", "rows", "columns"),
    [
        (["--mode=grid", "--num_images=4", "--sampler=dpmpp_2m", "--steps=5"], 2, 2),
        (["--mode=progressive", "--num_images=3", "--frames=5"], 3, 5),
        (["--mode=shared_latents", "--num_images=3", "--levels=20,5"], 2, 4),
        (["--mode=interpolation", "--indices=0,1,2,3", "--points=4", "--levels=5,9"], 4, 6),
        (["--mode=interpolation", "--indices=0,1", "--points=4", "--mix=slerp", "--steps=5"], 1, 6),
        (["--mode=coarse_to_fine", "--indices=0,1", "--points=3", "--rows=4", "--steps=5"], 4, 5),
        (["--mode=neighbours", "--num_images=2", "--columns=3", "--steps=5"], 2, 4),
        (
            [
                "--mode=inpaint",
                "--indices=4,5",
                "--num_images=2",
                "--hole=1,1,3,3",
                "--steps=5",
                "--jump=2",
            ],
            2,
            4,
        ),
        (["--mode=reconstruction", "--indices=0,1,2", "--steps=10"], 2, 3),
    ],
)
def test_every_mode_draws_its_panel(command, flags, rows, columns):
    assert command(*flags).shape == (10 * rows - 2, 10 * columns - 2, 1)


def test_captions_are_the_levels_that_a_strided_chain_visits(command, monkeypatch):
    """Of 20 timesteps in four steps: x_t of 20, 14, 7 and 1."""
    captions = []
    monkeypatch.setattr(
        Job, "save", lambda job, panel, *, rows=(), columns=(): captions.append(rows)
    )
    for flags in (
        ["--mode=shared_latents", "--num_images=1", "--levels=20,16,5"],
        ["--mode=interpolation", "--indices=0,1", "--points=2", "--levels=20,16,5"],
        ["--mode=coarse_to_fine", "--indices=0,1", "--points=2", "--rows=3"],
    ):
        with pytest.raises(UserError, match="no such file"):  # nothing was saved
            command(*flags, "--steps=4")
    assert captions == [["t=20", "t=14", "t=7"], ["t=20", "t=14", "t=7"], ["t=0", "t=7", "t=20"]]


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode=progressive", "--num_images=2", "--frames=3"],
        ["--mode=shared_latents", "--num_images=2", "--levels=20,5"],
        ["--mode=interpolation", "--indices=0,1", "--points=2", "--steps=5"],
        ["--mode=interpolation", "--indices=0,1", "--points=2", "--steps=5", "--mix=slerp"],
        ["--mode=coarse_to_fine", "--indices=0,1", "--points=2", "--rows=2", "--steps=5"],
        ["--mode=inpaint", "--indices=4", "--num_images=2", "--steps=5"],
        ["--mode=reconstruction", "--indices=0", "--steps=5"],
        ["--mode=neighbours", "--num_images=2", "--columns=1", "--steps=5"],
    ],
    ids=lambda flags: flags[0].partition("=")[2] + "-slerp" * ("--mix=slerp" in flags),
)
def test_the_label_reaches_every_chain_of_a_figure(command, monkeypatch, flags):
    labels, draw = [], Generator.draw

    def spy(made, params, **batch):
        labels.append(batch.get("labels"))
        return draw(made, params, **batch)

    monkeypatch.setattr(Generator, "draw", spy)
    command(*flags, "--label=5", model={"num_classes": 10, "label_dropout": 0.1})
    assert labels and all(given is not None and set(given.tolist()) == {5} for given in labels)


def test_options_of_inpainting_reach_the_chain(command, monkeypatch):
    """The hole is the middle of the image by default, and the samples have their numbers."""
    seen, draw = [], Generator.draw

    def spy(made, params, **batch):
        seen.append((made.sampler.repaint, batch["indices"].tolist(), batch["known"][1][0]))
        return draw(made, params, **batch)

    monkeypatch.setattr(Generator, "draw", spy)
    flags = ["--mode=inpaint", "--indices=4", "--num_images=2", "--steps=5", "--first=7"]
    command(*flags, "--resample=3", "--jump=2")
    ((repaint, numbers, mask),) = seen
    assert (repaint, numbers) == (Repaint(resample=3, jump=2), [7, 8])
    np.testing.assert_array_equal(mask, hole((8, 8), (2, 2, 4, 4)))


def test_films_have_their_frames_and_a_rest(command):
    for suffix in (".gif", ".webp"):
        with Image.open(
            command("--mode=denoising", "--num_images=4", "--frames=8", f"--output=a{suffix}")
        ) as film:
            assert film.size == (18, 18)
            assert film.n_frames in (8, 10)  # writers may join the equal frames of the rest


def test_many_samples_are_those_of_the_grid(command):
    flags = ["--num_images=5", "--steps=5", "--seed=3", "--first=2", "--scale=1"]
    drawn = command(*flags)
    with np.load(command(*flags, "--output=s.npz")) as stored:
        np.testing.assert_array_equal(drawn, images.grid(stored["arr_0"]))
    folder = command(*flags, "--output=pngs")
    assert sorted(path.name for path in folder.glob("*.png")) == [
        f"{i:06d}.png" for i in range(2, 7)
    ]
    with pytest.raises(ShardError, match=r"another protocol \(config.sampling.steps: 5, now 6\)"):
        command("--steps=6", "--output=pngs")


def test_labels_and_guidance_reach_the_network(command):
    classes = {"model": {"num_classes": 10, "label_dropout": 0.1}}
    flags = ["--num_images=60", "--sampler=ddim", "--output=s.npz"]
    with np.load(command(*flags, "--label=1,5", **classes)) as stored:
        np.testing.assert_array_equal(stored["arr_1"], np.tile([1, 5], 30))
        low, high = (
            stored["arr_0"][0::2].mean() / 127.5 - 1,
            stored["arr_0"][1::2].mean() / 127.5 - 1,
        )
    np.testing.assert_allclose([low, high], [0.1, 0.5], atol=0.06)
    # Without a label the class is number 10, whose mean is 1 here: from there past 0.5 is down.
    flags = ["--num_images=60", "--sampler=ddim", "--label=5", "--guidance=1.5", "--output=g.npz"]
    with np.load(command(*flags, **classes)) as stored:
        assert stored["arr_0"].mean() / 127.5 - 1 < high - 0.1


def test_labels_by_name_are_those_that_the_run_remembers(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the run x is
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.json").write_text('{"classes": ["cats", "dogs", "owls"]}')
    classes = {"model": {"num_classes": 3, "label_dropout": 0.1}}
    with np.load(command("--num_images=4", "--label=owls,1", "--output=s.npz", **classes)) as there:
        np.testing.assert_array_equal(there["arr_1"], [2, 1, 2, 1])
    with pytest.raises(UserError, match="label=dog: no such class; there are 'dogs', "):
        command("--label=dog", **classes)


@pytest.mark.parametrize(
    ("flags", "sections", "said"),
    [
        (["--label=3"], {}, "label=3: this run has no classes"),
        (
            ["--label=3"],
            {"model": {"num_classes": 3, "label_dropout": 0.1}},
            r"label=3: must be in 0\.\.2",
        ),
        (
            [],
            {"model": {"num_classes": 3}},
            "this run has 3 classes and was trained with a label always: give --label",
        ),
        (["--mode=progressive", "--label=1,2"], {}, "label=1: this run has no classes"),
        (
            ["--mode=coarse_to_fine"],
            {},
            "mode coarse_to_fine: name indices of the data set, or images",
        ),
        (["--mode=coarse_to_fine", "--indices=0"], {}, "mode coarse_to_fine: 2 images"),
        (
            ["--mode=interpolation", "--indices=0,999"],
            {},
            r"indices=999: digits test has images 0\.\.178",
        ),
        (["--mode=neighbours", "--columns=2000"], {}, r"columns=2000: must be in 1\.\.1618"),
        (["--mode=inpaint", "--indices=0", "--hole=1,1,9,9"], {}, "within 8x8"),
        (
            ["--mode=inpaint", "--indices=0", "--sampler=dpmpp_2m"],
            {},
            "a multistep sampler cannot inpaint",
        ),
        (["--mode=shared_latents", "--levels=21"], {}, r"level=21: must be in 1\.\.20"),
        (["--rederive_eps=false"], {}, "--rederive_eps: only ddim and deis use eps_hat"),
        (["--eta=0.5"], {}, "eta=0.5: sampler=ancestral has none, only ddim does"),
        (["--steps=21"], {}, r"sampling.steps=21: must be in 0\.\.20"),
    ],
)
def test_what_a_run_cannot_do_is_one_line(command, flags, sections, said):
    with pytest.raises(UserError, match=said) as caught:
        command(*flags, **sections)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- bad input


def test_frames_have_a_limit():
    for count in (1, T + 2, 501):
        with pytest.raises(ConfigError, match=rf"frames={count}: must be in 2\.\.21 for 20 steps"):
            generator(gaussian(), record="x_t", num_frames=count)
    with pytest.raises(ConfigError, match=r"frames=21: must be in 2\.\.20"):
        generator(gaussian(), record="x0", num_frames=21)


def test_source_images_are_checked(tmp_path: Path):
    source = ArraySource(np.zeros((5, 8, 8, 1), np.uint8))
    np.testing.assert_array_equal(images_of(source, [4], "digits test"), -np.ones((1, 8, 8, 1)))
    for index in (5, -1):
        with pytest.raises(DataError, match=rf"indices={index}: digits test has images 0\.\.4"):
            images_of(source, [index], "digits test")
    Image.new("L", (16, 16)).save(tmp_path / "large.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "right.png")
    np.testing.assert_array_equal(
        images_from([tmp_path / "right.png"], CONFIG.data), np.ones((1, 8, 8, 1))
    )
    np.testing.assert_array_equal(mask_from(tmp_path / "right.png", (8, 8)), 0)
    with pytest.raises(DataError, match="a mask is a grey PNG of 8x8"):
        mask_from(tmp_path / "large.png", (8, 8))
    for box in ((0, 0, 9, 1), (-1, 0, 2, 2), (0, 0, 0, 3), (5, 0, 4, 1)):
        with pytest.raises(ConfigError, match="within 8x8"):
            hole((8, 8), box)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mode=interpolation", "--output=a.gif"], "--output=a.gif: must end in .png"),
        (["--mode=denoising", "--output=a.png"], "--output=a.png: must end in .gif or .webp"),
        (["--output=a.tiff"], "must end in .png or .npz, or be a folder"),
        (["--output=a.png", "--points=1"], "--points=1: must be at least 2"),
        (["--output=a.png", "--guidance=2"], "towards which class? give --label"),
        (["--output=a.png", "--hole=1,2"], "--hole: write --hole=TOP,LEFT,HEIGHT,WIDTH"),
        (["--output=a.png", "--frames=0"], "--frames=0: must be at least 1"),
        (["--output=a.png", "--mode=classes", "--guidance=2"], "of no use with --mode=classes"),
        (
            ["--output=a.png", "--mode=reconstruction", "--sampler=unipc"],
            "--sampler=unipc: images have codes under ddim alone",
        ),
        (
            ["--output=a.png", "--mode=interpolation", "--mix=slerp", "--eta=0.5"],
            "--eta=0.5: images have codes under ddim alone",
        ),
    ],
)
def test_flags_are_checked_before_the_run_is_opened(flags, said):
    with pytest.raises(ConfigError) as caught:
        sample_script.main(["--workdir=nowhere", *flags])
    assert said in str(caught.value)


def test_unknown_modes_and_samplers_are_told_the_known_ones(capsys):
    for flag, known in (("--mode=morph", "coarse_to_fine"), ("--sampler=euler", "dpmpp_2m")):
        with pytest.raises(SystemExit):
            sample_script.main(["--workdir=nowhere", "--output=a.png", flag])
        assert known in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ConfigError, match="spacing=even: one of linspace, uniform"):
        build_sampler(sampling(spacing="even", steps=4))
    with pytest.raises(ConfigError, match=r"sampling.steps=21: must be in 0\.\.20"):
        sampling(steps=21)


def test_photos_of_any_size_are_cropped_as_the_run_s_own_were(tmp_path: Path):
    """By the config's crop, or the one that the set was prepared with, or in the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178), np.uint8)
    photo, size = Image.fromarray(pixels), (8, 8)
    photo.save(tmp_path / "photo.png")
    middle = photo.crop((0, 20, 178, 198)).resize(size, Image.Resampling.BILINEAR)
    aligned = photo.crop((25, 57, 153, 185)).resize(size, Image.Resampling.BILINEAR)
    for own, recorded, expected in [
        ("none", None, middle),
        ("none", "none", middle),
        ("none", "celeba64", aligned),
        ("celeba64", None, aligned),
        ("center", "center", middle),
    ]:
        data = dataclasses.replace(CONFIG.data, crop=own)
        [image] = images_from([tmp_path / "photo.png"], data, recorded)
        np.testing.assert_array_equal(
            image[..., 0], images.from_uint8(np.asarray(expected)[..., None])[..., 0]
        )
    Image.new("L", (7, 9)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="small.png is 7x9, which leaves 7x7"):
        images_from([tmp_path / "small.png"], CONFIG.data)
