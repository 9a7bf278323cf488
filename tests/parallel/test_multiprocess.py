"""Two processes of four devices, against one of eight: the same run, and one set of files.

Real processes on this machine, joined by jax.distributed, with gloo between them. The faults are
real as well: signals, a process that is killed, one that stops answering, one that never comes.
What ends well, or is refused, runs in two processes that stay (`pair`): they import, trace and
compile once. The ends of processes are those of two that start for the test (`start`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.cli.run import outcome
from ddpm_jax.config import Config
from ddpm_jax.data.load import load_source
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.images import load_png, save_png, to_uint8
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.trained import open_trained
from ddpm_jax.training.loop import train
from tests.support.commands import command_module
from tests.support.hosts import FOUR, HOST_TIMEOUT, end, free_port, start
from tests.support.processes import (
    final_state,
    finish,
    metrics,
    metrics_seen,
    script,
    wait_for_step,
    wait_until,
    write_config,
)
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.multiprocess
CONFIG = tiny_config(train={"sample_every": 6})


# "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1",
# written piece by piece by threads that do not wait for one another.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+"
)


def ours(out: str) -> list[str]:
    """The lines of a process but those of its collectives library, which writes around Python."""
    return [line for line in out.splitlines() if GLOO.sub("", line).strip()]


def train_here(config: Config, workdir: Path) -> None:
    assert train(config, workdir, data_dir=workdir, devices=Devices(jax.devices()[:8])) == 0


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Six steps in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train_here(CONFIG, workdir)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, pair) -> tuple[Path, list[str]]:
    """Six steps in two processes of four, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    out = pair.run_both(
        "train.py", f"--config={write_config(folder, CONFIG)}", f"--workdir={folder / 'run'}"
    )
    return folder / "run", out


@pytest.fixture(scope="module")
def drawn(one) -> np.ndarray:
    """Eleven samples, drawn in one process of eight devices."""
    devices = Devices(jax.devices()[:8])
    trained = open_trained(one, devices)
    generator = build_generator(trained.config, devices, batch_size=8)
    return to_uint8(generator.draw(trained.params, seed=3, indices=np.arange(11)))


def assert_same_curves(one: Path, other: Path) -> None:
    ours, theirs = metrics(one), metrics(other)
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for row, twin in zip(ours, theirs):
        for name in row:
            np.testing.assert_allclose(
                row[name], twin[name], rtol=2e-5, atol=1e-6, err_msg=f"{name} at step {row['step']}"
            )


def assert_same_state(one: Path, other: Path) -> None:
    """Not bit for bit.

    The sums over devices are done in another order, and Adam divides by what is small.
    """
    ours, theirs = final_state(CONFIG, one), final_state(CONFIG, other)
    assert int(ours.step) == int(theirs.step)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        (ours.params, ours.ema),
        (theirs.params, theirs.ema),
    )


def files(workdir: Path) -> list[str]:
    names = [path.relative_to(workdir).as_posix() for path in workdir.rglob("*") if path.is_file()]
    return sorted(
        "events" if name.startswith("events.") else name
        for name in names
        if not name.startswith("checkpoints/")
    )


def test_two_hosts_train_as_one_does(one, two):
    workdir, out = two
    assert_same_curves(one, workdir)
    assert_same_state(one, workdir)
    picture = Path("samples") / "step_0000006.png"
    assert (one / picture).read_bytes() == (workdir / picture).read_bytes()
    assert files(one) == files(workdir)
    assert len(metrics(workdir)) == 5  # three log lines and two held-out losses, once each
    assert "on 8 device(s)" in out[0] and ours(out[1]) == []


@pytest.mark.parametrize("hosts", [(1, 2), (2, 1), (2, 2)])
def test_a_run_moves_between_one_host_and_two(one, pair, tmp_path, hosts):
    """Stopped after four steps on the one and gone on with on the other.

    The same data and noise, the same curve.
    """
    workdir, config = tmp_path / "run", write_config(tmp_path, CONFIG)
    for processes, steps in zip(hosts, (4, 6)):
        if processes == 1:
            train_here(tiny_config(train={"sample_every": 6, "steps": steps}), workdir)
        else:
            pair.run_both(
                "train.py",
                f"--config={config}",
                f"--workdir={workdir}",
                f"--config.train.steps={steps}",
            )
    wanted, got = (
        {row["step"]: row for row in metrics(folder) if "loss" in row} for folder in (one, workdir)
    )
    assert sorted(got) == [2, 4, 6]
    for step in got:
        for name in ("loss", "gradient_norm", "parameter_norm", "learning_rate"):
            np.testing.assert_allclose(
                got[step][name], wanted[step][name], rtol=2e-5, err_msg=f"{name} at {step}"
            )
    assert_same_state(one, workdir)


