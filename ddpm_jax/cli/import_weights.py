"""Make a run directory from a published checkpoint, for all other commands to work on.

What the file does not say comes from the published recipe of its layout and is printed; --config
and its overrides replace it. Nothing in the file is executed, and reading it needs no PyTorch. To
fine-tune: train.py --config=WORKDIR/config.json --workdir=WORKDIR.
"""

from pathlib import Path

from ddpm_jax.cli import flags
from ddpm_jax.training.imported import check_place, save_imported
from ddpm_jax.weights.detect import AUTO
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.layouts.registry import LAYOUTS


def main(argv: list[str] | None = None) -> None:
    parser = flags.parser(
        __doc__,
        "python scripts/import_weights.py --input=ddpm-ema-church-256 --workdir=runs/church\n"
        "  python scripts/import_weights.py --layout=pesser "
        "--input=ema_diffusion_cifar10_model-790000.ckpt --workdir=runs/paper",
    )
    flags.add_workdir(parser)
    add = parser.add_argument
    add(
        "--layout",
        default=AUTO,
        choices=[AUTO, *sorted(LAYOUTS)],
        help="the code base that wrote the file (default: auto, the one that fits)",
    )
    add(
        "--input",
        type=Path,
        required=True,
        metavar="PATH",
        help=".safetensors, a PyTorch file, .npz, the index of shards, the prefix of a TensorFlow "
        "checkpoint, or a diffusers folder",
    )
    add("--weights", choices=["raw", "ema"], help="what a file holds that does not say so itself")
    flags.add_config(parser, required=False)
    options, overrides = flags.parse_with_overrides(parser, argv)
    was_there = check_place(options.workdir)
    imported = import_weights(
        options.layout,
        options.input,
        config_file=options.config,
        overrides=overrides,
        weights=options.weights,
    )
    for message in imported.messages:
        print(message)
    save_imported(options.workdir, imported)
    again = ", in the place of an import that nothing was done with" if was_there else ""
    print(f"wrote {options.workdir}{again}")
