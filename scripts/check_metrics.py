"""Does the metric measure? FID of train against test images, and against the same, blurred, noised and JPEG-compressed.

Every row has as many images, so their bias is alike. Exit code 1 where a stronger damage has a smaller distance.
"""

import argparse

import numpy as np

from ddpm_jax import cli
from ddpm_jax.config import load_config
from ddpm_jax.data.sources import load_source
from ddpm_jax.devices import Devices
from ddpm_jax.evaluation import quality, references
from ddpm_jax.evaluation.damage import DAMAGES
from ddpm_jax.evaluation.errors import EvaluationError
from ddpm_jax.evaluation.features import Extractor
from ddpm_jax.evaluation.image_sets import of_array, of_split
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.evaluation.resize import RESIZES

METRICS = ("fid", "kid")


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "python scripts/check_metrics.py --config=configs/cifar10.py --num_images=5000")
    cli.add_config(flags)
    cli.add_data_dir(flags)
    add = flags.add_argument
    add("--num_images", type=int, default=500, metavar="N", help="of the test split, at least 40 (default: 500)")
    add("--reference_images", type=int, metavar="N", help="of the train split, the first N (default: all)")
    add("--features", choices=quality.FEATURES, default="2048", help="of Inception (default: 2048)")
    add("--resize", choices=RESIZES, default="tf", help="to 299x299 (default: tf)")
    add("--batch_size", type=int, default=128, metavar="N", help="images at once, over all devices (default: 128)")
    cli.add_inception(flags)
    options, overrides = cli.parse_with_overrides(flags, argv)
    for name, least in (("num_images", 40), ("reference_images", 40), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise EvaluationError(f"--{name}={value}: must be at least {least}")
    return measure(options, overrides)


def measure(options: argparse.Namespace, overrides: list[str]) -> int:
    data, tap = load_config(options.config, overrides).data, options.features
    if data.channels != 3:
        raise EvaluationError(f"{data.name} is grey: JPEG is compared in colour")
    weights = load_inception(options.inception, options.cache / "inception")
    quality.check_weights(weights, METRICS, tap)
    cache = options.cache / "features"
    extractor = Extractor(weights, Devices(), resize=options.resize, cache=cache, batch_size=options.batch_size, progress=True)
    train, test = (of_split(load_source(data, options.data_dir, split), data, split) for split in ("train", "test"))
    reference = references.kept(
        options.data_dir / "references", extractor, train.first(options.reference_images or train.count), tap
    )
    clean = test.read(np.arange(min(options.num_images, test.count)))
    fid, kid = (quality.titled(name, tap) for name in ("FID", "KID"))
    print(f"{reference.describe()} against {len(clean):,} test images, resize {options.resize}")
    print(f"{'':24}{fid:>12}{'infinite N':>12}{f'1000 {kid}':>16}")

    def row(name: str, images: np.ndarray) -> float:
        frechet, kernel = quality.measure(extractor, of_array(images, {"damage": name}), reference, METRICS, tap)
        infinite, error = frechet.extra["infinity"], kernel.extra["standard_error"]
        print(f"{name:24}{frechet.value:12.5f}{infinite:12.5f}{1000 * kernel.value:10.4f} +- {1000 * error:.4f}", flush=True)
        return frechet.value

    distances = {"none": [row("test images as they are", clean)]}
    for kind, (damage, strengths) in DAMAGES.items():
        distances[kind] = [row(f"{kind} {strength:g}", damage(clean, strength)) for strength in strengths]
    broken = [kind for kind, values in distances.items() if np.any(np.diff(distances["none"] + values) <= 0) and kind != "none"]
    print(f"not monotone: {', '.join(broken)}" if broken else f"{fid} grows with every damage")
    return int(bool(broken))


if __name__ == "__main__":
    cli.run(main)
