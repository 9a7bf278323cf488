"""Describe everything that a run is, as nested dataclasses.

A file `configs/NAME.py` has one function, `get_config() -> Config`. That of a family, such as the
rows of a table, lists them in `VARIANTS`, and `configs/NAME.py:VARIANT` is `get_config(VARIANT)`.
Command lines override single fields by path (`config.optimizer.learning_rate=1e-4`), run
directories keep the result as config.json, and both come back through the same typed door: a
misspelt field, a wrong type or an impossible value raises ConfigError, a one-line message that
names the field and what it accepts.

The annotation of a field is its contract: `Literal` lists the choices, rules say which values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from ddpm_jax.config.rules import AtLeast, In, Positive, Rule, check_name
from ddpm_jax.diffusion.losses import Objective
from ddpm_jax.diffusion.process import Prediction, Variance
from ddpm_jax.diffusion.schedule import Schedule

_CHANNELS = Rule(lambda value: value in (1, 3, 4), "must be 1 (grey), 3 (RGB) or 4 (RGBA)")
_SIDES = Rule(
    lambda value: all(1 <= side < 2**31 for side in np.ravel(value)), "must be at least 1"
)
_SET_NAME = Rule(
    lambda value: re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?", value) is not None,
    "NAME or NAME/CONFIGURATION, of letters, digits, '_' and '-'",
)
_FACTORS = Rule(
    lambda value: len(value) >= 1 and min(value) >= 1,
    "one positive factor a level, such as (1,2,2,2)",
)
_SOME_DECAY = Rule(lambda value: len(value) >= 1, "at least one decay, such as (0.9999,)")
_DECAYS = Rule(lambda value: all(0 <= decay < 1 for decay in value), "each in [0, 1)")
_DISTINCT = Rule(lambda value: len(set(value)) == len(value), "each decay once")


class Fields:
    """What has the fields of its annotations and takes no others, which would be of no effect."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; ConfigError names the nearest one where there is none of this name."""
        check_name(self, name, type(self).__name__)
        super().__setattr__(name, value)


