"""Make the most of the first hour on an accelerator: check it, time it, train, draw and evaluate.

A call takes so many minutes and does what it gets to; the next one goes on from there:

    agreement          the device computes what a CPU does (agreement.py)
    speed              training and sampling in turn with diffusers, at each batch size
    train              the row's network, for so many minutes in all or to its end
    draw, evaluate     of the checkpoint that is there then

What is done stands in RUNS/first_hour.json, written after each stage. Commands run in processes of
their own, as in `rows`: this one opens no device. A command that is cut off is asked to stop, which
makes a training save. The run directory is the one that `reproduce` goes on from.
"""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_jax.config import load_config
from ddpm_jax.errors import LedgerError
from ddpm_jax.files import read_json
from ddpm_jax.progress import say
from ddpm_jax.reproduction import processes, provenance, rows
from ddpm_jax.reproduction.agreement import differences
from ddpm_jax.reproduction.hour import Hour, HourOptions, open_hour
from ddpm_jax.reproduction.ledger import Record, check
from ddpm_jax.reproduction.processes import Stopped, stoppable
from ddpm_jax.reproduction.records import keep, newest_step, recorded
from ddpm_jax.reproduction.rows import ROOT
from ddpm_jax.reproduction.speed_page import speed_table, write_table

RESERVE = 30.0  # seconds before the end of a call when a training is asked to save
SPEEDS = ("train,host", "sample")
# In full the chain of 1000 steps and 50,000 samples takes longer than the hour: `reproduce` has it.
FULL_NLL = {"split": "test", "num_images": 2000, "num_timesteps": 20}
FULL_FID = {"sampler": "ddim", "steps": 100, "features": "768"}


def spend(paper: Record, options: HourOptions) -> int:
    """Do as many stages as the minutes of this call hold, and say what is next.

    Args:
      paper: the content of benchmarks/paper.json.

    Returns:
      0, or 128 + the signal's number when one ended the call.

    Raises:
      LedgerError: no accelerator, or a stage failed; what is done stays done.
    """
    hour = open_hour(paper, options)
    following = None
    try:
        with stoppable():
            for name, stage in stages(hour):
                check_device(hour)
                say(f"{name}: {hour.left() / 60:.1f} minutes left")
                if hour.left() <= 0 or not stage(hour):
                    following = name
                    break
    except Stopped as stop:
        say("stopped; the same command goes on")
        return 128 + stop.number
    print("\n".join(summary(hour, following)), flush=True)
    return 0


def check_device(hour: Hour) -> None:
    """Check that an hour at full scale has an accelerator: JAX falls back to the CPU by itself.

    Raises:
      LedgerError: it has none.
    """
    check(
        hour.options.scale != "full" or not provenance.device().endswith(" x cpu"),
        "JAX finds no accelerator: pip install -c requirements.lock -e '.[cuda]', "
        "or rehearse with scale=small",
    )


def stages(hour: Hour) -> Iterator[tuple[str, Callable[[Hour], bool]]]:
    """Yield the stages that are not done, in their order: name, and what tells whether it is done.

    Each is asked for when those before it are done: the last ones are of the newest checkpoint.
    """
    if "agreement" not in hour.done:
        yield "agreement", agree
    for size in hour.options.batch_sizes:
        for what in SPEEDS:
            name = f"speed {size} {what}"
            if name not in hour.done:
                yield name, lambda hour, size=size, what=what: time_speed(hour, size, what)
    trained = hour.done.get("train", {})
    if not trained.get("ended") and trained.get("seconds", 0) < 60 * hour.options.train_minutes:
        yield "train", train
    step = newest_step(hour.options.workdir)
    for name, stage in (("draw", draw), ("evaluate", evaluate)):
        if hour.done.get(name, {}).get("step") != step:
            yield name, stage


