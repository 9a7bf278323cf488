"""The training step: a pure function of (state, batch) that is the same on one device and on a pod.

Each example's timestep, noise, flip and dropout depend on (seed, step, its index in the global batch) alone; the devices meet
in one `pmean`. What is carried from step to step is the TrainState and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddpm_jax.build import Params, abstract_params, build_model, build_objective, build_process, denoiser, init_params
from ddpm_jax.config import Config, OptimizerConfig
from ddpm_jax.losses import per_example_loss
from ddpm_jax.randomness import Stream, example_keys, normal_per_example, stream_key
from ddpm_jax.timesteps import LossHistory, empty_history, importance_timesteps, record_losses, uniform_timesteps

Batch = dict[str, jax.Array]  # image uint8 [b,h,w,c], label int32 [b] where there are classes
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries. step - updates is the number of skipped steps.

    Attributes:
      step: int32, steps done; the position in the data and of every random draw.
      updates: int32, steps that changed the parameters.
      nonfinite_streak: int32, steps skipped in a row.
      ema: for each decay, by its name such as "0.9999", an average of the parameters.
      loss_history: of importance sampling; None where timesteps are uniform.
    """

    step: jax.Array
    updates: jax.Array
    nonfinite_streak: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: dict[str, Params]
    loss_history: LossHistory | None


