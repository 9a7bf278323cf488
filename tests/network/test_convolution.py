"""The convolution that CPUs get is the same linear map as XLA's.

Other platforms get XLA's and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.passmanager import PassManager

from ddpm_jax.config import UNetConfig
from ddpm_jax.network import blocks, convolution, unet
from ddpm_jax.network.convolution import (
    convolve,
    cpu_gradients,
    direct,
    direct_gradients,
    suits_winograd,
    winograd,
    winograd_gradients,
)
from ddpm_jax.parallel.devices import Devices

SAME = ((1, 1), (1, 1))
NHWC = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # as flax spells it
WIDE = UNetConfig(
    base_channels=64, channel_mult=(1, 1), blocks_per_level=1, attention_resolutions=(), dropout=0.0
)


def exact(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx and dw by the definition, tap by tap, in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, dpadded, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for i in range(3):
        for j in range(3):
            window = (slice(None), slice(i, i + height), slice(j, j + width))
            y += padded[window] @ w[i, j]
            dpadded[window] += dy @ w[i, j].T
            dw[i, j] = np.einsum("bhwc,bhwo->co", padded[window], dy)
    return y, dpadded[:, 1:-1, 1:-1], dw


def draw(
    shape: tuple[int, int, int, int], features: int, mean: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(mean, 1, shape).astype(np.float32)
    w = random.normal(0, 0.1, (3, 3, shape[-1], features)).astype(np.float32)
    return x, w, random.normal(0, 1, (*shape[:3], features)).astype(np.float32)


@pytest.mark.parametrize(
    "shape, features, mean",
    [
        ((2, 4, 6, 3), 5, 0),
        ((1, 2, 2, 7), 2, 0),
        ((3, 16, 16, 64), 48, 0),
        ((2, 32, 32, 128), 64, 0),
        ((2, 8, 8, 64), 64, 30),
    ],
)
def test_only_rounding_sets_it_apart_from_the_definition(shape, features, mean):
    x, w, dy = draw(shape, features, mean)
    got = winograd(x, w), *winograd_gradients(x, w, dy)
    plain = direct(x, w, (1, 1), SAME), *direct_gradients(x, w, dy, strides=(1, 1), padding=SAME)
    for ours, xla, true in zip(got, plain, exact(x, w, dy), strict=True):
        scale = np.abs(true).max()
        error, theirs = np.abs(ours - true).max() / scale, np.abs(xla - true).max() / scale
        assert error < max(4 * theirs, 1e-6)


def test_an_image_does_not_depend_on_those_beside_it(monkeypatch):
    x, w, dy = draw((6, 8, 8, 16), 16)
    whole = winograd(x, w), *winograd_gradients(x, w, dy)
    monkeypatch.setattr(convolution, "CHUNK", 2 * 8 * 8 * 32)  # pairs
    pairs = winograd(x, w), *winograd_gradients(x, w, dy)
    alone = np.concatenate([winograd(x[i : i + 1], w) for i in range(6)])
    for one, other in zip(whole, pairs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())
    np.testing.assert_allclose(whole[0], alone, atol=2e-6 * np.abs(alone).max())


def test_chunks_hold_all_images_in_order_and_no_more_than_fits(monkeypatch):
    monkeypatch.setattr(convolution, "CHUNK", 4 * 4 * 4 * 2)
    for batch, chunks in ((8, 2), (9, 3), (7, 7), (4, 1)):
        images = jnp.arange(batch * 4 * 4 * 1.0).reshape(batch, 4, 4, 1)
        cut = convolution._chunks(images, 2)
        assert len(cut) == chunks
        np.testing.assert_array_equal(cut.reshape(images.shape), images)


@pytest.mark.parametrize(
    "shape, kernel, strides, padding, dtype, suits",
    [
        ((16, 8, 8, 64), (3, 3, 64, 64), (1, 1), SAME, "float32", True),
        ((16, 8, 8, 64), (3, 3, 64, 64), (2, 2), SAME, "float32", False),
        ((16, 8, 8, 64), (3, 3, 64, 64), (1, 1), ((0, 1), (0, 1)), "float32", False),
        ((16, 8, 8, 64), (1, 1, 64, 64), (1, 1), SAME, "float32", False),
        ((16, 8, 8, 64), (3, 3, 64, 64), (1, 1), SAME, "bfloat16", False),
        ((16, 9, 8, 64), (3, 3, 64, 64), (1, 1), SAME, "float32", False),
        ((16, 8, 8, 3), (3, 3, 3, 64), (1, 1), SAME, "float32", False),
        ((16, 8, 8, 64), (3, 3, 64, 3), (1, 1), SAME, "float32", False),
        ((1, 8, 8, 64), (3, 3, 64, 64), (1, 1), SAME, "float32", False),
        ((16, 32, 32, 64), (3, 3, 64, 32), (1, 1), SAME, "float32", True),
        ((15, 32, 32, 64), (3, 3, 64, 32), (1, 1), SAME, "float32", False),
        ((16, 32, 32, 32), (3, 3, 32, 64), (1, 1), SAME, "float32", False),
        ((16, 32, 32, 64), (3, 3, 64, 31), (1, 1), SAME, "float32", False),
    ],
)
def test_only_what_pays_takes_the_other_form(shape, kernel, strides, padding, dtype, suits):
    x, w = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(kernel, dtype)
    assert suits_winograd(x, w, strides, padding) is suits
    traced = str(
        jax.make_jaxpr(
            lambda x, w: convolve(x, w, list(strides), list(padding), dimension_numbers=NHWC)
        )(x, w)
    )
    assert ("platform_index" in traced) is suits


@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGH])
@pytest.mark.parametrize(
    "shape, kernel, strides, padding",
    [
        ((3, 8, 6, 4), (3, 3, 4, 5), (1, 1), SAME),
        ((3, 8, 6, 4), (3, 3, 4, 5), (2, 2), ((0, 1), (0, 1))),
        ((3, 8, 6, 4), (3, 3, 4, 5), (2, 2), SAME),
        ((3, 9, 7, 4), (3, 3, 4, 5), (2, 1), ((1, 0), (2, 1))),
        ((3, 8, 6, 4), (1, 1, 4, 5), (1, 1), ((0, 0), (0, 0))),
        ((3, 9, 9, 1), (4, 2, 1, 1), (3, 2), ((0, 0), (1, 1))),
    ],
)
def test_gradients_laid_out_by_hand_are_those_of_xla(shape, kernel, strides, padding, precision):
    random = np.random.default_rng(0)
    x, w = (random.normal(size=size).astype(np.float32) for size in (shape, kernel))
    how = {"strides": strides, "padding": padding, "precision": precision}
    dy = random.normal(size=direct(x, w, **how).shape).astype(np.float32)
    for ours, xla in zip(
        cpu_gradients(x, w, dy, **how), direct_gradients(x, w, dy, **how), strict=True
    ):
        np.testing.assert_allclose(ours, xla, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "option", [{"lhs_dilation": (2, 2)}, {"rhs_dilation": (2, 2)}, {"feature_group_count": 2}]
)
def test_a_convolution_with_options_is_left_alone(option):
    x, _, _ = draw((16, 8, 8, 128), 64)
    w = np.ones((3, 3, 128 // option.get("feature_group_count", 1), 64), np.float32)
    got = convolve(x, w, (1, 1), SAME, dimension_numbers=NHWC, **option)
    expected = jax.lax.conv_general_dilated(x, w, (1, 1), SAME, dimension_numbers=NHWC, **option)
    np.testing.assert_array_equal(got, expected)


# ----------------------------------------------------------------------------------- in the network


def plain_forms(monkeypatch, *, norms: bool = True) -> None:
    """The network in what flax has: what every platform would get if none needed anything else."""

    def group_norm(config: UNetConfig, dtype, name: str) -> nn.GroupNorm:
        options = {"epsilon": config.group_norm_epsilon, "use_fast_variance": False}
        return nn.GroupNorm(config.group_norm_groups, dtype=dtype, name=name, **options)

    monkeypatch.setattr(blocks, "convolve", None)  # flax's default
    for module in (blocks, unet) if norms else ():
        monkeypatch.setattr(module, "group_norm", group_norm)


def gradient_program(platform: str, dtype: str) -> str:
    """The network and its gradient as StableHLO for a platform, after MLIR's own clean-up."""
    model, x, t = (
        unet.UNet(dataclasses.replace(WIDE, dtype=dtype), 3),
        jnp.zeros((16, 16, 16, 3)),
        jnp.zeros(16, jnp.int32),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)
    loss = jax.jit(jax.value_and_grad(lambda params, x, t: jnp.sum(model.apply(params, x, t) ** 2)))
    text = loss.trace(params, x, t).lower(lowering_platforms=(platform,)).as_text()
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        return str(module)


