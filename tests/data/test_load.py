"""Images of one's own become sources, beside those that a config names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.data.load import as_source, load_source, own_sources
from ddpm_jax.data.source import ArraySource
from tests.support.tiny import images, tiny_config


@pytest.mark.parametrize("kind", [list, np.uint8, np.int64])
def test_arrays_keep_each_image_with_its_label(kind) -> None:
    config = tiny_config()
    pixels, labels = images(config, 4), [3, 0, 2, 1]
    given = labels if kind is list else np.array(labels, kind)
    batch = as_source((pixels, given), config.data).read(np.array([2, 0, 3]))
    assert batch["label"].dtype == np.int32 and batch["label"].tolist() == [2, 3, 1]
    np.testing.assert_array_equal(batch["image"], pixels[[2, 0, 3]])


def test_what_is_not_given_is_trained_on_as_the_config_names_it(tmp_path: Path) -> None:
    """With held-out images of one's own: the training split, all of it."""
    config = tiny_config()
    mine = images(config, 5)
    sources = own_sources(config, tmp_path, None, mine)
    train, test = sources["train"], sources["test"]
    assert isinstance(train, ArraySource) and isinstance(test, ArraySource)
    assert len(train) == 1618
    expected = load_source(config.data, tmp_path, "train")
    np.testing.assert_array_equal(train.images, expected.images)
    np.testing.assert_array_equal(test.images, mine)
