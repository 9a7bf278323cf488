"""The best checkpoint is one with a held-out loss that is a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.errors import WorkdirError
from ddpm_jax.runs.checkpoints import Checkpoints

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("losses, best", [([NAN, 0.7, 0.5, INF], 3), ([-INF, 0.5, NAN], 2)])
def test_what_is_no_number_is_never_the_best(tmp_path: Path, losses: list, best: int) -> None:
    with Checkpoints(tmp_path, keep=9, keep_best=1) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, {"x": np.float32(step)}, loss)
        checkpoints.wait()
    with Checkpoints.reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == list(range(1, len(losses) + 1))
        assert checkpoints.best() == best


def test_without_any_number_there_is_no_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": np.float32(1)}, NAN)
        checkpoints.wait()
        with pytest.raises(WorkdirError, match="no checkpoint has a held-out loss"):
            checkpoints.best()
