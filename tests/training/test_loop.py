"""A run from end to end.

It is trained, logged, saved, resumed to the bit, sampled, refused where it must be.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import images
from ddpm_jax.build import signal_note
from ddpm_jax.cli.run import outcome
from ddpm_jax.config import Config, from_dict
from ddpm_jax.data.source import ArraySource, RecordSource, Stream
from ddpm_jax.errors import ConfigError, DataError, WorkdirError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.workdir import sole_trainer
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.trained import open_trained
from ddpm_jax.training.images import check_labels
from ddpm_jax.training.loop import finished, train
from ddpm_jax.training.monitor import Diverged
from ddpm_jax.training.state import average_note, initial_share
from ddpm_jax.training.step import ema_decay
from tests.support.commands import command_module
from tests.support.processes import (
    ROOT,
    assert_bit_equal,
    final_state,
    finish,
    metrics,
    metrics_seen,
    script,
    write_config,
)
from tests.support.tiny import tiny_config


def train_on(devices: int, config: Config, workdir: Path, **options) -> int:
    return train(
        config, workdir, data_dir=workdir, devices=Devices(jax.devices()[:devices]), **options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    """Six uninterrupted steps on two devices."""
    workdir = tmp_path_factory.mktemp("run") / "straight"
    config = tiny_config(train={"sample_every": 6})
    assert train_on(2, config, workdir) == 0
    return config, workdir


def test_a_run_directory_describes_the_run(run):
    config, workdir = run
    assert from_dict(json.loads((workdir / "config.json").read_text())) == config
    rows = metrics(workdir)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [3, 6]
    for name in (
        "loss",
        "gradient_norm",
        "update_norm",
        "parameter_norm",
        "learning_rate",
        "skipped",
    ):
        assert all(np.isfinite(row[name]) for row in rows if "loss" in row)
    assert (
        0.5 < rows[0]["loss"] < 1.5
    )  # the untrained network predicts 0, and the noise has variance 1
    assert "conv_in/kernel" in (workdir / "parameters.txt").read_text()
    assert images.load_png(workdir / "samples" / "step_0000006.png").shape == (18, 18, 1)
    assert list(workdir.glob("events.out.tfevents*"))


@pytest.mark.parametrize("cut", [2, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, tmp_path, cut):
    """Parameters, moments, averages and the log; stopped at a checkpoint, and one step past it."""
    config, straight = run
    workdir = tmp_path / "resumed"
    stopped = tiny_config(train={"sample_every": 6, "steps": cut, "checkpoint_every": 2})
    train_on(2, stopped, workdir)
    train_on(2, config, workdir)
    assert_bit_equal(final_state(config, workdir), final_state(config, straight))
    wanted = {row["step"]: row for row in metrics(straight) if "loss" in row}
    got = {row["step"]: row for row in metrics(workdir) if "loss" in row}
    assert got[6]["learning_rate"] == wanted[6]["learning_rate"]
    if cut == 2:
        assert got == wanted


def test_a_run_goes_on_with_another_number_of_devices(run, tmp_path):
    config, straight = run
    workdir = tmp_path / "moved"
    shutil.copytree(straight, workdir)
    train_on(1, config, workdir, step=4)
    assert [row["step"] for row in metrics(workdir) if "loss" in row] == [2, 4, 6]
    one, other = final_state(config, workdir), final_state(config, straight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, other.params)


def test_a_run_goes_on_with_what_takes_less_memory(run, tmp_path):
    """As the line about memory says it, in the directory that the run has claimed by then."""
    config, straight = run
    workdir = tmp_path / "smaller"
    shutil.copytree(straight, workdir)
    smaller = tiny_config(train={"sample_every": 6, "accumulation": 4}, model={"remat": True})
    train_on(2, smaller, workdir, step=4)
    assert from_dict(json.loads((workdir / "config.json").read_text())) == smaller
    one, other = final_state(config, workdir), final_state(config, straight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, other.params)


def test_going_on_from_an_older_checkpoint_drops_what_came_after(run, tmp_path):
    config, straight = run
    workdir = tmp_path / "back"
    train_on(2, config, workdir)
    train_on(2, config, workdir, step=2)
    assert_bit_equal(final_state(config, workdir), final_state(config, straight))
    assert [row["step"] for row in metrics(workdir) if "loss" in row] == [2, 4, 6]
    assert metrics(workdir) == metrics(straight)
    assert sorted(path.name for path in (workdir / "checkpoints.aside").iterdir()) == ["4", "6"]


def test_a_finished_run_is_left_alone(run, tmp_path, capsys):
    config, workdir = run
    before = final_state(config, workdir)
    assert train_on(2, config, workdir) == 0
    said = f"{workdir}: finished at step 6 of 6; a larger train.steps goes on\n"
    assert capsys.readouterr().out == said
    shutil.copytree(workdir, tmp_path / "copy")
    assert train_on(2, tiny_config(train={"sample_every": 6, "steps": 4}), tmp_path / "copy") == 0
    fewer = f"{tmp_path / 'copy'}: finished at step 6 of 4, which asks for fewer than are done\n"
    assert capsys.readouterr().out == fewer
    assert_bit_equal(final_state(config, workdir), before)
    assert [row["step"] for row in metrics(workdir) if "loss" in row] == [2, 4, 6]
    cooled = tiny_config(optimizer={"schedule": "cosine"})
    assert finished(workdir, 6, cooled).endswith(f"a run --from={workdir} goes on")


@pytest.mark.parametrize(
    "seed, indices, said",
    [
        (0, [0, 2**32], "indices=4294967296"),
        (0, [-1], "indices=-1"),
        (2**32, [0], "seed=4294967296"),
        (-1, [0], "seed=-1"),
    ],
)
def test_no_other_draw_stands_in_for_one_out_of_range(run, seed, indices, said):
    config, _ = run
    generator = build_generator(config, Devices(jax.devices()[:1]), batch_size=2)
    with pytest.raises(ConfigError, match=rf"^{said}: must be in 0\.\.2\^32-1"):
        generator.draw({}, seed=seed, indices=np.array(indices))


def test_samples_depend_on_seed_and_index_alone(run):
    """Whatever the batch size, the order and the number of devices."""
    _, workdir = run
    drawn = {}
    for devices, batch_size in ((1, 5), (2, 4), (8, 8)):
        place = Devices(jax.devices()[:devices])
        trained = open_trained(workdir, place)
        generator = build_generator(trained.config, place, batch_size=batch_size)
        drawn[devices] = np.concatenate(
            list(generator(trained.params, seed=3, indices=np.arange(5)))
        )
        assert drawn[devices].shape == (5, 8, 8, 1)
        if devices == 8:
            others = np.concatenate(list(generator(trained.params, seed=4, indices=np.arange(5))))
            reversed_ = np.concatenate(
                list(generator(trained.params, seed=3, indices=np.arange(5)[::-1]))
            )
    np.testing.assert_allclose(drawn[2], drawn[1], atol=1e-5)
    np.testing.assert_allclose(drawn[8], drawn[1], atol=1e-5)
    np.testing.assert_allclose(reversed_[::-1], drawn[1], atol=1e-5)
    assert np.abs(others - drawn[1]).max() > 0.1


def test_weights_are_what_they_are_called(run):
    config, workdir = run
    state, devices = final_state(config, workdir), Devices(jax.devices()[:1])
    for name, want in (
        ("ema", state.ema["0.9"]),
        ("0.99", state.ema["0.99"]),
        ("raw", state.params),
    ):
        assert_bit_equal(open_trained(workdir, devices, weights=name).params, want)
    assert open_trained(workdir, devices).weights == "ema 0.9"
    with pytest.raises(WorkdirError, match="weights=0.5: this run has ema, raw, 0.9, 0.99"):
        open_trained(workdir, devices, weights="0.5")


def test_what_cannot_run_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "run"
    for config, error, said in (
        (
            tiny_config(train={"batch_size": 12}),
            ConfigError,
            "batch_size=12: must be divisible by 8 devices; try 8 or 16",
        ),
        (
            tiny_config(data={"name": "cifar10", "image_size": 32}),
            DataError,
            "run ddpm prepare-data --dataset=cifar10",
        ),
        (tiny_config(data={"image_size": 16}), DataError, "set config.data.image_size=8"),
        (
            tiny_config(model={"base_channels": 2, "group_norm_groups": 1}),
            ConfigError,
            "config.model.base_channels=2: .* needs at least 4",
        ),
        (
            tiny_config(model={"num_classes": 5}),
            ConfigError,
            "num_classes=5: data set 'digits' has labels up to 9",
        ),
    ):
        with pytest.raises(error, match=said):
            train_on(8, config, workdir)
        assert not workdir.exists()


def test_a_refused_command_leaves_a_run_as_it_is(run, tmp_path):
    """Its config.json above all.

    The run trains in another process, or does not have the checkpoint that the command names.
    """
    config, straight = run
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    longer = tiny_config(train={"sample_every": 6, "steps": 99})

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    before = contents()
    with sole_trainer(workdir), pytest.raises(WorkdirError, match="another process is training"):
        train_on(2, longer, workdir)
    assert contents() == before
    with pytest.raises(WorkdirError, match="no checkpoint of step 5; there are: 2, 4, 6"):
        train_on(2, longer, workdir, step=5)
    assert from_dict(json.loads((workdir / "config.json").read_text())) == config


def test_labels_that_the_network_lacks_are_named_in_memory_and_on_disk():
    """At once where the set says how many classes it has, else as they are read."""
    config = tiny_config(model={"num_classes": 5})
    images = np.zeros((9, 8, 8, 1), np.uint8)
    labels = np.arange(9, dtype=np.int32)

    def on_disk(num_classes: int | None) -> RecordSource:
        return RecordSource(
            9,
            lambda rows: rows,
            lambda _, row: (images[row], labels[row]),
            (8, 8, 1),
            True,
            num_classes,
        )

    def said(largest: int):
        what = f"num_classes=5: data set 'digits' has labels up to {largest}"
        return pytest.raises(ConfigError, match=what)

    with said(8):
        check_labels(config, ArraySource(images, labels))
    with said(9):
        check_labels(config, on_disk(10))
    source = on_disk(None)
    check_labels(config, source)
    source.read(np.arange(5))
    with said(6):
        source.read(np.array([1, 6]))
    check_labels(config, ArraySource(images, labels % 5))
    with pytest.raises(ConfigError, match="has no labels; set it to 0"):
        check_labels(config, ArraySource(images))


def test_labels_of_a_stream_that_the_network_lacks_are_named():
    """Those of the first array at once, to its last; those of others as they are read."""
    config = tiny_config(model={"num_classes": 5})
    images = np.zeros((9, 8, 8, 1), np.uint8)

    def stream(*labels) -> Stream:
        return Stream(lambda: [{"image": images, "label": np.array(row)} for row in labels])

    with pytest.raises(ConfigError, match="num_classes=5: .* has labels up to 7"):
        check_labels(config, stream([0] * 8 + [7]))
    with pytest.raises(ConfigError, match="has the label -1: classes are numbered from 0"):
        check_labels(config, stream([0] * 8 + [-1]))
    check_labels(tiny_config(), stream([-1] * 9))  # a network without classes looks at none
    source = stream([4] * 9, [0] * 8 + [6])
    check_labels(config, source)
    arrays = source.arrays()
    next(arrays)
    with pytest.raises(ConfigError, match="num_classes=5: .* has labels up to 6"):
        next(arrays)


def test_an_average_that_is_mostly_the_initial_network_says_so():
    """The share by recursion: what is left of a constant that later weights do not have."""
    for decay, updates, warmup in [(0.9999, 1000, False), (0.9, 5, False), (0.999, 30, True)]:
        left = 1.0
        for n in range(updates):
            d = float(ema_decay(decay, jnp.int32(n), warmup))
            left = d * left + (1 - d) * 0
        assert abs(initial_share(decay, updates, warmup) - left) < 1e-5
    config = tiny_config(train={"ema_decays": (0.9999,)})
    said = average_note(config, "0.9999", 1000)
    assert said.startswith(
        "note: ema 0.9999 averages over 10,000 steps, and this run has 1,000: 90 %"
    )
    assert (
        said.endswith("weights=raw shows more") and average_note(config, "0.9999", 50_000) is None
    )
    assert average_note(config, "0.9999", 0) is None  # imported weights have no updates


def test_a_chain_that_ends_with_signal_left_says_so():
    """Ho et al.'s betas over 100 steps: their product in float64 is 0.36."""
    left = np.prod(1 - np.linspace(1e-4, 0.02, 100))
    said = signal_note(tiny_config(diffusion={"timesteps": 100, "beta_end": 0.02}))
    assert f"a chain of 100 steps with these betas leaves {100 * left:.0f} % of the signal" in said
    assert "leaves 36 %" in said
    for fields in (
        {"timesteps": 1000, "beta_end": 0.02},
        {"timesteps": 100, "beta_end": 0.02, "rescale_betas": True},
        {"timesteps": 100, "schedule": "cosine"},
    ):
        assert signal_note(tiny_config(diffusion=fields)) is None


