"""A sampler is what the config says, and a sample what its number, seed and class say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, validate
from ddpm_jax.diffusion.inpainting import Repaint
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.errors import ConfigError
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling import generate
from ddpm_jax.sampling.generate import Generator, even_batch
from ddpm_jax.sampling.guidance import guided
from ddpm_jax.sampling.sampler import build_sampler, chain_steps, codes_config, equidistant_frames
from tests.support.tiny import tiny_config

T, SHAPE = 8, (2, 2, 1)
PARAMS = {"unused": np.zeros(1)}  # pmap wants a leaf
SIGNAL2 = np.cumprod(1 - np.linspace(1e-4, 0.2, T))


def config_with(**fields) -> Config:
    config = tiny_config(diffusion={"timesteps": T})
    config.sampling = dataclasses.replace(config.sampling, **fields)
    return validate(config)


def by_class(params, labels):
    """A network whose x0_hat is a tenth of the class, -0.9 without any."""
    value = -0.9 if labels is None else 0.1 * labels[:, None, None, None].astype(jnp.float32)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        at = jnp.asarray(SIGNAL2, jnp.float32)[t][:, None, None, None]
        return (x - jnp.sqrt(at) * value) / jnp.sqrt(1 - at)

    return denoise


def generator(config: Config, devices: int = 1, bind=by_class, **options) -> Generator:
    return Generator(
        build_sampler(config), bind, SHAPE, Devices(jax.devices()[:devices]), **options
    )


def written_out_noise(seed: int, index: int, number: int) -> np.ndarray:
    """The draw `number` of a sample: of a timestep, or T for x_T; stream 8 is that of samples."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 8), 0)
    key = jax.random.fold_in(jax.random.fold_in(key, index), number)
    return np.asarray(jax.random.normal(key, SHAPE), np.float64)


@pytest.mark.parametrize("sampler, eta", [("ancestral_small", 0.0), ("ddim", 0.0), ("ddim", 0.4)])
def test_samples_are_the_chain_written_out(sampler: str, eta: float) -> None:
    """Numbers, seed and classes at three of eight steps; all but the last row shows its noise."""
    config = config_with(sampler=sampler, steps=3, eta=eta, clip=False)
    network = lambda params, labels: lambda x, t: 0.5 * x  # noqa: E731
    drawn = generator(config, bind=network).draw(PARAMS, seed=4, indices=np.array([7, 2, 300]))
    eta = 1.0 if sampler == "ancestral_small" else eta
    for index, sample in zip((7, 2, 300), drawn):
        x = written_out_noise(4, index, T)
        for t, to in ((7, 4), (4, 0), (0, None)):
            at, after = SIGNAL2[t], 1.0 if to is None else SIGNAL2[to]
            eps = 0.5 * x
            x0 = (x - np.sqrt(1 - at) * eps) / np.sqrt(at)
            sigma = eta * np.sqrt((1 - after) / (1 - at) * (1 - at / after))
            x = np.sqrt(after) * x0 + np.sqrt(max(1 - after - sigma**2, 0)) * eps
            x += sigma * written_out_noise(4, index, t)
        np.testing.assert_allclose(sample, x, atol=1e-4)


@pytest.mark.parametrize(
    "steps, spacing, count", [(0, "linspace", 8), (3, "trailing", 3), (0, "sections:2,3", 5)]
)
def test_the_steps_of_a_chain_are_those_that_its_sampler_takes(
    steps: int, spacing: str, count: int
) -> None:
    for sampler in SAMPLERS:
        config = config_with(sampler=sampler, steps=steps, spacing=spacing)
        assert chain_steps(config) == build_sampler(config).steps == count
    assert build_sampler(config, inverted=True).steps == count
    with pytest.raises(ConfigError, match="spacing=sections:2,3 has 5; leave steps at 0"):
        chain_steps(config_with(steps=4, spacing="sections:2,3"))


@pytest.mark.parametrize("clip, threshold", [(False, 0.0), (True, 0.9)])
def test_codes_are_of_ddim_without_noise_whatever_the_config_says(clip, threshold) -> None:
    """Nothing limits x0_hat, unless a clip is asked for: then it is the config's own."""
    config = config_with(sampler="unipc", order=3, dynamic_threshold=0.9, steps=4, spacing="karras")
    expected = {"sampler": "ddim", "eta": 0.0, "order": 0, "steps": 6, "spacing": "karras"}
    expected |= {"clip": clip, "dynamic_threshold": threshold, "rederive_eps": True}
    made = codes_config(config, clip=clip, steps=6)
    assert dataclasses.asdict(made.sampling) == expected
    noisy = config_with(sampler="ddim", eta=0.7)
    assert codes_config(noisy, clip=clip).sampling.eta == 0
    assert codes_config(noisy, clip=clip, steps=None).sampling.steps == 0


