"""What cannot be measured is refused before hours of drawing, or of the bound, are spent."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.data.source import ArraySource
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import inputs, jobs, reconstruction, references
from ddpm_jax.evaluation.inception.weights import load_inception
from ddpm_jax.evaluation.jobs import evaluate
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import Trained
from tests.support.inception import save_layers
from tests.support.tiny import images, tiny_config

RUN = Trained(tiny_config(), {}, "raw", 3)
FROM_PYTHON = Trained(tiny_config(), {}, "raw", 3, data_origin={"train": "3 images"})


class Unlabelled(Trained):
    """A run whose images have no labels."""

    def open_split(self, data_dir: Path, split: str) -> ArraySource:
        return ArraySource(images(self.config, 2))


LARGE = Unlabelled(tiny_config(data={"image_size": 64, "channels": 3}), {}, "raw", 3)
RGBA = Unlabelled(tiny_config(data={"channels": 4}), {}, "raw", 3)
OF_CLASSES = Unlabelled(tiny_config(model={"num_classes": 4}), {}, "raw", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Statistics of others: moments alone, with too few features, of larger images."""
    save_layers(tmp_path / "three.npz")
    moments = {"mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(tmp_path / "moments.npz", **moments)
    few = np.zeros((39, 64), np.float32)
    np.savez(tmp_path / "few.npz", **moments, features=few)
    weights = load_inception(tmp_path / "three.npz", tmp_path)
    images = {"folder": "faces", "image_size": 64, "channels": 3}
    seen = {"resize": "tf", "inception": weights.provenance(), "images": images, "count": 50}
    np.savez(tmp_path / "large.npz", **moments, provenance=np.array(json.dumps(seen)))
    return tmp_path


@pytest.mark.parametrize(
    "run, ask, message",
    [
        (RUN, {"metrics": ("kid",), "reference": "moments.npz"}, "KID: the reference has moments"),
        (RUN, {"metrics": ("kid",), "reference": "few.npz"}, "KID: 39 images of the reference; at"),
        (RUN, {"metrics": ("fid",), "reference": "large.npz"}, "samples are 8x8, the reference is"),
        (RUN, {"metrics": ("nll", "fid"), "inception": Path("none.npz")}, "none.npz"),
        (RUN, {"metrics": ("audit",), "inception": Path("none.npz")}, "none.npz"),
        (
            RUN,
            {"metrics": ("nll", "pixels"), "reference": "few.npz"},
            "pixels are compared with tr",
        ),
        (RUN, {"metrics": ("reconstruction", "is")}, "Inception Score needs the"),
        (LARGE, {"metrics": ("pixels",)}, r"pixels: images of \[64, 64, 3\] are too large for it"),
        (RGBA, {"metrics": ("is",)}, "samples: 4 channels; Inception sees grey and RGB"),
        (RGBA, {"metrics": ("audit",)}, "samples: 4 channels; Inception sees grey and RGB"),
        (OF_CLASSES, {"metrics": ("nll", "fid")}, "digits has no labels: this network has 4"),
        (OF_CLASSES, {"metrics": ("reconstruction", "fid")}, "digits has no labels"),
        (FROM_PYTHON, {"metrics": ("audit",)}, "the run was given its images from Python"),
        (FROM_PYTHON, {"metrics": ("pixels",)}, "the run was given its images from Python"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Trained, ask: dict, message: str
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("drawn, or bounded")

    monkeypatch.setattr(inputs, "open_trained", lambda *_, **__: run)
    monkeypatch.setattr(inputs, "build_generator", too_late)
    monkeypatch.setattr(jobs, "evaluate_nll", too_late)
    monkeypatch.setattr(references, "build", too_late)
    monkeypatch.setattr(reconstruction, "reconstruction_errors", too_late)
    monkeypatch.chdir(folder)
    options = {"inception": Path("three.npz"), "features": "64", "cache": folder} | ask
    if run is FROM_PYTHON:
        del options["inception"]
    with pytest.raises(UserError, match=message):
        evaluate(EvaluationOptions(workdir=folder, **options), Devices(jax.devices()[:1]))
    assert not (folder / "evaluations.jsonl").exists()
