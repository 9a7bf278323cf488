"""Check the images that a run trains on."""

from __future__ import annotations

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data.source import ArraySource, RecordSource, Source, Stream
from ddpm_jax.errors import check


def check_labels(config: Config, source: Source | Stream) -> None:
    """Check that `source` has the classes of the network, now or as it is read.

    Raises:
      ConfigError: it has no labels, or others than the classes.
    """
    classes, name = config.model.num_classes, config.data.name
    if not classes:
        return

    def check_largest(largest: int) -> None:
        what = f"config.model.num_classes={classes}: data set {name!r} has labels up to {largest}"
        check(largest < classes, what)

    def check_each(labels: np.ndarray) -> None:
        check_largest(int(labels.max(initial=0)))
        least = int(labels.min(initial=0))
        check(least >= 0, f"data set {name!r} has the label {least}: classes are numbered from 0")

    what = f"config.model.num_classes={classes}: data set {name!r} has no labels; set it to 0"
    check(source.labelled, what)
    if isinstance(source, ArraySource):
        check_each(source.labels)
    elif isinstance(source, RecordSource):
        check_largest((source.num_classes or 1) - 1)
    if isinstance(source, (RecordSource, Stream)):
        source.check_each(check_each)
