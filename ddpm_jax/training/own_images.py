"""Choose a config for a folder of images: size, channels, network, and how long to train.

The choices are those of the configs that ship, scaled to the images and the machine. They are
written into config.json, and each says its reason, so that nothing is decided in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    UNetConfig,
    override,
    validate,
)
from ddpm_jax.data import decoding
from ddpm_jax.data.classes import some_of
from ddpm_jax.data.folder import HELD_OUT_EVERY, folder_classes, scan, split_folder
from ddpm_jax.errors import DataError, check
from ddpm_jax.machine import memory
from ddpm_jax.parallel.devices import Devices

SIZES = (256, 128, 64, 32, 16, 8)
LARGE = 128  # pixels from which on the recipe is that of CelebA-HQ
ALIGNED = (178, 218)  # CelebA's aligned faces
_LOOKED_AT = 20_000  # images whose size is read
_DECODED = 64  # images whose channels are looked at


@dataclass(frozen=True)
class Choice:
    """A field of the config, or the argument `image_size`; its value, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What a folder's images are like.

    Attributes:
      count: how many there are.
      sizes: (width, height) of those looked at, with their numbers.
      grey: whether all that were decoded are grey.
    """

    count: int
    sizes: Counter[tuple[int, int]]
    grey: bool

    @property
    def one_size(self) -> tuple[int, int] | None:
        """Return the size of the images, if all have the same."""
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None

    def smallest_side(self, share: float = 0.0) -> int:
        """Return the side that all images have at least, but for a `share` of them."""
        sides = np.repeat([min(size) for size in self.sizes], list(self.sizes.values()))
        return int(np.quantile(sides, share, method="lower"))


def choose_config(
    folder: Path,
    devices: Devices,
    *,
    image_size: int | None = None,
    overrides: Iterable[str] = (),
) -> tuple[Config, list[Choice]]:
    """Choose a config for training on the images under `folder`.

    Args:
      image_size: the side of the images that the network sees, after any border; what `overrides`
        say of data.image_size is the same.
      overrides: `section.field=value` each; they win over what is chosen.

    Returns:
      The config, and what was chosen but for what `overrides` say.

    Raises:
      DataError: no images, none that can be read, or with data.classes=true no classes.
      ConfigError: an override that does not serve.
    """
    overrides = list(overrides)
    said, asked = {item.partition("=")[0] for item in overrides}, Config()
    for item in overrides:
        override(asked, item)
    if "data.image_size" in said:
        said.add("image_size")
        size = asked.data.image_size
        check(
            image_size in (None, size),
            f"image_size={image_size}, and config.data.image_size={size}: leave one of them out",
        )
        image_size = size
    listing = scan(folder)
    paths, survey = listing.images, survey_images(listing.images)
    classes = folder_classes(listing) if asked.data.classes else ()
    fast = devices.devices[0].platform != "cpu"
    data, why = choose_data(folder, survey, image_size, fast, asked.data.skip_bad)
    side = min(data.sides)
    config = Config(
        data=data,
        model=choose_network(data.image_size, fast, len(classes)),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        loss=LossConfig(weighting="min_snr"),
        optimizer=choose_optimizer(side, fast),
        train=choose_training(side, fast, len(devices.devices)),
        sampling=SamplingConfig() if fast else SamplingConfig(sampler="ddim", steps=50),
    )
    for item in overrides:
        override(config, item)
    validate(config)
    held_out = len(split_folder(paths, "test", config.data.held_out_every))
    if "train.eval_images" not in said:
        config.train.eval_images = min(held_out, config.train.eval_images)
    choices = [*why, *_explain_classes(config, classes), *_explain(config, fast, held_out)]
    return config, [choice for choice in choices if choice.field not in said]


def survey_images(paths: Sequence[Path]) -> Survey:
    """Look at images: the sizes of most, the channels of a few. Bad ones are for others to name.

    Raises:
      DataError: none can be read.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for path in _some(paths, _LOOKED_AT):
        try:
            with Image.open(path, formats=decoding.FORMATS) as image:
                sizes[image.size] += 1
        except Exception:  # a damaged file can fail in any way
            continue
    grey = []
    for path in _some(paths, _DECODED):
        try:
            grey.append(_is_grey(decoding.open_image(path, str(path))))
        except DataError:
            continue
    if not sizes or not grey:
        raise DataError(f"{paths[0]} and the others cannot be read as images: name another folder")
    return Survey(len(paths), sizes, all(grey))


