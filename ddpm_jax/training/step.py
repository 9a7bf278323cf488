"""Build the training step, Algorithm 1 of Ho et al. 2020.

It is a pure function of (state, batch) that is the same on one device and on a pod. Each example's
timestep, noise, flip and dropout depend on (seed, step, its index in the global batch) alone; the
devices meet in one `pmean`. What is carried from step to step is the TrainState and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.build import Params, build_network, build_objective, build_process, denoiser
from ddpm_jax.config import Config
from ddpm_jax.diffusion.losses import per_example_loss
from ddpm_jax.diffusion.randomness import Stream, example_keys, normal_per_example, stream_key
from ddpm_jax.diffusion.timesteps import importance_timesteps, record_losses, uniform_timesteps
from ddpm_jax.images import scale_images
from ddpm_jax.network.adapt import Dropout, Network
from ddpm_jax.training.form import TreeForm
from ddpm_jax.training.state import (
    Batch,
    Metrics,
    TrainState,
    build_optimizer,
    ema_name,
    learning_rate_schedule,
)


def random_flips(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Mirror each image of [b,h,w,c] left to right with probability 1/2, by its own key."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)


def build_train_step(
    config: Config,
    form: TreeForm | None = None,
    network: Network | None = None,
    *,
    loss: Callable[..., dict[str, jax.Array]] | None = None,
    timesteps: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Build one turn of Algorithm 1: `step(state, batch, *, axis_name=None) -> (state, metrics)`.

        x_0 ~ q(x_0),  t ~ Uniform{0..T-1},  eps ~ N(0, I)
        take a gradient step on || eps - eps_theta(sqrt(ab_t) x_0 + sqrt(1-ab_t) eps, t) ||^2

    The other objectives of diffusion/losses.py have a gradient of their own. Adam takes the step,
    and the averages of the parameters follow it.

    `batch` is this device's share of the global batch, contiguous in device order; with
    axis_name=None it is all of it. Metrics are float32 scalars, equal on every device: loss (and
    its terms), learning_rate, gradient_norm (before the clip), update_norm, parameter_norm,
    skipped (1 where this step was), nonfinite_streak.

    Args:
      form: of the state, which the step takes and gives as `form.pack` does; a tree by default.
      loss: another objective, `loss(denoise, x0, t, eps, labels, teacher) -> {"loss": [b], ...}`,
        where `teacher` is what the step is called with.
      timesteps: how many t there are for it.
    """
    form = TreeForm() if form is None else form
    network = build_network(config) if network is None else network
    process, objective = build_process(config), build_objective(config)
    optimizer, learning_rate = (
        build_optimizer(config.optimizer, config.train.steps),
        learning_rate_schedule(config.optimizer, config.train.steps),
    )
    timesteps, num_classes = timesteps or config.diffusion.timesteps, config.model.num_classes
    decays = {ema_name(decay): decay for decay in config.train.ema_decays}

    def loss_fn(
        params: Params, batch: Batch, examples: jax.Array, state: TrainState, teacher: Any
    ) -> tuple[jax.Array, Metrics]:
        def key(stream: Stream) -> jax.Array:
            return stream_key(config.seed, stream, state.step)

        x0 = scale_images(batch["image"])
        if config.data.flip:
            x0 = random_flips(example_keys(key(Stream.FLIPS), examples), x0)
        eps = normal_per_example(example_keys(key(Stream.NOISE), examples), x0.shape[1:])
        timestep_keys = example_keys(key(Stream.TIMESTEPS), examples)
        if state.loss_history is None:
            t, weight = uniform_timesteps(timestep_keys, timesteps), jnp.ones(len(x0))
        else:
            t, weight = importance_timesteps(timestep_keys, state.loss_history)
        labels = None
        if num_classes:
            hidden = jax.vmap(lambda k: jax.random.bernoulli(k, config.model.label_dropout))(
                example_keys(key(Stream.LABEL_DROPOUT), examples)
            )
            labels = jnp.where(hidden, num_classes, batch["label"])

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            dropout = Dropout(key(Stream.DROPOUT), examples)
            return network.apply(params, x_t, t, labels, dropout)

        if loss is None:
            terms = per_example_loss(process, objective, denoise, x0, t, eps)
        else:
            terms = loss(denoise, x0, t, eps, labels, teacher)
        means = {name: jnp.mean(weight * value) for name, value in terms.items()}
        return means["loss"], {"means": means, "t": t, "losses": terms["loss"]}

    def train_step(
        state: TrainState, batch: Batch, *, axis_name: str | None = None, teacher: Any = None
    ) -> tuple[TrainState, Metrics]:
        local = len(batch["image"])
        first = jax.lax.axis_index(axis_name) * local if axis_name else 0
        examples = first + jnp.arange(local)
        microbatches, params = config.train.accumulation, form.split(state.params)

        def gradient_of(batch: Batch, examples: jax.Array) -> tuple[Any, Params]:
            (_, outputs), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
                params, batch, examples, state, teacher
            )
            return outputs, form.join(gradient)

        if microbatches == 1:
            outputs, gradient = gradient_of(batch, examples)
        else:
            rows = jax.tree.map(
                lambda x: x.reshape(microbatches, -1, *x.shape[1:]), (batch, examples)
            )
            outputs, gradient = accumulate(gradient_of, rows, state.params)
        means = outputs["means"]
        if axis_name:
            # The only place where devices meet. Mapped, the gradient is this device's own, so the
            # mean is due here.
            gradient, means = jax.lax.pmean((gradient, means), axis_name)

        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(gradient_norm)
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = {
            name: average(
                old, params, ema_decay(decays[name], state.updates, config.train.ema_warmup)
            )
            for name, old in state.ema.items()
        }
        history = state.loss_history
        if history is not None:
            t, losses = outputs["t"], outputs["losses"]
            if axis_name:
                t, losses = jax.lax.all_gather((t, losses), axis_name, tiled=True)
            history = record_losses(history, t, losses)

        # A step that is not finite changes nothing but the counters: neither moments nor averages
        # ever see it.
        carried = keep_if(
            finite,
            (params, opt_state, ema, history),
            (state.params, state.opt_state, state.ema, state.loss_history),
        )
        metrics = {
            **means,
            "learning_rate": jnp.asarray(learning_rate(state.updates), jnp.float32),
            "gradient_norm": gradient_norm,
            "update_norm": optax.tree.norm(update),
            "parameter_norm": optax.tree.norm(carried[0]),
            "skipped": 1 - finite.astype(jnp.float32),
        }
        streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
        metrics["nonfinite_streak"] = streak.astype(jnp.float32)
        return TrainState(state.step + 1, state.updates + finite, streak, *carried), metrics

    return train_step


