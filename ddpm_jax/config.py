"""Everything a run is, as nested dataclasses.

A file `configs/NAME.py` has one function, `get_config() -> Config`; that of a family, such as the rows of a table, lists them in
`VARIANTS`, and `configs/NAME.py:VARIANT` is `get_config(VARIANT)`. Command lines override single fields by path
(`--config.optimizer.learning_rate=1e-4`), run directories keep the result as config.json, and both come back through the
same typed door: a misspelt field, a wrong type or an impossible value raises ConfigError, a one-line message that names the
field and what it accepts. The annotation of a field is its contract: `Literal` lists the choices.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddpm_jax.errors import UserError


class ConfigError(UserError):
    """A config that cannot be run; the message names the field and what it accepts."""


@dataclass
class DataConfig:
    name: str = "cifar10"  # digits, a set prepared by prepare_data.py such as lsun/cat, or folder
    path: str = ""  # name="folder" only: where the images are
    image_size: int = 32
    channels: int = 3
    flip: bool = True  # mirror each training image with probability 1/2, drawn anew at every step
    padding: int = 0  # zero border added on each side: 28x28 digits become 32x32 with padding=2
    crop: Literal["none", "center", "celeba64"] = "none"  # before the resize to image_size
    in_memory: bool = True  # decode once into RAM; False reads by random access at every step


@dataclass
class UNetConfig:
    """The network of Ho et al. 2020 by default; each switch is one that a published checkpoint family needs."""

    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2  # on the way down; the way up has one more
    attention_resolutions: tuple[int, ...] = (16,)  # sizes of the feature map, in pixels
    attention_in_mid: bool = True
    attention_placement: Literal["block", "level"] = "block"  # on the way up: after each block, or once a level
    heads: int = 1
    head_channels: int = 0  # > 0: as many heads as fit, and `heads` is ignored
    qkv_layout: Literal["separate", "fused", "fused_by_head"] = "separate"
    dropout: float = 0.1
    conditioning: Literal["add", "scale_shift"] = "add"  # how the time embedding enters a residual block
    embedding_order: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos"
    embedding_denominator: Literal["half_minus_one", "half"] = "half_minus_one"
    timestep_scale: float = 1.0  # the network sees t * timestep_scale
    group_norm_groups: int = 32
    group_norm_epsilon: float = 1e-6
    resampling: Literal["conv", "pool", "residual"] = "conv"
    down_padding: Literal["asymmetric", "symmetric"] = "asymmetric"  # of the strided 3x3: (0,1) as TF's SAME, or (1,1)
    skip_scale: float = 1.0  # residual sums are multiplied by this
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.0  # probability of hiding the label in training, for classifier-free guidance
    dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and matrix products; parameters stay float32
    remat: bool = False  # recompute each residual block in the backward pass: less memory, about a third more time


@dataclass
class DiffusionConfig:
    timesteps: int = 1000
    schedule: Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine", "sigmoid"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    rescale_betas: bool = False  # multiply both ends by 1000/timesteps, as Improved DDPM does; the paper does not
    prediction: Literal["eps", "x0", "v", "mu"] = "eps"
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "fixed_large"


@dataclass
class LossConfig:
    kind: Literal["simple", "vlb", "hybrid"] = "simple"
    vlb_weight: float = 1e-3  # hybrid: simple + vlb_weight * (bound in bits/dim)
    weighting: Literal["none", "min_snr", "p2"] = "none"  # of the squared error
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    timestep_sampling: Literal["uniform", "importance"] = "uniform"


@dataclass
class OptimizerConfig:
    learning_rate: float = 2e-4
    warmup_steps: int = 5000  # linear from 0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    gradient_clip: float = 1.0  # largest global norm; 0 switches clipping off


@dataclass
class TrainConfig:
    steps: int = 800_000
    batch_size: int = 128  # over all devices and hosts
    accumulation: int = 1  # microbatches a step, one after the other
    ema_decays: tuple[float, ...] = (0.9999,)  # the first is the one that sampling and evaluation use
    ema_warmup: bool = False  # decay min(d, (1+n)/(10+n)) at update n: for runs short against 1/(1-d)
    max_nonfinite_steps: int = 20  # consecutive skipped steps that end the run
    log_every: int = 100
    eval_every: int = 5000
    eval_images: int = 2048  # held-out images of the fixed-noise loss; 0 switches it off
    checkpoint_every: int = 5000
    keep_checkpoints: int = 3  # newest ones kept
    keep_every: int = 0  # besides, every checkpoint whose step it divides; 0: none
    keep_best: int = 0  # besides, so many with the lowest held-out loss; 0: none
    sample_every: int = 20_000  # a grid in workdir/samples; 0 switches it off
    sample_images: int = 64


@dataclass
class SamplingConfig:
    """What sample.py does when no flag says otherwise."""

    sampler: str = "ancestral"
    steps: int = 0  # 0: all timesteps
    spacing: str = "linspace"  # of the timesteps visited, where steps are fewer than all
    eta: float = 0.0  # sampler="ddim" only: share of the ancestral noise, 0 is deterministic
    clip: bool = True  # clip x0_hat to [-1, 1] before the update
    rederive_eps: bool = True  # where x0_hat was clipped, derive eps_hat from it again


@dataclass
class Config:
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def output_channels(self) -> int:
        """Channels the network emits: twice the image's where it predicts the variance too."""
        return self.data.channels * (2 if self.diffusion.variance.startswith("learned") else 1)