@pytest.mark.parametrize(
    "clip, rederive, percentile", [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0.9)]
)
def test_limits_of_the_config_reach_every_chain(
    clip: int, rederive: int, percentile: float
) -> None:
    """The samples, their films and the filling of holes: one row by hand, from an x0_hat past 1.

    A known part and its frames are those of the same row.
    """
    config = config_with(
        sampler="ddim",
        steps=2,
        clip=bool(clip),
        rederive_eps=bool(rederive),
        dynamic_threshold=percentile,
    )
    keys, shape = jax.random.split(jax.random.key(0), 2), (2, 4, 4, 1)
    x_T = np.asarray(jax.random.normal(jax.random.key(1), shape), np.float64)
    x0 = np.linspace(0.5, 3, 32).reshape(shape)
    at = SIGNAL2[T - 1], SIGNAL2[0]
    eps = (x_T - np.sqrt(at[0]) * x0) / np.sqrt(1 - at[0])

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        """Give this x0_hat at the first row, and the state itself as x0_hat at the last."""
        last = jnp.asarray(t == 0)[:, None, None, None]
        level = jnp.asarray(SIGNAL2, jnp.float32)[t][:, None, None, None]
        state = (x - jnp.sqrt(level) * x / 4) / jnp.sqrt(1 - level)
        return jnp.where(last, state, jnp.asarray(eps, jnp.float32))

    s = np.quantile(x0, percentile, axis=(1, 2, 3), keepdims=True) if percentile else 1.0
    limited = np.clip(x0, -s, s) / s if clip else x0
    again = (x_T - np.sqrt(at[0]) * limited) / np.sqrt(1 - at[0]) if rederive else eps
    x_1 = np.sqrt(at[1]) * limited + np.sqrt(1 - at[1]) * again
    top = np.quantile(np.abs(x_1 / 4), percentile, axis=(1, 2, 3), keepdims=True)
    top = np.maximum(top, 1) if percentile else 1.0
    expected = np.clip(x_1 / 4, -top, top) / top if clip else x_1 / 4
    chain = denoise, jnp.asarray(x_T, jnp.float32), keys
    whole = build_sampler(config)(*chain, {})
    np.testing.assert_allclose(whole, expected, atol=2e-4)
    film = build_sampler(config, record="x_t", num_frames=3)(*chain, {})
    np.testing.assert_allclose(film[:, 1], x_1, atol=2e-4)
    nothing = {"known": jnp.zeros(shape), "mask": jnp.zeros((2, 4, 4, 1))}
    filled = build_sampler(config, repaint=Repaint(1, 1))(*chain, nothing)
    np.testing.assert_allclose(filled, expected, atol=2e-4)


def test_holes_are_filled_where_a_chain_ends_without_signal() -> None:
    """The schedule jsd: x_T is noise alone, and the first visit keeps all of it."""
    config = tiny_config(diffusion={"timesteps": T, "schedule": "jsd", "prediction": "x0"})
    shape, keys = (2, *SHAPE), jax.random.split(jax.random.key(0), 2)
    batch = {"known": jnp.full(shape, 0.5), "mask": jnp.zeros((2, *SHAPE[:2], 1))}
    for repaint in (Repaint(1, 1), Repaint(3, 2), Repaint(2, T - 1)):
        sampler = build_sampler(config, repaint=repaint)
        x_T = jax.random.normal(keys[0], shape)
        filled = sampler(lambda x, t: jnp.full_like(x, 0.25), x_T, keys, batch)
        np.testing.assert_allclose(filled, 0.25, atol=1e-5)


def test_classes_reach_the_network() -> None:
    labels = np.array([3, 0, 5, 1, 2])
    options = {"seed": 0, "indices": np.arange(5)}
    drawn = generator(config_with(), batch_size=2).draw(PARAMS, labels=labels, **options)
    expected = np.broadcast_to(0.1 * labels[:, None, None, None], (5, *SHAPE))
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    without = generator(config_with()).draw(PARAMS, **options)
    np.testing.assert_allclose(without, -0.9, atol=1e-4)


@pytest.mark.parametrize("clip, limit", [(True, 1.0), (False, 5.0)])
def test_x0_is_clipped_where_the_config_says_so(clip: bool, limit: float) -> None:
    drawn = generator(config_with(clip=clip)).draw(
        PARAMS, seed=0, indices=np.arange(2), labels=np.array([50, 50])
    )
    np.testing.assert_allclose(drawn, limit, atol=1e-3)


@pytest.mark.parametrize("devices, asked, size", [(1, 5, 5), (2, 5, 6), (4, 5, 8), (4, 1, 4)])
def test_batches_are_rounded_up_to_the_devices(devices: int, asked: int, size: int) -> None:
    made = generator(config_with(), devices, batch_size=asked)
    assert made.batch_size == size
    batches = made(PARAMS, seed=0, indices=np.arange(size + 1), labels=np.zeros(size + 1, int))
    assert [len(batch) for batch in batches] == [size, 1]


@pytest.mark.parametrize("count", [1, 2, 7, 65, 488, 512])
@pytest.mark.parametrize("asked", [1, 2, 64, 500, 1024])
def test_a_batch_that_is_evened_out_takes_no_more_calls_and_fills_least(asked, count) -> None:
    """The least of all batches up to the one asked for that take as many calls."""
    calls = np.ceil(count / np.arange(1, asked + 1))
    assert even_batch(asked, count) == 1 + np.flatnonzero(calls == calls[-1])[0]


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        even_batch(0, 5)


