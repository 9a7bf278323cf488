"""Check that a config can be run."""

from __future__ import annotations

from typing import Any

from ddpm_jax.config.rules import check_fields, short
from ddpm_jax.config.schema import Config
from ddpm_jax.errors import ConfigError


def validate(config: Config) -> Config:
    """Return `config` if it can be run, whatever the machine.

    First each field by itself, by the rules in its annotation; then what fields say together. What
    depends on the devices is checked with the devices.

    Raises:
      ConfigError: naming the first field at fault and what it accepts.
    """
    check_fields(config)

    def require(condition: bool, name: str, accepts: str) -> None:
        if not condition:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            raise ConfigError(f"config.{name}={short(value)}: {accepts}")

    data, model, diffusion = config.data, config.model, config.diffusion
    train, loss, optimizer = config.train, config.loss, config.optimizer

    require(
        0 <= data.padding < min(data.sides) / 2,
        "data.padding",
        "must be at least 0 and leave some image",
    )
    require(
        (data.name == "folder") == bool(data.path),
        "data.path",
        "set it for, and only for, data.name=folder",
    )
    require(
        not data.classes or (data.name == "folder" and model.num_classes > 0),
        "data.classes",
        "needs data.name=folder, and model.num_classes: the number of folders",
    )
    require(
        data.crop != "celeba64" or isinstance(data.image_size, int),
        "data.crop",
        "celeba64 is a square, data.image_size is not: set crop=center",
    )

    levels = len(model.channel_mult)
    factor = 2 ** (levels - 1)
    require(
        all(side % factor == 0 for side in data.sides),
        "data.image_size",
        f"must be divisible by {factor}, for the {levels} levels of model.channel_mult",
    )
    require(
        model.base_channels >= 2 and model.base_channels % model.group_norm_groups == 0,
        "model.base_channels",
        f"must be a multiple of model.group_norm_groups={model.group_norm_groups}",
    )
    height, width = data.sides
    sizes = [height // 2**i for i in range(levels)]
    require(
        all(r in sizes for r in model.attention_resolutions),
        "model.attention_resolutions",
        f"{'sizes' if height == width else 'heights'} of this network's feature maps: "
        f"{', '.join(map(str, sizes))}",
    )
    widths = [
        model.base_channels * m
        for m, size in zip(model.channel_mult, sizes)
        if size in model.attention_resolutions
    ]
    widths += [model.base_channels * model.channel_mult[-1]] * model.attention_in_mid
    per_head, name = (
        (model.head_channels, "head_channels") if model.head_channels else (model.heads, "heads")
    )
    require(
        all(w % per_head == 0 for w in widths),
        f"model.{name}",
        f"must divide the widths with attention: {widths}",
    )

    scale = 1000 / diffusion.timesteps if diffusion.rescale_betas else 1.0
    require(
        scale * max(diffusion.beta_start, diffusion.beta_end) < 1,
        "diffusion.rescale_betas",
        "the rescaled betas must stay below 1: more timesteps, or smaller ends",
    )
    require(
        not diffusion.zero_terminal_snr or diffusion.timesteps > 1,
        "diffusion.zero_terminal_snr",
        "a chain that ends in noise takes diffusion.timesteps of at least 2",
    )
    ends_at_0 = diffusion.schedule == "jsd" or diffusion.zero_terminal_snr
    require(
        not (ends_at_0 and diffusion.prediction == "eps"),
        "diffusion.prediction",
        "the chain ends at alphas_cumprod = 0, from which eps cannot give x0: use x0, v or mu",
    )

    learned = diffusion.variance.startswith("learned")
    require(
        not (loss.kind == "hybrid" and not learned),
        "loss.kind",
        "hybrid trains a learned variance: set diffusion.variance",
    )
    require(
        not (loss.kind == "simple" and learned),
        "loss.kind",
        f"diffusion.variance={diffusion.variance} is trained by vlb or hybrid",
    )
    require(
        loss.kind != "vlb" or loss.weighting == "none",
        "loss.weighting",
        "applies to the squared error, not to vlb",
    )
    # The fields of the objective belong to the layer below, which knows no configs.
    require(loss.vlb_weight > 0, "loss.vlb_weight", "must be positive")
    require(loss.min_snr_gamma > 0, "loss.min_snr_gamma", "must be positive")
    require(loss.p2_k > 0, "loss.p2_k", "must be positive")
    require(loss.p2_gamma >= 0, "loss.p2_gamma", "must be at least 0")

    decays = optimizer.schedule != "constant"
    require(
        not decays or train.steps > optimizer.warmup_steps,
        "optimizer.schedule",
        f"decays between warmup_steps={optimizer.warmup_steps} and train.steps={train.steps}: "
        "more steps, or a shorter warm-up",
    )
    require(
        decays or optimizer.final_fraction == 0,
        "optimizer.final_fraction",
        "is where schedule=linear and cosine end: set optimizer.schedule",
    )

    measured = train.eval_images > 0 and train.checkpoint_every % train.eval_every == 0
    require(
        not train.keep_best or measured,
        "train.keep_best",
        "needs a held-out loss for each checkpoint: train.eval_images, and an eval_every that "
        "divides checkpoint_every",
    )
    require(
        train.batch_size % train.accumulation == 0,
        "train.batch_size",
        f"must be divisible by train.accumulation={train.accumulation}",
    )

    require(
        0 <= config.sampling.steps <= diffusion.timesteps,
        "sampling.steps",
        f"must be in 0..{diffusion.timesteps}",
    )
    student = config.distillation.steps > 0
    require(
        student == bool(config.distillation.teacher),
        "distillation.steps",
        "a student has steps and a teacher: ddpm distill sets both",
    )
    require(
        2 * config.distillation.steps <= diffusion.timesteps,
        "distillation.steps",
        f"the teacher takes twice as many, of diffusion.timesteps={diffusion.timesteps}",
    )
    require(
        not student or (diffusion.prediction != "mu" and not learned),
        "diffusion.prediction" if diffusion.prediction == "mu" else "diffusion.variance",
        "a student predicts x0, v or eps, and no variance",
    )
    require(
        not student or loss.timestep_sampling == "uniform",
        "loss.timestep_sampling",
        "a student's steps are drawn uniformly",
    )
    require(
        config.sampling.clip or not config.sampling.dynamic_threshold,
        "sampling.dynamic_threshold",
        "is a way to clip, which clip=false switches off: leave one of them",
    )
    return config
