"""Score a run by two processes of four devices as by one of eight: every image counted once.

There is one set of records and files, and what one process refuses ends both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.evaluation import references
from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import load_inception
from ddpm_jax.images import save_npz
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import claim_workdir
from ddpm_jax.training.state import init_state
from tests.support.commands import command_module
from tests.support.hosts import Pair
from tests.support.inception import pictures, save_layers
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.multiprocess


def make_run(workdir: Path) -> None:
    config = tiny_config(sampling={"sampler": "ddim", "steps": 3})
    claim_workdir(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))


def test_two_hosts_score_a_run_as_one_does(pair: Pair, tmp_path: Path) -> None:
    make_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    save_layers(tmp_path / "three.npz")

    def flags(name: str) -> list[str]:
        places = [
            f"--workdir={tmp_path / name}",
            f"--cache={tmp_path / name / 'cache'}",
            f"--data_dir={tmp_path / name / 'data'}",
        ]
        rest = [
            "--metrics=fid,kid,prdc,audit",
            "--features=64",
            "--num_images=45",
            "--reference_images=53",
            "--batch_size=24",
        ]
        return [*places, *rest, f"--inception={tmp_path / 'three.npz'}"]

    command_module("evaluate").main(flags("one"))  # here, on eight devices
    printed = [
        pair.run_both("evaluate.py", *flags("two")) for _ in range(2)
    ]  # drawn and computed, then looked up
    assert "FID-64" in printed[0][0] and "FID-64" not in printed[0][1]
    one, two = (read_evaluations(tmp_path / name) for name in ("one", "two"))
    assert [record["metric"] for record in two] == [record["metric"] for record in one] * 2
    for once, first, again in zip(one, two, two[len(one) :]):
        np.testing.assert_allclose(first["value"], once["value"], rtol=1e-3, atol=1e-7)
        assert again["value"] == first["value"]
    samples = [
        next((tmp_path / name / "evaluations" / "samples").glob("*.npz")) for name in ("one", "two")
    ]
    assert samples[0].name == samples[1].name
    drawn = [np.load(path)["arr_0"].astype(int) for path in samples]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].shape == (45, 8, 8, 1)
    names = [
        sorted(path.name for path in (tmp_path / name / "data" / "references").iterdir())
        for name in ("one", "two")
    ]
    assert names[0] == names[1] and len(names[0]) == 1


def of_another_size(folder: Path) -> tuple[list[str], str]:
    """Take a reference of 16x16 images, whose size the first host alone knows."""
    save_npz(folder / "samples.npz", pictures(30, 8))
    extractor = Extractor(
        load_inception(folder / "three.npz", folder), Devices(jax.devices()[:1]), batch_size=30
    )
    images = of_array(pictures(30, 16), {"file": "others.npz", "image_size": 16})
    references.save(folder / "others.npz", references.build(extractor, images, "64"))
    flags = ["--metrics=fid", f"--samples={folder / 'samples.npz'}"]
    return [
        *flags,
        f"--reference={folder / 'others.npz'}",
    ], "samples are 8x8, the reference is of 16x16"


def without_features(folder: Path) -> tuple[list[str], str]:
    """Take moments for a KID of two seeds, with the second of which the other host would go on."""
    np.savez(folder / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    make_run(folder / "run")
    flags = [f"--workdir={folder / 'run'}", "--metrics=kid", "--num_images=40", "--seeds=0,1"]
    return [*flags, f"--reference={folder / 'moments.npz'}"], "the reference has moments only"


def of_other_features(folder: Path) -> tuple[list[str], str]:
    """Take statistics that are refused when they are loaded."""
    np.savez(folder / "bad.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    make_run(folder / "run")
    flags = [f"--workdir={folder / 'run'}", "--metrics=fid"]
    return [*flags, f"--reference={folder / 'bad.npz'}"], "bad.npz has 3 features, these are 64"


def with_a_torn_cache(folder: Path) -> tuple[list[str], str]:
    """Damage the features that the first host looks up for all."""
    save_npz(folder / "samples.npz", pictures(30, 8))
    save_npz(folder / "real.npz", pictures(30, 8, seed=1))
    weights = load_inception(folder / "three.npz", folder)
    extractor = Extractor(weights, Devices(jax.devices()[:1]), cache=folder / "cache" / "features")
    list(extractor.blocks(of_array(pictures(30, 8, seed=1), {}), ("64",)))
    for path in (folder / "cache").rglob("*_64.npy"):
        path.write_bytes(b"torn")
    flags = ["--metrics=fid", f"--samples={folder / 'samples.npz'}"]
    return [*flags, f"--reference={folder / 'real.npz'}"], "_64.npy is damaged"


def with_a_full_disk(folder: Path) -> tuple[list[str], str]:
    """Put a file where the first host needs a folder for the plot of the bound."""
    make_run(folder / "run")
    (folder / "run" / "evaluations").write_text("a file where a folder should be")
    flags = [f"--workdir={folder / 'run'}", "--metrics=nll,reconstruction", "--num_images=8"]
    return [*flags, "--steps=2"], "could not be written"


@pytest.mark.parametrize(
    "case",
    [of_another_size, without_features, of_other_features, with_a_torn_cache, with_a_full_disk],
)
def test_what_one_host_refuses_all_refuse(
    case: Callable[[Path], tuple[list[str], str]], pair: Pair, tmp_path: Path
) -> None:
    """End it on both: neither waits for the other for ever, and both say why."""
    save_layers(tmp_path / "three.npz")
    flags, message = case(tmp_path)
    common = [f"--inception={tmp_path / 'three.npz'}", "--features=64", "--batch_size=24"]
    flags += [*common, f"--cache={tmp_path / 'cache'}"]
    for code, _, errors in pair.run("evaluate.py", *flags):
        assert code == 1 and message in errors, errors[-2000:]