def test_two_hosts_sample_as_one_does(one, drawn, pair, tmp_path):
    """Every sample once, in its place.

    The eleventh of a batch of eight falls on the second host.
    """
    flags = [f"--workdir={one}", "--num_images=11", "--batch_size=8", "--seed=3"]
    out = pair.run_both("sample.py", *flags, f"--output={tmp_path / 'two.npz'}")
    assert "11 drawn, 0 were there" in out[0] and ours(out[1]) == []
    np.testing.assert_array_equal(np.load(tmp_path / "two.npz")["arr_0"], drawn)


def test_two_hosts_evaluate_as_one_does(one, pair, tmp_path):
    """21 images on eight devices.

    The last batch is part filling, which must not count on any host.
    """
    workdir = shutil.copytree(one, tmp_path / "run")
    out = pair.run_both(
        "evaluate.py", f"--workdir={workdir}", "--metrics=nll", "--num_images=21", "--batch_size=16"
    )
    assert "21 images" in out[0] and ours(out[1]) == []
    (record,) = read_evaluations(workdir)
    devices = Devices(jax.devices()[:8])
    trained, source = open_trained(one, devices), load_source(CONFIG.data, tmp_path, "test")
    here = evaluate_nll(
        CONFIG, trained.params, source, devices, protocol=Protocol(), num_images=21, batch_size=16
    )
    for name in ("prior", "middle", "decoder", "total"):
        np.testing.assert_allclose(record[name], getattr(here, name).mean, rtol=1e-6)
    np.testing.assert_allclose(record["total_standard_error"], here.total.standard_error, rtol=1e-5)


def endless(tmp_path: Path, **fields) -> tuple[Path, list[str]]:
    config = tiny_config(
        train={"steps": 100_000, "log_every": 1, "checkpoint_every": 100_000, "eval_images": 0}
        | fields
    )
    workdir = tmp_path / "run"
    return workdir, [f"--config={write_config(tmp_path, config)}", f"--workdir={workdir}"]


@pytest.mark.parametrize("host, number, code", [(1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)])
def test_a_signal_to_one_host_stops_all_at_the_same_step(pair, tmp_path, host, number, code):
    """Processes of its own say once that a stopped training is also their end."""
    workdir, flags = endless(tmp_path)
    own = number == signal.SIGTERM
    processes = start("train.py", *flags) if own else pair.begin("train.py", *flags)
    wait_for_step(workdir, 5, processes[0])
    processes[host].send_signal(number)
    assert [ended[0] for ended in (end(processes) if own else pair.end())] == [code, code]
    with Checkpoints.reading(workdir) as checkpoints:
        assert checkpoints.steps() == [metrics_seen(workdir / "metrics.jsonl")]


def assert_lost(ended: tuple[int, str, str]) -> None:
    """Whoever notices first reports it.

    It is JAX's coordination service, or the collective that was under way.

    On CPUs the latter may abort as well: gloo goes on in a step of several collectives and meets
    the rest of the broken one.
    """
    code, _, said = ended
    by_service = code == -signal.SIGABRT and (
        "another task died" in said or "gloo::EnforceNotMet" in said
    )
    by_collective = code == 1 and "error: the hosts lost one another" in said.splitlines()[-1]
    assert by_service or by_collective, (code, said[-2000:])


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_dies_or_hangs_ends_the_other_in_time(tmp_path, host, number):
    workdir, flags = endless(tmp_path, checkpoint_every=5)
    processes = start("train.py", *flags)
    wait_for_step(workdir, 8, processes[0])

    def saved() -> bool:
        """Whether what both hosts save beside the steps is whole: these run ahead of it."""
        with Checkpoints.reading(workdir) as checkpoints:
            return bool(checkpoints.steps())

    wait_until(saved, processes[0], "a checkpoint")
    processes[host].send_signal(number)
    died = time.monotonic()
    survivor = finish(processes[1 - host])
    seconds = time.monotonic() - died
    processes[host].kill()
    finish(processes[host])
    assert_lost(survivor)
    assert seconds < HOST_TIMEOUT + 10, seconds
    print(f"host {host} got {number.name}: the other ended after {seconds:.1f} s")
    with Checkpoints.reading(workdir) as checkpoints:
        good = checkpoints.steps()[-1]
    assert good >= 5 and int(final_state(tiny_config(), workdir, good).step) == good


