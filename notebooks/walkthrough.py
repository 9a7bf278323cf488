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
# # A walk through DDPM
#
# *Denoising diffusion probabilistic models* (Ho, Jain, Abbeel 2020,
# [arXiv:2006.11239](https://arxiv.org/abs/2006.11239)), from the noising of one image to samples.
# The images are Fashion-MNIST, padded to 32x32. Equations carry their number in the paper. The
# paper counts t from 1; here t runs from 0 to T - 1.
#
# It takes some minutes on two CPU cores and about one on a GPU. What would take longer is read
# from the network that ships.

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
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import ddpm_jax as ddpm
from ddpm_jax.data.prepare import prepare
from ddpm_jax.network.unet import timestep_embedding

ddpm.tune_cpu()  # before JAX runs anything: faster programs where there is no accelerator
QUICK = bool(os.environ.get("DDPM_QUICK"))  # the test suite's: 8x8 digits, and a few steps of all
ACCELERATOR = jax.default_backend() != "cpu"
STEPS = 4 if QUICK else 1000 if ACCELERATOR else 100  # of a reverse chain; the paper takes 1000
TRAINING = 2 if QUICK else 2000 if ACCELERATOR else 300  # steps
SCALE = 8 if QUICK else 2  # side of a pixel in a picture
FOLDER = Path(tempfile.mkdtemp())  # what the notebook writes

# %% [markdown]
# ## The data
#
# Fashion-MNIST is prepared once, from its publisher's four files. Where there is no network, the
# 8x8 digits that come with scikit-learn take its place, and this cell says so.

# %%
NAME = "digits" if QUICK else "fashion_mnist"
here = [folder for folder in ("data", "../data") if Path(folder, NAME).is_dir()]
DATA = os.environ.get("DDPM_DATA", here[0] if here else "data")
if NAME == "fashion_mnist":
    try:
        prepare(NAME, DATA)  # does nothing where it is prepared already
    except ddpm.UserError as error:
        NAME, SCALE = "digits", 8
        print(f"No Fashion-MNIST ({error}): everything below is of the 8x8 digits instead.")

model = ddpm.load(NAME)
process, schedule = model.process, model.process.schedule
T = schedule.timesteps
train, test = (ddpm.load_source(model.config.data, DATA, split) for split in ("train", "test"))
print(model)
print(f"schedule {model.config.diffusion.schedule}, predicts {process.prediction}; ", end="")
print(f"{len(train):,} training and {len(test):,} test images")


