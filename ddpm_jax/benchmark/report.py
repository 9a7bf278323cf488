"""Time each part of a config and lay the figures out as a table."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_jax.benchmark import components, machine, ours, pipeline, rivals, startup, timing
from ddpm_jax.config import Config, load_config
from ddpm_jax.errors import ConfigError
from ddpm_jax.machine import cores
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress

PARTS = ("train", "sample", "chain", "components", "host", "data", "start")

Results = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is timed, and how often.

    Attributes:
      config: a config file, as `load_config` takes it.
      overrides: of its fields, each "section.field=value".
      data_dir: the prepared data sets.
      what: some of PARTS.
      against: "diffusers" times the same network in PyTorch in turn; None times ours alone.
      variants: of PyTorch, some of `rivals.VARIANTS`.
      rounds: timings of each.
      least_seconds: of one timing; steps are repeated until they take so long.

    Raises:
      ConfigError: there is no round.
    """

    config: str
    overrides: Sequence[str] = ()
    data_dir: Path = Path("data")
    what: Sequence[str] = ("train", "sample")
    against: str | None = None
    variants: Sequence[str] = ("eager",)
    rounds: int = 20
    least_seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: at least 1")


def measure(options: BenchmarkOptions) -> Results:
    """Time the parts that `options` names.

    Returns:
      The figures of each part, and what they were measured on, ready for JSON.

    Raises:
      ConfigError: a config that cannot be run, or a batch that the devices do not divide.
      RivalError: PyTorch cannot take part.
      StartError: a training did not start.
    """
    config = load_config(options.config, options.overrides)
    if options.against:
        # Two programs share the device: neither may take all of its memory at the start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices = Devices()
    devices.check_batch(config.train.batch_size, config.train.accumulation, "train.batch_size")
    peak = timing.matrix_peak(config.model.dtype) * len(devices.devices)
    results: Results = {
        "machine": machine.describe_machine(devices),
        "config": options.config,
        "dtype": config.model.dtype,
        "batch_size": config.train.batch_size,
        "rounds": options.rounds,
        "matrix_peak_tflops": peak / 1e12,
    }
    results |= measure_programs(config, options, devices, peak)
    if "components" in options.what:
        say("components: compiling")
        results["components"] = components.measure_components(
            config, config.train.batch_size, options.rounds
        )
    if "data" in options.what:
        results["data"] = pipeline.measure_pipeline(
            config, options.data_dir, devices, batches=max(50, options.rounds)
        )
        results["data"]["times_the_step"] = (
            results["data"]["images_per_s"] / results["train"]["images_per_s"]
        )
    if "start" in options.what:
        say("start: two trainings to their first step")
        first, second = startup.measure_starts(options.config, options.data_dir, options.overrides)
        results["start"] = {"first_s": first, "second_s": second, "ratio": second / first}
    return results


def measure_programs(
    config: Config, options: BenchmarkOptions, devices: Devices, peak: float
) -> Results:
    """Time the training step and the sampler's step, with the rival in turn, and what is around."""
    results: Results = {}
    rival = None
    try:
        if options.against:
            rival = rivals.Diffusers(config, config.train.batch_size, cores())
            results["diffusers"] = rival.about
        if {"train", "host", "data"} & set(options.what):
            say("train: compiling")
            step = ours.TrainStep(config, devices)
            result = compare(step, rival, "train", options)
            results["train"] = speed(result, config.train.batch_size, step.flops(), peak) | {
                "build": step.build
            }
        if "sample" in options.what:
            say("sample: compiling")
            chain = ours.SamplingSteps(config, devices, config.train.batch_size)
            result = compare(lambda steps: chain(), rival, "sample", options)
            results["sample"] = speed(result, config.train.batch_size, chain.flops(), peak) | {
                "build": chain.build
            }
        results["peak_bytes"] = {"ours": machine.peak_memory(devices)}
        if rival is not None:
            results["peak_bytes"]["diffusers"] = rival.peak_bytes()
    finally:
        if rival is not None:
            rival.close()
    if "chain" in options.what:
        say("chain: compiling")
        results["chain"] = measure_chain(config, devices, options.rounds)
    if "host" in options.what:
        say("host: compiling a loop of steps")
        results["host"] = measure_host(config, devices, step, options.rounds)
    return results


