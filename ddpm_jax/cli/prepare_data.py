"""Prepare a data set for training: from its publisher, or from an archive or folder on disk.

Sets: cifar10, mnist, fashion_mnist; celeb_a from --source, the folder with img_align_celeba and
list_eval_partition.txt (docs/celeba.md); celeb_a_hq/256 and its kin, which need TensorFlow once,
as celeb_a does without --source; and folder, any folder of images, cropped and shrunk into a set
called --name. LSUN's images, exported from its lmdb, are such a folder. Digits need no preparing.
"""

from pathlib import Path

from ddpm_jax.cli import flags, values
from ddpm_jax.data import prepare
from ddpm_jax.data.archives import innermost, unpacked
from ddpm_jax.errors import DataError, check


def main(argv: list[str] | None = None) -> None:
    parser = flags.parser(
        __doc__,
        "python scripts/prepare_data.py --dataset=cifar10 --data_dir=data "
        "--source=cifar-10-python.tar.gz\n"
        "  python scripts/prepare_data.py --dataset=folder --data_dir=data "
        "--source=photos --name=mine64 --crop=center --image_size=64",
    )
    flags.add_data_dir(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help=f"{', '.join(prepare.KNOWN)}, folder")
    add(
        "--source",
        type=Path,
        metavar="PATH",
        help="the original archive or folder, of --dataset=folder also a zip or tar of images; "
        "without it, the set is downloaded",
    )
    folder = parser.add_argument_group("--dataset=folder, and celeb_a from --source")
    folder.add_argument(
        "--name", help="what config.data.name will say (default: celeb_a, or celeba64 at 64 pixels)"
    )
    folder.add_argument(
        "--image_size",
        type=values.sides,
        metavar="N|H,W",
        help="pixels of a square, or height and width, after cropping; images are never enlarged "
        "(default, of celeb_a: whole faces, which a config crops and shrinks)",
    )
    folder.add_argument(
        "--channels",
        type=int,
        choices=[1, 3, 4],
        help="of a folder, 1: grey, 3: RGB, 4: RGBA (default: 3)",
    )
    folder.add_argument(
        "--crop",
        choices=["none", "center", "celeba64"],
        help="before shrinking (default: none; celeba64 of celeb_a)",
    )
    folder.add_argument(
        "--skip_bad",
        nargs="?",
        const="true",
        choices=["true", "false"],
        help="leave out images that do not decode or fit, instead of refusing the set",
    )
    folder.add_argument(
        "--classes",
        nargs="?",
        const="true",
        choices=["true", "false"],
        help="of a folder: the folders in it are classes: cats/1.png, dogs/1.png",
    )
    options = parser.parse_args(argv)
    if options.dataset == "digits":
        print("data set 'digits' comes with scikit-learn: there is nothing to prepare")
        return
    if options.dataset == "folder":
        needs = ("source", "name", "image_size")
        missing = [f"--{flag}" for flag in needs if getattr(options, flag) is None]
        if missing:
            raise DataError(f"--dataset=folder needs {', '.join(missing)}")
    celeba = options.dataset == "celeb_a" and options.source is not None
    useless = [] if options.dataset == "folder" else ["channels", "classes"]
    useless += [] if celeba or not useless else ["name", "image_size", "crop", "skip_bad"]
    for flag in useless:
        what = f"--dataset={options.dataset}" + " without --source" * (options.dataset == "celeb_a")
        check(getattr(options, flag) is None, f"--{flag}: of no use with {what}")
    name = options.name if options.dataset == "folder" else options.dataset
    if celeba:
        name = prepare.celeba_name(options.name, options.image_size)
    classes = options.classes == "true"
    was_there = prepare.is_prepared(name, options.data_dir)
    if options.dataset == "folder":
        with unpacked(options.source, options.data_dir) as source:
            if classes and options.source.is_file():
                source = innermost(source)
            path = prepare.prepare_folder(
                source,
                options.data_dir,
                name,
                options.image_size,
                options.channels or 3,
                options.crop or "none",
                skip_bad=options.skip_bad == "true",
                classes=classes,
            )
    elif celeba:
        path = prepare.prepare_celeba(
            options.source,
            options.data_dir,
            options.name,
            options.image_size,
            options.crop,
            skip_bad=options.skip_bad == "true",
        )
    else:
        path = prepare.prepare(options.dataset, options.data_dir, options.source)
    state = "was already" if was_there else "is"
    print(f"data set {name!r} {state} prepared in {path}: config.data.name={name}")
