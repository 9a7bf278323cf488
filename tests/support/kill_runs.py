"""Kill a short training run again and again, at random moments, and see whether anything is lost.

    python -m tests.support.kill_runs --kills=100

SIGKILL leaves a process no last word. A third of the kills come at any time after the start, imports, restoring and compiling
included; a third after a random step; a third while a checkpoint is being written or an old one deleted. After each, every file
must be whole and the newest checkpoint the one it has to be; the killed run must end as the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm_jax import images
from ddpm_jax.config import Config
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.workdir import load_workdir_config
from tests.support.processes import (
    assert_bit_equal,
    final_state,
    finish,
    metrics,
    metrics_seen,
    script,
    wait_until,
    write_config,
)
from tests.support.tiny import tiny_config

SAVE_EVERY = 7


def kill_runs(
    folder: Path, kills: int, steps: int, seed: int = 0, say: Callable[[str], None] = print
) -> collections.Counter[str]:
    """How many kills hit what; AssertionError as soon as something is lost.

    A run that gets to its end between two kills is compared with the uninterrupted one, and another begins.
    """
    rng = np.random.default_rng(seed)
    fields = {
        "steps": steps,
        "checkpoint_every": SAVE_EVERY,
        "log_every": 1,
        "eval_images": 0,
        "sample_every": 50,
    }
    config = tiny_config(train=fields)
    flags = [f"--config={write_config(folder, config)}"]
    workdir, whole = folder / "killed", folder / "whole"

    start = time.monotonic()
    process = script("train.py", *flags, f"--workdir={whole}")
    wait_until(lambda: metrics_seen(whole / "metrics.jsonl") > 0, process, "the first step")
    to_first_step = time.monotonic() - start
    code, _, said = finish(process, 1800)
    assert code == 0, said

    hit: collections.Counter[str] = collections.Counter()
    newest = 0
    while sum(hit.values()) < kills:
        process = script("train.py", *flags, f"--workdir={workdir}")
        wait_for_moment(rng, process, workdir, to_first_step)
        process.kill()
        code, out, said = finish(process)
        begun = f"going on from step {newest}," if newest else "a new run,"
        assert begun in out or "steps of" not in out, (
            f"after checkpoint {newest} it began with: {out}"
        )
        if code == 0:  # it was faster
            compare(config, workdir, whole)
            shutil.rmtree(workdir)
            newest = 0
            continue
        assert code == -9, f"the run ended with code {code}: {said}"
        moment = moment_of(workdir, newest, out)
        newest = check(config, workdir, newest)
        hit[moment] += 1
        say(f"kill {sum(hit.values())}/{kills}: {moment}; newest checkpoint {newest}")
    code, _, said = finish(script("train.py", *flags, f"--workdir={workdir}"), 1800)
    assert code == 0, said
    check(config, workdir, newest)
    compare(config, workdir, whole)
    return hit


def compare(config: Config, workdir: Path, whole: Path) -> None:
    """Bit for bit: parameters, moments, averages, the log, the pictures."""
    assert_bit_equal(final_state(config, workdir), final_state(config, whole))
    assert metrics(workdir) == metrics(whole)
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (workdir / "samples" / path.name).read_bytes()


def wait_for_moment(rng: np.random.Generator, process, workdir: Path, to_first_step: float) -> None:
    kind = rng.choice(["any time", "a step", "a save"])
    if kind == "any time":
        time.sleep(rng.uniform(0, 1.2 * to_first_step))
        return
    path, started = workdir / "metrics.jsonl", time.time()
    further = int(rng.integers(1, 20)) if kind == "a step" else 1
    first: list[int] = []  # the number of the first step that this process logs

    def far_enough() -> bool:
        if process.poll() is not None:
            return True
        if not first and path.exists() and path.stat().st_mtime > started:
            first.append(metrics_seen(path))
        return bool(first) and metrics_seen(path) >= first[0] + further

    wait_until(far_enough, process, "a step", every=0.002)
    if kind == "a save":
        wait_until(
            lambda: saving(workdir) or process.poll() is not None, process, "a save", every=0.0002
        )
    time.sleep(rng.uniform(0, 0.02))


def saving(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if not name.isdecimal()]


def moment_of(workdir: Path, newest: int, out: str) -> str:
    """What the kill interrupted, by what it left behind."""
    if "steps of" not in out:
        return "before training began"
    if saving(workdir):
        return "in a save"
    return (
        "between steps"
        if metrics_seen(workdir / "metrics.jsonl") > newest
        else "before the first step"
    )


def check(config: Config, workdir: Path, newest: int) -> int:
    """The newest checkpoint, after every file has been read."""
    if not (workdir / "config.json").exists():
        assert newest == 0
        return 0
    assert load_workdir_config(workdir) == config
    for path in workdir.glob("samples/*.png"):
        images.load_png(path)
    path = workdir / "metrics.jsonl"
    logged = 0
    if path.exists():
        *lines, torn = path.read_bytes().split(b"\n")
        seen = [json.loads(line)["step"] for line in lines]
        assert seen == list(range(1, len(seen) + 1)), (
            "a step is missing from metrics.jsonl, or there twice"
        )
        logged = len(seen)
    if not (workdir / "checkpoints").is_dir():
        assert newest == 0 and logged == 0
        return 0
    with Checkpoints.reading(workdir) as checkpoints:
        steps = checkpoints.steps()
    for step in steps:
        assert int(final_state(config, workdir, step).step) == step
    # Step k is logged before its save begins, and that waits for the save before: one save may be under way.
    promised = ((logged - 1) // SAVE_EVERY - 1) * SAVE_EVERY
    assert max(steps, default=0) >= max(newest, promised), (
        f"checkpoints {steps}, {newest} was there, {logged} steps logged"
    )
    return max(steps, default=0)


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--steps", type=int, default=700, help="of a run that nobody kills")
    flags.add_argument("--seed", type=int, default=0)
    options = flags.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        hit = kill_runs(
            Path(folder),
            options.kills,
            options.steps,
            options.seed,
            lambda line: print(line, flush=True),
        )
    print(
        f"{sum(hit.values())} kills, nothing lost: {', '.join(f'{count} {moment}' for moment, count in hit.most_common())}"
    )


if __name__ == "__main__":
    sys.exit(main())
