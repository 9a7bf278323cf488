"""Check the images that a run trains on."""

from __future__ import annotations

from ddpm_jax.config import Config
from ddpm_jax.data.source import ArraySource, RecordSource, Source, Stream
from ddpm_jax.errors import check


def check_labels(config: Config, source: Source | Stream) -> None:
    """Check that `source` has the classes of the network, now or, on disk, as it is read.

    Raises:
      ConfigError: it has no labels, or more classes.
    """
    classes, name = config.model.num_classes, config.data.name
    if not classes:
        return

    def check_largest(largest: int) -> None:
        what = f"config.model.num_classes={classes}: data set {name!r} has labels up to {largest}"
        check(largest < classes, what)

    what = f"config.model.num_classes={classes}: data set {name!r} has no labels; set it to 0"
    check(source.labelled, what)
    if isinstance(source, ArraySource):
        check_largest(int(source.labels.max()))
    elif isinstance(source, Stream):
        check_largest(int(source.first["label"].max()))
    elif isinstance(source, RecordSource):
        check_largest((source.num_classes or 1) - 1)
        source.check_each(lambda labels: check_largest(int(labels.max())))
