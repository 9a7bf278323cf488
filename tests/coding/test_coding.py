"""The coders give back every bit, and the messages have the length that the bound promises."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.build import init_params
from ddpm_jax.coding import bits_back, progressive
from ddpm_jax.coding.ans import SLOTS, Stack, draw_mask
from ddpm_jax.coding.bits_back import ChainCoder, Reverse
from ddpm_jax.coding.container import MOST_IMAGES, Coded, Settings
from ddpm_jax.coding.files import compress, decompress, receive
from ddpm_jax.coding.gaussians import BinnedGaussian, Lattice, cdf_erf, cdf_tanh
from ddpm_jax.coding.progressive import ProgressiveCoder, SharedNoise
from ddpm_jax.config import Config
from ddpm_jax.data.load import load_source
from ddpm_jax.diffusion.gaussians import discretized_gaussian_log_likelihood
from ddpm_jax.errors import CodingError
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import Trained
from tests.support.gaussian_chain import GaussianChain
from tests.support.tiny import tiny_config
from tests.support.two_levels import LEVELS, PROBABILITIES, STD, closed_form, made_schedule

# ---------------------------------------------------------------------------------------- the stack


def random_symbols(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """start and frequency of `count` symbols, from one slot to nearly all of them."""
    rng = np.random.default_rng(seed)
    frequency = np.maximum(
        1, (SLOTS - 1) * rng.uniform(size=count) ** rng.choice([1, 4, 40], count)
    ).astype(np.uint64)
    return (rng.uniform(size=count) * (SLOTS - frequency.astype(np.float64))).astype(
        np.uint64
    ), frequency


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_popping_undoes_pushing(lanes: int, masked: bool) -> None:
    """Symbols of 30 bits need two words at a time, which must come back in the other order."""
    stack = Stack(lanes, seed=3)
    before = (stack.heads.copy(), stack.bits)
    pushes = [
        (*random_symbols(count, count), draw_mask(5, count, count) if masked else None)
        for count in (1, 64, 200)
    ]
    for push in pushes:
        stack.push(*push)
    information = sum(
        np.log2(SLOTS / frequency.astype(np.float64)).sum() for _, frequency, _ in pushes
    )
    np.testing.assert_allclose(stack.bits - before[1], information, rtol=2e-3)

    stack = Stack.of(stack.heads, stack.tail)
    for start, frequency, mask in reversed(pushes):

        def symbol_at(rows: slice, slots: np.ndarray, start=start, frequency=frequency):
            assert (slots >= start[rows]).all() and (slots < start[rows] + frequency[rows]).all()
            return np.arange(rows.start, rows.stop), start[rows], frequency[rows]

        np.testing.assert_array_equal(stack.pop(len(start), symbol_at, mask), np.arange(len(start)))
    np.testing.assert_array_equal(stack.heads, before[0])
    assert stack.is_initial(0, seed=3) and not stack.is_initial(0, seed=4)
    assert not stack.is_initial(10**15, seed=3)  # a damaged file may say so: nothing is drawn


def test_symbols_of_the_model_cost_their_entropy() -> None:
    """A hundred thousand symbols of 3 bits: the state's granularity must not show."""
    rng, lattice = np.random.default_rng(0), Lattice(-8, 1 / 2, 32)
    mean, std = rng.normal(size=100_000), np.full(100_000, 1.0)
    k = np.floor((rng.normal(mean, std) - lattice.origin) / lattice.width).astype(int)
    p = scipy.stats.norm(mean, std)
    edge = lattice.origin + k * lattice.width
    ideal = -np.log2(p.cdf(edge + lattice.width) - p.cdf(edge)).sum()
    stack = Stack(16)
    before = stack.bits
    BinnedGaussian(lattice, mean, std, leak=True).push(stack, k)
    assert abs(stack.bits - before - ideal) < 1e-5 * ideal
    np.testing.assert_array_equal(BinnedGaussian(lattice, mean, std, leak=True).pop(stack), k)