def ema_name(decay: float) -> str:
    return f"{decay:g}"


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """lr * min(n / warmup_steps, 1) at update n: the first update has rate 0, as in the paper's code."""
    if not config.warmup_steps:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam after a clip of the global norm.

    The paper's TensorFlow code differs in two details: its Adam adds epsilon before the bias correction, which shows in the
    first steps only, and it clips the gradient of each core's 16 images before the average over cores.
    """
    clip = optax.clip_by_global_norm(config.gradient_clip) if config.gradient_clip else optax.identity()
    adam = optax.adam(learning_rate_schedule(config), config.beta1, config.beta2, config.epsilon)
    return optax.chain(clip, adam)


def init_state(config: Config, params: Params | None = None) -> TrainState:
    """The state before the first step. The averages are copies: a donated state must not hold one buffer twice."""
    params = init_params(config) if params is None else params
    timesteps = config.diffusion.timesteps
    importance = config.loss.timestep_sampling == "importance"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        nonfinite_streak=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=build_optimizer(config.optimizer).init(params),
        ema={ema_name(decay): jax.tree.map(jnp.copy, params) for decay in config.train.ema_decays},
        loss_history=empty_history(timesteps) if importance else None,
    )


def abstract_state(config: Config) -> TrainState:
    """The tree of `init_state` as shapes and types, with nothing computed: what a checkpoint is restored into."""
    return jax.eval_shape(lambda params: init_state(config, params), abstract_params(config))


def sampling_params(config: Config, state: TrainState) -> Params:
    """The weights that samples and figures come from: the first average."""
    return state.ema[ema_name(config.train.ema_decays[0])]


def scale_images(image: jax.Array) -> jax.Array:
    """uint8 levels k to k/127.5 - 1, float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def random_flips(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Each image of [b,h,w,c] mirrored left to right with probability 1/2, by its own key."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)


def build_train_step(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, batch, *, axis_name=None) -> (state, metrics)`.

    `batch` is this device's share of the global batch, contiguous in device order; with axis_name=None it is all of it.
    Metrics are float32 scalars, equal on every device: loss (and its terms), learning_rate, gradient_norm (before the clip),
    update_norm, parameter_norm, skipped (1 where this step was), nonfinite_streak.
    """
    model, process, objective = build_model(config), build_process(config), build_objective(config)
    optimizer, learning_rate = build_optimizer(config.optimizer), learning_rate_schedule(config.optimizer)
    timesteps, num_classes = config.diffusion.timesteps, config.model.num_classes

    def loss_fn(params: Params, batch: Batch, examples: jax.Array, state: TrainState) -> tuple[jax.Array, Metrics]:
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
            rngs = {"dropout": key(Stream.DROPOUT)}
            return model.apply({"params": params}, x_t, t, labels, train=True, examples=examples, rngs=rngs)

        terms = per_example_loss(process, objective, denoise, x0, t, eps)
        means = {name: jnp.mean(weight * value) for name, value in terms.items()}
        return means["loss"], {"means": means, "t": t, "losses": terms["loss"]}

    def train_step(state: TrainState, batch: Batch, *, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
        local = len(batch["image"])
        first = jax.lax.axis_index(axis_name) * local if axis_name else 0
        examples = first + jnp.arange(local)
        parts = config.train.accumulation

        def gradient_of(batch: Batch, examples: jax.Array) -> tuple[Any, Params]:
            (_, seen), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, examples, state)
            return seen, gradient

        if parts == 1:
            seen, gradient = gradient_of(batch, examples)
        else:
            rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (batch, examples))
            seen, gradient = accumulate(gradient_of, rows, state.params)
        means = seen["means"]
        if axis_name:
            # The only place where devices meet. Under pmap the gradient is this device's own, so the mean is due here.
            gradient, means = jax.lax.pmean((gradient, means), axis_name)

        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(gradient_norm)
        update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema = {
            name: average(old, params, ema_decay(float(name), state.updates, config.train.ema_warmup))
            for name, old in state.ema.items()
        }
        history = state.loss_history
        if history is not None:
            t, losses = seen["t"], seen["losses"]
            if axis_name:
                t, losses = jax.lax.all_gather((t, losses), axis_name, tiled=True)
            history = record_losses(history, t, losses)

        # A step that is not finite changes nothing but the counters: neither moments nor averages ever see it.
        kept = keep_if(
            finite,
            (params, opt_state, ema, history),
            (state.params, state.opt_state, state.ema, state.loss_history),
        )
        metrics = {
            **means,
            "learning_rate": jnp.asarray(learning_rate(state.updates), jnp.float32),
            "gradient_norm": gradient_norm,
            "update_norm": optax.tree.norm(update),
            "parameter_norm": optax.tree.norm(kept[0]),
            "skipped": 1 - finite.astype(jnp.float32),
        }
        streak = jnp.where(finite, 0, state.nonfinite_streak + 1)
        metrics["nonfinite_streak"] = streak.astype(jnp.float32)
        return TrainState(state.step + 1, state.updates + finite, streak, *kept), metrics

    return train_step


def accumulate(gradient_of: Callable[..., Any], rows: Any, params: Params) -> tuple[Any, Params]:
    """Runs `gradient_of` over the leading axis of `rows`, one after the other; means of losses and gradients.

    The gradient is summed in the carry: only one microbatch's activations and one gradient are alive at a time.
    """
    parts = jax.tree.leaves(rows)[0].shape[0]

    def add(total: Params, row: Any) -> tuple[Params, Any]:
        seen, gradient = gradient_of(*row)
        return jax.tree.map(jnp.add, total, gradient), seen

    total, seen = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
    means = jax.tree.map(lambda x: x.mean(axis=0), seen["means"])
    flat = {name: seen[name].reshape(-1) for name in ("t", "losses")}
    return {"means": means, **flat}, jax.tree.map(lambda g: g / parts, total)


def ema_decay(decay: float, updates: jax.Array, warmup: bool) -> jax.Array | float:
    """The decay at update number `updates` (0-based): `decay`, or with warm-up min(decay, (1+n)/(10+n))."""
    return jnp.minimum(decay, (1 + updates) / (10 + updates)) if warmup else decay


def average(old: Params, new: Params, decay: jax.Array | float) -> Params:
    """old + (1-decay) (new - old), which leaves equal weights exactly equal."""
    return jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), old, new)


def keep_if(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def build_held_out_loss(config: Config) -> Callable[[Params, Batch], jax.Array]:
    """`loss(params, batch) -> [b]`: the objective at timesteps and noise that depend on the image's index alone.

    `batch["index"]` int32 [b] is the position in the held-out set. The same images, timesteps and noise at every evaluation
    of every run with this seed: the curve moves because the network does.
    """
    denoise, process, objective = denoiser(config), build_process(config), build_objective(config)

    def held_out_loss(params: Params, batch: Batch) -> jax.Array:
        x0 = scale_images(batch["image"])
        t_keys = example_keys(stream_key(config.seed, Stream.HELD_OUT_TIMESTEPS), batch["index"])
        eps_keys = example_keys(stream_key(config.seed, Stream.HELD_OUT_NOISE), batch["index"])
        t = uniform_timesteps(t_keys, config.diffusion.timesteps)
        eps = normal_per_example(eps_keys, x0.shape[1:])
        labels = batch["label"] if config.model.num_classes else None
        return per_example_loss(process, objective, denoise(params, labels), x0, t, eps)["loss"]

    return held_out_loss
