"""Measure how fast it is, alone or in turn with the same network in PyTorch; prints a table, writes JSON.

train       the training step: time, images/s, compile time, memory, share of the measured peak of matrix products
sample      one step of the sampler
chain       what a step of the sampler's loop costs beyond the forward pass that it makes
components  convolutions, GroupNorm, attention and dropout by themselves, at every size that the network has
host        what Python costs: time until a step's call returns, and the gap that it leaves between steps on the device
data        the data pipeline by itself, and how many times over it feeds the training step
start       two starts of scripts/train.py: seconds to the first step without and with compiled programs on disk

--against=diffusers runs diffusers' UNet2DModel with the same sizes in a process of its own, in turn with ours (channels_last;
eager, and with --variants=eager,compiled through torch.compile; autocast to bfloat16 where the config says so). ratio is our
time by theirs, pair by pair: below 1 we are faster. On a CPU give --config.model.dtype=float32, and leave the machine alone.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_jax import cli
from ddpm_jax.benchmark import components, machine, ours, pipeline, rivals, startup, timing
from ddpm_jax.config import Config, ConfigError, load_config
from ddpm_jax.devices import Devices
from ddpm_jax.progress import Progress

WHAT = ("train", "sample", "chain", "components", "host", "data", "start")
Results = dict[str, Any]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compare(call: Callable[[int], float], rival: rivals.Diffusers | None, what: str, options: argparse.Namespace) -> Results:
    """Timings of ours (`call(steps)` gives seconds a step) and of each variant of the rival, in turn."""
    steps = max(1, math.ceil(options.least_seconds / min(call(1), call(1))))
    calls = {"ours": lambda: call(steps)}
    for variant in options.variants if rival is not None else ():
        say(f"{what}: diffusers {variant}")
        calls[f"diffusers {variant}"] = lambda variant=variant: getattr(rival, what)(variant, steps)
    with Progress(len(calls) * (options.rounds + 1), unit="timing") as progress:

        def counted(name: str, call: Callable[[], float]) -> Callable[[], float]:
            def timed() -> float:
                taken = call()
                progress.update(of=name)
                return taken

            return timed

        taken = timing.in_turn({name: counted(name, call) for name, call in calls.items()}, options.rounds)
    rows = {name: timing.summary(values) for name, values in taken.items()}
    for name in rows:
        if name != "ours":
            rows[name]["ratio"] = timing.paired_ratio(taken["ours"], taken[name])
    return {"steps_a_round": steps, **rows}


def speed(result: Results, images: int, flops: int, peak: float) -> Results:
    """Images a second and the share of the peak, of the median."""
    median = result["ours"]["median_ms"] / 1e3
    use = {"gflop": flops / 1e9, "images_per_s": images / median, "flop_utilisation": flops / median / peak}
    return {**result, **use}


def measure(config: Config, options: argparse.Namespace) -> Results:
    devices = Devices()
    devices.check_batch(config.train.batch_size, config.train.accumulation, "train.batch_size")
    results: Results = {"machine": machine.describe_machine(devices), "config": options.config, "dtype": config.model.dtype}
    results |= {"batch_size": config.train.batch_size, "rounds": options.rounds}
    peak = timing.matrix_peak(config.model.dtype) * len(devices.devices)
    results["matrix_peak_tflops"] = peak / 1e12
    threads = machine.cores()
    rival = rivals.Diffusers(config, config.train.batch_size, threads) if options.against else None
    try:
        if rival is not None:
            results["diffusers"] = rival.about
        if {"train", "host", "data"} & set(options.what):
            say("train: compiling")
            step = ours.TrainStep(config, devices)
            results["train"] = speed(compare(step, rival, "train", options), config.train.batch_size, step.flops(), peak)
            results["train"]["build"] = step.build
        if "sample" in options.what:
            say("sample: compiling")
            chain = ours.SamplingSteps(config, devices, config.train.batch_size)
            result = compare(lambda steps: chain(), rival, "sample", options)
            results["sample"] = speed(result, config.train.batch_size, chain.flops(), peak) | {"build": chain.build}
        results["peak_bytes"] = {"ours": machine.peak_memory(devices)}
        if rival is not None:
            results["peak_bytes"]["diffusers"] = rival.peak_bytes()
    finally:
        if rival is not None:
            rival.close()
    if "chain" in options.what:
        say("chain: compiling")
        sized = config, devices, config.train.batch_size
        taken = timing.in_turn({"step": ours.SamplingSteps(*sized), "forward": ours.ForwardPasses(*sized)}, options.rounds)
        ratio = timing.paired_ratio(taken["step"], taken["forward"])
        results["chain"] = {name: timing.summary(values) for name, values in taken.items()} | {"ratio": ratio}
    if "host" in options.what:
        say("host: compiling a loop of steps")
        loop = ours.DeviceLoop(config, devices)
        calls = {"call": step.host_seconds, "step": lambda: step(ours.CHAIN), "device_loop": loop}
        taken = timing.in_turn(calls, options.rounds)
        results["host"] = {name: timing.summary(values) for name, values in taken.items()}
        results["host"]["gap_ms"] = 1e3 * float(timing.median_difference(taken["step"], taken["device_loop"]))
    if "components" in options.what:
        say("components: compiling")
        results["components"] = components.measure_components(config, config.train.batch_size, options.rounds)
    if "data" in options.what:
        results["data"] = pipeline.measure_pipeline(config, options.data_dir, devices, batches=max(50, options.rounds))
        results["data"]["times_the_step"] = results["data"]["images_per_s"] / results["train"]["images_per_s"]
    if "start" in options.what:
        say("start: two trainings to their first step")
        overrides = [f"--config.{item}" for item in options.overrides]
        train = [str(Path(__file__).with_name("train.py")), f"--config={options.config}", f"--data_dir={options.data_dir}"]
        first, second = startup.measure_starts([*train, *overrides])
        results["start"] = {"first_s": first, "second_s": second, "ratio": second / first}
    return results


def table(results: Results) -> list[str]:
    about = results["machine"]
    lines = [f"{about['processor']}, {about['cores']} cores, {', '.join(sorted(set(about['devices'])))}"]
    lines.append(f"{results['config']}, batch {results['batch_size']}, {results['dtype']}")
    lines.append(f"matrix products reach {results['matrix_peak_tflops']:.3g} TFLOP/s")
    for what in ("train", "sample"):
        for name, row in results.get(what, {}).items():
            if isinstance(row, dict) and "median_ms" in row:
                ratio = f"  ratio {row['ratio']['median']:.2f}" if "ratio" in row else ""
                if name == "ours":
                    ratio = f"  {results[what]['images_per_s']:.4g} images/s, {results[what]['flop_utilisation']:.0%} of the peak"
                lines.append(f"{what:<8}{name:<20}{row['median_ms']:10.4g} ms{ratio}")
    for row in results.get("components", []):
        rate = f"{row['gflops_per_s']:8.0f} GFLOP/s" if "gflops_per_s" in row else ""
        lines.append(f"{row['part']:<32}{row['map']:<14}{row['median_ms']:10.4g} ms{rate}")
    if "host" in results:
        host = results["host"]
        lines.append(
            f"host    a call returns after {host['call']['median_ms']:.3g} ms; gap between steps {host['gap_ms']:.3g} ms"
        )
    if "chain" in results:
        chain = results["chain"]
        step, forward = chain["step"]["median_ms"], chain["forward"]["median_ms"]
        lines.append(f"chain   a step {step:.4g} ms, a forward pass {forward:.4g} ms, ratio {chain['ratio']['median']:.3f}")
    if "data" in results:
        lines.append(
            f"data    {results['data']['images_per_s']:.4g} images/s, {results['data']['times_the_step']:.3g} times the step's"
        )
    if "start" in results:
        start = results["start"]
        lines.append(f"start   first step after {start['first_s']:.1f} s, at the second start after {start['second_s']:.1f} s")
    return lines


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/benchmark.py --config=configs/cifar10.py --config.model.dtype=float32 --config.train.batch_size=16 "
        "--what=train,sample --against=diffusers --output=benchmark.json",
    )
    cli.add_config(flags)
    cli.add_data_dir(flags)
    flags.add_argument("--what", type=cli_list(WHAT), default=["train", "sample"], help=f"of {','.join(WHAT)} (train,sample)")
    flags.add_argument("--against", choices=["diffusers"], help="run PyTorch in turn (requirements-torch.txt)")
    flags.add_argument("--variants", type=cli_list(rivals.VARIANTS), default=["eager"], help="of PyTorch: eager,compiled (eager)")
    flags.add_argument("--rounds", type=int, default=20, metavar="N", help="timings of each (default: 20)")
    flags.add_argument("--least_seconds", type=float, default=0.1, metavar="S", help="of one timing (default: 0.1)")
    flags.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    options, overrides = cli.parse_with_overrides(flags, argv)
    options.overrides = overrides
    config = load_config(options.config, overrides)
    if options.rounds < 1:
        raise ConfigError(f"--rounds={options.rounds}: at least 1")
    if options.against:
        # Two programs share the device: neither may take all of its memory at the start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = measure(config, options)
    print("\n".join(table(results)))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def cli_list(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """For `type=`: a comma-separated list of some of `choices`."""

    def parse(text: str) -> list[str]:
        for item in text.split(","):
            if item not in choices:
                raise argparse.ArgumentTypeError(f"{item!r}: choose from {', '.join(choices)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    cli.run(main)
