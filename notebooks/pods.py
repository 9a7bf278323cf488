# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From one device to a pod
#
# One training step, mapped over whatever devices there are. This notebook goes from one device to
# eight simulated ones to two processes on this machine, shows that the run is the same each time,
# and ends with what a real pod would be told.

# %%
# In a hosted notebook nothing is installed yet: let SOURCE name a clone, or "git+https://..." of
# one. Neither TensorFlow nor PyTorch is needed.
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("DDPM_SOURCE", "..")
if importlib.util.find_spec("ddpm_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE], check=True)

# %%
import json
import socket
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

QUICK = bool(os.environ.get("DDPM_QUICK"))  # the test suite's: as few steps as show it
STEPS = 4 if QUICK else 40
WORK = Path(tempfile.mkdtemp())
SMALL = [
    "--config=digits",
    "--config.model.base_channels=8",
    "--config.model.group_norm_groups=8",
    "--config.model.attention_resolutions=()",
    "--config.model.dropout=0.1",  # also random, also the same on any number of devices
    "--config.train.batch_size=64",
    "--config.train.log_every=1",
    "--config.train.eval_images=0",
    f"--config.train.checkpoint_every={STEPS // 2}",
]
if QUICK:
    SMALL += ["--config.model.channel_mult=(1,)", "--config.model.blocks_per_level=1"]


def start(workdir, *flags, devices=1, steps=STEPS):
    """Start `ddpm train` in a process that sees so many simulated devices."""
    words = ["train", *SMALL, f"--config.train.steps={steps}", f"--workdir={WORK / workdir}"]
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "ddpm_jax.cli", *words, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=settings, **pipes)


def finish(*processes):
    """Wait for them, and print what the first one said of itself."""
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    print(
        "\n".join(line for line in outputs[0].splitlines() if "device(s)" in line or "run," in line)
    )


def losses(workdir):
    """Read the loss of every step."""
    lines = (WORK / workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([row["loss"] for row in map(json.loads, lines) if "loss" in row])


# %% [markdown]
# ## One device, eight devices
#
# The batch is split over the devices, each computes the gradient of its share, and one `pmean`
# joins them. Timestep, noise and dropout of an image depend on its place in the global batch
# alone, so eight devices draw what one would.

# %%
finish(start("one"))
finish(start("eight", devices=8))
difference = np.abs(losses("one") / losses("eight") - 1).max()
print(f"largest relative difference of a step's loss: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## Two hosts
#
# Each host runs the same command; three flags say where the first one is, how many there are, and
# which one this is. Each reads its own rows of each batch, and the run directory lies on a disk
# that all share.

# %%
with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
hosts = [
    start(
        "hosts",
        f"--coordinator_address={address}",
        "--num_processes=2",
        f"--process_id={number}",
        devices=4,
    )
    for number in range(2)
]
finish(*hosts)
difference = np.abs(losses("one") / losses("hosts") - 1).max()
print(f"two hosts of four devices beside one device: {difference:.1e}")
assert difference < 1e-3

# %%
figure, ax = plt.subplots(figsize=(6, 2.5), layout="constrained")
for name, style in (("one", "-"), ("eight", "--"), ("hosts", ":")):
    ax.plot(1 + np.arange(STEPS), losses(name), style, label=name, lw=3 if name == "one" else 1.5)
ax.set_xlabel("step")
ax.set_ylabel("loss")
ax.legend()
plt.show()

# %% [markdown]
# ## What resumes, and why
#
# Nothing random is stored: a draw is a function of the seed and the step, and so is the order of
# the data. A checkpoint is therefore parameters, averages and optimiser state, and a run that was
# cut short on one device goes on, on eight, as if nothing had been.

# %%
finish(start("cut", steps=STEPS // 2))
finish(start("cut", devices=8))
difference = np.abs(losses("cut") / losses("one") - 1).max()
print(f"half on one device and half on eight, beside all on one: {difference:.1e}")
assert difference < 1e-3
print("in the run directory:", ", ".join(sorted(path.name for path in (WORK / "cut").iterdir())))

# %% [markdown]
# On the same devices it is equal bit for bit, also after `kill -9`:

# %%
finish(start("halves", steps=STEPS // 2))
finish(start("halves"))
assert np.array_equal(losses("halves"), losses("one"))
print("stopped half-way and started again: every loss is the same number")

# %% [markdown]
# ## A pod
#
# On a TPU pod, under SLURM and under Open MPI 4 the three flags are found, and the command is that
# of one machine. Start it on all hosts at once, each with the same code:
#
# ```
# gcloud compute tpus tpu-vm ssh pod --worker=all \
#     --command="ddpm train --config=celebahq256 --workdir=/shared/runs/hq"
# srun --ntasks-per-node=1 ddpm train --config=cifar10 --workdir=/shared/runs/cifar10
# ```
#
# One of them being stopped with SIGTERM lets all stop at the same step, with a checkpoint; the
# same command goes on from it, on as many hosts as there are then.
#
# ## Known before it is rented
#
# `ddpm compile-ahead` compiles a config for a machine that is not here and reports what the
# compiler decided: memory, exchanges, operations. It takes minutes and, for TPUs, the extra
# `tpu`; the reports of the shipped configs are in the repository.

# %%
folder = next(
    (path for path in (Path("../benchmarks/tpu"), Path("benchmarks/tpu")) if path.is_dir()), None
)
if folder is None:
    print("no reports here; in a clone they are in benchmarks/tpu")
else:
    command = [sys.executable, "-m", "ddpm_jax.cli", "compile-ahead", "--table"]
    reports = sorted(map(str, folder.glob("cifar10*.json")))
    table = subprocess.run([*command, *reports], capture_output=True, text=True, check=True).stdout
    print(table)

# %% [markdown]
# The memory of a chip is the same from 8 to 256 chips, so nothing is gathered whole on one of
# them; the only exchange of a step is the sum of the gradients. [docs/ahead.md](../docs/ahead.md)
# says what of such a report may be trusted, [docs/running.md](../docs/running.md) what happens
# when a host dies.
