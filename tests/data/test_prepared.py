"""A prepared set that came from somebody else: its description is read, and runs nothing."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import decoding, prepare
from ddpm_jax.data.batches import fingerprint
from ddpm_jax.data.load import load_splits, origin_of
from ddpm_jax.data.prepared import find_prepared, open_prepared
from ddpm_jax.data.source import SPLITS
from ddpm_jax.errors import DataError, WorkdirError
from ddpm_jax.runs.data_origin import check_origin, save_origin

DATA = DataConfig(name="faces", image_size=8)


@pytest.fixture
def features(tmp_path) -> Path:
    """features.json of the set "faces" in tmp_path/data."""
    (tmp_path / "originals").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "originals" / f"{i}.png")
    folder = prepare.prepare_folder(tmp_path / "originals", tmp_path / "data", "faces", 8)
    return folder / "features.json"


EVIL = {"pythonClassName": "evil.Feature", "text": {}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: EVIL,
        lambda whole: whole["featuresDict"]["features"].update(more=EVIL),
        lambda whole: {"type": "evil.Feature", "content": {}},
        lambda whole: whole["featuresDict"]["features"].update(
            more=whole | {"featuresDict": {"features": {"deep": EVIL}}}
        ),
        lambda whole: {
            "python_class_name": whole["pythonClassName"],
            "json_feature": {"json": json.dumps({"x": {"type": "evil.Feature", "content": {}}})},
        },
        lambda whole: {
            "type": whole["pythonClassName"],
            "content": json.dumps({"features": {"more": EVIL}}),
            "proto_cls": "tensorflow_datasets.FeaturesDict",
        },
    ],
    ids=["class", "nested", "old spelling", "deep", "in text", "in old text"],
)
def test_a_set_names_no_class_that_would_run(spoil: Callable, features, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    whole = json.loads(features.read_text())
    features.write_text(json.dumps(spoil(whole) or whole))
    with pytest.raises(DataError, match="is damaged .features.json.*delete .* and run") as caught:
        open_prepared(DATA, tmp_path / "data", "train")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"pythonClassName": ' + "9" * 5000 + "}", "[]", '{"featuresDict": 3}', "\0"],
    ids=["depth", "digits", "list", "number", "no JSON"],
)
def test_a_description_that_makes_no_sense_is_one_line(text, features, tmp_path):
    features.write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        open_prepared(DATA, tmp_path / "data", "train")


def test_a_set_of_our_own_is_read_as_before(features, tmp_path):
    batch = open_prepared(DATA, tmp_path / "data", "train").read(np.arange(3))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 1, 2]


def test_of_several_versions_the_newest_that_is_whole_is_read(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.11.0"):
        (tmp_path / "faces" / version).mkdir(parents=True)
        if version != "1.11.0":  # its description is written last
            (tmp_path / "faces" / version / "dataset_info.json").touch()
    assert find_prepared("faces", tmp_path).name == "1.10.0"


def test_a_run_goes_on_without_a_record_that_has_gone_bad_since(tmp_path, monkeypatch):
    """What it remembers is the set, not what is left of it, as it was in earlier versions."""
    (tmp_path / "originals").mkdir()
    for i in range(60):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "originals" / f"{i}.png")
    prepare.prepare_folder(tmp_path / "originals", tmp_path, "faces", 8)
    lenient = dataclasses.replace(DATA, skip_bad=True)
    decode = decoding.open_image

    def origin(data: DataConfig) -> dict[str, Any]:
        sources = dict(zip(SPLITS, load_splits(data, tmp_path, SPLITS)))
        return origin_of(data, tmp_path, sources) | {"left": fingerprint(sources["train"])}

    def spoil(number: int) -> None:
        def open_image(file, name, **options):
            if name.endswith(f"train record {number}"):
                raise DataError(f"{name} does not decode")
            return decode(file, name, **options)

        monkeypatch.setattr(decoding, "open_image", open_image)

    assert origin(DATA) == origin(lenient)
    save_origin(tmp_path, origin(DATA))
    spoil(3)
    check_origin(tmp_path, origin(lenient), "data set")
    save_origin(tmp_path, {"train": origin(lenient)["left"]})
    check_origin(tmp_path, origin(lenient), "data set")
    spoil(0)  # one of those that stand for the set
    with pytest.raises(WorkdirError, match="data set has other images"):
        check_origin(tmp_path, origin(lenient), "data set")
    save_origin(tmp_path, origin(lenient))
    check_origin(tmp_path, origin(lenient), "data set")
