"""A run opened for one set of weights reads those alone, and knows them to be what was saved."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorstore import experimental_collect_matching_metrics

from ddpm_jax.errors import WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs import parts as module
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.workdir import claim_workdir, load_workdir_config
from ddpm_jax.trained import open_trained
from ddpm_jax.training.form import FlatForm, TreeForm, VectorForm
from ddpm_jax.training.state import TrainState, abstract_state, init_state
from tests.support.tiny import tiny_config

OLD = Path(__file__).parents[1] / "support" / "fixtures" / "run_of_2026_11.tar.xz"
WIDE = {"model": {"base_channels": 32}}  # weights of half a megabyte, far above all metadata


def numbers(config, seed: int) -> TrainState:
    """A state in which every array has numbers of its own, and each set of weights other ones."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.uniform(1, 100, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, abstract_state(config))


@pytest.fixture(scope="module", params=[TreeForm, FlatForm, VectorForm])
def run(request, tmp_path_factory) -> tuple[Path, TrainState]:
    """A run with checkpoint 7 of known numbers, saved by a training that carries any of the forms."""
    workdir, config = tmp_path_factory.mktemp("run") / "run", tiny_config(**WIDE)
    form = TreeForm() if request.param is TreeForm else request.param(config)
    claim_workdir(workdir, config)
    state = numbers(config, 0)
    with Checkpoints(workdir) as checkpoints:
        carried = form.pack(Devices(jax.devices()[:1]).replicate(state))
        checkpoints.save(7, form.unpack(carried))
    return workdir, state


def bytes_read() -> int:
    """Bytes that the storage library has read from files in this process."""
    metrics = experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def on_devices() -> int:
    """Bytes of all buffers on devices, each counted once however many arrays show it."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


@pytest.mark.parametrize("weights", ["ema", "0.99", "raw"])
def test_the_weights_asked_for_are_read_and_no_others(run, weights):
    workdir, state = run
    expected = state.params if weights == "raw" else state.ema[{"ema": "0.9"}.get(weights, weights)]
    devices = Devices(jax.devices()[:2])
    live, read = on_devices(), bytes_read()
    trained = open_trained(workdir, devices, weights=weights)
    live, read = on_devices() - live, bytes_read() - read
    jax.tree.map(np.testing.assert_array_equal, trained.params, expected)
    assert trained.step == int(state.step)
    # Five sets of this size are saved: weights, two moments, two averages.
    assert size(state) > 4.9 * size(expected)
    assert live <= 1.1 * len(devices.devices) * size(expected)
    assert read <= 1.5 * size(expected)


def test_all_of_it_is_read_for_training(run):
    workdir, state = run
    like = Devices(jax.devices()[:1]).abstract_replicated(abstract_state(tiny_config(**WIDE)))
    with Checkpoints.reading(workdir) as checkpoints:
        restored = checkpoints.restore(like)
        part = checkpoints.restore(like, parts=("step", "opt_state"))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, part.opt_state, state.opt_state)
    assert {*jax.tree.leaves((part.params, part.ema, part.updates))} == {...}


def without_hashes_of_parts(workdir: Path, *, of_all: bool) -> None:
    """Turn the checkpoint into one of an earlier version: one hash, or none at all."""
    path = workdir / "checkpoints" / "7" / "_CHECKPOINT_METADATA"
    about = json.loads(path.read_text())
    del about["custom_metadata"]["sha256_of_parts"]
    if of_all:
        del about["custom_metadata"]["sha256"]
    path.write_text(json.dumps(about))


@pytest.mark.parametrize("of_all", [False, True])
def test_a_checkpoint_with_one_hash_is_checked_on_the_host(run, tmp_path, monkeypatch, of_all):
    source, state = run
    workdir = shutil.copytree(source, tmp_path / "run")
    without_hashes_of_parts(workdir, of_all=of_all)
    seen, hash_all = [], module.content_hashes
    monkeypatch.setattr(module, "content_hashes", lambda read: seen.append(read) or hash_all(read))
    trained = open_trained(workdir, Devices(jax.devices()[:1]), weights="0.99")
    jax.tree.map(np.testing.assert_array_equal, trained.params, state.ema["0.99"])
    (read,) = seen
    others = jax.tree.leaves((read.params, read.opt_state, read.ema["0.9"]))
    kind = type(...) if of_all else np.ndarray
    assert {type(leaf) for leaf in others} == {kind}
    assert isinstance(jax.tree.leaves(read.ema["0.99"])[0], jax.Array)


def test_a_run_of_an_earlier_version_opens_as_it_was(tmp_path):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    workdir, one = tmp_path / "run", Devices(jax.devices()[:1])
    config = load_workdir_config(workdir)
    with Checkpoints.reading(workdir) as checkpoints:
        state = checkpoints.restore(one.abstract_replicated(abstract_state(config)))
    sets = {"raw": state.params, **state.ema}
    assert len(sets) == 3
    for name, params in sets.items():
        trained = open_trained(workdir, one, weights=name)
        jax.tree.map(np.testing.assert_array_equal, trained.params, params)


def test_a_part_that_is_not_what_was_saved_is_refused(run, tmp_path):
    """Each hash guards its part: another state's hash is found wrong for the parts that differ."""
    workdir = shutil.copytree(run[0], tmp_path / "run")
    path = workdir / "checkpoints" / "7" / "_CHECKPOINT_METADATA"
    about = json.loads(path.read_text())
    hashes = about["custom_metadata"]["sha256_of_parts"]
    hashes["ema.0.9"] = hashes["ema.0.99"]
    path.write_text(json.dumps(about))
    one = Devices(jax.devices()[:1])
    with pytest.raises(WorkdirError, match="cannot be read .its content is not what was saved"):
        open_trained(workdir, one)
    for sound in ("0.99", "raw"):
        open_trained(workdir, one, weights=sound)


def test_a_config_of_another_network_is_told_from_a_part_as_well(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    about = json.loads((workdir / "config.json").read_text())
    about["model"]["base_channels"] = 16
    (workdir / "config.json").write_text(json.dumps(about))
    with pytest.raises(WorkdirError, match="is of another network than config.json"):
        open_trained(workdir, Devices(jax.devices()[:1]))


def test_the_first_state_is_read_in_parts(tmp_path):
    """Where averages equal the weights their hashes differ still: a hash holds the paths."""
    config, one = tiny_config(), Devices(jax.devices()[:1])
    claim_workdir(tmp_path / "run", config)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(0, one.replicate(init_state(config)))
    path = tmp_path / "run" / "checkpoints" / "0" / "_CHECKPOINT_METADATA"
    hashes = json.loads(path.read_text())["custom_metadata"]["sha256_of_parts"]
    assert {*hashes} >= {"step", "updates", "params", "opt_state", "ema.0.9", "ema.0.99"}
    assert len({hashes["params"], hashes["ema.0.9"], hashes["ema.0.99"]}) == 3
