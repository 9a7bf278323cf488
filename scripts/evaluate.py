"""Measure a trained run: print a table, append one line for each metric to workdir/evaluations.jsonl.

nll   the variational bound of a data split in bits/dim (eq. 5 of the paper), its terms, and the rate-distortion curve (Table 4,
      Figure 5): CSV and plot in workdir/evaluations/. All T terms take T forward passes an image; --num_timesteps=K estimates
      from K of them, drawn by strata anew for each image.

Every number is that of (weights, images, seed), whatever the batch size and the number of devices.
"""

import argparse
from collections.abc import Callable
from typing import Any

from ddpm_jax import cli
from ddpm_jax.data.sources import SPLITS, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.diffusion import CDFS
from ddpm_jax.evaluation import rate_distortion
from ddpm_jax.evaluation.nll import EvaluationError, Protocol, evaluate_nll
from ddpm_jax.evaluation.record import NAME, append_evaluation
from ddpm_jax.trained import Trained, open_trained


def measure_nll(trained: Trained, devices: Devices, options: argparse.Namespace) -> dict[str, Any]:
    config = trained.config
    protocol = Protocol(options.num_timesteps, options.clip == "true", options.cdf, options.seed)
    nll = evaluate_nll(
        config,
        trained.params,
        load_source(config.data, options.data_dir, options.split),
        devices,
        protocol=protocol,
        num_images=options.num_images,
        batch_size=options.batch_size,
        progress=True,
    )
    title = (
        f"{config.data.name} {options.split}, {nll.images} images, {len(nll.strata)} of {nll.strata.timesteps} terms, "
        f"weights {trained.weights}, step {trained.step}, clip {options.clip}, cdf {options.cdf}, seed {options.seed}"
    )
    print(title, rate_distortion.format_table(nll), sep="\n")
    if config.data.padding:
        print(f"dimensions counted: all of the image, with its border of {config.data.padding} pixels")
    print(f"{nll.seconds:.0f} s for {nll.images} x {len(nll.strata)} forward passes, one for each image and term")
    name = f"nll_{options.split}_step{trained.step}_{trained.weights.replace(' ', '')}_{nll.images}x{len(nll.strata)}"
    path = options.workdir / "evaluations" / name
    if devices.is_main:
        rate_distortion.save_csv(path.with_name(f"{name}.csv"), nll)
        rate_distortion.save_plot(path.with_name(f"{name}.png"), nll, title)
        print(f"wrote {path}.csv and .png")
    parts = {"prior": nll.prior, "middle": nll.middle, "decoder": nll.decoder, "total": nll.total}
    return {
        **{name: part.mean for name, part in parts.items()},
        **{f"{name}_standard_error": part.standard_error for name, part in parts.items() if nll.images > 1},
        "rate": nll.rate,
        "rmse": float(nll.curve.rmse[-1]),
        "unit": "bits/dim",
        "split": options.split,
        "num_images": nll.images,
        "num_timesteps": len(nll.strata),
        "timesteps": nll.strata.timesteps,
        "clip": protocol.clip,
        "cdf": protocol.cdf,
        "seed": protocol.seed,
        "forward_passes": nll.images * len(nll.strata),
        "seconds": round(nll.seconds, 3),
        "curve": f"evaluations/{name}.csv",
    }


METRICS: dict[str, Callable[[Trained, Devices, argparse.Namespace], dict[str, Any]]] = {"nll": measure_nll}


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(__doc__, "python scripts/evaluate.py --workdir=runs/cifar10 --metrics=nll")
    cli.add_workdir(flags)
    cli.add_data_dir(flags)
    add = flags.add_argument
    add("--metrics", required=True, metavar="A,B", help=f"any of {', '.join(METRICS)}")
    add("--split", choices=SPLITS, default="test", help="(default: test)")
    add("--num_images", type=int, metavar="N", help="(default: the whole split)")
    add("--batch_size", type=int, default=128, metavar="N", help="images at once, over all devices (default: 128)")
    add("--seed", type=int, default=0, help="of every draw (default: 0)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, or a decay such as 0.9999 (default: ema)")
    add("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    nll = flags.add_argument_group("nll")
    nll.add_argument("--num_timesteps", type=int, default=0, metavar="K", help="terms an image; 0: all T (default: 0)")
    nll.add_argument("--clip", choices=["true", "false"], default="true", help="clip x0_hat to [-1, 1] (default: true)")
    nll.add_argument("--cdf", choices=sorted(CDFS), default="tanh", help="of the decoder: the paper's or exact (default: tanh)")
    options = flags.parse_args(argv)
    names = options.metrics.split(",")
    for name in names:
        check(name in METRICS, f"--metrics={name}: any of {', '.join(METRICS)}, with commas between")
    check(options.num_images is None or options.num_images >= 1, f"--num_images={options.num_images}: must be at least 1")
    check(options.batch_size >= 1, f"--batch_size={options.batch_size}: must be at least 1")
    check(0 <= options.seed < 2**32, f"--seed={options.seed}: must be in 0..2^32-1")

    devices = Devices()
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    for name in names:
        protocol = {"metric": name, "weights": trained.weights, "step": trained.step, "data": trained.config.data.name}
        record = protocol | METRICS[name](trained, devices, options)
        if devices.is_main:
            append_evaluation(options.workdir, record)
            print(f"appended to {options.workdir / NAME}", flush=True)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise EvaluationError(message)


if __name__ == "__main__":
    cli.run(main)