# ---------------------------------------------------------------------------------------------- in and out


def load_config(path: str | Path, overrides: typing.Iterable[str] = ()) -> Config:
    """The config of `configs/NAME.py`, `configs/NAME.py:VARIANT` or a run's config.json, with `section.field=value` overrides.

    Raises:
      ConfigError: no such file or variant, no `get_config`, or anything `override` and `validate` refuse.
    """
    name, _, variant = str(path).partition(":")
    if not Path(name).is_file():
        raise ConfigError(f"--config={path}: no such file; the ready ones are in configs/")
    config = _from_json(Path(name)) if name.endswith(".json") else _from_python(Path(name), variant)
    for item in overrides:
        override(config, item)
    return validate(config)


def _from_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--config={path}: not JSON: {error}") from error
    return from_dict(values, f"--config={path}")


def _from_python(path: Path, variant: str) -> Config:
    what = f"--config={path}"
    spec = importlib.util.spec_from_file_location(f"ddpm_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        variants = getattr(module, "VARIANTS", ())
        if variant not in (variants or ("",)):
            raise ConfigError(f"{what}:VARIANT, one of {', '.join(variants)}" if variants else f"{what} has no variants")
        config = module.get_config(variant) if variants else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's program: whatever it raises is a fault of the file
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{what}: get_config() must return a ddpm_jax.config.Config, not {type(config).__name__}")
    return _build(Config, to_dict(config), "", what)  # Python checks no types, this does


def override(config: Config, item: str) -> None:
    """Applies one `section.field=value`, the value written as in Python (strings without quotes)."""
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--config.{name}: write --config.{name}=VALUE")
    *sections, last = name.split(".")
    holder: Any = config
    for depth, section in enumerate(sections):
        _check_field(holder, section, ".".join(sections[:depth]))
        holder = getattr(holder, section)
        if not dataclasses.is_dataclass(holder):
            raise ConfigError(f"config.{name}: {'.'.join(sections[: depth + 1])} is a value, it has no fields")
    _check_field(holder, last, ".".join(sections))
    annotation = typing.get_type_hints(type(holder))[last]
    if dataclasses.is_dataclass(annotation):
        names = ", ".join(f.name for f in dataclasses.fields(annotation))
        raise ConfigError(f"config.{name} is a section; set one of its fields: {names}")
    setattr(holder, last, _typed(_parse(text, annotation), annotation, name))


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], what: str = "config") -> Config:
    """The inverse of `to_dict` and of config.json, refusing unknown fields and wrong types."""
    return validate(_build(Config, values, "", what))


def save_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """`path: old -> new` for each field that differs."""

    def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat = {}
        for key, value in values.items():
            flat.update(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return flat

    before, after = leaves(to_dict(old)), leaves(to_dict(new))
    return [f"{path}: {before[path]!r} -> {after[path]!r}" for path in before if before[path] != after[path]]


def _build(cls: type, values: Any, path: str, what: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path or 'the whole'} must be a JSON object, not {values!r}")
    hints, built = typing.get_type_hints(cls), cls()
    for name, value in values.items():
        _check_field(built, name, path)
        full = f"{path}.{name}" if path else name
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation):
            setattr(built, name, _build(annotation, value, full, what))
        else:
            setattr(built, name, _typed(value, annotation, full))
    return built