FAULTY = """
import runpy, sys
from ddpm_jax.training import loop

def fingerprint(source):
    raise RuntimeError("a fault of the code")

loop.fingerprint = fingerprint
sys.argv = sys.argv[2:]  # after -c and the interpreter
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_fault_on_one_host_ends_both(tmp_path):
    """The one says what it was and does not wait for the other, which waits for it."""
    _, flags = endless(tmp_path)
    flags += [
        f"--coordinator_address=localhost:{free_port()}",
        "--num_processes=2",
        f"--host_timeout={HOST_TIMEOUT}",
    ]
    first = script("train.py", *flags, "--process_id=0", environment=FOUR)
    faulty = [sys.executable, "-c", FAULTY]
    second = script("train.py", *flags, "--process_id=1", before=faulty, environment=FOUR)
    (code, _, said), other = end([second, first])
    assert code == 1 and said.rstrip().endswith("RuntimeError: a fault of the code")
    assert_lost(other)


# Ctrl-C on this host while it reads its images; the other one waits to hear what became of it.
INTERRUPTED = """
import runpy, signal, sys
from ddpm_jax.training import loop
loop.load_splits = lambda *arguments: signal.raise_signal(signal.SIGINT)
sys.argv = sys.argv[2:]  # after -c and the interpreter
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("host", [0, 1])
def test_ctrl_c_on_one_host_before_training_leaves_no_other_waiting(tmp_path, host):
    workdir, flags = endless(tmp_path)
    flags += [
        f"--coordinator_address=localhost:{free_port()}",
        "--num_processes=2",
        f"--host_timeout={HOST_TIMEOUT}",
    ]
    before = {host: [sys.executable, "-c", INTERRUPTED]}
    processes = [
        script(
            "train.py",
            *flags,
            f"--process_id={index}",
            before=before.get(index),
            environment=FOUR,
        )
        for index in (0, 1)
    ]
    ended = end(processes)
    assert ended[host][0] == 130, ended[host][2][-2000:]
    assert_lost(ended[1 - host])
    assert not workdir.exists()


# Ctrl-C on this host in the middle of its work, while it waits for devices or for the other host.
INTERRUPTED_AT_WORK = """
import os, runpy, signal, sys, threading
from ddpm_jax.parallel.devices import Devices
gather, calls = Devices.rows, []

def rows(self, stacked):
    calls.append(stacked)
    if len(calls) == 3:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    return gather(self, stacked)

Devices.rows = rows
sys.argv = sys.argv[2:]  # after -c and the interpreter
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "command, interrupted",
    [("sample", (0,)), ("sample", (0, 1)), ("evaluate", (1,)), ("evaluate", (0, 1))],
)
def test_ctrl_c_in_sampling_and_evaluation_leaves_no_host_waiting(
    one, tmp_path, command, interrupted
):
    """Whether a launcher hands it to all or one host alone gets it: both end, and soon.

    Where both get it, the first to end may break the collective in which the other still is.
    """
    work = {
        "sample": ["--num_images=100000", "--batch_size=8", f"--output={tmp_path / 'x.npz'}"],
        "evaluate": [
            "--metrics=nll",
            "--batch_size=8",
            "--num_timesteps=2",
            f"--data_dir={tmp_path}",
        ],
    }
    flags = [
        f"--workdir={one}",
        *work[command],
        f"--coordinator_address=localhost:{free_port()}",
        "--num_processes=2",
        f"--host_timeout={HOST_TIMEOUT}",
    ]
    faulty = [sys.executable, "-c", INTERRUPTED_AT_WORK]
    processes = [
        script(
            f"{command}.py",
            *flags,
            f"--process_id={host}",
            before=faulty if host in interrupted else None,
            environment=FOUR,
        )
        for host in (0, 1)
    ]
    begin = time.monotonic()
    both = end(processes)
    assert any(both[host][0] == 130 for host in interrupted), both
    for host, ended in enumerate(both):
        if host not in interrupted or ended[0] != 130:
            assert_lost(ended)
        assert "Traceback" not in ended[2]
    print(f"both ended {time.monotonic() - begin:.0f} s after their start")
    assert not (tmp_path / "x.npz").exists()  # nothing that looks finished


@pytest.mark.parametrize(
    "own, said",
    [
        (
            (["--config.optimizer.learning_rate=0.5"], []),
            "the config of host 1 is not that of host 0: start all hosts alike",
        ),
        (([], ["--step=2"]), "the command line of host 1 is not that of host 0"),
        (([], ["--workdir=WORKDIR"]), "the command line of host 1 is not that of host 0"),
    ],
)
def test_hosts_that_differ_are_all_refused(pair, tmp_path, own, said):
    workdir, flags = endless(tmp_path)
    own = tuple([flag.replace("WORKDIR", str(tmp_path / "other")) for flag in part] for part in own)
    for code, _, errors in pair.run("train.py", *flags, own=own):
        assert code == 1 and said in errors.splitlines()[-1]
    assert not workdir.exists()


def apart(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, one for each process to run in, so that a relative path is another one for each.

    They stand for machines that share no disk.
    """
    for name in ("first", "second"):
        (tmp_path / name).mkdir(exist_ok=True)
    return tmp_path / "first", tmp_path / "second"


