"""Train on images of one's own: a generator of arrays, and held-out images as one array.

    python examples/own_data.py runs/shapes      # rings and bars, drawn as training needs them

`source` may also be an array [N, h, w, c], a pair of it and its labels, or an object that reads by
index, such as ddpm.ArraySource. Pictures in a folder need no Python: `data.name=folder`.
"""

import itertools
import sys

import numpy as np

import ddpm_jax as ddpm


def shapes(seed, count=256, size=16):
    """Draw `count` images uint8 [count, size, size, 1], half of them rings, half bars."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre = random.uniform(5, size - 5, (2, count, 1, 1))
    dy, dx = y - centre[0], x - centre[1]
    ring = np.hypot(dy, dx) - random.uniform(2, 4, (count, 1, 1))
    bar = dy if random.integers(2) else dx
    distance = np.where(np.arange(count)[:, None, None] % 2, ring, bar)
    return np.uint8(255 * np.clip(1.5 - np.abs(distance), 0, 1))[..., None]


def stream():
    """Yield arrays without end; a run that goes on reads them again up to where it was."""
    for seed in itertools.count():
        yield shapes(seed)


ddpm.tune_cpu()  # before JAX runs anything
folder, *overrides = sys.argv[1:]
small = ["data.name=shapes", "data.image_size=16", "model.attention_resolutions=(8,)"]
config = ddpm.load_config("digits", [*small, "train.batch_size=64", *overrides])
model = ddpm.train(config, folder, source=stream, held_out=shapes(seed=2**31))
pictures = np.concatenate([shapes(0, 32), model.sample(32, sampler="ddim", steps=50)])
ddpm.save_png(f"{folder}/shapes.png", ddpm.grid(pictures, columns=16, scale=2))
print(f"{folder}/shapes.png: two rows of the data, two rows of samples")
