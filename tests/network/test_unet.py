from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import UNetConfig
from ddpm_jax.errors import ConfigError
from ddpm_jax.network import blocks, unet
from ddpm_jax.network.blocks import AttentionBlock, ResidualBlock
from ddpm_jax.network.unet import UNet
from tests.support import unet_reference
from tests.support.programs import precisions

TINY = UNetConfig(
    base_channels=8,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_resolutions=(4,),
    group_norm_groups=4,
    dropout=0.0,
)
SMALLEST = dataclasses.replace(TINY, attention_resolutions=())
FLAT = dataclasses.replace(SMALLEST, channel_mult=(1,))
IMPROVED_DDPM = UNetConfig(
    blocks_per_level=3,
    attention_resolutions=(16, 8),
    heads=4,
    conditioning="scale_shift",
    qkv_layout="fused_by_head",
    embedding_order="cos_sin",
    embedding_denominator="half",
    group_norm_epsilon=1e-5,
    down_padding="symmetric",
)


def shapes_of(config, size=8, channels=3, out_channels=3):
    x, t = jnp.zeros((1, size, size, channels)), jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(UNet(config, out_channels).init, jax.random.key(0), x, t)["params"]


def random_params(config, seed=0, **kwargs):
    """Every parameter random, those that start near zero included.

    What enters norm2 is kept at a variance of about 1e-4, so that the epsilon of GroupNorm is felt.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = rng.standard_normal(leaf.shape)
        if name.endswith("kernel"):
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif name.endswith("scale"):
            values = 1 + 0.2 * values
        else:
            values *= 0.3
        quiet = "conv1" in name or ("temb_proj" in name and config.conditioning == "add")
        return np.float32(values * (0.01 if quiet else 1))

    return jax.tree_util.tree_map_with_path(fill, shapes_of(config, **kwargs))


@functools.cache
def tiny_params():
    return random_params(TINY)


def quick_jit(function, **kwargs):
    """These programs run once or twice: compile them in half the time, to run at half the speed."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options, **kwargs)


def images(count, height=8, width=8, channels=3, seed=1):
    return (
        np.random.default_rng(seed)
        .uniform(-1, 1, (count, height, width, channels))
        .astype(np.float32)
    )


def run(config, params, x, t, labels=None, out_channels=3):
    return np.asarray(quick_jit(UNet(config, out_channels).apply)({"params": params}, x, t, labels))


def reference(config, params, x, t, labels=None, **kwargs):
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return unet_reference.unet(wide, x, t, config, labels, **kwargs)


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# ------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize(
    "config, size, out_channels, expected",
    [
        (UNetConfig(), 32, 3, 35_746_307),
        (UNetConfig(), 32, 6, 35_749_766),
        (UNetConfig(channel_mult=(1, 2, 2, 2, 4)), 64, 3, 78_700_803),
        (UNetConfig(channel_mult=(1, 1, 2, 2, 4, 4)), 256, 3, 113_673_219),
        (IMPROVED_DDPM, 32, 6, 52_546_438),
    ],
    ids=["cifar10", "cifar10 learned variance", "celeba 64", "256", "improved ddpm"],
)
def test_parameter_counts_are_the_published_ones(config, size, out_channels, expected):
    shapes = shapes_of(config, size, out_channels=out_channels)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_parameter_names_are_a_file_format():
    shapes = shapes_of(dataclasses.replace(TINY, num_classes=5))
    block = {"norm1", "conv1", "temb_proj", "norm2", "conv2"}
    modules = {
        "time_embedding_0",
        "time_embedding_1",
        "label_embedding",
        "conv_in",
        "norm_out",
        "conv_out",
    }
    modules |= {"down_0_block_0", "down_0_downsample", "down_1_block_0", "down_1_attn_0"}
    modules |= {"mid_block_1", "mid_attn", "mid_block_2"}
    modules |= {"up_1_block_0", "up_1_attn_0", "up_1_block_1", "up_1_attn_1", "up_1_upsample"}
    modules |= {"up_0_block_0", "up_0_block_1"}
    assert set(shapes) == modules
    assert set(shapes["down_0_block_0"]) == block
    assert set(shapes["down_1_block_0"]) == block | {"shortcut"}
    assert set(shapes["mid_attn"]) == {"norm", "q", "k", "v", "proj_out"}
    assert shapes["mid_attn"]["q"]["kernel"].shape == (16, 16)
    assert shapes["down_1_block_0"]["shortcut"]["kernel"].shape == (8, 16)
    assert shapes["conv_in"]["kernel"].shape == (3, 3, 3, 8)