# %%
def show(pictures, title=None, columns=8, scale=None):
    """Show images, uint8 [n,h,w,c] or floats in [-1, 1], as one grid."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8:
        pictures = np.uint8(np.rint(127.5 * (np.clip(pictures, -1, 1) + 1)))
    picture = ddpm.grid(pictures, columns, scale=scale or SCALE)
    height, width = picture.shape[0] / 100, picture.shape[1] / 100
    figure = plt.figure(figsize=(width, height + (0.3 if title else 0)))
    axes = figure.add_axes((0, 0, 1, height / figure.get_figheight()))
    axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    if title:
        figure.suptitle(title, fontsize=9, y=0.99, va="top")
    plt.show()


show(train.read(np.arange(32))["image"], columns=16)

# %% [markdown]
# ## Noise schedules: betas, alphas_cumprod, SNR
#
# $$q(x_t \mid x_{t-1}) = \mathcal N(\sqrt{1-\beta_t}\, x_{t-1},\ \beta_t I)\quad (2)\qquad
# \bar\alpha_t = \prod_{s \le t} (1-\beta_s)$$
#
# The schedule decides how much of the image is left at each t, and so how hard each of the
# network's T tasks is. The linear one of the paper spends many steps where almost nothing is
# left; the cosine one (Nichol & Dhariwal 2021) falls more evenly.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
for name in ("linear", "cosine"):
    other = ddpm.NoiseSchedule.from_betas(ddpm.beta_schedule(name, T))
    axes[0].semilogy(other.betas, label=name)
    axes[1].plot(other.alphas_cumprod, label=name)
    axes[2].semilogy(other.snr, label=name)
    print(f"{name}: alphas_cumprod ends at {other.alphas_cumprod[-1]:.3g}")
for ax, name in zip(axes, ("betas", "alphas_cumprod", "SNR = ab / (1 - ab)")):
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("t")
axes[0].legend()
plt.show()

# %% [markdown]
# ## The forward process in one jump
#
# $$q(x_t \mid x_0) = \mathcal N(\sqrt{\bar\alpha_t}\, x_0,\ (1-\bar\alpha_t) I)\quad (4)$$
#
# Training needs x_t at a random t, and this jump gives it without the t steps before. One image
# at eight noise levels shows where it disappears.

# %%
x0 = jnp.asarray(test.read(np.arange(8))["image"] / 127.5 - 1, jnp.float32)  # in [-1, 1]
levels = np.linspace(0, T - 1, 8).astype(int)
one = jnp.repeat(x0[:1], 8, axis=0)
eps = jax.random.normal(jax.random.key(0), one.shape)
show(ddpm.q_sample(schedule, one, jnp.asarray(levels), eps), f"t = {', '.join(map(str, levels))}")

# %% [markdown]
# ## The jump is the walk
#
# Eq. 4 claims to be eq. 2, applied t + 1 times. The check is by brute force: many copies of one
# image are noised step by step, and their mean and variance are held against the closed form.

# %%
random, copies = np.random.default_rng(0), 20 if QUICK else 200
walk = np.repeat(np.asarray(x0[:1]), copies, axis=0).astype(np.float32)
means, variances = [], []
for beta in schedule.betas:
    walk = np.sqrt(1 - beta) * walk + np.sqrt(beta) * random.standard_normal(walk.shape, np.float32)
    mean = walk.mean(axis=0)
    means.append((mean * x0[0]).sum() / (x0[0] ** 2).sum())  # how much of x_0 is in it
    variances.append(((walk - mean) ** 2).sum() / ((copies - 1) * mean.size))

figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
closed = {"mean / x_0": schedule.sqrt_alphas_cumprod, "variance": 1 - schedule.alphas_cumprod}
for ax, walked, (name, values) in zip(axes, (means, variances), closed.items()):
    ax.plot(values, "k", lw=4, alpha=0.2, label="closed form, eq. 4")
    ax.plot(walked, "--", label=f"{copies} copies, step by step")
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("t")
    for t in (T // 10, T // 2, T - 1):
        print(f"t={t:3d}  {name}: {walked[t]:.4f} by steps, {values[t]:.4f} in one")
axes[1].legend()
plt.show()

# %% [markdown]
# ## What the network is told of t
#
# $$\bigl[\sin(t f_i),\ \cos(t f_i)\bigr],\qquad f_i = 10000^{-i/(d/2-1)}\quad
# (\text{appendix B})$$
#
# One network serves all noise levels, so it must know which one it sees. Sinusoids of many
# frequencies make neighbouring t similar and distant t different, which a bare number would not.

# %%
embedding = timestep_embedding(jnp.arange(T), model.config.model)
figure, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
ax.imshow(embedding.T, aspect="auto", cmap="RdBu", interpolation="nearest")
ax.set_xlabel("t")
ax.set_ylabel("feature")
plt.show()

# %% [markdown]
# ## The network
#
# $$\epsilon_\theta(x_t, t)\quad (11)$$
#
# Input and output are images of one size, so it is a UNet: fine detail travels over the skips,
# the whole picture is seen at the bottom. Each residual block hears the time embedding.

# %%
size, channels = model.config.data.image_size, model.config.data.channels
network = ddpm.UNet(model.config.model, model.config.output_channels)
inputs = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


def record(next_function, arguments, options, context):
    """Note the output's shape of each block of the network."""
    output = next_function(*arguments, **options)
    if len(context.module.path) == 1 and context.method_name == "__call__":
        shapes[context.module.path[0]] = output.shape
    return output


shapes = {}
with nn.intercept_methods(record):
    time = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.eval_shape(lambda x, t: network.apply({"params": model.params}, x, t), inputs, time)
print(f"{'block':24} {'output':>18} {'parameters':>12}")
for name, shape in shapes.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params[name]))
    print(f"{name:24} {'x'.join(map(str, shape[1:])):>18} {count:12,}")