def summary(hour: Hour, following: str | None) -> list[str]:
    """Write what is done, a line a stage, and what is next."""
    lines = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items())
        for name, result in hour.done.items()
        if result
    ]
    if following:
        return [*lines, f"next: {following}; the same command goes on"]
    row, scale = hour.options.row, hour.options.scale
    if hour.done["train"]["ended"]:
        words = ["ddpm", "reproduce", f"--row={row}", f"--scale={scale}"]
        words += [f"--runs={hour.options.runs}", *(f"--config.{x}" for x in hour.options.overrides)]
        command = shlex.join(words)
        return [*lines, f"next: the row's own evaluations: {command}"]
    minutes = hour.options.train_minutes
    return [*lines, f"next: train on, with a train_minutes={minutes:g} that is larger"]


# ---------------------------------------------------------------------------------------- stages


AGREE = ("-m", "ddpm_jax.reproduction.agreement")


def agree(hour: Hour) -> bool:
    """Compute with a tiny network on the devices and on the CPU, and compare.

    Raises:
      LedgerError: they differ by more than the tolerance.
    """
    paths = [hour.options.runs / "agreement" / name for name in ("device.npz", "cpu.npz")]
    for path, environment in zip(paths, ({}, {"JAX_PLATFORMS": "cpu"})):
        command = [*AGREE, str(path), str(ROOT / hour.config), *hour.options.overrides]
        if not path.exists() and not finished(hour, command, environment):
            return False
    found = differences(*paths)
    for difference in found:
        print(f"{difference.name}: {difference.value:.2g} of at most {difference.tolerance:g}")
    wrong = [difference for difference in found if not difference.within]
    for path in paths if wrong else ():
        path.unlink()  # the next call computes anew
    names = ", ".join(difference.name for difference in wrong)
    check(not wrong, f"{provenance.device()} is not what a CPU computes: {names}")
    worst = max(found, key=lambda difference: difference.value / difference.tolerance)
    hour.keep("agreement", device=provenance.device(), worst=worst.name, difference=worst.value)
    return True


def time_speed(hour: Hour, size: int, what: str) -> bool:
    """Time one batch size, training or sampling, in turn with diffusers where that is installed.

    Where this fails, as PyTorch may for lack of memory or of a compiler, ours is timed alone; a
    failure of that is noted, and the training still has its turn.
    """
    here = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    if not here:
        say("PyTorch or diffusers is not installed: timed alone (pip install 'ddpm_jax[torch]')")
    kind, name = what.partition(",")[0], f"speed {size} {what}"
    path = hour.options.runs / "speed" / f"{size}_{kind}.json"
    fields = (*hour.options.fields, f"train.batch_size={size}")
    command = ["-m", "ddpm_jax.cli", "benchmark", f"--config={ROOT / hour.config}"]
    command += [f"--what={what}", f"--rounds={hour.options.rounds}", f"--output={path}"]
    command += [f"--config.{item}" for item in fields]
    rival = ["--against=diffusers", "--variants=eager,compiled"]
    for more in [rival, []] if here else [[]]:
        try:
            if not finished(hour, [*command, *more]):
                return False
            break
        except LedgerError as error:
            say(f"{error}; {'timed alone' if more else 'not timed'}")
    else:
        hour.keep(name, device=provenance.device(), error="the benchmark failed")
        return True
    result = read_json(path, nan=True)
    times = {
        side: f"{row['median_ms']:.4g} ms"
        for side, row in result[kind].items()
        if isinstance(row, dict) and "median_ms" in row
    }
    hour.keep(name, device=provenance.device(), **times)
    write_table(hour.options.page, speed_table(hour.options.runs / "speed"))
    return True


