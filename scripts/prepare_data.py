"""Prepare a data set for training: from its publisher, or from an archive or folder that is already on disk.

Sets: cifar10, mnist, fashion_mnist; celeb_a, celeb_a_hq/256, lsun/bedroom and their kin, which need TensorFlow once;
and folder, any folder of images, cropped and shrunk into a set called --name. Digits need no preparing.
"""

from pathlib import Path

from ddpm_jax import cli
from ddpm_jax.data import prepare
from ddpm_jax.data.errors import DataError


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/prepare_data.py --dataset=cifar10 --data_dir=data --source=cifar-10-python.tar.gz\n"
        "  python scripts/prepare_data.py --dataset=folder --data_dir=data --source=img_align_celeba "
        "--name=celeba64 --crop=celeba64 --image_size=64",
    )
    cli.add_data_dir(flags)
    add = flags.add_argument
    add("--dataset", required=True, metavar="NAME", help=f"{', '.join(prepare.KNOWN)}, folder")
    add("--source", type=Path, metavar="PATH", help="the original archive or folder; without it, the set is downloaded")
    folder = flags.add_argument_group("--dataset=folder")
    folder.add_argument("--name", help="what config.data.name will say")
    folder.add_argument("--image_size", type=int, metavar="N", help="pixels, after cropping; images are never enlarged")
    folder.add_argument("--channels", type=int, default=3, choices=[1, 3], help="1: grey, 3: RGB (default: 3)")
    folder.add_argument("--crop", default="none", choices=["none", "center", "celeba64"], help="before shrinking (default: none)")
    options = flags.parse_args(argv)
    if options.dataset == "digits":
        print("data set 'digits' comes with scikit-learn: there is nothing to prepare")
        return
    if options.dataset == "folder":
        for flag in ("source", "name", "image_size"):
            if getattr(options, flag) is None:
                raise DataError(f"--dataset=folder needs --{flag}")
    name = options.name if options.dataset == "folder" else options.dataset
    there = prepare.is_prepared(name, options.data_dir)
    if options.dataset == "folder":
        path = prepare.prepare_folder(options.source, options.data_dir, name, options.image_size, options.channels, options.crop)
    else:
        path = prepare.prepare(options.dataset, options.data_dir, options.source)
    print(f"data set {name!r} {'was already' if there else 'is'} prepared in {path}: config.data.name={name}")


if __name__ == "__main__":
    cli.run(main)