print(f"{'all':43} {sum(leaf.size for leaf in jax.tree.leaves(model.params)):12,}")

# %% [markdown]
# ## The loss in ten lines
#
# $$L_\text{simple} = \mathbb E_{t, x_0, \epsilon}\,\bigl\| \epsilon -
# \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon,\ t) \bigr\|^2
# \quad (14)$$
#
# It is the variational bound without its weights: the steps with little noise, which count much
# in the bound and little to the eye, count less. A network that says nothing has the loss 1, the
# variance of the noise, and anything below 1 is knowledge.


# %%
def eps_of(denoise):
    """Turn a denoiser of any prediction (eps, v, x0) into one of eps: eq. 4 solved for it."""

    def predict(x_t, t):
        x0_hat = ddpm.predict_x0(schedule, process.prediction, denoise(x_t, t), x_t, t)
        column = (-1, 1, 1, 1)
        signal = jnp.float32(schedule.sqrt_alphas_cumprod)[t].reshape(column)
        noise = jnp.float32(schedule.sqrt_one_minus_alphas_cumprod)[t].reshape(column)
        return (x_t - signal * x0_hat) / noise

    return predict


def simple_loss(predict_eps, x0, t, key):
    """Compute eq. 14 for each image, as a mean over pixels."""
    eps = jax.random.normal(key, x0.shape)
    ab = jnp.float32(schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    x_t = jnp.sqrt(ab) * x0 + jnp.sqrt(1 - ab) * eps
    return jnp.mean((eps - predict_eps(x_t, t)) ** 2, axis=(1, 2, 3))


key, t = jax.random.key(1), jnp.asarray(levels)
silent = simple_loss(lambda x_t, t: jnp.zeros_like(x_t), x0, t, key)
print(f"a network that says nothing: {silent.mean():.3f}")

# %%
ts = np.unique(np.geomspace(1, T - 1, 3 if QUICK else 24).astype(int))
losses = [
    simple_loss(eps_of(model.denoise), x0, jnp.full(8, t), jax.random.key(int(t))).mean()
    for t in ts
]
figure, ax = plt.subplots(figsize=(5, 2.5), layout="constrained")
ax.loglog(ts, losses, "o-", label=f"{NAME}, as shipped")
ax.axhline(1, color="gray", ls=":", label="says nothing")
ax.set_xlabel("t")
ax.set_ylabel("error of eps")
ax.legend()
plt.show()

# %% [markdown]
# ## Training, Algorithm 1
#
# $$\text{repeat: } x_0 \sim q,\ t \sim U,\ \epsilon \sim \mathcal N(0, I);\quad \text{step on }
# \nabla_\theta \| \epsilon - \epsilon_\theta(x_t, t) \|^2$$
#
# A smaller network, a few hundred steps: enough to see noise turn into shapes. A run directory is
# a run, so this very cell, run again, would go on where it was.

# %%
small = ["model.base_channels=16", "model.channel_mult=(1,2)", "model.group_norm_groups=8"]
small += ["model.attention_resolutions=()", f"train.steps={TRAINING}", "train.batch_size=32"]
small += [f"train.sample_every={max(1, TRAINING // 3)}", "train.sample_images=16"]
small += ["sampling.sampler=ddim", f"sampling.steps={min(20, STEPS)}", "train.eval_images=0"]
small += [f"train.log_every={max(1, TRAINING // 30)}", "train.ema_decays=(0.98,)"]
fresh = ddpm.train(ddpm.load_config(NAME, small), FOLDER / "run", DATA)
print(fresh)

# %%
rows = [json.loads(line) for line in (FOLDER / "run" / "metrics.jsonl").read_text().splitlines()]
curve = [(row["step"], row["loss"]) for row in rows if "loss" in row]
figure, ax = plt.subplots(figsize=(5, 2.2), layout="constrained")
ax.semilogy(*zip(*curve))
ax.set_xlabel("step")
ax.set_ylabel("loss")
plt.show()
grids = sorted((FOLDER / "run" / "samples").glob("*.png"))
figure, axes = plt.subplots(1, len(grids), figsize=(8, 2.4), layout="constrained", squeeze=False)
for ax, path in zip(axes[0], grids):
    ax.imshow(plt.imread(path), cmap="gray")
    ax.set_title(f"step {int(path.stem.removeprefix('step_'))}", fontsize=9)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Sampling, Algorithm 2, written out
#
# $$x_{t-1} = \tilde\mu_t(x_t, \hat x_0) + \sigma_t z\quad (7),\qquad
# \hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta) / \sqrt{\bar\alpha_t}\quad (15)$$
#
# Each step asks the network for the image, then goes a little way towards it: to a draw from the
# posterior of eq. 7. As one `lax.scan` the whole chain is one compiled program; on a CPU it
# visits 100 of the 1000 timesteps, whose coefficients follow from the same alphas_cumprod.

# %%
assert not process.learns_variance
table = ddpm.ancestral_table(process, STEPS, variance="fixed_small")  # float64, one row a step
x_T = jax.random.normal(jax.random.key(2), x0.shape)
keys = jax.random.split(jax.random.key(3), len(x_T))  # one a sample


@jax.jit
def by_hand(x_T):
    """Run the chain; return x_0, and x_t and x0_hat of every row."""
    rows = {name: jnp.float32(getattr(table, name)) for name in ("x0", "x", "z")}
    rows["t"] = jnp.asarray(table.timesteps)

    def body(x_t, row):
        t = jnp.full(len(x_t), row["t"])
        output = model.denoise(x_t, t)
        x0_hat = ddpm.predict_x0(schedule, process.prediction, output, x_t, t)
        x0_hat = jnp.clip(x0_hat, -1, 1)  # images are in [-1, 1]
        z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, row["t"]), shape))(keys)
        x_prev = row["x0"] * x0_hat + row["x"] * x_t + row["z"] * z
        return x_prev, (x_prev, x0_hat)

    shape = x_T.shape[1:]
    return jax.lax.scan(body, x_T, rows)