def train(hour: Hour) -> bool:
    """Train until this call, or all the minutes of training, are over."""
    options, before = hour.options, hour.done.get("train", {}).get("seconds", 0.0)
    seconds = min(hour.left() - RESERVE, 60 * options.train_minutes - before)
    how = rows.ReproductionOptions(
        scale=options.scale, data_dir=options.data_dir, overrides=options.overrides
    )
    command = rows.network_command({"config": hour.config}, options.workdir, how)
    if seconds <= 0:
        return False
    start = time.monotonic()

    def note(ended: bool) -> None:
        spent = before + time.monotonic() - start
        step = newest_step(options.workdir)
        where = {"step": step, "device": provenance.device()}
        hour.keep("train", **where, seconds=round(spent, 1), ended=ended)

    try:
        code = processes.call(["-m", "ddpm_jax.cli", *command], seconds)
    except Stopped:
        if saved(options.workdir):
            note(False)
        raise
    if not saved(options.workdir):
        return False  # cut off before its first step
    note(code == 0)
    return code == 0 or hour.done["train"]["seconds"] >= 60 * options.train_minutes


def saved(workdir: Path) -> bool:
    """Return whether a run has a checkpoint."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def draw(hour: Hour) -> bool:
    """Draw a grid of 64 samples of the newest checkpoint."""
    step = newest_step(hour.options.workdir)
    path = hour.options.runs / f"grid_{step:07d}.png"
    command = ["sample", f"--workdir={hour.options.workdir}", f"--step={step}"]
    command += ["--num_images=64", f"--output={path}"]
    if not finished(hour, ["-m", "ddpm_jax.cli", *command]):
        return False
    hour.keep("draw", step=step, picture=str(path))
    return True


def evaluate(hour: Hour) -> bool:
    """Evaluate the newest checkpoint, and add the records to the results.

    Their scale is "hour": they fill no cell of a table, which is of a whole training. Each is added
    as soon as it is measured, with the device of this call.
    """
    options = hour.options
    step = newest_step(options.workdir)
    if options.scale == "small":
        wanted = rows.small_evaluations(load_config(ROOT / hour.config))
    else:
        wanted = [{"metric": "nll", **FULL_NLL}]
    if options.inception:
        fid = FULL_FID if options.scale == "full" else {"features": "768", "steps": 50}
        wanted += [{"metric": "fid", **fid, "num_images": options.num_images}]
        wanted[-1]["inception"] = str(options.inception)
    else:
        say("no FID: inception=FILE names the weights of its network")
    of_run = {"row": options.row, "scale": "hour", "origin": "trained"}

    def store(about: Record, *, whole: bool = False) -> list[Record]:
        about = about | {"trained": f"step {step}"}
        names = tuple(match["metric"] for match in wanted)  # of "fid-768" as well
        records = [r for r in recorded(options.workdir) if r["metric"].startswith(names)]
        keep(options.results, of_run, records, about, whole=whole)
        return records

    store(provenance.unknown(options.workdir))  # of a call that was cut off
    for metrics, match in rows.grouped(wanted):
        part = f"evaluate {step} {' '.join(metrics)}"
        if part not in hour.done:
            command = rows.evaluation_command(options.workdir, metrics, match, options.data_dir)
            if not finished(hour, ["-m", "ddpm_jax.cli", *command]):
                return False
            store(provenance.of_run(options.workdir))
            hour.keep(part)
    records = store(provenance.of_run(options.workdir), whole=True)
    values = {r["metric"]: round(r.get("value", r.get("total")), 4) for r in records}
    hour.keep("evaluate", step=step, **values)
    return True


# ------------------------------------------------------------------------------------- processes


def finished(hour: Hour, command: list[str], environment: dict[str, str] | None = None) -> bool:
    """Run Python on a command for as long as this call lasts; say whether it came to its end.

    Raises:
      LedgerError: it failed.
    """
    given = hour.left()
    if processes.call(command, given, environment) is not None:
        return True
    if given > 50 * hour.options.minutes:  # seconds: it had nearly all of the call
        say(f"cut off after {given:.0f} s: minutes={hour.options.minutes:g} are too few for it")
    return False