def accumulate(gradient_of: Callable[..., Any], rows: Any, params: Params) -> tuple[Any, Params]:
    """Run `gradient_of` over the leading axis of `rows`, one after the other, and take means.

    The gradient is summed in the carry: only one microbatch's activations and one gradient are
    alive at a time.

    Returns:
      The outputs, whose losses are means, and the mean gradient.
    """
    microbatches = jax.tree.leaves(rows)[0].shape[0]

    def add(total: Params, row: Any) -> tuple[Params, Any]:
        outputs, gradient = gradient_of(*row)
        return jax.tree.map(jnp.add, total, gradient), outputs

    total, outputs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
    means = jax.tree.map(lambda x: x.mean(axis=0), outputs["means"])
    flat = {name: outputs[name].reshape(-1) for name in ("t", "losses")}
    return {"means": means, **flat}, jax.tree.map(lambda g: g / microbatches, total)


def ema_decay(decay: float, updates: jax.Array, warmup: bool) -> jax.Array | float:
    """Return the decay at update number n = `updates`, counted from 0.

    It is `decay`, or with warm-up min(decay, (1+n)/(10+n)).
    """
    return jnp.minimum(decay, (1 + updates) / (10 + updates)) if warmup else decay


def average(old: Params, new: Params, decay: jax.Array | float) -> Params:
    """Return old + (1-decay) (new - old), which leaves equal weights exactly equal."""
    return jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), old, new)


def keep_if(condition: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` where the condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def build_held_out_loss(
    config: Config, network: Network | None = None
) -> Callable[[Params, Batch], jax.Array]:
    """Build `loss(params, batch) -> [b]`: the objective at fixed timesteps and noise.

    They depend on the seed and on `batch["index"]` alone, int32 [b], the position in the held-out
    set. Images, timesteps and noise are then the same at every evaluation of every run with this
    seed: the curve moves because the network does.
    """
    denoise = denoiser(config, network)
    process, objective = build_process(config), build_objective(config)

    def held_out_loss(params: Params, batch: Batch) -> jax.Array:
        x0 = scale_images(batch["image"])
        t_keys = example_keys(stream_key(config.seed, Stream.HELD_OUT_TIMESTEPS), batch["index"])
        eps_keys = example_keys(stream_key(config.seed, Stream.HELD_OUT_NOISE), batch["index"])
        t = uniform_timesteps(t_keys, config.diffusion.timesteps)
        eps = normal_per_example(eps_keys, x0.shape[1:])
        labels = batch["label"] if config.model.num_classes else None
        return per_example_loss(process, objective, denoise(params, labels), x0, t, eps)["loss"]

    return held_out_loss
