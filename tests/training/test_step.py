"""The training step.

It is the same on any number of devices, exact in its averages, unmoved by what is not finite.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.state import TrainState, ema_name, init_state
from ddpm_jax.training.step import build_held_out_loss, ema_decay, random_flips
from tests.support.steps import mapped_step, plain_step
from tests.support.tiny import images, tiny_config


def run(config: Config, devices: int, steps: int) -> tuple[TrainState, list[dict[str, float]]]:
    place = Devices(jax.devices()[:devices])
    state, step, rows = (
        place.replicate(init_state(config)),
        mapped_step(config, place),
        [],
    )
    for i in range(steps):
        state, metrics = step(state, place.place(batch(config, i)))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def batch(config: Config, step: int) -> dict[str, np.ndarray]:
    made = {"image": images(config, config.train.batch_size, step)}
    if config.model.num_classes:
        made["label"] = (
            np.arange(config.train.batch_size, dtype=np.int32) % config.model.num_classes
        )
    return made


@functools.lru_cache
def reference() -> tuple[TrainState, list[dict[str, float]]]:
    return run(tiny_config(), devices=1, steps=4)


@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
def test_every_device_count_computes_the_same_steps(devices):
    """Dropout, flips, noise and timesteps included.

    A gradient summed instead of averaged shows in its norm.
    """
    _, alone = reference()
    _, together = run(tiny_config(), devices, steps=4)
    for one, many in zip(alone, together, strict=True):
        assert one.keys() == many.keys()
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=2e-5, err_msg=name)


def test_importance_sampling_is_the_same_on_every_device_count():
    config = tiny_config(loss={"timestep_sampling": "importance"}, diffusion={"timesteps": 2})
    one, alone = run(config, 1, 6)
    many, together = run(config, 8, 6)
    # 96 draws of two timesteps: the history is full, and the draws follow it
    np.testing.assert_array_equal(one.loss_history.counts, [10, 10])
    np.testing.assert_allclose(many.loss_history.losses, one.loss_history.losses, rtol=2e-5)
    np.testing.assert_allclose([r["loss"] for r in together], [r["loss"] for r in alone], rtol=2e-5)


def test_accumulation_changes_nothing():
    _, whole = reference()
    _, parts = run(tiny_config(train={"accumulation": 4}), devices=2, steps=4)
    for one, many in zip(whole, parts, strict=True):
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=2e-5, err_msg=name)


def test_the_new_state_is_bit_equal_on_every_device():
    """pmap believes out_axes=None.

    A mean forgotten in the step would leave eight different states called one.
    """
    state, _ = run(tiny_config(), devices=8, steps=2)
    for leaf in jax.tree.leaves(state):
        assert leaf.is_fully_replicated
        first, *rest = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(rest) == 7
        for other in rest:
            np.testing.assert_array_equal(other, first)


def test_without_devices_the_step_is_a_plain_function():
    config = tiny_config()
    step = plain_step(config)
    state, metrics = step(init_state(config), batch(config, 0))
    state, metrics = step(state, batch(config, 1))
    np.testing.assert_allclose(metrics["loss"], reference()[1][1]["loss"], rtol=2e-5)
    assert int(state.step) == int(state.updates) == 2


def test_averages_follow_their_recurrence_exactly():
    """With a decay of many nines too, which six digits would round to 1: no update at all."""
    decays = (0.9, 0.99, 0.9999999)
    config = tiny_config(train={"ema_decays": decays})
    step, state = plain_step(config), init_state(config)
    expected = {
        decay: jax.tree.map(lambda p: np.asarray(p, np.float64), state.params) for decay in decays
    }
    start = state.params
    for i in range(4):
        state, _ = step(state, batch(config, i))
        for decay, tree in expected.items():
            expected[decay] = jax.tree.map(
                lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new, np.float64),
                tree,
                state.params,
            )
    for decay, tree in expected.items():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            state.ema[ema_name(decay)],
            tree,
        )
    slowest = jax.tree.map(np.array_equal, state.ema["0.9999999"], start)
    assert not all(jax.tree.leaves(slowest))


def test_the_name_of_an_average_reads_back_as_its_decay():
    rng = np.random.default_rng(0)
    decays = [0.9999999, 0.99999999, 1 - 2**-53, 0.1 + 0.2, 1e-7, *rng.random(200)]
    decays += [float(f"{decay:.3g}") for decay in decays if decay < 0.9]
    names = {ema_name(float(decay)): float(decay) for decay in decays}
    assert all(float(name) == decay for name, decay in names.items())
    assert len(names) == len(set(map(float, decays)))
    # What checkpoints hold already.
    held = {0.0: "0", 0.5: "0.5", 0.99: "0.99", 0.998: "0.998", 0.9999: "0.9999", 1e-5: "1e-05"}
    assert {decay: ema_name(decay) for decay in held} == held


def test_average_of_unchanged_weights_is_exactly_them():
    """The first update has learning rate 0: weights and averages must be bit-equal after it."""
    config = tiny_config()
    start = init_state(config)
    state, metrics = plain_step(config)(start, batch(config, 0))
    assert float(metrics["learning_rate"]) == 0
    for average in state.ema.values():
        jax.tree.map(np.testing.assert_array_equal, average, start.params)


def test_averages_start_as_copies_not_aliases():
    state = init_state(tiny_config())
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(buffers)) == len(buffers)


def test_ema_warmup_starts_near_a_plain_mean_and_ends_at_the_decay():
    assert float(ema_decay(0.999, jnp.array(0), True)) == pytest.approx(0.1)
    assert float(ema_decay(0.999, jnp.array(10**6), True)) == pytest.approx(0.999)
    assert ema_decay(0.999, jnp.array(0), False) == 0.999


def test_a_step_that_is_not_finite_changes_only_the_counters():
    config = tiny_config()
    step = plain_step(config)
    good, _ = step(init_state(config), batch(config, 0))
    poisoned = good.replace(params=jax.tree.map(lambda p: p * jnp.nan, good.params))
    bad, metrics = step(poisoned, batch(config, 1))
    bad, metrics = step(bad, batch(config, 2))
    assert float(metrics["skipped"]) == 1 and float(metrics["nonfinite_streak"]) == 2
    assert int(bad.step) == 3 and int(bad.updates) == 1
    jax.tree.map(np.testing.assert_array_equal, bad.opt_state, good.opt_state)
    jax.tree.map(np.testing.assert_array_equal, bad.ema, good.ema)
    healed, metrics = step(bad.replace(params=good.params), batch(config, 3))
    assert (
        float(metrics["skipped"]) == 0
        and int(healed.nonfinite_streak) == 0
        and int(healed.updates) == 2
    )


def test_learning_rate_warms_up_linearly_from_zero():
    rates = [row["learning_rate"] for row in reference()[1]]
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 1e-3], rtol=1e-6)


def test_the_gradient_is_clipped_after_its_norm_is_taken():
    """Adam's first moment holds a gradient of exactly the clip's norm.

    The clip is far below the gradient.
    """
    config = tiny_config(optimizer={"gradient_clip": 1e-3})
    state, metrics = plain_step(config)(init_state(config), batch(config, 0))
    assert float(metrics["gradient_norm"]) > 0.01
    moment = jax.tree.leaves(state.opt_state[1][0].mu)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in moment))
    assert norm == pytest.approx((1 - config.optimizer.beta1) * 1e-3, rel=1e-4)


def test_flips_mirror_half_the_images_and_others_at_the_next_step():
    x = jnp.arange(400 * 6, dtype=jnp.float32).reshape(400, 2, 3, 1)
    flipped = []
    for step in range(2):
        y = random_flips(jax.random.split(jax.random.key(step), 400), x)
        same, mirrored = (
            jnp.all(y == x, axis=(1, 2, 3)),
            jnp.all(y == x[:, :, ::-1], axis=(1, 2, 3)),
        )
        assert bool(jnp.all(same ^ mirrored))
        flipped.append(np.asarray(mirrored))
    assert all(150 < f.sum() < 250 for f in flipped)
    assert 100 < (flipped[0] ^ flipped[1]).sum() < 300


def test_one_batch_is_overfitted():
    config = tiny_config(
        model={"base_channels": 16, "dropout": 0.0},
        data={"flip": False},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 10},
    )
    step, state, same = plain_step(config), init_state(config), batch(config, 0)
    same["image"] = np.repeat(same["image"][:1], 16, axis=0)
    losses = []
    for _ in range(150):
        state, metrics = step(state, same)
        losses.append(float(metrics["mse"]))
    assert losses[0] == pytest.approx(1, abs=0.2) and np.mean(losses[-20:]) < 0.25


def test_hidden_labels_do_not_train_the_label_embedding():
    moved = {}
    for rate in (0.0, 1.0):
        config = tiny_config(
            model={"num_classes": 4, "label_dropout": rate}, optimizer={"warmup_steps": 0}
        )
        # the projections behind the embedding start near zero, and so does its gradient: it is the
        # first moment that tells
        state, _ = plain_step(config)(init_state(config), batch(config, 0))
        moved[rate] = float(jnp.abs(state.opt_state[1][0].mu["label_embedding"]).max())
    assert moved[0.0] > 0 and moved[1.0] == 0


@pytest.mark.parametrize(
    "kind, variance",
    [
        ("vlb", "learned_range"),
        pytest.param("vlb", "fixed_small", marks=pytest.mark.slow),
        pytest.param("hybrid", "learned_range", marks=pytest.mark.slow),
    ],
)
def test_other_losses_train(kind, variance):
    config = tiny_config(loss={"kind": kind}, diffusion={"variance": variance})
    _, rows = run(config, devices=2, steps=3)
    assert all(
        np.isfinite(row["loss"]) and row["gradient_norm"] > 0 and row["vlb"] > 0 for row in rows
    )


def test_held_out_loss_depends_on_the_image_alone():
    config = tiny_config()
    params, loss = init_state(config).params, jax.jit(build_held_out_loss(config))
    rows = {"image": images(config, 8), "index": np.arange(8, dtype=np.int32)}
    whole = loss(params, rows)
    parts = [loss(params, jax.tree.map(lambda x, s=s: x[s : s + 2], rows)) for s in range(0, 8, 2)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5)
    elsewhere = loss(params, rows | {"index": rows["index"] + 8})
    assert np.abs(elsewhere - whole).max() > 1e-3