def choose_data(
    folder: Path,
    survey: Survey,
    image_size: int | tuple[int, int] | None,
    fast: bool,
    skip_bad: bool,
) -> tuple[DataConfig, list[Choice]]:
    """Choose the form of the images: crop, size, border, channels, flips and held-out share."""
    limit = 64 if fast else 32
    side, one = survey.smallest_side(0.05 if skip_bad else 0.0), survey.one_size
    square = one is not None and one[0] == one[1]
    padding, crop = 0, "celeba64" if one == ALIGNED else "center"
    if isinstance(image_size, tuple):
        crop = "none" if one == image_size[::-1] else "center"
    if square and image_size in (None, side) and side <= max(limit, image_size or 0):
        crop = "none"
        if side % 8 and side % 2 == 0 and image_size is None:
            padding = (8 - side % 8) // 2
        size = side + 2 * padding
        reason = f"the images are {side}x{side}" + (f", with a border of {padding}" * bool(padding))
    elif image_size is not None:
        size, reason = image_size, "as you say"
    else:
        size = next((size for size in SIZES if size <= min(side, limit)), side)
        machine = "" if fast else ", and more takes a CPU days"
        reason = f"the smallest side of an image is {side}{machine}"
    if image_size is None and crop == "none" and size % 2:  # a network halves the size
        size, crop = size - 1, "center"
        reason = f"the images are {side}x{side}, shrunk by one pixel"
    pixels = survey.count * int(np.prod(np.broadcast_to(size, 2))) * (1 if survey.grey else 3)
    data = DataConfig(
        name="folder",
        path=str(folder),
        image_size=size,
        channels=1 if survey.grey else 3,
        flip=not survey.grey,
        padding=padding,
        crop=crop,
        in_memory=pixels <= memory() / 4,
        held_out_every=HELD_OUT_EVERY if survey.count >= 1000 else 10,
    )
    flip = "grey images may be letters or digits" if survey.grey else "not for letters or digits"
    return data, [
        Choice("image_size", str(size), reason),
        Choice("data.crop", crop, "what is left of an image before it is shrunk"),
        Choice("data.channels", str(data.channels), "grey" if survey.grey else "colour"),
        Choice("data.flip", str(data.flip).lower(), f"mirrored half of the time; {flip}"),
        Choice("data.held_out_every", str(data.held_out_every), "images, of which one is held out"),
    ]


