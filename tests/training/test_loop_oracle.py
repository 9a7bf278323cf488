"""What the loop does around the step, written out: data, held-out losses, pictures, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax import images
from ddpm_jax.build import build_model
from ddpm_jax.config import Config
from ddpm_jax.data.source import ArraySource
from ddpm_jax.errors import ConfigError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.training import loop
from ddpm_jax.training.monitor import HeldOut
from ddpm_jax.training.state import TrainState, init_state
from tests.support.processes import assert_bit_equal, final_state, metrics
from tests.support.steps import mapped_step, plain_step
from tests.support.tiny import images as random_images
from tests.support.tiny import tiny_config

HELD_OUT_TIMESTEPS, HELD_OUT_NOISE = 6, 7  # numbers of streams
ONE = Devices(jax.devices()[:1])
TRAIN, TEST, LAST = 24, 30, 3


@dataclass
class Run:
    """Three steps that neither evaluations nor checkpoints divide, on sets of a few images."""

    config: Config
    workdir: Path
    sources: dict[str, ArraySource]

    def state(self, step: int) -> TrainState:
        return final_state(self.config, self.workdir, step)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_config(
        diffusion={"timesteps": 8, "beta_end": 0.4},
        model={"attention_in_mid": False},
        optimizer={"learning_rate": 0.05, "warmup_steps": 0},
        train={
            "steps": LAST,
            "ema_decays": (0.5, 0.9),
            "log_every": 2,
            "eval_every": 2,
            "checkpoint_every": 2,
            "sample_every": 2,
        },
    )
    config.seed = 9
    sources = {
        split: ArraySource(random_images(config, count, seed=count))
        for split, count in (("train", TRAIN), ("test", TEST))
    }
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_splits", lambda data, folder, names: [sources[n] for n in names])
        assert loop.train(config, workdir, data_dir=workdir, devices=ONE) == 0
    return Run(config, workdir, sources)


def test_the_last_step_is_saved_evaluated_and_drawn_whatever_divides_it(run: Run) -> None:
    with Checkpoints.reading(run.workdir) as checkpoints:
        assert checkpoints.steps() == [2, LAST]
    rows = metrics(run.workdir)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, LAST]
    assert [row["step"] for row in rows if "loss" in row] == [2, LAST]
    names = sorted(path.name for path in (run.workdir / "samples").iterdir())
    assert names == ["step_0000002.png", "step_0000003.png"]


def test_the_loop_takes_its_steps_on_the_images_of_its_seed(run: Run) -> None:
    """Image i of a step is number step * 16 + i of the epochs, each in an order of its own."""
    config, data = run.config, run.sources["train"].images
    order = np.concatenate(
        [
            np.argsort(np.random.Philox(key=np.array([9, epoch], np.uint64)).random_raw(TRAIN))
            for epoch in range(3)
        ]
    )
    state, step = ONE.replicate(init_state(config)), mapped_step(config, ONE)
    rows = []
    for number in range(LAST):
        batch = {"image": data[order[16 * number : 16 * number + 16]]}
        state, row = step(state, ONE.place(batch))
        rows.append({name: float(value) for name, value in row.items()})
    saved = run.state(LAST)
    assert int(saved.step) == LAST
    for mine, its in ((state.params, saved.params), (state.ema, saved.ema)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mine, its)
    # A line of the log has the means since the line before.
    first, second = (row for row in metrics(run.workdir) if "loss" in row)
    for name in ("loss", "mse", "gradient_norm", "update_norm", "parameter_norm", "learning_rate"):
        mean = (rows[0][name] + rows[1][name]) / 2
        np.testing.assert_allclose(first[name], mean, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(second[name], rows[2][name], rtol=1e-5, err_msg=name)


def held_out_keys(seed: int, stream: int, count: int) -> list[jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), 0)
    return [jax.random.fold_in(key, image) for image in range(count)]


def held_out_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    keys = held_out_keys(seed, HELD_OUT_NOISE, shape[0])
    return np.stack([jax.random.normal(key, shape[1:]) for key in keys])


def test_held_out_losses_are_means_over_the_first_images_at_the_averaged_weights(run: Run) -> None:
    """Twenty of thirty images in batches of sixteen: each counts once, at noise of its own."""
    config, count = run.config, run.config.train.eval_images
    assert count == 20
    x0 = run.sources["test"].images[:count] / 127.5 - 1
    t = np.array(
        [jax.random.randint(key, (), 0, 8) for key in held_out_keys(9, HELD_OUT_TIMESTEPS, count)]
    )
    eps = held_out_noise(9, x0.shape)
    signal2 = np.cumprod(1 - np.linspace(1e-4, 0.4, 8))[t][:, None, None, None]
    x_t = np.float32(np.sqrt(signal2) * x0 + np.sqrt(1 - signal2) * eps)
    apply = jax.jit(lambda params: build_model(config).apply({"params": params}, x_t, t))
    losses = {}
    for step in (2, LAST):
        state = run.state(step)
        for name, params in (("ema", state.ema["0.5"]), ("raw", state.params)):
            error = eps.astype(np.float64) - np.asarray(apply(params))
            losses[step, name] = np.mean(error**2)
    written = [row["held_out_loss"] for row in metrics(run.workdir) if "held_out_loss" in row]
    np.testing.assert_allclose(written, [losses[2, "ema"], losses[LAST, "ema"]], rtol=1e-5)
    assert abs(losses[2, "raw"] / losses[2, "ema"] - 1) > 1e-3  # the two would be told apart


def test_held_out_losses_are_of_the_class_of_each_image() -> None:
    """A network whose output is its label: mean_i |eps_i - label_i|^2, by hand."""
    config = tiny_config(
        model={"num_classes": 3, "label_dropout": 0.5}, train={"eval_images": 5, "batch_size": 4}
    )
    config.seed = 4
    labels = np.array([2, 0, 1, 2, 0], np.int32)
    network = ddpm.Network(
        lambda key: {},
        lambda params, x_t, t, labels, dropout: jnp.broadcast_to(
            labels[:, None, None, None].astype(jnp.float32), x_t.shape
        ),
    )
    source = ArraySource(random_images(config, 5), labels)
    eps = held_out_noise(4, source.images.shape).astype(np.float64)
    expected = np.mean((eps - labels[:, None, None, None]) ** 2)
    np.testing.assert_allclose(HeldOut(config, ONE, source, network)({}), expected, rtol=1e-5)


def test_held_out_losses_are_the_same_on_any_devices(run: Run) -> None:
    """On four devices the last batch is filled up on the last three of them."""
    four, rows = Devices(jax.devices()[:4]), metrics(run.workdir)
    params = four.replicate(run.state(LAST).ema["0.5"])
    loss = HeldOut(run.config, four, run.sources["test"])(params)
    written = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    np.testing.assert_allclose(loss, written[-1], rtol=1e-5)


def test_grids_are_samples_of_the_averaged_weights_by_the_seed_of_the_run(run: Run) -> None:
    generator = build_generator(run.config, ONE, batch_size=4)
    for step in (2, LAST):
        params = ONE.replicate(run.state(step).ema["0.5"])
        samples = generator.draw(params, seed=9, indices=np.arange(4))
        grid = images.load_png(run.workdir / "samples" / f"step_{step:07d}.png")
        expected = images.grid(images.to_uint8(samples))
        assert np.abs(grid.astype(int) - expected).max() <= 1


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(run: Run) -> None:
    """The loss at the step of a checkpoint is saved with it."""
    rows = metrics(run.workdir)
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    with Checkpoints.reading(run.workdir) as checkpoints:
        assert checkpoints.best() == min(losses, key=losses.__getitem__)


def test_what_is_opened_by_weights_and_step_is_what_was_saved(run: Run) -> None:
    last, first = run.state(LAST), run.state(2)
    for weights, step, params, note in (
        ("raw", LAST, last.params, "raw"),
        ("0.9", LAST, last.ema["0.9"], "ema 0.9"),
        ("ema", 2, first.ema["0.5"], "ema 0.5"),
        ("raw", 2, first.params, "raw"),
    ):
        opened = ddpm.load(run.workdir, weights, step)
        assert (opened.weights, opened.step) == (note, step)
        assert_bit_equal(opened.params, params)


def test_a_finite_loss_with_a_gradient_that_is_not_changes_only_the_counters() -> None:
    """A last layer of 1e14: the loss is about 1e28, the square of its gradient beyond float32."""
    sections = {"loss": {"timestep_sampling": "importance"}, "model": {"attention_in_mid": False}}
    config = tiny_config(**sections)
    params = jax.tree.map(np.asarray, init_state(config).params)
    kernel = params["conv_out"]["kernel"]
    params["conv_out"]["kernel"] = np.full(kernel.shape, 1e14, np.float32)
    state = init_state(config, params).replace(step=jnp.int32(4), updates=jnp.int32(4))
    batch = {"image": random_images(config, 16)}
    after, metrics = plain_step(config)(state, batch)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert (float(metrics["skipped"]), float(metrics["nonfinite_streak"])) == (1, 1)
    counters = {"step": jnp.int32(5), "nonfinite_streak": jnp.int32(1)}
    jax.tree.map(np.testing.assert_array_equal, after, state.replace(**counters))


@pytest.mark.parametrize("classes, refused", [(3, True), (4, True), (5, False)])
def test_classes_are_as_many_as_the_labels_need(classes: int, refused: bool) -> None:
    """Labels up to 4 are five classes."""
    config = tiny_config(model={"num_classes": classes})
    labels = np.array([0, 4, 2], np.int32)
    source = ArraySource(random_images(config, 3), labels)
    if refused:
        with pytest.raises(ConfigError, match=f"num_classes={classes}.*labels up to 4"):
            loop.check_labels(config, source)
    else:
        loop.check_labels(config, source)
