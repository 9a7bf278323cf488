"""Train one config with this code and with diffusers in PyTorch, and say whether they differ by more than their seeds do.

PyTorch's side is a plain loop around diffusers' UNet2DModel and DDPMScheduler, with its own data order, noise, optimiser and
averages: the same recipe, written twice. Both see the same number of images. One evaluation judges both: the averaged weights of
the other side are read as any diffusers checkpoint is. It needs requirements-torch.txt.

For each seed: the mean squared error of eps at fixed timesteps over held-out images, with the same noise for all; and the bound
in bits/dim. Then means and standard errors over seeds, and the difference with its standard error.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import cli
from ddpm_jax.build import Params, build_process, denoiser, image_shape
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.data.sources import Source, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.diffusion import q_sample
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.images import replacing
from ddpm_jax.loop import train
from ddpm_jax.progress import Progress
from ddpm_jax.trained import open_trained
from ddpm_jax.training import scale_images
from ddpm_jax.weights.diffusers_config import layout_of, network_config, scheduler_config
from ddpm_jax.weights.layout import read_params

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.999)  # of T: where eps is judged
SIDES = ("ddpm_jax", "diffusers")


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/compare_with_diffusers.py --config=configs/digits.py --workdir=runs/compare --seeds=0,1,2 --output=F",
    )
    cli.add_config(flags)
    cli.add_data_dir(flags)
    add = flags.add_argument
    add(
        "--workdir",
        type=Path,
        required=True,
        metavar="DIR",
        help="of the runs, a folder a seed; a finished one is not repeated",
    )
    add("--seeds", type=lambda text: [int(item) for item in text.split(",")], default=[0], metavar="A,B", help="(default: 0)")
    add("--num_images", type=int, default=1000, metavar="N", help="held-out images that judge, at most (default: 1000)")
    add("--num_timesteps", type=int, default=50, metavar="K", help="terms of the bound an image (default: 50)")
    add("--output", type=Path, required=True, metavar="FILE", help="the figures as JSON")
    options, config = cli.parse_with_config(flags, argv)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        raise ConfigError("PyTorch or diffusers is not installed: pip install -c requirements.lock -r requirements-torch.txt")
    if config.loss.kind != "simple" or config.train.accumulation != 1 or config.model.num_classes:
        raise ConfigError("the loop on PyTorch's side knows L_simple without classes or accumulation: take such a config")
    network_config(config), scheduler_config(config)  # ConfigError before anything is trained

    rows = [measure(dataclasses.replace(config, seed=seed), side, options) for seed in options.seeds for side in SIDES]
    results = {"config": dataclasses.asdict(config), "versions": versions(), "runs": rows, "summary": summarise(rows)}
    print(table(results["summary"], len(options.seeds)))
    with replacing(options.output) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    print(f"wrote {options.output}")


def measure(config: Config, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, unless its record is there, and judges."""
    folder = options.workdir / f"seed{config.seed}"
    record = folder / f"{side}.json"
    protocol = {"num_images": options.num_images, "num_timesteps": options.num_timesteps, "config": dataclasses.asdict(config)}
    if record.is_file():
        found = json.loads(record.read_text())
        if found["protocol"] == json.loads(json.dumps(protocol)):
            return found
    print(f"seed {config.seed}: {side}", flush=True)
    devices, started = Devices(), time.monotonic()
    if side == "ddpm_jax":
        train(config, folder / side, data_dir=options.data_dir)
        params = open_trained(folder / side, devices).params
    else:
        params = devices.replicate(train_with_diffusers(config, load_source(config.data, options.data_dir, "train")))
    trained = time.monotonic()
    held_out = load_source(config.data, options.data_dir, "test")
    nll = evaluate_nll(config, params, held_out, devices, protocol=Protocol(options.num_timesteps), num_images=options.num_images)
    row = {
        "side": side,
        "seed": config.seed,
        "seconds": round(trained - started, 1),
        "nll": nll.total.mean,
        "nll_standard_error": nll.total.standard_error,
        "eps_error": eps_errors(config, params, held_out, options.num_images),
        "protocol": protocol,
    }
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(row) + "\n")
    return row


