"""Draw samples from a trained run: a grid as PNG, or the images as .npz (key arr_0, uint8 [n,h,w,c]).

Sample i depends on --seed and i alone, whatever --num_images, --batch_size and the number of devices. Weights are the EMA
unless --weights says otherwise.
"""

from pathlib import Path

import numpy as np

from ddpm_jax import cli, images
from ddpm_jax.config import ConfigError
from ddpm_jax.devices import Devices
from ddpm_jax.generate import SAMPLERS, Generator
from ddpm_jax.trained import open_trained

FORMATS = (".png", ".npz")


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/sample.py --workdir=runs/cifar10 --mode=grid --steps=1000 --num_images=64 --output=grid.png",
    )
    cli.add_workdir(flags)
    add = flags.add_argument
    add("--mode", choices=["grid"], default="grid", help="what to draw (default: grid)")
    add("--output", type=Path, required=True, metavar="FILE", help=f"ends in {' or '.join(FORMATS)}")
    add("--num_images", type=int, default=64, metavar="N", help="(default: 64)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--first", type=int, default=0, metavar="I", help="number of the first sample (default: 0)")
    add("--label", type=int, metavar="K", help="the class, where the config has classes")
    add("--sampler", choices=sorted(SAMPLERS), help="(default: the config's)")
    add("--steps", type=int, metavar="S", help="reverse steps; 0: all (default: the config's)")
    add("--clip", choices=["true", "false"], help="clip x0_hat to [-1, 1] (default: the config's)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, or a decay such as 0.9999 (default: ema)")
    add("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    add("--batch_size", type=int, default=64, metavar="N", help="samples at once, over all devices (default: 64)")
    add("--scale", type=int, default=1, metavar="K", help="side of a pixel in the grid (default: 1)")
    options = flags.parse_args(argv)
    check(options.output.suffix in FORMATS, f"--output={options.output}: must end in {' or '.join(FORMATS)}")
    check(options.num_images >= 1, f"--num_images={options.num_images}: must be at least 1")
    check(options.batch_size >= 1, f"--batch_size={options.batch_size}: must be at least 1")
    check(options.scale >= 1, f"--scale={options.scale}: must be at least 1")
    check(0 <= options.seed < 2**32, f"--seed={options.seed}: must be in 0..2^32-1")
    check(options.first >= 0, f"--first={options.first}: must be at least 0")

    devices = Devices()
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    classes = trained.config.model.num_classes
    check(options.label is None or classes > 0, f"--label={options.label}: this run has no classes")
    check(options.label is None or 0 <= options.label < classes, f"--label={options.label}: must be in 0..{classes - 1}")
    batch_size = min(options.batch_size, options.num_images)
    generator = Generator(
        trained.config,
        devices,
        batch_size=batch_size,
        sampler=options.sampler,
        steps=options.steps,
        clip=None if options.clip is None else options.clip == "true",
        progress=True,
    )
    print(f"{options.num_images} samples of {trained.weights}, step {trained.step}: {generator.table.steps} reverse steps")
    indices = options.first + np.arange(options.num_images)
    labels = None if options.label is None else np.full(options.num_images, options.label)
    batches = generator(trained.params, seed=options.seed, indices=indices, labels=labels)
    samples = np.concatenate([images.to_uint8(batch) for batch in batches])
    if devices.is_main:
        if options.output.suffix == ".npz":
            images.save_npz(options.output, samples, labels)
        else:
            images.save_png(options.output, images.grid(samples, scale=options.scale))
        print(f"wrote {options.output}")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


if __name__ == "__main__":
    cli.run(main)