x_0, (states, guesses) = by_hand(x_T)
show(x_0, "by hand")


# %%
def run(table):
    """Run the library's chain down a sampler's table, from the same x_T."""
    chain = jax.jit(lambda x: ddpm.reverse_chain(process, table, model.denoise, x, keys))
    return chain(x_T)


ancestral = run(table)
difference = np.abs(np.rint(127.5 * np.asarray(x_0 - ancestral)))
print(f"the library's chain: {np.mean(difference == 0):.2%} of the pixels are the same, ", end="")
print(f"the others differ by at most {difference.max():.0f} of 255 levels")
assert difference.max() <= 1

# %% [markdown]
# ## A film of it
#
# $$x_T \to \dots \to x_t \to \dots \to x_0$$
#
# Above x_t, below what the network takes the image to be at that moment. Large shapes come first,
# detail last: the order in which noise hides them (section 4.3 of the paper).

# %%
frames = np.linspace(0, STEPS - 1, min(STEPS, 24)).astype(int)


def pair(number):
    """Draw four samples at one row of the chain: x_t, and below x0_hat."""
    both = np.clip(np.concatenate([states[number][:4], guesses[number][:4]]), -1, 1)
    return ddpm.grid(np.uint8(np.rint(127.5 * (both + 1))), columns=4, scale=SCALE)


film = np.stack([pair(number) for number in [*frames, *frames[-1:].repeat(8)]])
ddpm.save_animation(FOLDER / "film.gif", film, milliseconds=120)
try:
    from IPython.display import Image, display
except ImportError:
    print(f"{FOLDER / 'film.gif'}")
else:
    # A browser sees by its first bytes that it is a GIF; some viewers know image/png only.
    display(Image((FOLDER / "film.gif").read_bytes(), format="png"))
visits = ", ".join(str(table.timesteps[row]) for row in frames[::3])
show(np.concatenate([states[row][:1] for row in frames[::3]]), f"the first, at t = {visits}")

# %% [markdown]
# ## Fewer steps: DDIM
#
# $$x' = \sqrt{\bar\alpha'}\,\hat x_0 + \sqrt{1-\bar\alpha'}\,\hat\epsilon
# \quad (\text{Song et al. 2021, eq. 12},\ \eta = 0)$$
#
# Without fresh noise the chain follows an ODE, whose solution hardly changes when steps are left
# out. From one x_T all rows therefore show nearly the same pictures, and the ancestral ones
# others.