# Each switch away from its default: the network must agree with the reference, and disagree with it
# at the default.
SWITCHES = {
    "default": {},
    "symmetric padding": {"down_padding": "symmetric"},
    "epsilon": {"group_norm_epsilon": 1e-5},
    "groups": {"group_norm_groups": 2},
    "cos first": {"embedding_order": "cos_sin"},
    "interleaved": {"embedding_order": "interleaved"},
    "denominator": {"embedding_denominator": "half"},
    "timestep scale": {"timestep_scale": 0.25},
    "heads": {"heads": 2},
    "head channels": {"head_channels": 4},
    "attention a level": {"attention_placement": "level"},
    "attention resolutions": {"attention_resolutions": ()},
    "no attention in mid": {"attention_in_mid": False},
    "skip scale": {"skip_scale": 0.5**0.5},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_matches_the_reference_and_matters(switch):
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    params, x, t = (
        tiny_params(),
        images(2),
        np.array([3, 50]),
    )  # parameters for all of these: some leave a few unused
    output = run(config, params, x, t)
    assert distance(output, reference(config, params, x, t)) <= 1e-5
    if SWITCHES[switch]:
        assert distance(output, reference(TINY, params, x, t)) > 1e-3


def test_skips_are_concatenated_after_h():
    params, x, t = random_params(SMALLEST), images(2), np.array([3, 50])
    output = run(SMALLEST, params, x, t)
    assert distance(output, reference(SMALLEST, params, x, t)) <= 1e-5
    assert distance(output, reference(SMALLEST, params, x, t, skip_first=True)) > 1e-3


def test_scale_shift_comes_after_the_second_norm():
    config = dataclasses.replace(SMALLEST, conditioning="scale_shift")
    params, x, t = random_params(config), images(2), np.array([3, 50])
    output = run(config, params, x, t)
    assert distance(output, reference(config, params, x, t)) <= 1e-5

    def halves(first):  # each half of the projections, fed to the additive form
        def cut(path, leaf):
            half = slice(None, leaf.shape[-1] // 2) if first else slice(leaf.shape[-1] // 2, None)
            return leaf[..., half] if "temb_proj" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(cut, params)

    for first in (True, False):
        assert distance(output, reference(SMALLEST, halves(first), x, t)) > 1e-3


@pytest.mark.parametrize("resampling", ["pool", "residual"])
def test_resampling_matches_the_reference(resampling):
    config = dataclasses.replace(SMALLEST, resampling=resampling)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    assert (
        ("down_0_downsample" in params) == ("up_1_upsample" in params) == (resampling == "residual")
    )
    assert distance(run(config, params, x, t), reference(config, params, x, t)) <= 1e-5


@pytest.mark.parametrize("layout, other", [("fused", "fused_by_head"), ("fused_by_head", "fused")])
def test_fused_qkv_matches_the_reference_and_the_layouts_differ(layout, other):
    config = dataclasses.replace(SMALLEST, qkv_layout=layout, heads=2)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    output = run(config, params, x, t)
    assert distance(output, reference(config, params, x, t)) <= 1e-5
    assert (
        distance(output, reference(dataclasses.replace(config, qkv_layout=other), params, x, t))
        > 1e-3
    )


def test_qkv_layouts_are_rearrangements_of_one_function():
    heads, c = 4, 16
    x = images(2, 4, 4, c)
    config = dataclasses.replace(TINY, heads=heads)
    params = random_params(config)["mid_attn"]
    expected = AttentionBlock(config).apply({"params": params}, x)

    def fuse(leaf, by_head):
        parts = [params[name][leaf].reshape(-1, heads, c // heads) for name in "qkv"]
        return np.stack(parts, axis=2 if by_head else 1).reshape(
            params["q"][leaf].shape[:-1] + (3 * c,)
        )

    for layout in ("fused", "fused_by_head"):
        kept = {name: params[name] for name in ("norm", "proj_out")}
        fused = kept | {
            "qkv": {leaf: fuse(leaf, layout == "fused_by_head") for leaf in ("kernel", "bias")}
        }
        block = AttentionBlock(dataclasses.replace(config, qkv_layout=layout))
        np.testing.assert_allclose(
            block.apply({"params": fused}, x), expected, rtol=1e-5, atol=1e-5
        )


def test_odd_details_match_the_reference():
    """One grey channel, an odd width, three groups, two blocks a level.

    And an oblong image and fractional timesteps.
    """
    config = UNetConfig(
        base_channels=9,
        channel_mult=(1, 2),
        blocks_per_level=2,
        attention_resolutions=(8,),
        group_norm_groups=3,
        embedding_order="interleaved",
        dropout=0.0,
    )
    params = random_params(config, channels=1, out_channels=2)
    x, t = images(2, 8, 4, 1), np.array([3.5, 50.25], np.float32)
    output = run(config, params, x, t, out_channels=2)
    assert output.shape == (2, 8, 4, 2) and output.dtype == np.float32
    assert distance(output, reference(config, params, x, t)) <= 1e-5


def test_timestep_embedding_spans_frequencies_1_to_1e_4():
    config = UNetConfig(base_channels=64)
    t = np.array([0, 1, 999])
    first = np.asarray(unet.timestep_embedding(t, config))
    assert first.dtype == np.float32 and first.shape == (3, 64)
    np.testing.assert_array_equal(first[0], [0.0] * 32 + [1.0] * 32)
    ends = [np.sin(999), np.sin(0.0999), np.cos(999), np.cos(0.0999)]
    np.testing.assert_allclose(first[2, [0, 31, 32, 63]], ends, atol=1e-6)
    # With denominator half, one more frequency would be needed to reach 1e-4: they stop at
    # 10000^(-31/32).
    second = unet.timestep_embedding(t, dataclasses.replace(config, embedding_denominator="half"))
    np.testing.assert_allclose(second[2, 31], np.sin(999 * 1e-4 ** (31 / 32)), atol=1e-6)
    exact = [unet_reference.sinusoids(float(time), config) for time in range(1000)]
    np.testing.assert_allclose(unet.timestep_embedding(np.arange(1000), config), exact, atol=1e-4)


# ---------------------------------------------------------------------------------------- the start


def test_output_is_near_zero_at_the_start():
    x, t = images(2), np.array([0, 999])
    params = quick_jit(UNet(FLAT, 3).init)(jax.random.key(0, impl="rbg"), x, t)["params"]
    output = run(FLAT, params, x, t)
    assert 0 < np.abs(output).max() < 1e-3
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert all(not np.any(leaf) for path, leaf in leaves if path[-1].key == "bias")


def test_blocks_are_the_identity_at_the_start():
    x, condition = images(2, channels=8), np.ones((2, 32), np.float32)
    for block, arguments in (
        (ResidualBlock(TINY, 8), (x, condition, None)),
        (AttentionBlock(TINY), (x,)),
    ):
        output = block.apply(block.init(jax.random.key(0, impl="rbg"), *arguments), *arguments)
        np.testing.assert_allclose(output, x, atol=1e-3)
        assert np.any(np.asarray(output) != x)


def test_kernels_are_uniform_with_variance_one_over_mean_fan():
    block = ResidualBlock(dataclasses.replace(TINY, base_channels=64), 128)
    x, condition = images(1, channels=64), np.zeros((1, 256), np.float32)
    params = block.init(jax.random.key(0, impl="rbg"), x, condition, None)["params"]
    for name, fan in (
        ("conv1", 9 * (64 + 128) / 2),
        ("temb_proj", (256 + 128) / 2),
        ("conv2", 9 * 128 * 1e10),
    ):
        kernel = np.asarray(params[name]["kernel"])
        np.testing.assert_allclose(kernel.var(), 1 / fan, rtol=0.05)
        np.testing.assert_allclose(np.abs(kernel).max(), np.sqrt(3 / fan), rtol=0.01)


def test_every_parameter_has_a_gradient():
    config = dataclasses.replace(TINY, num_classes=3)
    params, x, t, labels = random_params(config), images(2), np.array([3, 50]), np.array([0, 2])
    gradient = quick_jit(
        jax.grad(
            lambda params: jnp.sum(UNet(config, 3).apply({"params": params}, x, t, labels) ** 2)
        )
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient(params))):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("k/bias"):  # softmax does not see a shift common to all keys
            assert np.abs(leaf).max() < 1e-3, name
        elif name == "label_embedding":
            assert np.all(np.any(leaf != 0, axis=1) == [True, False, True])
        else:
            assert np.abs(leaf).max() > 1e-3, name


# ------------------------------------------------------------------------------------------ dropout

drop = quick_jit(blocks.dropout, static_argnames="rate")


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_stated_fraction_and_the_mean(rate):
    shape = (16, 32, 32, 16)
    output = np.asarray(drop(jax.random.key(0), jnp.ones(shape), rate, jnp.arange(16)))
    kept = output != 0
    sigma = np.sqrt(rate * (1 - rate) / kept.size)
    np.testing.assert_allclose(kept.mean(), 1 - rate, atol=5 * sigma)
    np.testing.assert_allclose(output.mean(), 1, atol=5 * sigma / (1 - rate))
    np.testing.assert_allclose(output[kept], 1 / (1 - rate), rtol=1e-4)


def test_dropout_decisions_are_independent():
    """Correlations are within Monte-Carlo error.

    They are those across the halves of a word, neighbours, examples and keys.
    """
    n, x = 64, jnp.ones((64, 32, 32, 8))
    first, second = (
        np.asarray(drop(jax.random.key(k), x, 0.5, jnp.arange(n))) - 1 for k in range(2)
    )
    pairs = {
        "halves": (first[:, :16], first[:, 16:]),
        "rows": (first[:, 1:], first[:, :-1]),
        "columns": (first[:, :, 1:], first[:, :, :-1]),
        "channels": (first[..., 1:], first[..., :-1]),
        "examples": (first[1:], first[:-1]),
        "keys": (first, second),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size), name


def test_dropout_of_odd_heights_and_extreme_rates():
    for height in (1, 5):
        output = drop(jax.random.key(0), jnp.ones((2, height, 3, 5)), 0.5, jnp.arange(2))
        assert set(np.unique(output)) == {0.0, 2.0}
    almost_all = drop(jax.random.key(0), jnp.ones((1, 64, 64, 4)), 1 - 1e-9, jnp.arange(1))
    assert np.all(np.isfinite(almost_all)) and np.mean(almost_all != 0) < 0.01
    assert (
        drop(jax.random.key(0), jnp.ones((1, 2, 2, 2), jnp.bfloat16), 0.1, jnp.arange(1)).dtype
        == jnp.bfloat16
    )


def test_dropout_masks_are_the_same_on_one_and_eight_devices():
    x, key, examples = jnp.ones((16, 4, 4, 6)), jax.random.key(7), jnp.arange(100, 116)
    whole = drop(key, x, 0.4, examples)
    mapped = jax.pmap(lambda x, examples: blocks.dropout(key, x, 0.4, examples))
    parts = mapped(x.reshape(8, 2, 4, 4, 6), examples.reshape(8, 2))
    np.testing.assert_array_equal(np.asarray(parts).reshape(x.shape), whole)
    assert not np.array_equal(whole, drop(key, x, 0.4, examples + 16))


def test_network_dropout_does_not_depend_on_how_the_batch_is_cut():
    config = dataclasses.replace(FLAT, dropout=0.3)
    params, x, t, key = random_params(config), images(8), np.arange(8), jax.random.key(5)
    apply = quick_jit(
        lambda x, t, examples, key: UNet(config, 3).apply(
            {"params": params}, x, t, train=True, examples=examples, rngs={"dropout": key}
        )
    )
    examples = np.arange(8, dtype=np.int32) + 24
    whole = apply(x, t, examples, key)
    parts = [apply(x[i : i + 1], t[i : i + 1], examples[i : i + 1], key) for i in range(8)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-5)
    assert distance(apply(x, t, examples - 24, key), whole) > 1e-2
    assert distance(apply(x, t, examples, jax.random.key(6)), whole) > 1e-2


def test_dropout_keys_differ_in_every_block_and_it_is_off_outside_training(monkeypatch):
    config = dataclasses.replace(FLAT, dropout=0.3)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    keys = []

    def record(key, x, rate, examples):
        assert rate == 0.3 and np.array_equal(examples, [4, 9])
        keys.append(jax.random.key_data(key).tobytes())
        return x

    monkeypatch.setattr(blocks, "dropout", record)
    rngs, examples = {"dropout": jax.random.key(0)}, np.array([4, 9])
    quiet = UNet(config, 3).apply({"params": params}, x, t, rngs=rngs, examples=examples)
    assert keys == []
    trained = UNet(config, 3).apply(
        {"params": params}, x, t, train=True, rngs=rngs, examples=examples
    )
    assert len(keys) == len(set(keys)) == sum("block" in name for name in params)
    np.testing.assert_array_equal(
        quiet, trained
    )  # with the masks taken away, training and sampling are one function


@pytest.mark.parametrize("resampling", ["conv", "residual"])
def test_keys_derived_at_once_are_those_that_each_block_would_ask_for(resampling, monkeypatch):
    config = dataclasses.replace(TINY, dropout=0.3, resampling=resampling)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    seen = []

    def record(key, x, rate, examples):
        seen.append(jax.random.key_data(key).tobytes())
        return x

    monkeypatch.setattr(blocks, "dropout", record)
    for derive in (unet.dropout_keys, lambda rng, names: {}):
        monkeypatch.setattr(unet, "dropout_keys", derive)
        rngs = {"dropout": jax.random.key(0)}
        UNet(config, 3).apply(
            {"params": params}, x, t, train=True, rngs=rngs, examples=np.arange(2)
        )
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert len(seen) == 2 * len(unet.block_names(config))


def test_parameters_cast_beforehand_give_the_same_output():
    config = dataclasses.replace(TINY, dtype="bfloat16", num_classes=3)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    apply = quick_jit(lambda params: UNet(config, 3).apply({"params": params}, x, t, np.arange(2)))
    cast = unet.cast_params(params, config)
    assert cast["down_0_block_0"]["conv1"]["kernel"].dtype == jnp.bfloat16
    assert cast["conv_in"]["kernel"].dtype == cast["label_embedding"].dtype == np.float32
    np.testing.assert_array_equal(apply(cast), apply(params))


def test_dropout_sits_between_the_activation_and_the_last_convolution(monkeypatch):
    """With everything dropped, a block is its shortcut plus the bias of conv2."""
    monkeypatch.setattr(blocks, "dropout", lambda key, x, rate, examples: jnp.zeros_like(x))
    params = random_params(TINY)["mid_block_1"]
    x, condition = images(2, 4, 4, 16), np.ones((2, 32), np.float32)
    block = ResidualBlock(TINY, 16, dropout_rate=0.5)
    output = block.apply(
        {"params": params}, x, condition, None, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_allclose(output, x + params["conv2"]["bias"][None, None, None, :], atol=1e-6)


# ---------------------------------------------------------------------------------------- precision


def test_bfloat16_is_close_and_parameters_stay_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", conditioning="scale_shift")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(config)))
    params, x, t = random_params(config), images(2), np.array([3, 50])
    output, exact = (
        run(config, params, x, t),
        run(dataclasses.replace(config, dtype="float32"), params, x, t),
    )
    assert output.dtype == np.float32
    assert 1e-4 < distance(output, exact) < 0.1


def test_bfloat16_trains_where_a_head_has_one_channel():
    """XLA for CPUs would end the process; the gradients are near those of float32."""
    config = dataclasses.replace(FLAT, base_channels=4, heads=4)
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 3)), jnp.arange(4)
    params = random_params(config)

    def gradient(dtype):
        model = UNet(dataclasses.replace(config, dtype=dtype), 3)
        slope = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, x, t)).mean()))
        return np.asarray(slope(params)["mid_attn"]["v"]["kernel"])

    exact = gradient("float32")
    assert np.linalg.norm(gradient("bfloat16") - exact) < 0.1 * np.linalg.norm(exact) != 0


