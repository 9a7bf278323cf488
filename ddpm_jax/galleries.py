"""The paper's figures as panels: float arrays [rows, columns, h, w, c] in [-1, 1], which `picture` makes a PNG of.

A level is what the paper calls t, the number of diffusion steps an image has gone through: 0 is the image, T is noise. On a
strided chain the nearest level it visits is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ddpm_jax import images
from ddpm_jax.build import Params, image_shape
from ddpm_jax.config import ConfigError, DataConfig
from ddpm_jax.data import decoding
from ddpm_jax.data.errors import DataError
from ddpm_jax.data.sources import Source, decode_file
from ddpm_jax.diffusion import q_sample
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.neighbours import Nearest
from ddpm_jax.generate import Generator, sample_keys
from ddpm_jax.progress import Progress
from ddpm_jax.sampling import forward_noise, initial_noise


def picture(panel: np.ndarray, scale: int = 1) -> np.ndarray:
    """A panel as one uint8 picture."""
    rows = panel.reshape(-1, *panel.shape[2:])
    return images.grid(images.to_uint8(rows), columns=panel.shape[1], scale=scale)


def start_of(generator: Generator, level: int) -> tuple[int, int]:
    """The row that denoises x at `level` 1..T, and the timestep that row is at; ConfigError for another level."""
    timesteps = generator.process.schedule.timesteps
    if not 1 <= level <= timesteps:
        raise ConfigError(f"level={level}: must be in 1..{timesteps}")
    row = generator.table.row_at(level - 1)
    return row, int(generator.table.timesteps[row])


# ---------------------------------------------------------------------------------------------- from noise


def denoising(
    generator: Generator, params: Params, *, seed: int, indices: np.ndarray, labels: np.ndarray | None = None, scale: int = 1
) -> np.ndarray:
    """What a generator recorded, as the frames of a film of all samples together: uint8 [K, h, w, c]."""
    frames = generator.draw(params, seed=seed, indices=indices, labels=labels)
    return np.stack([images.grid(images.to_uint8(frame), scale=scale) for frame in frames.swapaxes(0, 1)])


def shared_latents(
    generator: Generator, params: Params, *, seed: int, index: int, levels: Sequence[int], variants: int, label: int | None = None
) -> np.ndarray:
    """Figure 7: for each level a row with x_t of sample `index` there, then `variants` samples that go on from it.

    All rows belong to one way down; variant j draws the same noise in each row.
    """
    starts = np.array([start_of(generator, level)[0] for level in levels])
    same = np.full(len(levels), index)
    keys = sample_keys(jnp.full(len(levels), seed, jnp.uint32), jnp.asarray(same, jnp.uint32))
    # Given x_T, the ways down and on are calls of one kind: one compilation.
    x = np.asarray(initial_noise(keys, image_shape(generator.config), generator.process.schedule.timesteps))
    labels, span = _labels(label, len(levels)), (np.zeros_like(starts), starts)
    latents = generator.draw(params, seed=seed, indices=same, labels=labels, x=x, span=span)
    first = starts.repeat(variants)
    samples = generator.draw(
        params,
        seed=seed,
        indices=np.tile(index + 1 + np.arange(variants), len(levels)),
        labels=_labels(label, len(first)),
        x=latents.repeat(variants, axis=0),
        span=(first, np.full_like(first, generator.table.steps)),
    )
    return np.concatenate([latents[:, None], samples.reshape(len(levels), variants, *samples.shape[1:])], axis=1)


# ---------------------------------------------------------------------------------------------- between two images


def mixes(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    pair: np.ndarray,
    levels: Sequence[int],
    weights: Sequence[float],
    indices: np.ndarray,
    shared_noise: bool = True,
    label: int | None = None,
) -> np.ndarray:
    """Two images diffused to a level, mixed there as (1 - weight) x_t + weight x_t', and denoised (section 4.3).

    The forward noise is one draw for all weights and levels, and a weight's noise on the way back the same at every level. Level
    0 is the plain mix of pixels.

    Args:
      pair: [2,h,w,c] in [-1, 1].
      indices: for each weight, the number of the sample whose noise it takes on the way back.
      shared_noise: both images get the same eps, so that a mix is as noisy as its timestep says; otherwise each its own, as in
        the paper's code, which leaves mixes short of noise, by half its variance at weight 0.5.

    Returns:
      float32 [levels, weights, h, w, c].
    """
    shape, timesteps = pair.shape[1:], generator.process.schedule.timesteps
    key = sample_keys(jnp.array([seed], jnp.uint32), jnp.array([0], jnp.uint32))
    eps = jnp.concatenate([forward_noise(key, shape, timesteps, 0 if shared_noise else i) for i in range(2)])
    share = np.asarray(weights, np.float32)[:, None, None, None]
    starts, first = [], []
    for level in levels:
        row, noisy = generator.table.steps, pair
        if level:
            row, timestep = start_of(generator, level)
            noisy = np.asarray(q_sample(generator.process.schedule, pair, jnp.full(2, timestep), eps))
        starts.append((1 - share) * noisy[0] + share * noisy[1])
        first.append(np.full(len(weights), row))
    rows = np.concatenate(first)
    samples = generator.draw(
        params,
        seed=seed,
        indices=np.tile(indices, len(levels)),
        labels=_labels(label, len(rows)),
        x=np.concatenate(starts),
        span=(rows, np.full_like(rows, generator.table.steps)),
    )
    return samples.reshape(len(levels), len(weights), *shape)


def interpolation(
    generator: Generator, params: Params, *, pair: np.ndarray, level: int, weights: Sequence[float], **options
) -> np.ndarray:
    """Figure 8, one row: the first image, `mixes` at `level`, the second image. All noise is the same for all weights."""
    same = np.zeros(len(weights), int)
    row = mixes(generator, params, pair=pair, levels=[level], weights=weights, indices=same, **options)[0]
    return np.concatenate([pair[:1], row, pair[1:]])[None]


def coarse_to_fine(
    generator: Generator, params: Params, *, pair: np.ndarray, rows: int, weights: Sequence[float], **options
) -> np.ndarray:
    """Figure 9: `rows` rows of `mixes` at levels 0 to T in equal steps, the images at both ends of each.

    Each weight has noise of its own on the way back, so that the row at T holds as many different samples.
    """
    if rows < 2:
        raise ConfigError(f"rows={rows}: must be at least 2")
    levels = np.rint(np.linspace(0, generator.process.schedule.timesteps, rows)).astype(int).tolist()
    own = np.arange(len(weights))
    middle = mixes(generator, params, pair=pair, levels=levels, weights=weights, indices=own, **options)
    ends = [np.broadcast_to(image, (rows, 1, *image.shape)) for image in pair]
    return np.concatenate([ends[0], middle, ends[1]], axis=1)


def slerp(first: np.ndarray, second: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """sin((1-w) angle)/sin(angle) first + sin(w angle)/sin(angle) second, [weights, ...]: the great circle between two codes."""
    cosine = (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = np.arccos(np.clip(cosine, -1, 1))
    w = np.asarray(weights).reshape(-1, *(1,) * first.ndim)
    if np.sin(angle) < 1e-6:  # nearly parallel codes: the straight line is the limit
        return (1 - w) * first + w * second
    return (np.sin((1 - w) * angle) * first + np.sin(w * angle) * second) / np.sin(angle)


def latent_interpolation(
    encoder: Generator,
    decoder: Generator,
    params: Params,
    *,
    pair: np.ndarray,
    weights: Sequence[float],
    label: int | None = None,
) -> np.ndarray:
    """Two images encoded by DDIM, `slerp` between their x_T, decoded: one row, the images at both ends."""
    codes = encoder.draw(params, seed=0, indices=np.arange(2), labels=_labels(label, 2), x=pair)
    between = slerp(codes[0], codes[1], weights)
    decoded = decoder.draw(params, seed=0, indices=np.arange(len(between)), labels=_labels(label, len(between)), x=between)
    return np.concatenate([pair[:1], decoded, pair[1:]])[None]


# ---------------------------------------------------------------------------------------------- of given images


def reconstruction(
    encoder: Generator, decoder: Generator, params: Params, *, originals: np.ndarray, label: int | None = None
) -> tuple[np.ndarray, float]:
    """DDIM to x_T and back (Song et al. 2021, Table 2).

    Returns:
      The images above what comes back, and the mean squared error a pixel of values in [0, 1].
    """
    numbers, labels = np.arange(len(originals)), _labels(label, len(originals))
    codes = encoder.draw(params, seed=0, indices=numbers, labels=labels, x=originals)
    decoded = decoder.draw(params, seed=0, indices=numbers, labels=labels, x=codes)
    return np.stack([originals, decoded]), float(np.mean(((decoded - originals).astype(np.float64) / 2) ** 2))


def inpainting(
    generator: Generator,
    params: Params,
    *,
    seed: int,
    originals: np.ndarray,
    mask: np.ndarray,
    variants: int,
    label: int | None = None,
) -> np.ndarray:
    """Each image with its hole in grey, then `variants` ways of filling it, then the image.

    `mask` [h,w,1] is 1 where an image is known.
    """
    count = len(originals)
    known = originals.repeat(variants, axis=0), np.broadcast_to(mask, (count * variants, *mask.shape))
    numbers = np.arange(count * variants)
    filled = generator.draw(params, seed=seed, indices=numbers, labels=_labels(label, len(numbers)), known=known)
    filled = filled.reshape(count, variants, *originals.shape[1:])
    return np.concatenate([(originals * mask)[:, None], filled, originals[:, None]], axis=1)


def nearest(
    samples: np.ndarray, source: Source, count: int, *, within: int | None = None, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` images of `source` nearest to each sample in pixel space, nearest first.

    Args:
      samples: uint8 [n,h,w,c].
      within: look among the first so many only.

    Returns:
      Root mean squared difference a pixel in levels 0..255, float64 [n, count], and the indices [n, count].
    """
    total = len(source) if within is None else min(within, len(source))
    if not 1 <= count <= total:
        raise ConfigError(f"columns={count}: must be in 1..{total}, the images of the split")
    search = Nearest(samples, count)
    with Progress(total, "image", enabled=progress and total > 10_000) as bar:
        for start in range(0, total, 1000):
            rows = np.arange(start, min(start + 1000, total))
            search.add(source.read(rows)["image"], start)
            bar.update(len(rows))
    return search.distances, search.indices