# %%
counts = (2, 3) if QUICK else (10, 20, 50)
pictures = [run(ddpm.ddim_table(process, count)) for count in counts]
title = f"DDIM in {', '.join(map(str, counts))} steps; below, ancestral in {STEPS}"
show(np.concatenate([*pictures, ancestral]), title)

# %% [markdown]
# ## Bits per dimension
#
# $$-\log p(x_0) \le L_T + \sum_{t>1} L_{t-1} + L_0\quad (5),\qquad L_{t-1} =
# D_\text{KL}\bigl(q(x_{t-1} \mid x_t, x_0) \,\|\, p_\theta(x_{t-1} \mid x_t)\bigr)$$
#
# The bound says in how many bits the image could be coded. Most of them go into the last few
# steps, into detail that nobody sees, and that is why eq. 14, which cares less for it, gives
# better pictures.


# %%
@jax.jit
def term(t):
    """Compute one term of eq. 5 for the eight images, in bits/dim."""
    t = jnp.full(len(x0), t)
    x_t = ddpm.q_sample(schedule, x0, t, jax.random.normal(jax.random.fold_in(key, t[0]), x0.shape))
    return ddpm.bound_term(process, model.denoise(x_t, t), x0, x_t, t, clip=True).mean()


ts = np.unique(np.append(0, np.geomspace(1, T - 1, 3 if QUICK else 40).astype(int)))
terms = np.array([float(term(t)) for t in ts])
prior = float(ddpm.prior_term(schedule, x0).mean())
figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
axes[0].loglog(ts + 1, terms, "o-", ms=3)
axes[0].set_title("terms, bits/dim", fontsize=9)
between = np.exp(np.interp(np.log(np.arange(1, T)), np.log(ts[1:]), np.log(terms[1:])))
below = terms[0] + np.append(0, np.cumsum(between))  # L_0, and the terms up to t
axes[1].semilogx(1 + np.arange(T), below)
axes[1].set_title("sum of the terms up to t, bits/dim", fontsize=9)
for ax in axes:
    ax.set_xlabel("t + 1")
plt.show()
images = test.read(np.arange(8))["image"]
bits = model.bits_per_dim(images, num_timesteps=4 if QUICK else 40)
print(
    f"L_T = {prior:.1e}, L_0 = {terms[0]:.2f}, all by these terms {prior + below[-1]:.2f} ", end=""
)
print(f"bits/dim; model.bits_per_dim, another draw of t and noise: {bits:.2f}")

# %% [markdown]
# ## Interpolation
#
# $$x_T = \text{DDIM backwards from } x_0,\qquad
# x_T(\lambda) = \frac{\sin((1-\lambda)\theta)}{\sin\theta}\, x_T +
# \frac{\sin(\lambda\theta)}{\sin\theta}\, x_T'$$
#
# Two images are encoded, their codes mixed on the sphere, and the mixes decoded (Song et al.
# 2021, section 5.3; the paper's Figure 8 mixes linearly at t = 500). A mix of codes is another
# garment, where a mix of pixels would be two in one picture.

# %%
steps, lambdas = min(STEPS, 20), np.linspace(0, 1, 8)[:, None, None, None]
first, last = model.encode(images[[0, 2]], steps=steps)
angle = np.arccos(np.sum(first * last) / np.linalg.norm(first) / np.linalg.norm(last))
mix = (np.sin((1 - lambdas) * angle) * first + np.sin(lambdas * angle) * last) / np.sin(angle)
pixels = np.rint((1 - lambdas) * images[0] + lambdas * images[2]).astype(np.uint8)
decoded = model.decode(mix, steps=steps)
show(np.concatenate([decoded, pixels]), "codes mixed; below, pixels mixed")

# %% [markdown]
# ## On from here
#
# - [your_images](your_images.ipynb): a folder of one's own pictures, classes and guidance, FID.
# - [pods](pods.ipynb): from one device to many.
# - [examples/](../examples): a sampler on one screen, one's own network, one's own data.