def test_draws_are_the_gaussian_and_cost_their_information() -> None:
    lattice, count = Lattice(-8, 0.01, 1600), 20_000
    mean, std = np.linspace(-2, 2, count), np.full(count, 0.3)
    stack = Stack(32)
    before = stack.bits
    k = BinnedGaussian(lattice, mean, std, leak=False).pop(stack, draw_mask(1, 0, count))
    z = (lattice.centres(k) - mean) / std
    assert (
        scipy.stats.kstest(
            z + np.random.default_rng(0).uniform(-0.5, 0.5, count) * 0.01 / 0.3, "norm"
        ).pvalue
        > 1e-3
    )
    taken = before - (stack.bits - 16 * stack.borrowed)
    np.testing.assert_allclose(
        taken, -np.log2(scipy.stats.norm.pdf(z) * 0.01 / 0.3).sum(), rtol=1e-4
    )
    BinnedGaussian(lattice, mean, std, leak=False).push(stack, k, draw_mask(1, 0, count))
    assert stack.is_initial(stack.borrowed)


def test_a_draw_does_not_depend_on_what_was_pushed_last() -> None:
    """Without a mask the next draw reads the very slot of the last symbol.

    A whole chain of draws would be tied to it.
    """
    lattice, count = Lattice(-8, 0.01, 1600), 5000
    zero, one = np.zeros(count), np.ones(count)
    pushed = np.random.default_rng(1).integers(
        900, 1000, count
    )  # all of them at +1 to +2 standard deviations
    drawn = {}
    for masked in (True, False):
        stack = Stack(count)
        BinnedGaussian(lattice, zero, one, leak=True).push(stack, pushed)
        k = BinnedGaussian(lattice, zero, one, leak=False).pop(
            stack, draw_mask(1, 0, count) if masked else None
        )
        drawn[masked] = lattice.centres(k)
    assert abs(drawn[True].mean()) < 4 / math.sqrt(count)
    assert drawn[False].mean() > 1


@pytest.mark.parametrize("leak", [True, False])
@pytest.mark.parametrize("cdf", [cdf_erf, cdf_tanh])
def test_bins_fill_all_slots_without_gap_or_overlap(leak: bool, cdf) -> None:
    lattice = bits_back.LEVELS
    for mean, std in ((0.1, 0.02), (-3.0, 0.5), (5.0, 0.01), (0.0, 50.0)):
        model = BinnedGaussian(lattice, np.full(257, mean), np.full(257, std), leak=leak, cdf=cdf)
        edges = model._edge(slice(0, 257), np.arange(257))
        assert edges[0] == 0 and edges[-1] == SLOTS
        assert (np.diff(edges) >= (1 if leak else 0)).all()
        slots = np.random.default_rng(0).integers(0, SLOTS, 257).astype(np.uint64)
        k, start, frequency = model._symbol_at(slice(0, 257), slots)
        np.testing.assert_array_equal(start, edges[k])
        assert (slots >= start).all() and (slots < start + frequency).all()


# --------------------------------------------------------------------------- lossless, to the bound


def gaussian_network(chain: GaussianChain, betas: np.ndarray, variance: str = "fixed_large"):
    """The exact denoiser of pixels from N(0, STD^2), as a reverse step, in NumPy."""

    def network(x: np.ndarray, t: int) -> Reverse:
        on_x0, on_xt, true = chain.posterior(t - 1, t)
        if t == 0:
            on_x0, on_xt, true = 1.0, 0.0, chain.posterior(0, 1)[2]
        model = betas[t] if variance == "fixed_large" and t else true
        x0 = chain.best_x0(t, 0.0, STD)[0] * x
        mean = (on_x0 * x0 + on_xt * x).astype(np.float32)
        return Reverse(
            mean, np.full((1, 1, 1, 1), math.log(model), np.float32), x0.astype(np.float32)
        )

    return network


def test_length_of_a_chain_of_gaussian_images_is_the_closed_form_of_the_bound() -> None:
    """It is so within 1 % for 60 images of 8x8; the draws of the images scatter by 0.5 %."""
    made = made_schedule(100)
    chain = GaussianChain(made.betas)
    levels = np.random.default_rng(0).choice(256, (60, 8, 8, 1), p=PROBABILITIES).astype(np.uint8)
    coder, stack = ChainCoder(made, gaussian_network(chain, made.betas)), Stack(64)
    for start in range(0, 60, 4):
        coder.encode(stack, levels[start : start + 4])
    expected = closed_form(chain, made.betas, "fixed_large", LEVELS[levels].ravel())
    bound = (expected["prior"] + expected["terms"].sum()) * levels.size
    net = stack.bits - stack.initial_bits
    assert abs(net / bound - 1) < 0.01
    # Only one x_1 of four images is borrowed for, not all T states of them.
    assert stack.initial_bits < 4 * 64 * 10 + 64 * 64

    received = Stack.of(stack.heads, stack.tail)
    for start in reversed(range(0, 60, 4)):
        np.testing.assert_array_equal(
            coder.decode(received, (4, 8, 8, 1)), levels[start : start + 4]
        )
    assert received.is_initial(stack.borrowed)


