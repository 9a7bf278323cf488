"""Compute the Inception Score (Salimans et al. 2016): exp(mean KL(p(y|x) || p(y))).

Mean and deviation are over 10 parts of the samples. The classes are the 1008 of the 2015 network,
whose logits are taken without its bias, as in the papers' own code: scores with it, or by other
networks, are other scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from ddpm_jax.errors import EvaluationError

SPLITS = 10


@dataclass(frozen=True)
class Score:
    """Mean and deviation over the parts, as in the paper's Table 1."""

    mean: float
    deviation: float


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, seed: int = 0) -> Score:
    """Compute the score of logits [n, classes].

    They are shuffled first: sorted by class, each part would lack most classes.

    Raises:
      EvaluationError: fewer than two samples a part.
    """
    if len(logits) < 2 * splits:
        raise EvaluationError(
            f"Inception Score: {len(logits)} images; "
            f"at least {2 * splits} are needed for {splits} splits"
        )
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(logits))
    log_p = log_softmax(logits[order].astype(np.float64), axis=1)
    scores = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        marginal = p.mean(axis=0)
        entropy = marginal @ np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
        # mean over x of sum p(y|x) (log p(y|x) - log p(y)); the second sum is that of p(y) log p(y)
        scores.append(np.exp((p * part).sum(axis=1).mean() - entropy))
    return Score(float(np.mean(scores)), float(np.std(scores)))