def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(tmp_path):
    """A learning rate that overflows.

    The steps are skipped, and the run ends instead of going on in vain.
    """
    config = tiny_config(
        optimizer={"learning_rate": 1e30, "warmup_steps": 2, "gradient_clip": 0.0},
        train={
            "steps": 40,
            "log_every": 1,
            "max_nonfinite_steps": 3,
            "checkpoint_every": 1,
            "eval_images": 0,
        },
    )
    with pytest.raises(Diverged, match="3 steps in a row .* checkpoint [0-9]+ is the last one"):
        train_on(1, config, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows][-3:] == [1, 1, 1] and rows[0]["skipped"] == 0
    assert rows[-1]["loss"] == "NaN"
    state = final_state(config, tmp_path / "run")
    assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))
    )


# ------------------------------------------------------------------------------------- as a process


def endless(tmp_path: Path, **train_fields) -> tuple[Config, Path, list[str]]:
    fields = {
        "steps": 100_000,
        "log_every": 1,
        "checkpoint_every": 100_000,
        "eval_images": 0,
    } | train_fields
    config = tiny_config(train=fields)
    workdir = tmp_path / "run"
    return config, workdir, [f"--config={write_config(tmp_path, config)}", f"--workdir={workdir}"]


def test_sigterm_saves_and_ends_with_143(tmp_path):
    """The code is what the process ends with, as tests/training/test_output.py sees for SIGHUP."""
    config, workdir, flags = endless(tmp_path)

    def end() -> None:
        deadline = time.monotonic() + 240
        while metrics_seen(workdir / "metrics.jsonl") < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        threads.submit(end)
        code = train_on(1, config, workdir)
    assert code == 143 and signal.getsignal(signal.SIGTERM) is before
    state = final_state(config, workdir)
    assert int(state.step) == metrics_seen(workdir / "metrics.jsonl") >= 3