def test_each_draw_of_a_chain_has_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws with one mask would depend on each other, which bits-back assumes they do not."""
    made, masks = made_schedule(20), []

    def recorded(seed: int, draw: int, count: int) -> np.ndarray:
        masks.append(draw_mask(seed, draw, count))
        return masks[-1]

    monkeypatch.setattr(bits_back, "draw_mask", recorded)
    coder = ChainCoder(made, gaussian_network(GaussianChain(made.betas), made.betas))
    coder.encode(Stack(64), np.zeros((1, 8, 8, 1), np.uint8))
    assert len({mask.tobytes() for mask in masks}) == len(masks) >= 19


def tiny_trained(scale: float = 1.0, **sections) -> Trained:
    config = tiny_config(**sections)
    params = jax.tree.map(lambda leaf: scale * leaf, init_params(config))
    return Trained(config, params, "raw", 0)


def digits(config: Config, count: int) -> np.ndarray:
    return load_source(config.data, "data", "test").images[:count]


@pytest.mark.parametrize(
    "variance", ["fixed_large", pytest.param("learned_range", marks=pytest.mark.slow)]
)
def test_length_of_a_hundred_digits_is_the_bound_of_evaluate(variance: str) -> None:
    """Any network has a bound, an untrained one too, and the codec must reach it.

    Its first step must not be so small that the network's error is many of its standard deviations:
    no symbol costs 30 bits.
    """
    loss = {"kind": "vlb" if variance == "learned_range" else "simple"}
    trained = tiny_trained(
        diffusion={"variance": variance, "timesteps": 25, "beta_start": 6e-3, "beta_end": 0.3},
        loss=loss,
    )
    levels, devices = digits(trained.config, 100), Devices(jax.devices()[:1])
    settings = Settings(group=25, lanes=32, cdf="erf")
    coded = compress(trained, levels, settings)
    source = load_source(trained.config.data, "data", "test")
    protocol = Protocol(clip=settings.clip, cdf=settings.cdf)
    nll = evaluate_nll(
        trained.config, trained.params, source, devices, protocol=protocol, num_images=100
    )
    assert abs(coded.header["net_bits"] / levels.size / nll.total.mean - 1) < 0.03
    np.testing.assert_array_equal(decompress(trained, coded), levels)


@pytest.mark.parametrize("method", ["lossless", "progressive"])
def test_files_come_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    """RGB, any levels, and a last group that is not full."""
    trained = tiny_trained(data={"channels": 3, "name": "folder", "path": "x"})
    levels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    levels[0], levels[1] = 0, 255
    coded = compress(trained, levels, Settings(method=method, group=3, step_rate=0.5, seed=2))
    coded.save(tmp_path / "images.ddpm")
    again = Coded.load(tmp_path / "images.ddpm")
    np.testing.assert_array_equal(decompress(trained, again), levels)
    assert (tmp_path / "images.ddpm").stat().st_size == len(coded.to_bytes())
    if method == "lossless":
        held = 8 * coded.payload_bytes - coded.header["net_bits"] - coded.header["initial_bits"]
        assert 0 <= held < 64 * 16 + 16  # what is not information is the unused top of 64 heads


def test_a_file_that_could_not_be_read_back_is_not_written() -> None:
    levels = np.broadcast_to(np.uint8(0), (MOST_IMAGES + 1, 8, 8, 1))
    with pytest.raises(CodingError, match="4,194,305 images: a file holds at most 4,194,304"):
        compress(tiny_trained(), levels, Settings())


def test_another_network_is_refused_and_a_nearly_equal_one_noticed() -> None:
    trained, other = tiny_trained(), tiny_trained(scale=1.001)
    coded = compress(trained, digits(trained.config, 4), Settings(group=4))
    with pytest.raises(CodingError, match="coded with sha256 .*: decode with the same"):
        decompress(other, coded)
    # On a machine that computes the same weights to other last digits, the initial bits do not come
    # back.
    forged = compress(other, digits(trained.config, 4), Settings(group=4)).header["model"]
    with pytest.raises(
        CodingError, match="computes the network differently|does not lead to|ends in the middle"
    ):
        decompress(other, Coded(coded.header | {"model": forged}, coded.sections))


def test_a_flipped_bit_at_the_bottom_of_the_message_is_noticed() -> None:
    """It reaches no image, or only the last one decoded, and no other check would see it."""
    trained = tiny_trained()
    coded = compress(trained, digits(trained.config, 4), Settings(group=4))
    heads, tail = coded.sections
    with pytest.raises(CodingError, match="differently"):
        decompress(trained, Coded(coded.header, [heads, bytes([tail[0] ^ 1]) + tail[1:]]))


@pytest.mark.parametrize("cdf", ["tanh", "erf"])
def test_the_decoder_coded_with_is_the_one_of_the_bound(cdf: str) -> None:
    made, shape = made_schedule(20), (256, 1, 1, 1)
    mean, std = 0.31, 0.04
    step = Reverse(
        np.full(shape, mean, np.float32),
        np.full((1, 1, 1, 1), 2 * math.log(std), np.float32),
        np.zeros(shape),
    )
    model = ChainCoder(made, lambda x, t: step, cdf=cdf)._reverse(
        0, np.zeros(256), shape, bits_back.LEVELS
    )
    edges = model._edge(slice(0, 256), np.arange(256))
    slots = np.append(edges[1:], SLOTS) - edges
    x = np.asarray(LEVELS, np.float32)[:, None, None, None]
    likelihood = discretized_gaussian_log_likelihood(
        x, np.float32(mean), np.float32(math.log(std)), cdf=cdf
    )
    expected = np.exp(np.asarray(likelihood, np.float64)).ravel()
    np.testing.assert_allclose(slots / SLOTS, expected, atol=2e-6)
    wrong = {"tanh": "erf", "erf": "tanh"}[cdf]
    other = discretized_gaussian_log_likelihood(
        x, np.float32(mean), np.float32(math.log(std)), cdf=wrong
    )
    assert np.abs(slots / SLOTS - np.exp(np.asarray(other, np.float64)).ravel()).max() > 1e-5


def test_bad_files_and_images_are_refused(tmp_path: Path) -> None:
    trained = tiny_trained()
    levels = digits(trained.config, 3)
    content = compress(trained, levels, Settings(group=3)).to_bytes()
    for bad in (b"", b"GIF89a", b'{"format": "other"}\n', content[:-1], content + b"x"):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(CodingError, match="bad: "):
            Coded.load(tmp_path / "bad")
    with pytest.raises(CodingError, match="no such file"):
        Coded.load(tmp_path / "none")
    for images in (levels[:0], levels.astype(np.float32), levels[:, :4]):
        with pytest.raises(CodingError, match="expected uint8"):
            compress(trained, images, Settings())
    with pytest.raises(CodingError, match="not finite"):
        compress(tiny_trained(scale=math.nan), levels, Settings(group=3))
    with pytest.raises(CodingError, match="num_classes=10"):
        compress(tiny_trained(model={"num_classes": 10}), levels, Settings())
    with pytest.raises(CodingError, match="can only be decoded whole"):
        next(receive(trained, Coded.from_bytes(content, "x")))
    for wrong in ({"method": "zip"}, {"cdf": "other"}, {"group": 0}, {"step_rate": -1}):
        with pytest.raises(CodingError, match=next(iter(wrong))):
            Settings(**wrong)


# -------------------------------------------------------------------------------------- progressive


def test_the_search_finds_the_best_of_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all 2^10 of them."""
    monkeypatch.setattr(progressive, "MEMORY", 4)
    lean = np.random.default_rng(0).normal(0, 0.7, 33)
    noise = SharedNoise(0, 1, lean.size, 10)
    variance = 2 ** (2 * 10 / progressive.SURPLUS / lean.size)

    def gain(path) -> float:
        z = noise.of(np.array(path, np.uint8))
        return (
            scipy.stats.norm.logpdf(z, lean, 1).sum()
            - scipy.stats.norm.logpdf(z, 0, math.sqrt(variance)).sum()
        )

    # The last segment is filled up with dimensions that are cut off from z; leave their share
    # of the gain out of the contest.
    best = max(map(gain, itertools.product((0, 1), repeat=10)))
    assert gain(noise.search(lean)) > best - 0.5
    assert gain(noise.search(lean)) > np.quantile(
        [gain(path) for path in itertools.product((0, 1), repeat=10)], 0.995
    )