def compare(
    call: Callable[[int], float],
    rival: rivals.Diffusers | None,
    what: str,
    options: BenchmarkOptions,
) -> Results:
    """Time ours and each variant of the rival in turn.

    Args:
      call: gives the seconds a step of so many steps of ours.
      what: "train" or "sample", the rival's method.
    """
    steps = max(1, math.ceil(options.least_seconds / min(call(1), call(1))))
    calls = {"ours": lambda: call(steps)}
    for variant in options.variants if rival is not None else ():
        say(f"{what}: diffusers {variant}")
        calls[f"diffusers {variant}"] = lambda variant=variant: getattr(rival, what)(variant, steps)
    with Progress(len(calls) * (options.rounds + 1), unit="timing") as progress:

        def counted(name: str, call: Callable[[], float]) -> Callable[[], float]:
            def timed() -> float:
                seconds = call()
                progress.update(of=name)
                return seconds

            return timed

        seconds = timing.in_turn(
            {name: counted(name, call) for name, call in calls.items()}, options.rounds
        )
    rows = {name: timing.summary(values) for name, values in seconds.items()}
    for name in rows:
        if name != "ours":
            rows[name]["ratio"] = timing.paired_ratio(seconds["ours"], seconds[name])
    return {"steps_a_round": steps, **rows}


def speed(result: Results, images: int, flops: int, peak: float) -> Results:
    """Add images a second and the share of the peak, both of the median."""
    median = result["ours"]["median_ms"] / 1e3
    use = {
        "gflop": flops / 1e9,
        "images_per_s": images / median,
        "flop_utilisation": flops / median / peak,
    }
    return {**result, **use}


def measure_chain(config: Config, devices: Devices, rounds: int) -> Results:
    """Time a step of the sampler's loop and a forward pass by itself, in turn."""
    sizes = config, devices, config.train.batch_size
    seconds = timing.in_turn(
        {"step": ours.SamplingSteps(*sizes), "forward": ours.ForwardPasses(*sizes)}, rounds
    )
    return {
        **{name: timing.summary(values) for name, values in seconds.items()},
        "ratio": timing.paired_ratio(seconds["step"], seconds["forward"]),
    }


def measure_host(config: Config, devices: Devices, step: ours.TrainStep, rounds: int) -> Results:
    """Time a step's call until it returns, and the gap between steps that the host leaves."""
    loop = ours.DeviceLoop(config, devices)
    calls = {"call": step.host_seconds, "step": lambda: step(ours.CHAIN), "device_loop": loop}
    seconds = timing.in_turn(calls, rounds)
    gap = timing.median_difference(seconds["step"], seconds["device_loop"])
    return {
        **{name: timing.summary(values) for name, values in seconds.items()},
        "gap_ms": 1e3 * float(gap),
    }


def table(results: Results) -> list[str]:
    """Lay the figures out as lines of text."""
    about = results["machine"]
    kinds = ", ".join(sorted(set(about["devices"])))
    lines = [
        f"{about['processor']}, {about['cores']} cores, {kinds}",
        f"{results['config']}, batch {results['batch_size']}, {results['dtype']}",
        f"matrix products reach {results['matrix_peak_tflops']:.3g} TFLOP/s",
    ]
    for what in ("train", "sample"):
        result = results.get(what, {})
        for name, row in result.items():
            if isinstance(row, dict) and "median_ms" in row:
                note = f"  ratio {row['ratio']['median']:.2f}" if "ratio" in row else ""
                if name == "ours":
                    note = (
                        f"  {result['images_per_s']:.4g} images/s, "
                        f"{result['flop_utilisation']:.0%} of the peak"
                    )
                lines.append(f"{what:<8}{name:<20}{row['median_ms']:10.4g} ms{note}")
    for row in results.get("components", []):
        rate = f"{row['gflops_per_s']:8.0f} GFLOP/s" if "gflops_per_s" in row else ""
        lines.append(f"{row['part']:<32}{row['map']:<14}{row['median_ms']:10.4g} ms{rate}")
    if "host" in results:
        host = results["host"]
        lines.append(
            f"host    a call returns after {host['call']['median_ms']:.3g} ms; "
            f"gap between steps {host['gap_ms']:.3g} ms"
        )
    if "chain" in results:
        chain = results["chain"]
        lines.append(
            f"chain   a step {chain['step']['median_ms']:.4g} ms, "
            f"a forward pass {chain['forward']['median_ms']:.4g} ms, "
            f"ratio {chain['ratio']['median']:.3f}"
        )
    if "data" in results:
        data = results["data"]
        lines.append(
            f"data    {data['images_per_s']:.4g} images/s, "
            f"{data['times_the_step']:.3g} times the step's"
        )
    if "start" in results:
        start = results["start"]
        lines.append(
            f"start   first step after {start['first_s']:.1f} s, "
            f"at the second start after {start['second_s']:.1f} s"
        )
    return lines


def save(results: Results, path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def say(line: str) -> None:
    """Print a line about what goes on, beside the results."""
    print(line, file=sys.stderr, flush=True)