@dataclass
class DataConfig(Fields):
    """Which images, in what form."""

    # digits, a set prepared by prepare_data.py such as lsun/cat, or folder
    name: Annotated[str, _SET_NAME] = "cifar10"
    path: str = ""  # name="folder" only: where the images are
    image_size: Annotated[int | tuple[int, int], _SIDES] = 32  # of a square, or (height, width)
    channels: Annotated[int, _CHANNELS] = 3
    flip: bool = True  # mirror each training image with probability 1/2, drawn anew at every step
    padding: int = 0  # zero border added on each side: 28x28 digits become 32x32 with padding=2
    crop: Literal["none", "center", "celeba64"] = "none"  # before the resize to image_size
    in_memory: bool = True  # decode once into RAM, if it fits; else read at every step
    # name="folder" only: every so many images one is held out, the last one if there are fewer
    held_out_every: Annotated[int, AtLeast(2)] = 50
    # name="folder" only: the folders right below path are classes (model.num_classes: how many)
    classes: bool = False
    skip_bad: bool = (
        False  # leave out images that do not decode or fit, instead of refusing the set
    )

    def __post_init__(self) -> None:
        """Write a square as one number."""
        sides = np.ravel(self.image_size).tolist()
        if len(sides) == 2 and sides[0] == sides[1]:
            self.image_size = sides[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Return the height and the width of the images, with their border."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def inner_sides(self) -> tuple[int, int]:
        """Return the height and the width of the images, without their border."""
        height, width = self.sides
        return height - 2 * self.padding, width - 2 * self.padding


@dataclass
class UNetConfig(Fields):
    """The network of Ho et al. 2020 by default.

    Each switch is one that a published checkpoint family needs.
    """

    base_channels: int = 128
    channel_mult: Annotated[tuple[int, ...], _FACTORS] = (1, 2, 2, 2)
    blocks_per_level: Annotated[int, AtLeast(1)] = 2  # on the way down; the way up has one more
    attention_resolutions: tuple[int, ...] = (16,)  # heights of the feature map, in pixels
    attention_in_mid: bool = True
    # on the way up: after each block, or once a level
    attention_placement: Literal["block", "level"] = "block"
    heads: Annotated[int, AtLeast(1)] = 1
    # > 0: as many heads as fit, and `heads` is ignored
    head_channels: Annotated[int, AtLeast(0, "0: use heads")] = 0
    qkv_layout: Literal["separate", "fused", "fused_by_head"] = "separate"
    dropout: Annotated[float, In("[0, 1)")] = 0.1
    # how the time embedding enters a residual block
    conditioning: Literal["add", "scale_shift"] = "add"
    embedding_order: Literal["sin_cos", "cos_sin", "interleaved"] = "sin_cos"
    embedding_denominator: Literal["half_minus_one", "half"] = "half_minus_one"
    timestep_scale: Annotated[float, Positive()] = 1.0  # the network sees t * timestep_scale
    group_norm_groups: Annotated[int, AtLeast(1)] = 32
    group_norm_epsilon: Annotated[float, Positive()] = 1e-6
    resampling: Literal["conv", "pool", "residual"] = "conv"
    # of the strided 3x3: (0,1) as TF's SAME, or (1,1)
    down_padding: Literal["asymmetric", "symmetric"] = "asymmetric"
    skip_scale: Annotated[float, Positive()] = 1.0  # residual sums are multiplied by this
    num_classes: Annotated[int, AtLeast(0)] = 0  # 0: unconditional
    # probability of hiding the label in training, for classifier-free guidance
    label_dropout: Annotated[float, In("[0, 1]")] = 0.0
    # of convolutions and matrix products; parameters stay float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # recompute each residual block in the backward pass: less memory, about a third more time
    remat: bool = False


@dataclass
class DiffusionConfig(Fields):
    """The forward process, and what the network predicts of it."""

    timesteps: Annotated[int, AtLeast(1)] = 1000
    schedule: Schedule = "linear"
    beta_start: Annotated[float, In("(0, 1)")] = 1e-4
    beta_end: Annotated[float, In("(0, 1)")] = 0.02
    # multiply both ends by 1000/timesteps, as Improved DDPM does; the paper does not
    rescale_betas: bool = False
    # shift and scale sqrt(alphas_cumprod) to end at 0 exactly, in the noise that samples start from
    zero_terminal_snr: bool = False
    prediction: Prediction = "eps"
    variance: Variance = "fixed_large"


@dataclass
class LossConfig(Fields, Objective):
    """The objective (its fields stand in diffusion/losses.py), and the draw of its timesteps."""

    timestep_sampling: Literal["uniform", "importance"] = "uniform"

    def __post_init__(self) -> None:
        """Leave the choices to the config's own door, which names the field."""


@dataclass
class OptimizerConfig(Fields):
    """Adam, its learning rate from step to step and the clip of its gradients."""

    learning_rate: Annotated[float, Positive()] = 2e-4
    warmup_steps: Annotated[int, AtLeast(0)] = 5000  # linear from 0
    # after the warm-up: a straight line or half a cosine that ends at train.steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # of learning_rate, where schedule is linear or cosine: what is left at the end
    final_fraction: Annotated[float, In("[0, 1]")] = 0.0
    beta1: Annotated[float, In("[0, 1)")] = 0.9
    beta2: Annotated[float, In("[0, 1)")] = 0.999
    epsilon: Annotated[float, Positive()] = 1e-8
    # of AdamW: each update takes this times the learning rate off every parameter
    weight_decay: Annotated[float, AtLeast(0, "0: Adam")] = 0.0
    # largest global norm; 0 switches clipping off
    gradient_clip: Annotated[float, AtLeast(0, "0: no clipping")] = 1.0


@dataclass
class TrainConfig(Fields):
    """How long, how much at once, and what is written when."""

    steps: Annotated[int, AtLeast(1)] = 800_000
    batch_size: Annotated[int, AtLeast(1)] = 128  # over all devices and hosts
    accumulation: Annotated[int, AtLeast(1)] = 1  # microbatches a step, one after the other
    # the first is the one that sampling and evaluation use
    ema_decays: Annotated[tuple[float, ...], _SOME_DECAY, _DECAYS, _DISTINCT] = (0.9999,)
    # decay min(d, (1+n)/(10+n)) at update n: for runs short against 1/(1-d)
    ema_warmup: bool = False
    # consecutive skipped steps that end the run
    max_nonfinite_steps: Annotated[int, AtLeast(1)] = 20
    log_every: Annotated[int, AtLeast(1)] = 100
    eval_every: Annotated[int, AtLeast(1)] = 5000
    # held-out images of the fixed-noise loss; 0 switches it off
    eval_images: Annotated[int, AtLeast(0)] = 2048
    checkpoint_every: Annotated[int, AtLeast(1)] = 5000
    keep_checkpoints: Annotated[int, AtLeast(1)] = 3  # newest ones kept
    # besides, every checkpoint whose step it divides; 0: none
    keep_every: Annotated[int, AtLeast(0)] = 0
    # besides, so many with the lowest held-out loss; 0: none
    keep_best: Annotated[int, AtLeast(0)] = 0
    # a grid in workdir/samples; 0 switches it off
    sample_every: Annotated[int, AtLeast(0)] = 20_000
    sample_images: Annotated[int, AtLeast(1)] = 64


@dataclass
class SamplingConfig(Fields):
    """What sample.py does when no flag says otherwise."""

    sampler: str = "ancestral"
    steps: int = 0  # 0: all timesteps
    spacing: str = "linspace"  # of the timesteps visited, where steps are fewer than all
    # sampler="ddim" only: share of the ancestral noise, 0 is deterministic
    eta: Annotated[float, Rule(lambda value: 0 <= value <= 1, "must be in 0..1")] = 0.0
    # sampler="deis" and "unipc" only
    order: Annotated[
        int, Rule(lambda value: value in (0, 2, 3), "must be 2 or 3 (0: the default, 2)")
    ] = 0
    clip: bool = True  # clip x0_hat to [-1, 1] before the update
    rederive_eps: bool = True  # where x0_hat was clipped, derive eps_hat from it again
    # instead of clipping, limit each sample's x0_hat by this percentile of its pixels, e.g. 0.995
    dynamic_threshold: Annotated[float, In("[0, 1]")] = 0.0


@dataclass
class DistillationConfig(Fields):
    """What a student of distillation/ learns from; `ddpm distill` sets it, other runs have none."""

    steps: Annotated[int, AtLeast(0, "0: no student")] = 0  # of the student, half of the teacher's
    teacher: str = ""  # its run directory; origin.json has the checkpoint
    weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"  # of the error of x0


@dataclass
class Config(Fields):
    """Everything that a run is."""

    seed: Annotated[int, Rule(lambda value: 0 <= value < 2**32, "must be in 0..2^32-1")] = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    @property
    def output_channels(self) -> int:
        """Return the network's channels: twice the image's where it predicts the variance too."""
        return self.data.channels * (2 if self.diffusion.variance.startswith("learned") else 1)
