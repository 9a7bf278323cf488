"""Trainings that are compared are whole ones, and their means have honest errors."""

from __future__ import annotations

import signal
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.benchmark import quality
from ddpm_jax.benchmark.quality import ComparisonOptions, measure, summarise
from ddpm_jax.data.source import ArraySource
from tests.support.tiny import images, tiny_config


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


@pytest.mark.interop
def test_the_average_of_pytorch_s_side_takes_its_share_of_each_step() -> None:
    """After one step it is still nine tenths of the start, where the decay is 0.9."""
    config = tiny_config(optimizer={"warmup_steps": 0, "learning_rate": 0.1})
    source = ArraySource(images(config, 32))

    def average(steps: int, decay: float) -> np.ndarray:
        config.train.steps, config.train.ema_decays = steps, (decay,)
        params = quality.train_with_diffusers(config, source)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

    start, end, between = (average(*how) for how in ((0, 0.9), (1, 0.0), (1, 0.9)))
    assert np.abs(end - start).max() > 0.05
    np.testing.assert_allclose(between, 0.9 * start + 0.1 * end, atol=1e-6)


def test_the_error_of_a_mean_of_two_seeds_is_half_of_their_distance() -> None:
    def row(side: str, nll: float, error: float) -> dict:
        return {"side": side, "nll": nll, "eps_error": {"10": error}}

    rows = [row("ddpm_jax", 3.0, 0.1), row("diffusers", 3.5, 0.3)]
    rows += [row("ddpm_jax", 3.6, 0.2), row("diffusers", 4.3, 0.1)]
    bound, eps = summarise(rows)
    assert (bound["figure"], eps["figure"]) == ("bound, bits/dim", "eps at t=10")
    for line, ours, theirs in ((bound, (3.0, 3.6), (3.5, 4.3)), (eps, (0.1, 0.2), (0.3, 0.1))):
        for side, (a, b) in (("ddpm_jax", ours), ("diffusers", theirs)):
            assert line[side] == pytest.approx((a + b) / 2)
            assert line[f"{side}_error"] == pytest.approx(abs(a - b) / 2)
        squares = line["ddpm_jax_error"] ** 2 + line["diffusers_error"] ** 2
        assert line["difference_error"] == pytest.approx(squares**0.5)
        assert line["difference"] == pytest.approx((sum(ours) - sum(theirs)) / 2)
    assert "difference_error" not in summarise(rows[:2])[0]  # of one seed it is not known