def choose_network(size: int | tuple[int, int], fast: bool, classes: int = 0) -> UNetConfig:
    """Choose the paper's network for this size, or on a CPU the small one of the configs.

    Levels are added while the size can be halved, down to 4 pixels of the shorter side (8 on a
    CPU). Where there are classes, a label in ten is hidden, so that samples can be guided.
    """
    labels = {"num_classes": classes, "label_dropout": 0.1 if classes else 0.0}
    sides = np.broadcast_to(size, 2)
    levels = [sides]
    while not np.any(levels[-1] % 2) and (min(levels[-1]) > (4 if fast else 8) or len(levels) < 2):
        levels.append(levels[-1] // 2)
    # Attention goes by the height, and is chosen by the shorter side.
    sizes = {int(level[0]): int(min(level)) for level in levels[:6]}
    if not fast:
        return UNetConfig(
            base_channels=32,
            channel_mult=(1, 2, 4, 4, 4, 4)[: len(sizes)],
            blocks_per_level=1,
            attention_resolutions=tuple(h for h, s in sizes.items() if 4 <= s <= 8)[:1],
            group_norm_groups=16,
            dropout=0.0,
            **labels,
        )
    mults = {5: (1, 2, 2, 2, 4), 6: (1, 1, 2, 2, 4, 4)}
    return UNetConfig(
        base_channels=128,
        channel_mult=mults.get(len(sizes), (1, 2, 2, 2)[: len(sizes)]),
        attention_resolutions=tuple(h for h, s in sizes.items() if 8 < s <= 16),
        dtype="bfloat16",
        **labels,
    )


def choose_optimizer(size: int, fast: bool) -> OptimizerConfig:
    """Choose the learning rate for images of this size: 2e-4 is unstable with large ones."""
    if not fast:
        return OptimizerConfig(learning_rate=1e-3, warmup_steps=500)
    return OptimizerConfig(learning_rate=2e-5 if size >= LARGE else 2e-4, warmup_steps=5000)


def choose_training(size: int, fast: bool, devices: int) -> TrainConfig:
    """Choose batch, length and how often to look, for images of this size and this machine."""
    if fast:
        batch_size = 64 if size >= LARGE else 128
        return TrainConfig(
            steps=200_000,
            batch_size=-(-batch_size // devices) * devices,
            ema_warmup=True,
            eval_images=2048,
            sample_every=10_000,
        )
    return TrainConfig(
        steps=20_000,
        batch_size=-(-32 // devices) * devices,
        ema_decays=(0.999,),
        ema_warmup=True,
        log_every=50,
        eval_every=500,
        eval_images=512,
        checkpoint_every=500,
        sample_every=2000,
        sample_images=16,
    )


def _explain_classes(config: Config, classes: Sequence[str]) -> list[Choice]:
    model = config.model
    return [
        Choice("model.num_classes", str(model.num_classes), some_of(classes)),
        Choice("model.label_dropout", str(model.label_dropout), "of the labels hidden: guidance"),
    ][: 2 * len(classes)]


def _explain(config: Config, fast: bool, held_out: int) -> list[Choice]:
    model, train = config.model, config.train
    where = "this accelerator" if fast else "a CPU"
    mults = ",".join(map(str, model.channel_mult))
    return [
        Choice("data.in_memory", str(config.data.in_memory).lower(), "decoded once, into RAM"),
        Choice("diffusion.schedule", config.diffusion.schedule, "draws sooner than linear would"),
        Choice("diffusion.prediction", config.diffusion.prediction, "sooner than eps, the paper's"),
        Choice("loss.weighting", config.loss.weighting, "goes with it; the paper's is none"),
        Choice("model.base_channels", str(model.base_channels), f"for {where}: the width"),
        Choice("model.channel_mult", f"({mults})", "times the width, level by level"),
        Choice("train.batch_size", str(train.batch_size), "images a step"),
        Choice(
            "train.steps",
            f"{train.steps}",
            "at most: Ctrl-C stops at any time, and the same command goes on",
        ),
        Choice("train.eval_images", str(train.eval_images), f"of {held_out:,} held out"),
        Choice(
            "sampling.sampler", config.sampling.sampler, "of samples, unless they say otherwise"
        ),
        Choice(
            "sampling.steps", str(config.sampling.steps), "0 is all; a CPU takes minutes for those"
        ),
    ]


def _some(paths: Sequence[Path], count: int) -> list[Path]:
    """Return so many of `paths`, evenly spaced, or all."""
    rows = np.unique(np.linspace(0, len(paths) - 1, count).astype(int))
    return [paths[row] for row in rows]


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA"):
        return True
    red, green, blue = (np.asarray(image.convert("RGB").getchannel(name)) for name in "RGB")
    return np.array_equal(red, green) and np.array_equal(green, blue)
