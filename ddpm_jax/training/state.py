"""Hold what a run carries from step to step, and build its optimizer."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.build import Params, abstract_params, init_params
from ddpm_jax.config import Config, OptimizerConfig
from ddpm_jax.diffusion.timesteps import LossHistory, empty_history
from ddpm_jax.network.adapt import Network

Batch = dict[str, jax.Array]  # image uint8 [b,h,w,c], label int32 [b] where there are classes


Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries; step - updates is the number of skipped steps.

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
    """Return the name of an average: the shortest text that reads back as its decay.

    Checkpoints hold these names. 0.9999 is "0.9999", 0.0 is "0"; no two decays share a name.
    """
    short = f"{decay:g}"
    return short if float(short) == decay else repr(decay)


def initial_share(decay: float, updates: int, warmup: bool) -> float:
    """Return the weight in an average, after so many updates, of what the run began with.

        prod_n decay_n,  n = 0..updates-1

    Args:
      decay, warmup: as in `ema_decay` of training/step.py, which gives decay_n.
    """
    n = np.arange(updates)
    decays = np.minimum(decay, (1 + n) / (10 + n)) if warmup else np.full(updates, decay)
    return float(np.prod(decays))


def average_note(config: Config, name: str, updates: int) -> str | None:
    """Return one line for an average that still holds much of the initial network, else None.

    Args:
      name: as `ema_name` returns it.
      updates: steps that changed the parameters.
    """
    decay, warmup = float(name), config.train.ema_warmup
    share = initial_share(decay, updates, warmup) if updates else 0.0
    if share < 0.1:
        return None
    return (
        f"note: ema {name} averages over {1 / (1 - decay):,.0f} steps, and this run has "
        f"{updates:,}: {100 * share:.0f} % of the average is what the run began with; weights=raw "
        "shows more"
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate at update n of a run of `steps`, as a function of n = 0, 1, ...

        lr * n / warmup_steps                             before warmup_steps
        lr * (f + (1-f) (1 - s))                          schedule="linear"
        lr * (f + (1-f) (1 + cos(pi s)) / 2)              schedule="cosine"

    with s = (n - warmup_steps) / (steps - warmup_steps), at most 1, and f = final_fraction. With
    schedule="constant" it stays lr, as in the paper. The first update has rate 0, as in the paper's
    code.
    """
    rate, warmup, final = config.learning_rate, config.warmup_steps, config.final_fraction
    if config.schedule == "constant":
        if not warmup:
            return optax.constant_schedule(rate)
        return optax.linear_schedule(0.0, rate, warmup)
    decay = (
        optax.linear_schedule(rate, final * rate, steps - warmup)
        if config.schedule == "linear"
        else optax.cosine_decay_schedule(rate, steps - warmup, alpha=final)
    )
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup])


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build Adam after a clip of the global norm, for a run of `steps`.

    With weight_decay it is AdamW (Loshchilov & Hutter 2019): an update takes
    learning_rate * weight_decay * parameter off every parameter, beside Adam's own step.

    The paper's TensorFlow code differs in two details. Its Adam adds epsilon before the bias
    correction, which shows in the first steps only. And it clips the gradient of each core's 16
    images before the average over cores.
    """
    clip = (
        optax.clip_by_global_norm(config.gradient_clip)
        if config.gradient_clip
        else optax.identity()
    )
    rate = learning_rate_schedule(config, steps)
    settings = (config.beta1, config.beta2, config.epsilon)
    if config.weight_decay:
        return optax.chain(clip, optax.adamw(rate, *settings, weight_decay=config.weight_decay))
    return optax.chain(clip, optax.adam(rate, *settings))


def init_state(
    config: Config, params: Params | None = None, network: Network | None = None
) -> TrainState:
    """Return the state before the first step: `params`, or what `network` starts from.

    The averages are copies: a donated state must not hold one buffer twice.
    """
    params = init_params(config, network) if params is None else params
    timesteps = config.diffusion.timesteps
    importance = config.loss.timestep_sampling == "importance"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        nonfinite_streak=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=build_optimizer(config.optimizer, config.train.steps).init(params),
        ema={ema_name(decay): jax.tree.map(jnp.copy, params) for decay in config.train.ema_decays},
        loss_history=empty_history(timesteps) if importance else None,
    )


def abstract_state(config: Config, network: Network | None = None) -> TrainState:
    """Return the tree of `init_state` as shapes and types, with nothing computed.

    A checkpoint is restored into it.
    """
    params = abstract_params(config, network)
    return jax.eval_shape(lambda params: init_state(config, params), params)


def sampling_params(config: Config, state: TrainState) -> Params:
    """Return the weights that samples and figures come from: the first average."""
    return state.ema[ema_name(config.train.ema_decays[0])]