def test_a_search_holds_a_few_segments_at_once_and_finds_the_same(monkeypatch) -> None:
    """The path is that of all words held against all segments in one product, 16 MB of them."""
    monkeypatch.setattr(progressive, "MEMORY", 12)
    lean = np.random.default_rng(0).normal(0, 0.7, 1900)
    noise = SharedNoise(0, 1, lean.size, 1000)
    tracemalloc.start()
    path = noise.search(lean)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    monkeypatch.setattr(progressive, "AT_ONCE", 1000)
    np.testing.assert_array_equal(noise.search(lean), path)


def test_shared_noise_leans_as_a_draw_of_the_posterior_does() -> None:
    """It is standard normal without bits, and N(lean, I) with the bits of its divergence.

    The product with lean is then |lean|^2.
    """
    free = SharedNoise(0, 1, 50_000, 0).of(np.zeros(0, np.uint8))
    assert scipy.stats.kstest(free, "norm").pvalue > 1e-3
    lean = np.random.default_rng(0).normal(0, 0.25, 4000)
    count = round(progressive.SURPLUS * lean.size / 2 * np.log2(1 + np.mean(lean**2)))
    noise = SharedNoise(0, 2, lean.size, count)
    z = noise.of(noise.search(lean))
    assert 0.95 < z @ lean / (lean @ lean) < 1.05
    rest = z - lean
    np.testing.assert_allclose(rest.std(), 1, rtol=0.03)
    assert abs(np.corrcoef(rest, lean)[0, 1]) < 0.05
    assert not np.array_equal(
        noise.of(noise.search(lean)), SharedNoise(1, 2, lean.size, count).of(noise.search(lean))
    )


