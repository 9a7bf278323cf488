"""The training step against Algorithm 1 written out here, number for number.

The random streams are derived by hand, everything but the network's own arithmetic is float64
NumPy: the noised images, the weights of importance sampling and its history, the clip of the
gradient, Adam, its warm-up and the averages. Of the code under test only the network's apply is
used, under a formula of the loss that stands here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.build import build_model, init_params
from ddpm_jax.config import Config
from ddpm_jax.diffusion.timesteps import LossHistory
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.state import TrainState, init_state
from ddpm_jax.training.step import random_flips
from tests.support.steps import mapped_step
from tests.support.tiny import images, tiny_config

# The numbers of the streams are part of every run's identity.
TIMESTEPS, NOISE, FLIPS, DROPOUT, HIDDEN_LABELS = 1, 2, 3, 4, 5
FIRST_STEP, STEPS = 7, 3
BATCH = {"batch_size": 8}

# Every part of the step is on in one of the two, off or otherwise in the other.
CASES = {
    # With classes, flips, a clip, and warm-up of the averages, in two microbatches.
    "importance": (
        1,
        5,
        tiny_config(
            model={"num_classes": 3, "label_dropout": 0.4, "attention_in_mid": False},
            diffusion={"timesteps": 5, "beta_end": 0.3},
            loss={"timestep_sampling": "importance"},
            optimizer={
                "learning_rate": 0.02,
                "warmup_steps": 2,
                "epsilon": 1e-3,
                "gradient_clip": 0.3,
            },
            train=BATCH | {"accumulation": 2, "ema_warmup": True, "ema_decays": (0.2, 0.9)},
        ),
    ),
    # Of v, by min_snr, without flips and clip, on two devices.
    "uniform": (
        2,
        2**31 + 3,
        tiny_config(
            data={"flip": False},
            diffusion={"prediction": "v"},
            loss={"weighting": "min_snr", "min_snr_gamma": 2.0},
            optimizer={
                "learning_rate": 0.01,
                "warmup_steps": 0,
                "beta1": 0.7,
                "beta2": 0.95,
                "epsilon": 1e-3,
                "gradient_clip": 0.0,
            },
            train=BATCH | {"ema_decays": (0.5, 0.99)},
        ),
    ),
}


def stream(seed: int, number: int, step: int, count: int) -> tuple[jax.Array, list[jax.Array]]:
    """Return the key of a stream at a step, and one key an example of the global batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
    return key, [jax.random.fold_in(key, example) for example in range(count)]


def tree_map(function, *trees):
    return jax.tree.map(lambda *leaves: function(*map(wide, leaves)), *trees)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(wide(leaf) ** 2) for leaf in jax.tree.leaves(tree))))