def nearest_in_features(
    extractor: Extractor, tap: str, samples: ImageSet, train: ImageSet, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `nearest`, in Inception features: root mean squared differences a feature, and the indices."""
    queries = np.concatenate([block.features[tap] for block in extractor.blocks(samples, (tap,), "samples")])
    search = Nearest(queries, count)
    for block in extractor.blocks(train, (tap,), "train"):
        search.add(block.features[tap], block.start)
    return search.distances, search.indices


def neighbours(samples: np.ndarray, source: Source, found: np.ndarray) -> np.ndarray:
    """Each sample (uint8) before the images `found` for it: whether the model only remembers."""
    near = source.read(found.ravel())["image"].reshape(*found.shape, *samples.shape[1:])
    return images.from_uint8(np.concatenate([samples[:, None], near], axis=1))


# ---------------------------------------------------------------------------------------------- what they start from


def images_of(source: Source, indices: Sequence[int], what: str) -> np.ndarray:
    """Images of a split by number, float32 in [-1, 1]; DataError for a number outside."""
    for index in indices:
        if not 0 <= index < len(source):
            raise DataError(f"--indices={index}: {what} has images 0..{len(source) - 1}")
    return images.from_uint8(source.read(np.asarray(indices))["image"])


def images_from(paths: Sequence[Path], data: DataConfig) -> np.ndarray:
    """Image files, float32 in [-1, 1], cropped and padded as the run's own; without a crop they must have its size."""
    size, read = data.image_size - 2 * data.padding, []
    for path in paths:
        found = decoding.open_image(path, str(path)).size
        if data.crop == "none" and found != (size, size):
            raise DataError(f"{path} is {found[0]}x{found[1]}, this run has {size}x{size} images: resize it")
        read.append(decoding.pad(decoding.to_pixels(decode_file(path, data.crop, size, data.channels)), data.padding))
    return images.from_uint8(np.stack(read))


def hole(image_size: int, box: Sequence[int]) -> np.ndarray:
    """The mask of an image but for `box` (top, left, height, width), float32 [h,w,1]; ConfigError for a box outside."""
    top, left, height, width = box
    inside = top >= 0 <= left and height >= 1 <= width and top + height <= image_size >= left + width
    if not inside:
        raise ConfigError(f"hole={top},{left},{height},{width}: top,left,height,width within {image_size}x{image_size}")
    mask = np.ones((image_size, image_size, 1), np.float32)
    mask[top : top + height, left : left + width] = 0
    return mask


def mask_from(path: Path, image_size: int) -> np.ndarray:
    """A mask from a grey PNG, white where the image is to be filled in."""
    levels = images.load_png(path)
    if levels.shape != (image_size, image_size, 1):
        raise DataError(f"{path}: a mask is a grey PNG of {image_size}x{image_size}, this one is {list(levels.shape)}")
    return (levels <= 127).astype(np.float32)


def _labels(label: int | None, count: int) -> np.ndarray | None:
    return None if label is None else np.full(count, label)