def start_apart(tmp_path: Path, *flags: str) -> list[subprocess.Popen]:
    common = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    processes = []
    for host, folder in enumerate(apart(tmp_path)):
        at = ["bash", "-c", f'cd {folder} && exec "$@"', "bash"]
        processes.append(
            script(
                "train.py",
                *flags,
                *common,
                f"--process_id={host}",
                before=at,
                environment=FOUR,
            )
        )
    return processes


def test_what_one_host_refuses_all_refuse(tmp_path):
    """The data lies on the first machine only."""
    source = tmp_path / "first" / "pictures"
    source.mkdir(parents=True)
    for index in range(8):
        save_png(source / f"{index}.png", np.full((8, 8, 1), index, np.uint8))
    workdir, flags = endless(tmp_path)
    first, second = end(
        start_apart(tmp_path, *flags, "--config.data.name=folder", "--config.data.path=pictures")
    )
    assert (
        first[0] == 1
        and f"host 1 says: {tmp_path}/second/pictures: no such folder" in first[2].splitlines()[-1]
    )
    assert (
        second[0] == 1
        and f"error: {tmp_path}/second/pictures: no such folder" in second[2].splitlines()[-1]
    )
    assert not workdir.exists()


def test_hosts_that_share_no_disk_are_refused(pair, tmp_path):
    config = write_config(tmp_path, tiny_config())
    flags = [f"--config={config}", "--workdir=run"]
    for code, _, said in pair.run("train.py", *flags, at=apart(tmp_path)):
        assert (
            code == 1
            and "--workdir=run is not on a disk that all hosts share" in said.splitlines()[-1]
        )
    assert not (tmp_path / "second" / "run").exists()


def test_a_host_that_never_comes_is_reported_in_time(tmp_path, capsys):
    """The first host has joined when it gives up; the second is refused before, and so in here."""
    _, flags = endless(tmp_path)
    flags += ["--start_timeout=3"]
    begun = time.monotonic()
    (first,) = start("train.py", *flags, hosts=(0,))
    address = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    second = [*flags, *address, "--process_id=1"]
    code = outcome(lambda: command_module("train").main(second))
    said = capsys.readouterr().err
    assert code == 1 and "no answer within 3 s" in said.splitlines()[-1]
    code, _, said = finish(first)
    assert code == -signal.SIGABRT and "DEADLINE_EXCEEDED" in said
    assert time.monotonic() - begun < 90


def test_slurm_needs_no_flags(one, drawn, tmp_path):
    """The variables that srun sets for two tasks, on one machine; JAX reads them itself.

    They draw into a folder what others draw into a file.
    """
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    job |= FOUR | {"SLURM_STEP_TASKS_PER_NODE": "2"}
    folder = tmp_path / "folder"
    flags = [f"--workdir={one}", "--num_images=11", "--batch_size=8", "--seed=3"]
    ranks = [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    ended = end(
        [script("sample.py", *flags, f"--output={folder}", environment=rank) for rank in ranks]
    )
    assert [code for code, _, _ in ended] == [0, 0], [said[-2000:] for _, _, said in ended]
    assert "11 samples of" in ended[0][1] and ours(ended[1][1]) == []
    pictures = sorted(folder.glob("*.png"))
    np.testing.assert_array_equal(np.stack([load_png(path) for path in pictures]), drawn)
    assert json.loads((folder / "protocol.json").read_text())["step"] == 6