@dataclass
class WrittenOut:
    """A run by the definition, in float64; `turn` is one step."""

    config: Config
    params: dict
    history: list[list[float]] | None
    step: int
    updates: int = 0
    ema: dict[float, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = tree_map(np.copy, self.params)
        self.ema = {decay: self.params for decay in self.config.train.ema_decays}
        self.first = self.second = tree_map(np.zeros_like, self.params)
        diffusion = self.config.diffusion
        betas = np.linspace(diffusion.beta_start, diffusion.beta_end, diffusion.timesteps)
        self.signal2 = np.cumprod(1 - betas)
        self.loss_and_gradient = jax.jit(jax.value_and_grad(self.loss, has_aux=True))

    def probabilities(self) -> np.ndarray:
        """Compute p_t: proportional to the root mean square of the last ten losses at t."""
        assert self.history is not None and all(len(row) == 10 for row in self.history)
        rms = np.array([np.sqrt(np.mean(np.square(row))) for row in self.history])
        return 0.999 * rms / rms.sum() + 0.001 / len(rms)

    def draw_timesteps(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return t, and the weight of each example's loss."""
        _, keys = stream(self.config.seed, TIMESTEPS, self.step, count)
        total = len(self.signal2)
        if self.history is None:
            return np.array([jax.random.randint(k, (), 0, total) for k in keys]), np.ones(count)
        p = self.probabilities()
        gumbels = np.array([jax.random.gumbel(key, (total,)) for key in keys])
        t = np.argmax(np.log(p) + gumbels, axis=1)  # the Gumbel maximum has distribution p
        return t, 1 / (total * p[t])

    def loss(self, params, x_t, t, labels, key, target, weight):
        """Compute mean_i w_i |target_i - network_i|^2 / pixels; and the squared errors."""
        output = build_model(self.config).apply(
            {"params": params},
            x_t,
            t,
            labels,
            train=True,
            examples=jnp.arange(len(x_t)),
            rngs={"dropout": key},
        )
        error = jnp.square(target - output).sum(axis=(1, 2, 3)) / target[0].size
        return jnp.dot(weight, error) / len(x_t), error

    def turn(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """Take one step, and return its metrics."""
        config, count = self.config, len(batch["image"])
        x0 = batch["image"] / 127.5 - 1
        if config.data.flip:
            _, keys = stream(config.seed, FLIPS, self.step, count)
            for row, key in enumerate(keys):
                if jax.random.uniform(key) < 0.5:
                    x0[row] = x0[row, :, ::-1].copy()
        _, keys = stream(config.seed, NOISE, self.step, count)
        eps = wide([jax.random.normal(key, x0.shape[1:]) for key in keys])
        t, drawn_weight = self.draw_timesteps(count)
        signal2 = self.signal2[t][:, None, None, None]
        x_t = np.sqrt(signal2) * x0 + np.sqrt(1 - signal2) * eps
        target, weight = eps, np.ones(count)
        if config.diffusion.prediction == "v":
            target = np.sqrt(signal2) * eps - np.sqrt(1 - signal2) * x0
            snr = self.signal2[t] / (1 - self.signal2[t])
            weight = np.minimum(snr, config.loss.min_snr_gamma) / (1 + snr)
        labels = None
        if config.model.num_classes:
            _, keys = stream(config.seed, HIDDEN_LABELS, self.step, count)
            hidden = [jax.random.uniform(key) < config.model.label_dropout for key in keys]
            labels = np.where(hidden, config.model.num_classes, batch["label"])
        key, _ = stream(config.seed, DROPOUT, self.step, count)
        single = [np.float32(v) for v in (x_t, target, drawn_weight * weight)]
        params = jax.tree.map(np.float32, self.params)
        (loss, error), gradient = self.loss_and_gradient(
            params, single[0], t, labels, key, *single[1:]
        )
        if self.history is not None:
            for at, value in zip(t, weight * wide(error)):
                self.history[at] = [*self.history[at][1:], value]
        rate, update = self.adam(tree_map(np.copy, gradient))
        metrics = {
            "loss": float(loss),
            "mse": float(np.mean(drawn_weight * wide(error))),
            "learning_rate": rate,
            "gradient_norm": norm(gradient),
            "update_norm": norm(update),
            "parameter_norm": norm(self.params),
            "skipped": 0,
            "nonfinite_streak": 0,
        }
        self.step += 1
        self.updates += 1
        return metrics

    def adam(self, gradient) -> tuple[float, dict]:
        """Clip, follow Adam (Kingma & Ba 2015, Algorithm 1), and let the averages follow."""
        how, n = self.config.optimizer, self.updates
        if how.gradient_clip:
            factor = min(1, how.gradient_clip / norm(gradient))
            gradient = tree_map(lambda g: g * factor, gradient)
        b1, b2 = how.beta1, how.beta2
        self.first = tree_map(lambda m, g: b1 * m + (1 - b1) * g, self.first, gradient)
        self.second = tree_map(lambda v, g: b2 * v + (1 - b2) * g**2, self.second, gradient)
        rate = how.learning_rate * (min(n / how.warmup_steps, 1) if how.warmup_steps else 1)

        def step(m: np.ndarray, v: np.ndarray) -> np.ndarray:
            m, v = m / (1 - b1 ** (n + 1)), v / (1 - b2 ** (n + 1))
            return -rate * m / (np.sqrt(v) + how.epsilon)

        update = tree_map(step, self.first, self.second)
        self.params = tree_map(np.add, self.params, update)
        for decay, average in self.ema.items():
            d = min(decay, (1 + n) / (10 + n)) if self.config.train.ema_warmup else decay
            self.ema[decay] = tree_map(
                lambda old, new, d=d: d * old + (1 - d) * new, average, self.params
            )
        return rate, update


def batch_of(config: Config, step: int) -> dict[str, np.ndarray]:
    batch = {"image": images(config, config.train.batch_size, 100 + step)}
    if config.model.num_classes:
        labels = np.random.default_rng(step).integers(0, config.model.num_classes, 8)
        batch["label"] = labels.astype(np.int32)
    return batch


def begin(config: Config) -> TrainState:
    """Return a state at a step other than 0: random parameters, an uneven history of losses."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(p + 0.15 * rng.standard_normal(p.shape)), init_params(config)
    )
    state = init_state(config, params).replace(step=jnp.int32(FIRST_STEP))
    if config.loss.timestep_sampling == "importance":
        timesteps = config.diffusion.timesteps
        scales = np.array([0.1, 3.0, 0.5, 0.02, 1.0])[:, None]
        losses = np.float32(scales * rng.uniform(0.5, 2, (timesteps, 10)))
        full = jnp.full(timesteps, 10, jnp.int32)
        state = state.replace(loss_history=LossHistory(jnp.asarray(losses), full))
    return state


def case(name: str) -> tuple[int, Config]:
    """Return a number of devices, and the config with its seed."""
    devices, seed, config = CASES[name]
    return devices, dataclasses.replace(config, seed=seed)


def assert_close(tree, expected) -> None:
    """Compare leaf by leaf, to a share of the largest entry that any leaf has."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), tree, expected
    )


def test_flips_have_probability_one_half() -> None:
    """Of 20,000 images the share lies within five standard deviations, 0.018; 0.4 does not."""
    count = 20_000
    x = np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, None, :, None], (count, 1, 2, 1))
    flipped = np.asarray(jax.jit(random_flips)(jax.random.split(jax.random.key(3), count), x))
    share = flipped[:, 0, 0, 0].mean()
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_algorithm_1_written_out(name: str) -> None:
    count, config = case(name)
    devices, start = Devices(jax.devices()[:count]), begin(config)
    history = None
    if start.loss_history is not None:
        history = wide(start.loss_history.losses).tolist()
    written = WrittenOut(config, start.params, history, FIRST_STEP)
    state, step = devices.replicate(start), mapped_step(config, devices)
    for number in range(STEPS):
        batch = batch_of(config, number)
        state, metrics = step(state, devices.place(batch))
        expected = written.turn(batch)
        assert set(metrics) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(float(metrics[key]), value, rtol=1e-4, err_msg=key)
        assert_close(state.params, written.params)
        for decay, tree in written.ema.items():
            assert_close(state.ema[f"{decay:g}"], tree)
        if written.history is not None:
            np.testing.assert_allclose(state.loss_history.losses, written.history, rtol=1e-4)
    assert (int(state.step), int(state.updates)) == (written.step, written.updates)
    moved = norm(tree_map(np.subtract, written.params, start.params))
    assert moved > 0.1  # so that a wrong step would show