@pytest.mark.skipif(
    sys.platform != "linux", reason="a limit on file sizes stands in for a disk that fails"
)
@pytest.mark.slow
def test_a_write_that_fails_ends_the_run_and_leaves_nothing_half_written(tmp_path):
    _, workdir, flags = endless(tmp_path, steps=3, checkpoint_every=2)
    code, _, said = finish(
        script("train.py", *flags, before=["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"])
    )
    assert code == 1
    assert (
        "a checkpoint cannot be written (File too large); there is no checkpoint yet"
        in said.splitlines()[-1]
    )
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "name, flags, code, said",
    [
        (
            "train",
            ["--config=configs/digits.py", "--workdir=x", "--config.train.stps=3"],
            1,
            "did you mean steps?",
        ),
        (
            "train",
            ["--config=configs/none.py", "--workdir=x"],
            1,
            "no such file; these ship: celeba32, ",
        ),
        ("train", ["--workdir=x"], 1, "name a config, or images of your own"),
        (
            "sample",
            ["--workdir=nowhere", "--output=grid.png"],
            1,
            "--workdir=nowhere: not a run directory",
        ),
        ("sample", ["--workdir=nowhere", "--output=grid.jpg"], 1, "must end in .png or .npz"),
    ],
)
def test_bad_flags_are_one_line_and_a_code(name, flags, code, said, capsys):
    try:
        got = outcome(lambda: command_module(name).main(flags))
    except SystemExit as end:
        got = end.code
    errors = capsys.readouterr().err
    assert got == code and "Traceback" not in errors
    assert said in errors.splitlines()[-1]
    assert not (ROOT / "x").exists()


def test_a_script_ends_with_its_line_and_code():
    got, _, errors = finish(script("sample.py", "--workdir=nowhere", "--output=grid.png"))
    assert got == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: --workdir=nowhere: not a run directory")


def test_sample_draws_grids_and_arrays(run, tmp_path, capsys):
    _, workdir = run
    for output in ("grid.png", "samples.npz"):
        flags = [
            f"--workdir={workdir}",
            f"--output={tmp_path / output}",
            "--num_images=3",
            "--batch_size=8",
            "--seed=7",
        ]
        assert not command_module("sample").main(flags)
        assert "3 samples of ema 0.9, step 6: 20 reverse steps" in capsys.readouterr().out
    arrays = np.load(tmp_path / "samples.npz")["arr_0"]
    assert arrays.shape == (3, 8, 8, 1) and arrays.dtype == np.uint8
    np.testing.assert_array_equal(images.load_png(tmp_path / "grid.png"), images.grid(arrays))


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_data.py"])
def test_help_has_flags_and_an_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}", "--help"])
    with pytest.raises(SystemExit) as end:
        command_module(Path(name).stem).main()
    out = capsys.readouterr().out
    assert end.value.code == 0 and "example:" in out and f"scripts/{name}" in out
