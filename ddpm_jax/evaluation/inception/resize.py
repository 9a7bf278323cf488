"""Turn 8-bit images into what Inception sees, 299x299 in about [-1, 1].

There are two ways, whose FIDs differ by more than papers do:

  tf          the resize inside the graph of 2015 and the scale (x - 128) / 128: what the paper's
              code, TTUR, OpenAI's evaluators and torch-fidelity use. Output pixel i lies at
              i * size / 299 of the input, which shifts the picture up and left.
  half_pixel  pytorch-fid: pixel centres correspond, (i + 1/2) * size / 299 - 1/2, and the scale is
              x / 127.5 - 1.

Both are bilinear without antialiasing, and both are linear: two matrices, computed in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.evaluation.inception.network import SIZE

RESIZES = ("tf", "half_pixel")


def bilinear_matrix(size: int, resize: str, target: int = SIZE) -> np.ndarray:
    """Return float64 [target, size], each row the weights of one output pixel.

    Beyond the border its last pixel repeats.
    """
    grid = np.arange(target)
    position = (
        grid * size / target
        if resize == "tf"
        else np.maximum((grid + 0.5) * size / target - 0.5, 0)
    )
    lower = np.floor(position).astype(int)
    matrix = np.zeros((target, size))
    matrix[grid, lower] = 1 - (position - lower)
    matrix[grid, np.minimum(lower + 1, size - 1)] += position - lower
    return matrix


def to_inception(images: jax.Array, resize: str) -> jax.Array:
    """Resize uint8 [b,h,w,c], c = 1 (repeated) or 3, to float32 [b,299,299,3]."""
    rows, columns = (
        jnp.asarray(bilinear_matrix(size, resize), jnp.float32) for size in images.shape[1:3]
    )
    x = images.astype(jnp.float32)
    x = (x - 128) / 128 if resize == "tf" else x / 127.5 - 1
    x = jnp.einsum("yh,bhwc->bywc", rows, x, precision="highest")
    x = jnp.einsum("xw,bywc->byxc", columns, x, precision="highest")
    return jnp.broadcast_to(x, (*x.shape[:3], 3))
