"""Draw random weights for Inception, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm_jax.evaluation.inception.files import Layers
from ddpm_jax.evaluation.inception.weights import layer_shapes


def random_layers(tap: str, seed: int = 0) -> Layers:
    """Draw the layers up to `tap`, scaled so that features neither grow nor vanish."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, shapes in layer_shapes(tap).items():
        fan_in = np.prod(shapes["kernel"][:-1])
        layers[layer] = {
            "kernel": (rng.normal(size=shapes["kernel"]) * np.sqrt(2 / fan_in)).astype(np.float32),
            "bias": (rng.normal(size=shapes["bias"]) * 0.1).astype(np.float32),
        }
    return layers


def save_layers(path: Path, tap: str = "64") -> None:
    """Write `random_layers` as the file of weights that commands take."""
    layers = random_layers(tap).items()
    np.savez(path, **{f"{layer}/{part}": a for layer, parts in layers for part, a in parts.items()})


def pictures(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Draw uint8 [count, size, size, channels], every level as likely."""
    return np.random.default_rng(seed).integers(
        0, 256, (count, size, size, channels), dtype=np.uint8
    )
