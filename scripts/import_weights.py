"""Make a run directory from a published checkpoint; sample.py, evaluate.py and train.py then work on it as on any other.

What the file does not say comes from the published recipe of its layout and is printed; --config and its overrides replace it.
Nothing in the file is executed. To fine-tune: train.py --config=WORKDIR/config.json --workdir=WORKDIR.
"""

from pathlib import Path

from ddpm_jax import cli
from ddpm_jax.trained import save_imported
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.layouts import LAYOUTS
from ddpm_jax.weights.workdir import check_free


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/import_weights.py --layout=diffusers --input=ddpm-ema-church-256 --workdir=runs/church\n"
        "  python scripts/import_weights.py --layout=pesser --input=ema_diffusion_cifar10_model-790000.ckpt "
        "--workdir=runs/paper",
    )
    cli.add_workdir(flags)
    add = flags.add_argument
    add("--layout", required=True, choices=sorted(LAYOUTS), help="the code base that wrote the file")
    add(
        "--input",
        type=Path,
        required=True,
        metavar="PATH",
        help=".safetensors, a PyTorch file, .npz, the prefix of a TensorFlow checkpoint, or a diffusers folder",
    )
    add("--weights", choices=["raw", "ema"], help="what a file holds that does not say so itself")
    cli.add_config(flags, required=False)
    options, overrides = cli.parse_with_overrides(flags, argv)
    check_free(options.workdir)
    imported = import_weights(
        options.layout, options.input, config_file=options.config, overrides=overrides, weights=options.weights
    )
    for message in imported.messages:
        print(message)
    save_imported(options.workdir, imported)
    print(f"wrote {options.workdir}")


if __name__ == "__main__":
    cli.run(main)