def eps_errors(config: Config, params: Params, source: Source, count: int) -> dict[str, float]:
    """Mean squared error of eps_hat at LEVELS of T, over the first images and one draw of noise for each level."""
    process, bind = build_process(config), denoiser(config)
    images = source.read(np.arange(min(count, len(source))))["image"]

    @jax.jit
    def errors(params: Params, image: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        x_t = q_sample(process.schedule, scale_images(image), t, eps)
        return jnp.mean((bind(params, None)(x_t, t) - eps) ** 2, axis=(1, 2, 3))

    found = {}
    for level in LEVELS:
        t = int(level * config.diffusion.timesteps)
        eps = np.random.default_rng(t).standard_normal((len(images), *image_shape(config)), np.float32)
        parts = [
            errors(params, images[rows], np.full(len(rows), t), eps[rows])
            for rows in np.array_split(np.arange(len(images)), -(-len(images) // 128))
        ]
        found[str(t)] = float(np.mean(np.concatenate(parts)))
    return found


# ---------------------------------------------------------------------------------------------- the other side


def train_with_diffusers(config: Config, source: Source) -> Params:
    """The averaged weights after `config.train.steps`, in our names."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(config.seed)
    described = network_config(config)
    network = UNet2DModel.from_config(described)
    initialise(network)
    network.train().to(memory_format=torch.channels_last)
    noising = DDPMScheduler.from_config(scheduler_config(config))
    recipe, steps, size = config.optimizer, config.train.steps, config.train.batch_size
    adam = torch.optim.Adam(network.parameters(), recipe.learning_rate, (recipe.beta1, recipe.beta2), recipe.epsilon)
    warmup = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min(n / recipe.warmup_steps, 1) if recipe.warmup_steps else 1)
    average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    images = torch.from_numpy(source.read(np.arange(len(source)))["image"]).permute(0, 3, 1, 2)

    order = torch.randperm(len(images))
    with Progress(steps, "step", enabled=True, scale=size) as shown:
        for step in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(images))])
            chosen, order = order[:size], order[size:]
            x0 = images[chosen].float() / 127.5 - 1
            if config.data.flip:
                x0 = torch.where((torch.rand(size) < 0.5)[:, None, None, None], x0.flip(3), x0)
            eps, t = torch.randn_like(x0), torch.randint(config.diffusion.timesteps, (size,))
            x_t = noising.add_noise(x0, eps, t).contiguous(memory_format=torch.channels_last)
            loss = torch.nn.functional.mse_loss(network(x_t, t).sample, eps)
            adam.zero_grad()
            loss.backward()
            if recipe.gradient_clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clip)
            adam.step()
            warmup.step()
            decay = config.train.ema_decays[0]
            decay = min(decay, (1 + step) / (10 + step)) if config.train.ema_warmup else decay
            with torch.no_grad():
                for name, tensor in network.state_dict().items():
                    average[name].lerp_(tensor, 1 - decay)
            shown.update(1)
    tensors = {name: tensor.contiguous().numpy() for name, tensor in average.items()}
    return read_params(layout_of(described), config, tensors, "diffusers")


def initialise(network: Any) -> None:
    """The paper's: uniform with the mean of both fans, which is Xavier's; the last layer of every branch almost 0; biases 0."""
    import torch

    last = ("conv2.weight", "to_out.0.weight", "conv_out.weight")
    for name, weight in network.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(weight)
        elif weight.ndim > 1:
            torch.nn.init.xavier_uniform_(weight, gain=1e-5 if name.endswith(last) else 1.0)


# ---------------------------------------------------------------------------------------------- what came out


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each figure the mean of both sides over seeds, and the difference with its standard error."""
    figures = {"bound, bits/dim": lambda row: row["nll"]}
    for t in rows[0]["eps_error"]:
        figures[f"eps at t={t}"] = lambda row, t=t: row["eps_error"][t]
    summary = []
    for name, of in figures.items():
        ours, theirs = (np.array([of(row) for row in rows if row["side"] == side]) for side in SIDES)
        line = {"figure": name, "ddpm_jax": ours.mean(), "diffusers": theirs.mean(), "difference": ours.mean() - theirs.mean()}
        if len(ours) > 1:
            errors = {side: runs.std(ddof=1) / np.sqrt(len(runs)) for side, runs in zip(SIDES, (ours, theirs))}
            line |= {f"{side}_error": error for side, error in errors.items()}
            line["difference_error"] = float(np.hypot(*errors.values()))
        summary.append(line)
    return summary


def table(summary: list[dict[str, Any]], seeds: int) -> str:
    lines = [f"{'':18} {'ddpm_jax':>20} {'diffusers':>20} {'difference':>20}   ({seeds} seed{'s' * (seeds > 1)})"]
    for line in summary:
        cells = []
        for name in (*SIDES, "difference"):
            error = line.get(f"{name}_error")
            cells.append(f"{line[name]:.5f}" + (f" +- {error:.5f}" if error is not None else ""))
        lines.append(f"{line['figure']:18} " + " ".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "diffusers")}
    return packages | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    cli.run(main)