def computed(program: str) -> str:
    """Return what a program computes, as a hash of its results' expressions.

    The order of its lines and the names of its values do not matter.

    Each line becomes itself with the names of values and functions replaced by what these are. A
    chain of additions is the set of its terms: a gradient that arrives on three ways may be (a + b)
    + c or a + (b + c).
    """
    bodies, lines, terms = {}, [], {}
    for line in program.splitlines():
        if found := re.search(r"func\.func .*@(\w+)\(", line):
            bodies[found[1]] = lines = []
        lines.append(line.strip())

    @functools.cache
    def result(function: str) -> str:
        values: dict[str, str] = {}
        for line in bodies[function][1:]:
            names, _, expression = (
                line.partition(" = ") if re.match(r"%\w+(:\d+)? = ", line) else ("", "", line)
            )
            expression = re.sub(r"%\w+", lambda found: values.get(found[0], found[0]), expression)
            expression = re.sub(r"@(\w+)", lambda found: result(found[1]), expression)
            summands: list[str] = []
            if found := re.fullmatch(r"stablehlo\.add (\S+), (\S+) : (.*)", expression):
                summands = sorted(
                    term for value in found.groups()[:2] for term in terms.get(value, [value])
                )
                expression = f"sum of {summands} : {found[3]}"
            digest = hashlib.sha256(expression.encode()).hexdigest()
            if summands:
                terms[digest] = summands
            if names:
                values[names.partition(":")[0]] = digest
            elif expression.startswith("return"):
                return digest
        raise AssertionError(f"{function} returns nothing")

    return result("main")


