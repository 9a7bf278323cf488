"""How well DDIM's codes keep an image: from x_0 to x_T and back (Song et al. 2021, section 5.4 and Table 2).

Nothing is drawn, so the result is that of the network, the images and the steps alone.
"""

from __future__ import annotations

import numpy as np

from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.data.batches import eval_batches
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import Devices
from ddpm_jax.generate import Generator, config_table, with_sampling
from ddpm_jax.images import from_uint8
from ddpm_jax.progress import Progress


def reconstruction_errors(
    config: Config,
    params: Params,
    source: Source,
    devices: Devices,
    *,
    num_images: int | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> np.ndarray:
    """Mean squared error over the pixels, of values in [0, 1], of each of the first `num_images` images (None: all), float64 [N].

    Args:
      config: its `sampling.steps` and `.spacing` count; a network with classes is given the images' own.
      params: replicated on `devices`.
      batch_size: images at once, over all devices and hosts; rounded up to a multiple of the devices.
    """
    config = with_sampling(config, sampler="ddim", eta=0.0, clip=False)  # clipped, neither inverts the other
    encoder = Generator(config, devices, batch_size=batch_size, table=config_table(config, inverted=True))
    decoder = Generator(config, devices, batch_size=batch_size)
    count = len(source) if num_images is None else min(num_images, len(source))
    errors = []
    with Progress(count, unit="image", enabled=progress and devices.is_main) as shown:
        for batch in eval_batches(source, count, encoder.batch_size):  # of all hosts: a Generator takes its own rows
            labels = batch["label"] if config.model.num_classes else None
            originals, kept = from_uint8(batch["image"]), batch["mask"] > 0
            inputs = {"seed": 0, "indices": np.arange(len(originals)), "labels": labels}
            codes = encoder.draw(params, x=originals, **inputs)
            decoded = decoder.draw(params, x=codes, **inputs)
            squares = np.square((decoded - originals).astype(np.float64) / 2)
            errors.append(squares.mean((1, 2, 3))[kept])
            shown.update(int(kept.sum()))
    return np.concatenate(errors)
