"""Trainings that are compared are whole ones."""

from __future__ import annotations

import signal
import types
from pathlib import Path

import pytest

from ddpm_jax.benchmark import quality
from ddpm_jax.benchmark.quality import ComparisonOptions, measure
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    "number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_training_that_was_stopped_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, raised: type
) -> None:
    """It saved what it had and returned a code; the next call trains on and judges the end."""
    config, options = tiny_config(), ComparisonOptions(tmp_path, num_images=2)
    codes = [128 + number, 0]
    # The weights are whether the training came to its end, and so are what a judge finds.
    monkeypatch.setattr(quality, "train", lambda *_, **__: codes.pop(0))
    monkeypatch.setattr(quality, "open_trained", lambda *_: types.SimpleNamespace(params=not codes))
    monkeypatch.setattr(quality, "eps_errors", lambda *_: {})
    monkeypatch.setattr(
        quality,
        "evaluate_nll",
        lambda config, params, *_, **__: types.SimpleNamespace(
            total=types.SimpleNamespace(mean=1.0 if params else 9.0, standard_error=0.1)
        ),
    )
    with pytest.raises(raised) as stopped:
        measure(config, "ddpm_jax", options)
    if raised is SystemExit:
        assert stopped.value.code == 143
    assert not (tmp_path / "seed0" / "ddpm_jax.json").exists()
    assert measure(config, "ddpm_jax", options)["nll"] == 1.0 and not codes
