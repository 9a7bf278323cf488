"""What makes a run fast and shows without a clock.

Nothing compiled twice, nothing fetched, copied or piled up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.benchmark.ours import SamplingSteps, compile_timed
from ddpm_jax.config import Config
from ddpm_jax.parallel import programs
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import waiting
from ddpm_jax.training import loop, monitor
from ddpm_jax.training.form import state_form
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import build_train_step
from tests.support.tiny import images, tiny_config


def prepared(config: Config, count: int):
    """The mapped step, its state and its placed batch on `count` devices."""
    devices = Devices(jax.devices()[:count])
    batch = {"image": images(config, config.train.batch_size)}
    form = state_form(config, devices)
    return (
        devices.map_step(build_train_step(config, form)),
        form.pack(devices.replicate(init_state(config))),
        devices.place(batch),
    )


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The events of XLA's compiler while it is open."""
    seen: list[str] = []

    def note(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_a_longer_run_compiles_no_more_programs(tmp_path, monkeypatch):
    """Training, evaluation, sample grids and checkpoints.

    All programs there are have been built once each has run once.
    """
    after: list[int] = []

    class Log(monitor.Log):
        def add(self, step, metrics, *, flush):
            super().add(step, metrics, flush=flush)
            after.append(len(seen))

    monkeypatch.setattr(loop, "Log", Log)
    fields = {"steps": 10, "sample_every": 3}
    config = tiny_config(train=fields, sampling={"steps": 4})
    with compilations() as seen:
        loop.train(config, tmp_path / "run", data_dir=tmp_path, devices=Devices(jax.devices()[:2]))
    # Step 3 evaluates and draws, step 4 saves for the second time: of the ten steps, the last six
    # and what ends the run find all they need.
    assert len(seen) == after[3] > after[0] > 0


def test_the_loop_fetches_from_the_device_only_where_it_logs(tmp_path, monkeypatch):
    """Between two lines of the log nothing waits for the device.

    No metric is read, the next step is under way.
    """
    fetched: list[int] = []
    kind = type(jnp.zeros(()))
    for name in ("__array__", "__float__", "__int__", "__bool__"):
        original = getattr(kind, name)

        def spy(self, *args, original=original, **options):
            fetched.append(self.size)
            return original(self, *args, **options)

        monkeypatch.setattr(kind, name, spy)
    during: list[int] = []

    class Log(monitor.Log):
        def add(self, step, metrics, *, flush):
            during.append(len(fetched))
            super().add(step, metrics, flush=flush)
            fetched.clear()

    monkeypatch.setattr(loop, "Log", Log)
    config = tiny_config(
        train={
            "steps": 8,
            "log_every": 8,
            "eval_every": 100,
            "eval_images": 0,
            "checkpoint_every": 100,
        }
    )
    loop.train(config, tmp_path / "run", data_dir=tmp_path, devices=Devices(jax.devices()[:1]))
    assert len(during) == 8 and not any(during[1:])
    fetched.clear()
    float(jnp.ones(()))
    assert fetched == [1]  # the spy sees what it should


def test_no_host_value_enters_the_step():
    """A Python number or NumPy array among the arguments would be sent anew at every step."""
    step, state, batch = prepared(tiny_config(), 2)
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = step(state, batch)
        with pytest.raises(jax.errors.JaxRuntimeError, match="[Dd]isallowed"):
            step(state, jax.tree.map(np.asarray, batch))
    assert np.isfinite(metrics["loss"])


def test_the_old_state_makes_room_for_the_new_one():
    step, state, batch = prepared(tiny_config(), 2)
    before = jax.tree.leaves(state)
    compiled, build = compile_timed(step, state, batch)
    size = sum(leaf.nbytes for leaf in before)
    assert build["alias_bytes"] >= size
    assert build["output_bytes"] - build["alias_bytes"] < 0.02 * size  # the metrics
    compiled(state, batch)
    assert all(leaf.is_deleted() for leaf in before)


@pytest.mark.slow
def test_the_gradient_is_averaged_by_one_all_reduce(compiled_in_full):
    """All leaves in a single operation, with the losses.

    A leaf each would be a hundred small ones.
    """
    step, state, batch = prepared(tiny_config(), 2)
    text = step.lower(state, batch).compile().as_text()
    reductions = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    leaves = len(jax.tree.leaves(state.params))
    assert len(reductions) == 1, f"{len(reductions)} all-reduces for {leaves} leaves"
    assert (
        reductions[0].count("f32[") > 0.9 * leaves
    )  # biases added at the same place have one gradient


def test_the_chain_takes_no_more_memory_for_more_steps():
    config = tiny_config(diffusion={"timesteps": 200, "beta_end": 0.05})
    devices = Devices(jax.devices()[:1])
    needed = {
        rows: SamplingSteps(config, devices, 16, rows).build["peak_bytes"] for rows in (2, 200)
    }
    image = 16 * 8 * 8 * 4  # bytes of the batch: one frame a step would be 200 times that
    assert abs(needed[200] - needed[2]) < image


def test_programs_are_kept_where_nobody_said_otherwise(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        assert (
            programs.keep_programs() is None and jax.config.jax_compilation_cache_dir == "elsewhere"
        )
        jax.config.update("jax_compilation_cache_dir", None)
        folder = programs.keep_programs()
        assert (
            folder.is_dir()
            and folder.is_relative_to(tmp_path)
            and jax.config.jax_compilation_cache_dir == str(folder)
        )
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert programs.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_who_waits_is_told(capfd):
    with waiting("compiling", every=0.05):
        done = jax.block_until_ready(jnp.zeros(()))
        while "compiling: 0 s" not in capfd.readouterr().err:
            pass
    with waiting("compiling", enabled=False, every=0.0):
        pass
    assert done == 0 and capfd.readouterr().err.count("\n") <= 1