def test_progressive_pictures_lie_near_the_curve_of_gaussian_data() -> None:
    """Each prefix's rate and RMSE stand against log2(s / RMSE).

    No coder of Gaussian data can take less.
    """
    made = made_schedule(1000)
    chain = GaussianChain(made.betas)
    levels = np.random.default_rng(0).choice(256, (60, 8, 8, 1), p=PROBABILITIES).astype(np.uint8)
    x0 = LEVELS[levels]
    coder = ProgressiveCoder(made, gaussian_network(chain, made.betas), step_rate=0.06)
    bits, stack = coder.encode(levels)
    steps = list(coder.receive(bits, levels.shape))
    assert steps[0].t == 999 and steps[-1].t == 0 and 25 < len(steps) < 80
    rate = np.array([known.bits for known in steps]) / levels.size
    rmse = np.array([np.sqrt(np.mean((known.x0 - x0) ** 2)) for known in steps])
    least = np.log2(np.std(x0) / rmse)
    assert (np.diff(rate) > 0).all() and (np.diff(rmse) < 0).all() and rate[0] == 0
    late = least > 0.2
    assert late.sum() > 15
    assert (rate[late] / least[late] > 1).all() and (rate[late] / least[late] < 1.25).all()
    # x_t has the noise that the network expects of it, and no other: it was chosen, not drawn.
    for known in steps[5::10]:
        noise = (known.x - chain.signal[known.t] * x0) / math.sqrt(
            chain.covariance[known.t, known.t]
        )
        np.testing.assert_allclose(noise.std(), 1, rtol=0.08)
    np.testing.assert_array_equal(coder.decode(bits, stack, levels.shape), levels)
    assert stack.is_initial(0)


def test_a_prefix_is_enough_for_its_pictures() -> None:
    """The stream cut after a step gives the same picture there: nothing later was looked at."""
    trained = tiny_trained()
    levels = digits(trained.config, 20)
    coded = compress(trained, levels, Settings(method="progressive", group=20))
    whole = [known for _, known in receive(trained, coded)]
    middle = whole[len(whole) // 2]
    cut = Coded(coded.header, [coded.sections[0][: -(-middle.bits // 8)], *coded.sections[1:]])
    seen = []
    with pytest.raises(CodingError, match="ends in the middle of a step"):
        for _, known in receive(trained, cut):
            seen.append(known)
    assert seen[-1].t == middle.t and len(whole) > 5
    np.testing.assert_array_equal(seen[-1].x0, middle.x0)


def test_elias_gamma_and_zigzag_are_inverted() -> None:
    writer, numbers = progressive._BitWriter(), [0, 1, -1, 2, -2, 1000, -1000, 7]
    for n in numbers:
        writer.gamma(progressive._zigzag(n) + 1)
    reader = progressive._BitReader(writer.bits())
    assert [progressive._unzigzag(reader.gamma() - 1) for _ in numbers] == numbers
    assert reader.position == len(writer.bits())
