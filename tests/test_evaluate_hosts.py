"""Two processes of four devices score a run as one of eight does: every image counted once, one set of records and files."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, script
from test_inception import random_layers
from test_multiprocess import run_both, start
from tiny import tiny_config

from ddpm_jax.checkpoints import Checkpoints, claim_workdir
from ddpm_jax.evaluation.record import read_evaluations
from ddpm_jax.training import init_state

pytestmark = pytest.mark.multiprocess


def test_two_hosts_score_a_run_as_one_does(tmp_path: Path) -> None:
    config = tiny_config(sampling={"sampler": "ddim", "steps": 3})
    claim_workdir(tmp_path / "one", config)
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    layers = random_layers("64")
    parts = {f"{layer}/{part}": array for layer, two in layers.items() for part, array in two.items()}
    np.savez(tmp_path / "three.npz", **parts)

    def flags(name: str) -> list[str]:
        places = [
            f"--workdir={tmp_path / name}",
            f"--cache={tmp_path / name / 'cache'}",
            f"--data_dir={tmp_path / name / 'data'}",
        ]
        wanted = ["--metrics=fid,kid,prdc,audit", "--features=64", "--num_images=45", "--reference_images=53", "--batch_size=24"]
        return [*places, *wanted, f"--inception={tmp_path / 'three.npz'}"]

    code, _, said = finish(script("evaluate.py", *flags("one"), environment={"JAX_NUM_CPU_DEVICES": "8"}))
    assert code == 0, said
    printed = [run_both("evaluate.py", *flags("two")) for _ in range(2)]  # drawn and computed, then looked up
    assert "FID-64" in printed[0][0] and "FID-64" not in printed[0][1]
    one, two = (read_evaluations(tmp_path / name) for name in ("one", "two"))
    assert [record["metric"] for record in two] == [record["metric"] for record in one] * 2
    for once, first, again in zip(one, two, two[len(one) :]):
        np.testing.assert_allclose(first["value"], once["value"], rtol=1e-3, atol=1e-7)
        assert again["value"] == first["value"]
    samples = [next((tmp_path / name / "evaluations" / "samples").glob("*.npz")) for name in ("one", "two")]
    assert samples[0].name == samples[1].name
    drawn = [np.load(path)["arr_0"].astype(int) for path in samples]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].shape == (45, 8, 8, 1)
    names = [sorted(path.name for path in (tmp_path / name / "data" / "references").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 1


def test_what_one_host_refuses_all_refuse(tmp_path: Path) -> None:
    config = tiny_config(sampling={"sampler": "ddim", "steps": 3})
    claim_workdir(tmp_path / "run", config)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    parts = {f"{layer}/{part}": array for layer, two in random_layers("64").items() for part, array in two.items()}
    np.savez(tmp_path / "three.npz", **parts)
    flags = [f"--workdir={tmp_path / 'run'}", "--metrics=fid", "--features=64", f"--cache={tmp_path / 'cache'}"]
    wanted = [f"--inception={tmp_path / 'three.npz'}", f"--reference={tmp_path / 'bad.npz'}"]
    for process in start("evaluate.py", *flags, *wanted):
        code, _, said = finish(process)
        assert code == 1 and "bad.npz has 3 features, these are 64" in said