@pytest.mark.parametrize("devices", [1, 4])
def test_samples_are_the_same_bits_whatever_the_batch(devices: int) -> None:
    """On one device in one call, and on several: a batch's size and its filling change nothing."""
    options = {"seed": 1, "indices": 3 + np.arange(9), "labels": np.arange(9)}
    config = config_with(sampler="ancestral", steps=3)
    expected = generator(config, batch_size=9).draw(PARAMS, **options)
    for batch_size in (8, even_batch(8, 9)):
        drawn = generator(config, devices, batch_size=batch_size).draw(PARAMS, **options)
        np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_eq_6_with_1_plus_w(scale: float) -> None:
    """The mean is u + scale (c - u), the variance that with the label; "no label" is class 10."""

    def bind(params, labels):
        at = labels[:, None, None, None].astype(jnp.float32)
        return lambda x, t: jnp.concatenate([x * at, 7 * at + 0 * x], axis=-1)

    @dataclasses.dataclass
    class Learned:
        learns_variance: bool = True

    denoise = guided(bind, Learned(), 10, scale)({}, jnp.array([2, 5]))
    output = denoise(jnp.ones((2, *SHAPE)), jnp.zeros(2, jnp.int32))
    for row, label in zip(output, (2, 5)):
        np.testing.assert_allclose(row[..., 0], 10 + scale * (label - 10), rtol=1e-6)
        np.testing.assert_allclose(row[..., 1], 7 * label)


def test_the_guidance_of_a_generator_is_the_scale_asked_for(monkeypatch) -> None:
    """Against x0_hat of classes 2 and "none", which is 3 here: 0.3 + scale (0.2 - 0.3)."""
    config = tiny_config(model={"num_classes": 3, "label_dropout": 0.1}, diffusion={"timesteps": T})
    monkeypatch.setattr(generate, "denoiser", lambda config, network=None: by_class)
    monkeypatch.setattr(generate, "image_shape", lambda config: SHAPE)
    one = Devices(jax.devices()[:1])
    for scale in (0.0, 1.0, 2.0, 4.0):
        made = generate.build_generator(config, one, guidance=scale)
        drawn = made.draw(PARAMS, seed=0, indices=np.arange(2), labels=np.array([2, 2]))
        np.testing.assert_allclose(drawn, 0.3 - 0.1 * scale, atol=1e-4)


@pytest.mark.parametrize(
    "prediction, fields",
    [("x0", {"sampler": "dpmpp_2m"}), ("eps", {"sampler": "deis", "rederive_eps": False})],
)
def test_a_network_that_computes_in_bfloat16_samples_in_float32(prediction, fields) -> None:
    """What a chain carries of it is float32, as of a network that rounds and returns float32."""
    config = config_with(steps=4, **fields)
    config.diffusion.prediction = prediction
    one, drawn = Devices(jax.devices()[:1]), []
    for dtype in ("bfloat16", "float32"):

        def apply(params, x, t, labels, dropout, dtype=dtype):
            return (0.7 * x).astype("bfloat16").astype(dtype)

        network = Network(lambda key: {"unused": jnp.zeros(1)}, apply)
        made = generate.build_generator(config, one, network=network, batch_size=2)
        drawn.append(made.draw(PARAMS, seed=0, indices=np.arange(2)))
    assert drawn[0].dtype == np.float32
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("what, first", [("x_t", -1), ("x0", 0)])
def test_frames_are_at_equal_distances_from_the_first_to_the_last(what: str, first: int) -> None:
    frames = equidistant_frames(9, what, 5)
    expected = np.rint(np.linspace(first, 8, 5)).astype(int)
    np.testing.assert_array_equal(frames.after, expected[1:] if what == "x_t" else expected)


def test_frames_of_x_t_begin_with_the_noise() -> None:
    config = config_with(clip=False)
    sampler = build_sampler(config, record="x_t", num_frames=T + 1)
    made = Generator(sampler, by_class, SHAPE, Devices(jax.devices()[:1]))
    frames = made.draw(PARAMS, seed=2, indices=np.array([5]), labels=np.array([4]))
    assert frames.shape == (1, T + 1, *SHAPE)
    np.testing.assert_allclose(frames[0, 0], written_out_noise(2, 5, T), atol=1e-6)
    np.testing.assert_allclose(frames[0, -1], 0.4, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_of_a_report_is_one_of_the_draw(devices: int, raised, monkeypatch) -> None:
    """XLA calls the reports, and whatever they raise comes out of it as an error of its own."""

    def update(self, steps: int) -> None:
        raise raised

    made = generator(config_with(), devices, progress=True)
    expected = KeyboardInterrupt if raised is KeyboardInterrupt else jax.errors.JaxRuntimeError
    draw = {"seed": 0, "indices": np.arange(2), "labels": np.array([4, 4])}
    with monkeypatch.context() as patched, pytest.raises(expected):
        patched.setattr(generate.Progress, "update", update)
        made.draw(PARAMS, **draw)
    np.testing.assert_allclose(made.draw(PARAMS, **draw), 0.4, atol=1e-4)  # it draws on
