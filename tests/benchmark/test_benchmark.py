"""The benchmark measures what it says: in turn, pair by pair, the programs of the run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddpm_jax.benchmark import components, ours, quality, report, rivals, startup
from ddpm_jax.benchmark.quality import ComparisonOptions
from ddpm_jax.benchmark.report import BenchmarkOptions
from ddpm_jax.benchmark.timing import in_turn, matrix_peak, paired_ratio, seconds, summary
from ddpm_jax.build import abstract_params, image_shape
from ddpm_jax.cli import benchmark, compare_with_diffusers, flags
from ddpm_jax.config import save_json
from ddpm_jax.errors import ConfigError
from ddpm_jax.network import normalization
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.weights.layouts.diffusers_config import network_config
from tests.support.norms import traced_anew
from tests.support.tiny import tiny_config


def test_turns_alternate_and_the_first_do_not_count():
    order = []

    def call(name):
        order.append(name)
        return float(len(order))

    taken = in_turn({name: lambda name=name: call(name) for name in "abc"}, rounds=3, warmup=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 15, 3)]
    assert [sorted(each) for each in rounds] == [list("abc")] * 5
    assert len({each[0] for each in rounds[2:]}) == 3  # everyone goes first once
    for name, values in taken.items():
        np.testing.assert_array_equal(values, [i + 1 for i in range(6, 15) if order[i] == name])


def test_ratios_are_taken_pair_by_pair():
    """A machine that turns ten times slower for half of the rounds leaves the ratio alone.

    The ratio of the medians would change.
    """
    slow = np.array([1, 1, 10, 10, 10])
    assert paired_ratio(2.0 * slow, 1.0 * slow)["median"] == pytest.approx(2)
    noisy = paired_ratio(np.array([1.0, 2, 3, 4, 5]), np.ones(5))
    assert (noisy["low"], noisy["median"], noisy["high"]) == (2, 3, 4)
    assert summary(np.array([0.003, 0.001, 0.002])) == pytest.approx(
        {"median_ms": 2, "best_ms": 1, "low_ms": 1.5, "high_ms": 2.5}
    )


def test_a_rival_of_twice_the_time_makes_ours_half_of_it():
    rival = SimpleNamespace(train=lambda variant, steps: 2.0)
    options = BenchmarkOptions("x.py", rounds=3)
    found = report.compare(lambda steps: 1.0, rival, "train", options)
    assert found["ours"]["median_ms"] == 1000 and found["diffusers eager"]["median_ms"] == 2000
    assert found["diffusers eager"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_seconds_wait_for_the_result():
    def slow(x):
        time.sleep(0.05)
        return x

    delayed = jax.jit(lambda x: jax.pure_callback(slow, jax.ShapeDtypeStruct((), np.float32), x))
    assert 0.05 <= seconds(delayed, np.float32(1)) < 5


def test_the_peak_of_matrix_products_is_no_fantasy():
    """No machine falls short of the lower bound, however busy, and none reaches the upper.

    No core does 64 float32 products a cycle at 8 GHz.
    """
    assert (
        1e8
        < matrix_peak("float32", sizes=(512,), budget=0.5)
        < (os.cpu_count() or 1) * 2 * 64 * 8e9
    )


@pytest.mark.slow
def test_a_chain_and_a_step_are_those_of_the_run():
    """State and batch go in, the next state comes out, and samples are finite."""
    config = tiny_config(
        model={"dropout": 0.0}, data={"flip": False}, train={"ema_decays": (0.9,), "batch_size": 4}
    )
    devices = Devices(jax.devices()[:2])
    step = ours.TrainStep(config, devices)
    assert step(3) > 0 and int(step._state.step) == 3
    loop = ours.DeviceLoop(config, devices, steps=4)
    assert loop() > 0 and int(loop._state.step) == 4
    chain = ours.SamplingSteps(config, devices, 4, rows=2)
    assert np.isfinite(chain._chain(chain._params, chain._batch)).all()
    passes = ours.ForwardPasses(config, devices, 4, passes=2)
    assert passes() > 0 and passes._forward(passes._params, passes._batch)["x"].shape == (
        2,
        2,
        *image_shape(config),
    )
    assert step.flops() == 3 * config.train.batch_size * chain.flops() / 4


def test_defaults_are_those_of_the_flags():
    parsed = benchmark.parser().parse_args(["--config=x.py"])
    assert flags.fill(BenchmarkOptions, parsed) == BenchmarkOptions("x.py")
    command = ["--config=x.py", "--workdir=w", "--output=o"]
    parsed = compare_with_diffusers.parser().parse_args(command)
    assert flags.fill(ComparisonOptions, parsed) == ComparisonOptions(Path("w"))


def test_group_norm_is_timed_in_the_form_that_the_network_has(monkeypatch):
    seen = []

    def by_channels(x, scale, bias, *, average, **how):
        seen.append((x.shape, how["groups"], how["epsilon"]))
        return normalization.plain(x, scale, bias, **how)

    monkeypatch.setattr(normalization, "by_channels", by_channels)
    config = tiny_config()
    with traced_anew():
        parts = [name for name, *_ in components.components(config, 2)]
    assert {"GroupNorm and SiLU", "GroupNorm and SiLU, gradients"} <= set(parts)
    expected = (2, 8, 8, 8), config.model.group_norm_groups, config.model.group_norm_epsilon
    assert seen and set(seen) == {expected}


def test_a_training_is_started_as_a_command_of_the_package(monkeypatch, tmp_path):
    """A stand-in for the command writes the line of the log that is waited for."""
    commands, popen = [], subprocess.Popen

    def start(command, **options):
        commands.append(command)
        workdir = command[-1].removeprefix("--workdir=")
        script = (
            f"import pathlib; path = pathlib.Path({workdir!r}); path.mkdir(); "
            """(path / 'metrics.jsonl').write_text('{"loss": 1.0}')"""
        )
        return popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    times = startup.measure_starts("configs/digits.py", tmp_path, ["seed=3"])
    assert len(times) == 2 and all(0 < seconds < 60 for seconds in times)
    for command in commands:
        assert command[:-1] == [
            *(sys.executable, "-m", "ddpm_jax.cli", "train"),
            *("--config=configs/digits.py", f"--data_dir={tmp_path}"),
            *("--config.seed=3", "--config.train.log_every=1"),
        ]
    assert len({command[-1] for command in commands}) == 2


def test_a_comparison_without_pytorch_is_refused(monkeypatch, tmp_path):
    found = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name == "torch" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigError, match="PyTorch or diffusers is not installed: pip install"):
        quality.compare(tiny_config(), ComparisonOptions(tmp_path))


@pytest.mark.parametrize(
    "sections",
    [
        {"diffusion": {"prediction": "v"}},
        {"loss": {"weighting": "min_snr"}},
        {"loss": {"kind": "vlb"}},
        {"loss": {"timestep_sampling": "importance"}},
        {"optimizer": {"schedule": "linear"}},
        {"optimizer": {"weight_decay": 0.1}},
        {"train": {"accumulation": 2}},
        {"model": {"num_classes": 10}},
    ],
    ids=str,
)
def test_a_config_that_the_other_side_would_train_otherwise_is_refused(tmp_path, sections):
    """Each of them would be left out on that side without a word, and both be called the same."""
    ((section, fields),) = sections.items()
    ((field, value),) = fields.items()
    message = f"{section}.{field}={value}: the loop on PyTorch's side knows .* only: --config"
    with pytest.raises(ConfigError, match=message):
        quality.compare(tiny_config(**sections), ComparisonOptions(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_everything_is_measured_and_written(tmp_path, capsys):
    source = tmp_path / "config.json"
    source.write_text(save_json(tiny_config()))
    output = tmp_path / "new" / "speed.json"
    what = "--what=train,sample,chain,components,host,data"
    benchmark.main(
        [f"--config={source}", what, "--rounds=2", "--least_seconds=0.01", f"--output={output}"]
    )
    found, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert found["batch_size"] == 16 and found["machine"]["versions"]["jax"] == jax.__version__
    assert found["train"]["ours"]["median_ms"] > 0 and 0 < found["train"]["flop_utilisation"] < 1
    assert found["train"]["build"]["compile_s"] > 0 and found["train"]["build"]["temp_bytes"] > 0
    assert found["sample"]["images_per_s"] > 0 and found["host"]["call"]["median_ms"] > 0
    assert {row["part"] for row in found["components"]} >= {
        "convolution",
        "GroupNorm and SiLU",
        "dropout",
    }
    assert found["data"]["times_the_step"] > 0
    assert found["chain"]["ratio"]["median"] > 0
    for line in ("train ", "sample ", "chain ", "convolution ", "host ", "data "):
        assert line in printed


@pytest.mark.parametrize(
    "flag, said", [("--rounds=0", "at least 1"), ("--config.train.batch_size=7", "divisible")]
)
def test_what_cannot_be_measured_is_refused(flag, said, tmp_path):
    source = tmp_path / "config.json"
    source.write_text(save_json(tiny_config()))
    with pytest.raises(ConfigError, match=said):
        benchmark.main([f"--config={source}", flag])


@pytest.mark.slow
def test_the_second_start_finds_its_programs(tmp_path):
    config = str(Path(__file__).parents[2] / "configs" / "digits.py")
    first, second = startup.measure_starts(config)
    assert second < first
    with pytest.raises(startup.StartError, match="ended with code 1"):
        startup.measure_starts(config, overrides=["train.batch_size=0"])


@pytest.mark.parametrize("size, sides", [(8, (8, 8)), ((8, 16), (8, 16))])
def test_a_batch_of_the_rival_is_of_the_images_of_the_config(size, sides):
    config = tiny_config(data={"image_size": size, "channels": 3})
    assert rivals.batch_shape(network_config(config), 4) == (4, 3, *sides)


class Requests:
    """One end of a pipe, through which these requests come and then nobody."""

    def __init__(self, *requests):
        self.requests, self.answers = list(requests), []

    def recv(self):
        if not self.requests:
            raise EOFError
        return self.requests.pop(0)

    def send(self, answer):
        self.answers.append(answer)


def test_whatever_pytorch_raises_comes_back_in_one_line(monkeypatch):
    def fail(variant, steps):
        raise ValueError("class_labels should be\n  provided")

    work = {"about": {"torch": "2"}, "train": fail, "sample": lambda variant, steps: 0.5}
    monkeypatch.setattr(rivals, "_prepare", lambda: work)
    pipe = Requests(("train", "eager", 1), ("sample", "eager", 1))
    rivals._serve(pipe, ())
    said = "eager: ValueError: class_labels should be provided"
    assert pipe.answers == [({"torch": "2"}, None), (None, said), (0.5, None)]

    def prepare():
        raise TypeError("x" * 5000)

    monkeypatch.setattr(rivals, "_prepare", prepare)
    pipe = Requests()
    rivals._serve(pipe, ())
    ((answer, said),) = pipe.answers
    assert answer is None and said.startswith("TypeError: xxx") and len(said) < 500


def test_a_rival_that_is_gone_is_told_in_one_line():
    class Gone(Requests):
        def send(self, request):
            raise BrokenPipeError

    rival = object.__new__(rivals.Diffusers)
    rival._here = Gone()
    with pytest.raises(rivals.RivalError, match="the process with PyTorch died"):
        rival.train("eager", 1)
    rival._here = Requests((None, "eager: ValueError: no"))
    with pytest.raises(rivals.RivalError, match="^against=diffusers: eager: ValueError: no$"):
        rival.sample("eager", 1)


@pytest.mark.parametrize("platform, device", [("gpu", "cpu"), ("gpu", "H100"), ("cpu", "cpu")])
def test_a_rival_on_the_cpu_is_no_rival_of_a_gpu(monkeypatch, platform, device):
    pipe = SimpleNamespace(recv=lambda: ({"torch": "2", "device": device}, None), close=list)
    process = SimpleNamespace(start=list, join=lambda timeout: None, is_alive=bool)
    context = SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=lambda **task: process)
    monkeypatch.setattr(rivals.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    if (platform, device) == ("gpu", "cpu"):
        with pytest.raises(rivals.RivalError, match="2 is on the CPU and JAX on a gpu: install"):
            rivals.Diffusers(tiny_config(), 4, threads=1)
    else:
        assert rivals.Diffusers(tiny_config(), 4, threads=1).about["device"] == device


@pytest.mark.interop
@pytest.mark.parametrize(
    "sections",
    [{"data": {"flip": True, "image_size": (8, 16)}}, {"model": {"num_classes": 10}}],
    ids=["wide", "classes"],
)
def test_the_rival_has_the_same_network(sections):
    levels = {"channel_mult": (1, 2), "attention_resolutions": (4,)}
    config = tiny_config(**sections | {"model": levels | sections.get("model", {})})
    rival = rivals.Diffusers(config, 4, threads=1)
    try:
        ours_count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
        assert rival.about["parameters"] == ours_count
        assert (
            rival.train("eager", 2) > 0
            and rival.sample("eager", 2) > 0
            and rival.peak_bytes() > 2**20
        )
    finally:
        rival.close()