def test_bfloat16_is_where_the_work_is_and_nowhere_else():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params, x, t = random_params(config), images(2), np.array([3, 50])
    traced = jax.make_jaxpr(UNet(config, 3).apply)({"params": params}, x, t)
    program, found = str(traced), {}
    for dtype, primitive in re.findall(r":(\w+)\[[^\]]*\] = (\w+)", program):
        found.setdefault(primitive, []).append(dtype)
    for primitive in ("exp", "rsqrt", "sin", "cos", "reduce_sum", "reduce_max"):
        assert set(found[primitive]) == {"f32"}, primitive  # softmax, GroupNorm, time embedding
    convolutions = found["conv_general_dilated"]
    assert convolutions[0] == convolutions[-1] == "f32"  # the two ends, where the image is
    assert set(convolutions[1:-1]) == {"bf16"}
    assert (
        len(convolutions) == 2 + 2 * sum("block" in name for name in params) + 2
    )  # ends, blocks, down and up
    of_image, *_ = precisions(traced.jaxpr, "conv_general_dilated")
    assert of_image == (jax.lax.Precision.HIGH,) * 2  # a TPU would round the pixels to bfloat16


def test_bfloat16_sees_the_whole_precision_of_the_pixels():
    """A step of 2^-10, an eighth of a grey level, which bfloat16 pixels near 1 would not show."""
    config = dataclasses.replace(FLAT, dtype="bfloat16")
    params, t = random_params(config), np.array([3, 50])
    x = np.full((2, 8, 8, 3), 0.75, np.float32)
    x[1] += 2.0**-10

    def first_layer(module, _):
        return module.name == "conv_in"

    record = {"capture_intermediates": first_layer, "mutable": "intermediates"}
    _, state = UNet(config, 3).apply({"params": params}, x, t, **record)
    output = np.asarray(state["intermediates"]["conv_in"]["__call__"][0])[:, 4, 4]
    expected = params["conv_in"]["kernel"].sum((0, 1, 2)) * 2.0**-10
    np.testing.assert_allclose(output[1] - output[0], expected, atol=1e-6)


