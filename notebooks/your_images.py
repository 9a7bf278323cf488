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
# # Your images
#
# From a folder of pictures to a trained network: samples, nearest neighbours, distances; another
# learning rate; fine-tuning; classes and guidance. Each step is one command of the shell, `ddpm
# ...`. Here they run in this process, which is quicker than starting one for each.

# %%
# In a hosted notebook nothing is installed yet: let SOURCE name a clone, or "git+https://..." of
# one. Neither TensorFlow nor PyTorch is needed.
import importlib
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("DDPM_SOURCE", "..")
if importlib.util.find_spec("ddpm_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE], check=True)

# %%
import shlex
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import ddpm_jax as ddpm
from ddpm_jax.files import shipped
from ddpm_jax.images import load_png

ddpm.tune_cpu()  # before JAX runs anything: faster programs where there is no accelerator
QUICK = bool(os.environ.get("DDPM_QUICK"))  # the test suite's: a step or two of everything
STEPS = 2 if QUICK else 400  # of training
DDIM = 2 if QUICK else 25  # steps of a chain
WORK = Path(tempfile.mkdtemp())  # what the notebook writes


def command(line):
    """Run one `ddpm` command; WORK stands for the folder of this notebook."""
    print(f"$ ddpm {line}", flush=True)
    name, *words = shlex.split(line.replace("WORK", str(WORK)))
    code = importlib.import_module(f"ddpm_jax.cli.{name.replace('-', '_')}").main(words)
    assert not code, f"it ended with {code}"


def show(picture, title):
    """Show a picture: an array [h,w,c], or the name of a file."""
    pixels = np.asarray(plt.imread(picture) if isinstance(picture, Path) else picture)
    height, width = pixels.shape[0] / 80, pixels.shape[1] / 80
    figure = plt.figure(figsize=(width, height + 0.3))
    axes = figure.add_axes((0, 0, 1, height / (height + 0.3)))
    axes.imshow(pixels.squeeze(), cmap="gray")
    axes.axis("off")
    figure.suptitle(title, fontsize=9, y=0.99, va="top")
    plt.show()


# %% [markdown]
# ## A folder of pictures
#
# Name a folder of your own in the environment as PICTURES: files of any size, also in subfolders.
# Without one, this cell draws some: coloured rings and bars, 40 pixels wide and 48 high.

# %%
PICTURES = os.environ.get("PICTURES")
if PICTURES is None:
    PICTURES, random = WORK / "pictures", np.random.default_rng(0)
    PICTURES.mkdir()
    y, x = np.mgrid[:48, :40]
    for number in range(60 if QUICK else 600):
        dy, dx = y - random.uniform(16, 32), x - random.uniform(14, 26)
        ring = np.hypot(dy, dx) - random.uniform(6, 10)
        distance = (ring, dy, ring, dx)[number % 4]
        ink = np.clip(4 - np.abs(distance), 0, 1)[..., None]
        colour = np.eye(3)[random.integers(3)] * 155 + 100
        plt.imsave(PICTURES / f"{number:04d}.png", np.uint8(colour * ink + 20 * (1 - ink)))
PICTURES = shlex.quote(str(PICTURES))

# %% [markdown]
# ## Train
#
# Nothing has to be prepared. What suits the pictures and the machine is chosen, said and written to
# the run's config.json, with a part of the pictures held out; each field can be set. The same
# command again goes on where the run was, also after a crash.

# %%
network = "--config.model.base_channels=16 --config.model.group_norm_groups=8"
if QUICK:
    network = "--config.model.base_channels=8 --config.model.group_norm_groups=4 "
    network += "--config.model.attention_resolutions=() --config.model.channel_mult=(1,)"
fields = f"--config.train.steps={STEPS} --config.optimizer.warmup_steps=50"
command(f"train --images={PICTURES} --workdir=WORK/run --image_size=16 {network} {fields}")

# %%
command("plot-metrics --workdir=WORK/run --output=WORK/curves.png")
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.imshow(plt.imread(WORK / "curves.png"))
ax.axis("off")
plt.show()

# %% [markdown]
# ## Samples
#
# From Python; `ddpm sample --workdir=runs/mine --num_images=32 --output=grid.png` draws the same.

# %%
model = ddpm.load(WORK / "run")
images = model.sample(32, seed=0, sampler="ddim", steps=DDIM)
real = ddpm.load_source(model.config.data, WORK, "train").read(np.arange(16))["image"]
both = ddpm.grid(np.concatenate([real, images]), 16, scale=2)
show(both, "a row of yours, two rows of samples")

# %% [markdown]
# ## Does it only remember?
#
# The nearest training images stand beside each sample. The audit asks in numbers: are samples
# nearer to the training set than images are that were held out? Of each number below, its line
# says what it means.

# %%
draws = f"--sampler=ddim --steps={DDIM}"
command(
    f"sample --workdir=WORK/run --mode=neighbours --num_images=4 {draws} "
    "--columns=6 --scale=2 --output=WORK/neighbours.png"
)
show(load_png(WORK / "neighbours.png"), "samples, and what is nearest to each")
count = 12 if QUICK else 64
command(f"evaluate --workdir=WORK/run --metrics=pixels,audit {draws} --num_images={count}")

# %% [markdown]
# ## FID
#
# `--metrics=fid,kid` sees the samples through the Inception network of the paper, which is
# downloaded at the first use (95 MB). This notebook leaves that to you: name a file of its
# weights in INCEPTION. An FID wants thousands of images, and of images as small as these it says
# little.

# %%
inception = os.environ.get("INCEPTION")
if inception is None:
    print("no INCEPTION. In a shell: ddpm evaluate --workdir=runs/mine --metrics=fid,kid")
else:
    features = "--features=768" if "768" in inception else ""
    command(
        f"evaluate --workdir=WORK/run --metrics=fid {draws} {features} "
        f"--inception={shlex.quote(inception)} --num_images={count} --reference_images=500 "
        "--cache=WORK/cache"
    )

# %% [markdown]
# ## Another learning rate, from where it is
#
# A run keeps one recipe, so that its result has one cause. To change it, begin a new run from the
# old one: from its weights, averages and optimiser, with the fields that are named. Here the
# learning rate sinks to nothing, which takes the noise out of the weights.

# %%
more = STEPS // 4 or 1
command(
    "train --from=WORK/run --config=WORK/run/config.json --workdir=WORK/slower "
    "--config.optimizer.warmup_steps=0 --config.optimizer.schedule=linear "
    f"--config.train.steps={more}"
)
again = ddpm.load(WORK / "slower").sample(32, seed=0, sampler="ddim", steps=DDIM)
show(ddpm.grid(np.concatenate([images, again]), 16, scale=2), "before, and after slower steps")

# %% [markdown]
# ## Fine-tuning what was trained elsewhere
#
# The same import takes published checkpoints, of the layouts in docs/weights.md. Here the network
# of digits that ships goes on with your pictures, brought to its size: 8 pixels, grey.

# %%
(WORK / "grey").mkdir()
for row, image in enumerate(ddpm.load_source(model.config.data, WORK, "train").images):
    Image.fromarray(image).convert("L").save(WORK / "grey" / f"{row:05d}.png")
command(
    "prepare-data --dataset=folder --source=WORK/grey --data_dir=WORK/data --name=small "
    "--image_size=8 --channels=1"
)
shutil.copytree(shipped("pretrained") / "digits", WORK / "digits")
command(
    "import-weights --layout=diffusers --input=WORK/digits --workdir=WORK/tuned "
    f"--config=WORK/digits/config.json --config.data.name=small --config.train.steps={more} "
    "--config.train.eval_images=8 --config.train.batch_size=32"
)
command("train --config=WORK/tuned/config.json --workdir=WORK/tuned --data_dir=WORK/data")
before = ddpm.load("digits").sample(16, sampler="ddim", steps=DDIM)
after = ddpm.load(WORK / "tuned").sample(16, sampler="ddim", steps=DDIM)
show(ddpm.grid(np.concatenate([before, after]), 16, scale=4), "digits, and on their way to yours")

# %% [markdown]
# ## Classes and guidance
#
# $$\tilde\epsilon = \epsilon_\theta(x_t) + s\,\bigl(\epsilon_\theta(x_t, c) -
# \epsilon_\theta(x_t)\bigr)\quad (\text{Ho \& Salimans 2022, there with } s = 1 + w)$$
#
# A network that sometimes trains without the label knows both terms, and s pushes samples towards
# the class, at the price of variety. Labels come from a folder for each class (`--classes`), with a
# prepared set or, from Python, with `ddpm.train(..., source=(images, labels))`; here they are those
# of the digits.

# %%
fields = [f"train.steps={STEPS}", "model.num_classes=10", "model.label_dropout=0.1"]
fields += ["train.eval_images=0", "train.batch_size=64"]
if QUICK:
    fields += ["model.base_channels=8", "model.attention_resolutions=()"]
    fields += ["model.channel_mult=(1,)", "model.blocks_per_level=1"]
classes = ddpm.train(ddpm.load_config("digits", fields), WORK / "classes")
rows = [
    classes.sample(10, labels=range(10), guidance=s, sampler="ddim", steps=DDIM) for s in (1, 2, 4)
]
show(ddpm.grid(np.concatenate(rows), 10, scale=4), "classes 0 to 9, guidance 1, 2, 4")
