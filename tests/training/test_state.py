"""The optimizer: its learning rate at every update, AdamW's decay, and what it is without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.config import OptimizerConfig
from ddpm_jax.errors import ConfigError
from ddpm_jax.training import step as step_module
from ddpm_jax.training.state import (
    abstract_state,
    build_optimizer,
    init_state,
    learning_rate_schedule,
)
from ddpm_jax.training.step import build_train_step
from tests.support.steps import plain_step
from tests.support.tiny import images, tiny_config

RATE, STEPS = 3e-3, 40


def rates(schedule: str, warmup: int, final: float, steps: int, n: np.ndarray) -> np.ndarray:
    """The learning rate in float64, by interpolation between the points where it bends."""
    rise = np.interp(n, [0, warmup], [0, 1]) if warmup else np.ones(len(n))
    gone = np.interp(n, [warmup, steps], [0, 1])
    left = {"constant": 1, "linear": 1 - gone, "cosine": np.cos(np.pi / 2 * gone) ** 2}[schedule]
    return RATE * rise * (final + (1 - final) * left)


@pytest.mark.parametrize("schedule, final", [("constant", 0.0), ("linear", 0.1), ("cosine", 0.25)])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_learning_rate_is_right_at_every_update(schedule, final, warmup):
    options = {"schedule": schedule, "final_fraction": final, "warmup_steps": warmup}
    config = OptimizerConfig(learning_rate=RATE, **options)
    n = np.arange(STEPS + 10)  # it stays where it ended
    got = jax.vmap(learning_rate_schedule(config, STEPS))(jnp.arange(STEPS + 10))
    want = rates(schedule, warmup, 1.0 if schedule == "constant" else final, STEPS, n)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1e-8, 0.1])
def test_adamw_is_adam_and_a_decay_of_its_own(epsilon):
    """Written out in float64: the decay sees the parameter, not the gradient, its clip or its moments."""
    options = {"beta1": 0.8, "beta2": 0.9, "warmup_steps": 2, "schedule": "linear"}
    options["epsilon"] = epsilon
    config = OptimizerConfig(learning_rate=RATE, weight_decay=0.3, **options)
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape), start) for _ in range(8)]

    optimizer = build_optimizer(config, 8)
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for gradient in gradients:
        update, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, update)

    p = np.concatenate([start["kernel"].ravel(), start["bias"]])
    m = v = np.zeros(8)
    for n, gradient in enumerate(gradients):
        g = np.concatenate([gradient["kernel"].ravel(), gradient["bias"]])
        g = g / max(1, np.sqrt(g @ g) / config.gradient_clip)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        adam = m / (1 - 0.8 ** (n + 1)) / (np.sqrt(v / (1 - 0.9 ** (n + 1))) + epsilon)
        (rate,) = rates("linear", 2, 0.0, 8, np.array([n]))
        p = (1 - rate * 0.3) * p - rate * adam
    got = np.concatenate([params["kernel"].ravel(), params["bias"]])
    np.testing.assert_allclose(got, p, rtol=2e-6)


def test_the_published_rate_is_the_one_that_was_applied():
    """Update n of the step itself: the length of the update over that of Adam's direction."""
    options = {"learning_rate": RATE, "warmup_steps": 2, "schedule": "cosine"}
    config = tiny_config(optimizer=options | {"final_fraction": 0.5})
    step, state = plain_step(config), init_state(config)
    batch = {"image": jnp.asarray(images(config, config.train.batch_size))}
    want = rates("cosine", 2, 0.5, config.train.steps, np.arange(config.train.steps))
    for n in range(config.train.steps):
        state, metrics = step(state, batch)
        assert float(metrics["learning_rate"]) == pytest.approx(want[n], rel=1e-5)
        adam = state.opt_state[1][0]
        direction = jax.tree.map(
            lambda m, v, n=n: (
                m / (1 - 0.9 ** (n + 1)) / (jnp.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
            ),
            adam.mu,
            adam.nu,
        )
        length = float(optax.tree.norm(direction))
        assert float(metrics["update_norm"]) == pytest.approx(want[n] * length, rel=1e-4)


@pytest.mark.parametrize("warmup, clip", [(2, 1.0), (0, 0.0)])
def test_without_schedule_and_decay_the_program_is_the_one_it_was(monkeypatch, warmup, clip):
    """The lowered step, text for text, against the optimizer as it was before these options."""
    config = tiny_config(optimizer={"warmup_steps": warmup, "gradient_clip": clip})

    def lowered() -> str:
        batch = {"image": jnp.asarray(images(config, config.train.batch_size))}
        return jax.jit(build_train_step(config)).lower(abstract_state(config), batch).as_text()

    now, options = lowered(), config.optimizer
    rate = optax.constant_schedule(options.learning_rate)
    if warmup:
        rate = optax.linear_schedule(0.0, options.learning_rate, warmup)
    first = optax.clip_by_global_norm(clip) if clip else optax.identity()
    then = optax.chain(first, optax.adam(rate, options.beta1, options.beta2, options.epsilon))
    monkeypatch.setattr(step_module, "build_optimizer", lambda config, steps: then)
    monkeypatch.setattr(step_module, "learning_rate_schedule", lambda config, steps: rate)
    assert lowered() == now
    structure = jax.tree.structure(then.init({"kernel": jnp.zeros(2)}))
    mine = build_optimizer(options, 6).init({"kernel": jnp.zeros(2)})
    assert jax.tree.structure(mine) == structure


@pytest.mark.parametrize(
    "options, said",
    [
        ({"schedule": "linear", "warmup_steps": 6}, "optimizer.schedule=linear: decays between"),
        ({"final_fraction": 0.1}, "optimizer.final_fraction=0.1: is where"),
        ({"schedule": "cosine", "final_fraction": 2.0}, "final_fraction=2.0: must be in"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0: must be at least 0"),
    ],
)
def test_schedules_that_say_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(optimizer=options)