def test_group_norm_statistics_are_float32_and_two_pass():
    rng = np.random.default_rng(0)

    class Norm(unet.nn.Module):
        dtype: str

        @unet.nn.compact
        def __call__(self, x):
            return blocks.group_norm(TINY, jnp.dtype(self.dtype), "norm")(x)

    def expected(x):
        groups = np.asarray(x, np.float64).reshape(2, 64, 4, 2)
        centred = groups - groups.mean((1, 3), keepdims=True)
        return (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True))).reshape(2, 8, 8, 8)

    far = (4096 + 0.1 * rng.standard_normal((2, 8, 8, 8))).astype(
        np.float32
    )  # x^2 = 1.7e7, of which float32 keeps +-1
    output, _ = Norm("float32").init_with_output(jax.random.key(0), far)
    np.testing.assert_allclose(output, expected(far), atol=1e-2)
    steps = jnp.asarray(
        300 + 2 * rng.integers(0, 4, (2, 8, 8, 8)), jnp.bfloat16
    )  # exact, as their mean would not be
    output, _ = Norm("bfloat16").init_with_output(jax.random.key(0), steps)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(output, np.float32), expected(steps), atol=1e-2)


def test_a_large_mean_does_not_drown_the_network():
    params, x, t = random_params(SMALLEST), images(2), np.array([3, 50])
    params["conv_in"]["bias"] = params["conv_in"]["bias"] + np.float32(2048)
    # Every block's sum is rounded to 2^-13 of a unit: the reference is met to about that; fast
    # variance is off by 1.
    assert distance(run(SMALLEST, params, x, t), reference(SMALLEST, params, x, t)) < 1e-2