def _check_field(holder: Any, name: str, path: str) -> None:
    known = [f.name for f in dataclasses.fields(holder)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise ConfigError(f"config{'.' + path if path else ''} has no field {name!r}: {hint}")


def _parse(text: str, annotation: Any) -> Any:
    """Command-line text to a Python value; what does not read as a literal stays text for `_typed` to judge."""
    if annotation is str or typing.get_origin(annotation) is Literal:
        return text
    if annotation is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if typing.get_origin(annotation) is tuple and not isinstance(value, (tuple, list)):
        return (value,)
    return value


def _typed(value: Any, annotation: Any, name: str) -> Any:
    """`value` as the annotation wants it; ints pass for floats, lists for tuples, nothing else is converted."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ConfigError(f"config.{name}={value}: one of {', '.join(choices)}")
        return value
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"config.{name}={value}: a tuple of {item.__name__}, such as (1,2)")
        return tuple(_typed(element, item, name) for element in value)
    if annotation is float and type(value) is int:
        value = float(value)
    if annotation is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5 is how people write a hundred thousand steps
    if type(value) is not annotation:
        raise ConfigError(f"config.{name}={value}: must be {'true or false' if annotation is bool else annotation.__name__}")
    if annotation is float and not math.isfinite(value):
        raise ConfigError(f"config.{name}={value}: must be finite")
    return value


# ---------------------------------------------------------------------------------------------- what can be run


def validate(config: Config) -> Config:
    """Returns `config` if it can be run, whatever the machine; what depends on the devices is checked with the devices.

    Raises:
      ConfigError: naming the first field at fault and what it accepts.
    """

    def require(condition: bool, name: str, accepts: str) -> None:
        if not condition:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            raise ConfigError(f"config.{name}={value}: {accepts}")

    data, model, diffusion = config.data, config.model, config.diffusion
    optimizer, train, loss = config.optimizer, config.train, config.loss

    require(0 <= config.seed < 2**32, "seed", "must be in 0..2^32-1")
    for section, holder in vars(config).items():
        for name, value in vars(holder).items() if dataclasses.is_dataclass(holder) else ():
            require(type(value) is not int or value < 2**31, f"{section}.{name}", "must be below 2^31")

    require(data.image_size >= 1, "data.image_size", "must be at least 1")
    require(data.channels in (1, 3), "data.channels", "must be 1 (grey) or 3 (RGB)")
    require(0 <= data.padding < data.image_size / 2, "data.padding", "must be at least 0 and leave some image")
    require(
        re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?", data.name) is not None,
        "data.name",
        "NAME or NAME/CONFIGURATION, of letters, digits, '_' and '-'",
    )
    require((data.name == "folder") == bool(data.path), "data.path", "set it for, and only for, data.name=folder")

    levels = len(model.channel_mult)
    require(levels >= 1 and min(model.channel_mult) >= 1, "model.channel_mult", "one positive factor a level, such as (1,2,2,2)")
    factor = 2 ** (levels - 1)
    require(
        data.image_size % factor == 0,
        "data.image_size",
        f"must be divisible by {factor}, for the {levels} levels of model.channel_mult",
    )
    require(model.group_norm_groups >= 1, "model.group_norm_groups", "must be at least 1")
    require(
        model.base_channels >= 2 and model.base_channels % model.group_norm_groups == 0,
        "model.base_channels",
        f"must be a multiple of model.group_norm_groups={model.group_norm_groups}",
    )
    require(model.blocks_per_level >= 1, "model.blocks_per_level", "must be at least 1")
    sizes = [data.image_size // 2**i for i in range(levels)]
    require(
        all(r in sizes for r in model.attention_resolutions),
        "model.attention_resolutions",
        f"sizes of this network's feature maps: {', '.join(map(str, sizes))}",
    )
    require(model.heads >= 1, "model.heads", "must be at least 1")
    require(model.head_channels >= 0, "model.head_channels", "must be at least 0 (0: use heads)")
    widths = [model.base_channels * m for m, size in zip(model.channel_mult, sizes) if size in model.attention_resolutions]
    widths += [model.base_channels * model.channel_mult[-1]] * model.attention_in_mid
    per_head, name = (model.head_channels, "head_channels") if model.head_channels else (model.heads, "heads")
    require(all(w % per_head == 0 for w in widths), f"model.{name}", f"must divide the widths with attention: {widths}")
    require(0 <= model.dropout < 1, "model.dropout", "must be in [0, 1)")
    require(0 <= model.label_dropout <= 1, "model.label_dropout", "must be in [0, 1]")
    require(model.num_classes >= 0, "model.num_classes", "must be at least 0")
    require(model.group_norm_epsilon > 0, "model.group_norm_epsilon", "must be positive")
    require(model.timestep_scale > 0, "model.timestep_scale", "must be positive")
    require(model.skip_scale > 0, "model.skip_scale", "must be positive")

    require(diffusion.timesteps >= 1, "diffusion.timesteps", "must be at least 1")
    require(0 < diffusion.beta_start < 1, "diffusion.beta_start", "must be in (0, 1)")
    require(0 < diffusion.beta_end < 1, "diffusion.beta_end", "must be in (0, 1)")
    scale = 1000 / diffusion.timesteps if diffusion.rescale_betas else 1.0
    require(
        scale * max(diffusion.beta_start, diffusion.beta_end) < 1,
        "diffusion.rescale_betas",
        "the rescaled betas must stay below 1: more timesteps, or smaller ends",
    )
    require(
        not (diffusion.schedule == "jsd" and diffusion.prediction == "eps"),
        "diffusion.prediction",
        "schedule jsd ends at alphas_cumprod = 0, from which eps cannot give x0: use x0, v or mu",
    )

    learned = diffusion.variance.startswith("learned")
    require(not (loss.kind == "hybrid" and not learned), "loss.kind", "hybrid trains a learned variance: set diffusion.variance")
    require(
        not (loss.kind == "simple" and learned),
        "loss.kind",
        f"diffusion.variance={diffusion.variance} is trained by vlb or hybrid",
    )
    require(loss.kind != "vlb" or loss.weighting == "none", "loss.weighting", "applies to the squared error, not to vlb")
    require(loss.vlb_weight > 0, "loss.vlb_weight", "must be positive")
    require(loss.min_snr_gamma > 0, "loss.min_snr_gamma", "must be positive")
    require(loss.p2_k > 0, "loss.p2_k", "must be positive")
    require(loss.p2_gamma >= 0, "loss.p2_gamma", "must be at least 0")

    require(optimizer.learning_rate > 0, "optimizer.learning_rate", "must be positive")
    require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps", "must be at least 0")
    require(0 <= optimizer.beta1 < 1, "optimizer.beta1", "must be in [0, 1)")
    require(0 <= optimizer.beta2 < 1, "optimizer.beta2", "must be in [0, 1)")
    require(optimizer.epsilon > 0, "optimizer.epsilon", "must be positive")
    require(optimizer.gradient_clip >= 0, "optimizer.gradient_clip", "must be at least 0 (0: no clipping)")

    for name in ("steps", "batch_size", "accumulation", "max_nonfinite_steps", "log_every", "eval_every"):
        require(getattr(train, name) >= 1, f"train.{name}", "must be at least 1")
    for name in ("checkpoint_every", "keep_checkpoints", "sample_images"):
        require(getattr(train, name) >= 1, f"train.{name}", "must be at least 1")
    for name in ("eval_images", "keep_every", "keep_best", "sample_every"):
        require(getattr(train, name) >= 0, f"train.{name}", "must be at least 0")
    measured = train.eval_images > 0 and train.checkpoint_every % train.eval_every == 0
    require(
        not train.keep_best or measured,
        "train.keep_best",
        "needs a held-out loss for each checkpoint: train.eval_images, and an eval_every that divides checkpoint_every",
    )
    require(
        train.batch_size % train.accumulation == 0,
        "train.batch_size",
        f"must be divisible by train.accumulation={train.accumulation}",
    )
    require(len(train.ema_decays) >= 1, "train.ema_decays", "at least one decay, such as (0.9999,)")
    require(all(0 <= d < 1 for d in train.ema_decays), "train.ema_decays", "each in [0, 1)")
    require(len(set(train.ema_decays)) == len(train.ema_decays), "train.ema_decays", "each decay once")

    require(0 <= config.sampling.steps <= diffusion.timesteps, "sampling.steps", f"must be in 0..{diffusion.timesteps}")
    require(0 <= config.sampling.eta <= 1, "sampling.eta", "must be in 0..1")
    return config