@pytest.mark.parametrize(
    "platform, dtype",
    [
        ("tpu", "bfloat16"),
        ("cuda", "float32"),
        ("cpu", "float32"),
        pytest.param("tpu", "float32", marks=pytest.mark.slow),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.slow),
        pytest.param("cpu", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gpu_and_tpu_programs_are_untouched(platform, dtype, monkeypatch):
    """The same operations on the same operands, and not one more; norms are another matter.

    Only sums of gradients may be added up in another order.
    """
    ours = gradient_program(platform, dtype)
    plain_forms(monkeypatch, norms=platform == "cpu")
    plain = gradient_program(platform, dtype)
    assert "stablehlo.convolution" in plain
    assert (computed(ours) == computed(plain)) is (platform != "cpu")
    if platform != "cpu":
        assert len(ours.splitlines()) == len(plain.splitlines())


def test_inside_a_loop_no_convolution_takes_the_slow_road():
    """XLA for CPUs runs only b01f_01io fast there.

    Its own gradients, laid out otherwise, take up to a hundred times as long.
    """
    model = unet.UNet(
        UNetConfig(base_channels=8, channel_mult=(1, 2), group_norm_groups=4, dropout=0.0), 1
    )
    x, t = jnp.zeros((3, 4, 8, 8, 1)), jnp.zeros((3, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x[0], t[0])

    def gradients(params, x, t):
        return jax.lax.map(
            lambda row: jax.grad(lambda params: jnp.sum(model.apply(params, *row) ** 2))(params),
            (x, t),
        )

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    text = jax.jit(gradients).lower(params, x, t).compile(compiler_options=options).as_text()
    layouts = re.findall(r" convolution\(.*dim_labels=([\w>-]+)", text)
    assert len(layouts) > 20 and set(layouts) == {"b01f_01io->b01f"}


def test_parameters_and_their_start_are_the_same(monkeypatch):
    def start() -> dict:
        x, t = jnp.zeros((16, 8, 8, 3)), jnp.zeros(16, jnp.int32)
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(unet.UNet(WIDE, 3).init, compiler_options=options)(jax.random.key(0), x, t)

    ours = start()
    plain_forms(monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, ours, start())


def test_the_network_computes_the_same_mapped_over_devices(monkeypatch):
    """pmap, custom_vjp and the choice of platform together: loss and gradient of every device."""
    model, key = unet.UNet(WIDE, 3), jax.random.key(1)
    x, t = jax.random.normal(key, (2, 16, 8, 8, 3)), jnp.arange(32).reshape(2, 16)
    params = jax.eval_shape(model.init, key, x[0], t[0])
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    params = jax.tree.unflatten(
        structure, [random.normal(0, 0.1, leaf.shape).astype(np.float32) for leaf in leaves]
    )
    devices = Devices(jax.devices()[:2])

    def gradient() -> dict:
        def on_one_device(params, batch):
            return jax.grad(lambda params: jnp.mean(model.apply(params, *batch) ** 2))(params)

        rows = jax.tree.map(lambda a: np.asarray(a).reshape(32, *a.shape[2:]), (x, t))
        return devices.map_batch(on_one_device)(devices.replicate(params), devices.place(rows))

    ours = gradient()
    plain_forms(monkeypatch)
    plain = gradient()
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    differs = False
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest)
        differs |= not np.array_equal(one, other)
    assert differs  # or both were the same program