def test_remat_changes_memory_only():
    config = dataclasses.replace(FLAT, dropout=0.3)
    params, x, t = random_params(config), images(2), np.array([3, 50])
    results, programs = [], []
    for remat in (False, True):
        model = UNet(dataclasses.replace(config, remat=remat), 3)

        def loss(params, model=model):
            rngs = {"dropout": jax.random.key(2)}
            output = model.apply(
                {"params": params}, x, t, train=True, examples=np.arange(2), rngs=rngs
            )
            return jnp.sum(output**2), output

        gradient = jax.grad(loss, has_aux=True)
        results.append(quick_jit(gradient)(params))
        programs.append(str(jax.make_jaxpr(gradient)(params)))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), *results
    )
    work = [program.count("conv_general_dilated") for program in programs]
    assert "remat" not in programs[0] and "remat" in programs[1] and work[1] > work[0]


# -------------------------------------------------------------------------------- labels and errors


def test_labels():
    config = dataclasses.replace(FLAT, num_classes=4)
    params, x, t = random_params(config), images(3), np.array([3, 50, 7])
    plain = run(config, params, x, t)
    unconditional = {name: leaf for name, leaf in params.items() if name != "label_embedding"}
    assert distance(plain, reference(FLAT, unconditional, x, t)) <= 1e-5
    np.testing.assert_array_equal(run(config, params, x, t, np.array([4, 4, 4])), plain)
    labels = np.array([0, 4, 3])
    output = run(config, params, x, t, labels)
    assert distance(output, reference(config, params, x, t, labels)) <= 1e-5
    changed = np.abs(output - plain).max((1, 2, 3)) / np.abs(plain).max()
    assert changed[0] > 1e-3 and changed[1] == 0 and changed[2] > 1e-3
    nonsense = run(config, params, x, t, np.array([-1, 0, 5]))
    np.testing.assert_array_equal(np.isnan(nonsense).any((1, 2, 3)), [True, False, True])


