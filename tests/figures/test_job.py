"""What a figure is drawn with: as many samples at once as leave little to be thrown away."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_jax.figures import films, job
from ddpm_jax.figures.job import Job, Options
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import Trained
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    "name, asked, count, batch",
    [
        ("x.npz", 1024, 2000, 512),  # a block of 512 at once: a batch of 1024 would be half filling
        ("folder", 500, 1000, 256),
        ("x.npz", 64, 40, 40),
        ("x.png", 500, 600, 300),  # a picture is drawn as one
    ],
)
def test_samples_are_drawn_in_even_batches(
    name: str, asked: int, count: int, batch: int, tmp_path: Path, monkeypatch
) -> None:
    built = []

    class Drawn(Exception):
        """A generator was asked for."""

    def build(config, devices, *, batch_size: int, **_: object) -> None:
        built.append(batch_size)
        raise Drawn

    monkeypatch.setattr(job, "build_generator", build)
    options = Options(tmp_path / name, num_images=count, batch_size=asked)
    with pytest.raises(Drawn):
        films.draw_grid(Job(options, Trained(tiny_config(), {}, "raw", 0), Devices()))
    assert built == [batch]