@pytest.mark.parametrize(
    "switches, x, t, kwargs, message",
    [
        (
            {},
            (2, 9, 8, 3),
            (2,),
            {},
            "x is 9x8 pixels: both sides must be divisible by 2, for the 2 levels",
        ),
        ({}, (8, 8, 3), (8,), {}, "x has shape (8, 8, 3): it must be a batch"),
        ({}, (2, 8, 8, 3), (), {}, "t has shape (): it must be (2,)"),
        ({}, (2, 8, 8, 3), (2,), {"labels": np.zeros(2, np.int32)}, "config.model.num_classes=0"),
        (
            {"num_classes": 2},
            (2, 8, 8, 3),
            (2,),
            {"labels": np.zeros(1, np.int32)},
            "labels has shape (1,)",
        ),
        ({"base_channels": 2, "group_norm_groups": 1}, (2, 8, 8, 3), (2,), {}, "needs at least 4"),
        ({"dropout": 0.1}, (2, 8, 8, 3), (2,), {"train": True}, "needs examples"),
        (
            {"dropout": 0.1},
            (2, 8, 8, 3),
            (2,),
            {"train": True, "examples": np.arange(2)},
            'rngs={"dropout": key}',
        ),
    ],
)
def test_errors_are_one_line_that_names_the_remedy(switches, x, t, kwargs, message):
    config = dataclasses.replace(SMALLEST, **switches)
    with pytest.raises(ValueError) as error:
        UNet(config, 3).init(jax.random.key(0), jnp.zeros(x), jnp.zeros(t, jnp.int32), **kwargs)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError) == (not kwargs.get("train", False))
