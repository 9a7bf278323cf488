"""Code images into bytes with a trained run, and back, bit for bit.

--method=lossless     bits-back along the chain: the length of the bound that evaluate.py reports, plus initial bits that the
                      decoder gets back. A file of many images amortises them.
--method=progressive  x_T, ..., x_0 one after the other (Algorithms 3 and 4 of the paper): no initial bits, some percent longer,
                      and decoding may stop early (--rate) for a lossy picture.

--mode=encode writes a file, --mode=decode reads one, --mode=measure does both on the first test images and compares with the
bound, with PNG and, for progressive files, with the rate-distortion curve; it appends to workdir/evaluations.jsonl. Decode on
the kind of machine and with the versions that encoded: both sides must compute the network alike to the last bit. A file that
does not decode to what was encoded is refused, not returned.
"""

import argparse
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import cli, images
from ddpm_jax.ans import CodingError
from ddpm_jax.compression import METHODS, Coded, Settings, compress, decompress, forward_passes, receive
from ddpm_jax.data.sources import SPLITS, load_source
from ddpm_jax.devices import Devices
from ddpm_jax.diffusion import CDFS
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.evaluation.record import NAME, append_evaluation
from ddpm_jax.likelihood import RateDistortion
from ddpm_jax.progress import Progress
from ddpm_jax.progressive import Received
from ddpm_jax.trained import Trained, open_trained


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(__doc__, "python scripts/code_images.py --workdir=runs/digits --mode=measure --num_images=100")
    cli.add_run(flags)
    cli.add_data_dir(flags)
    add = flags.add_argument
    add("--mode", choices=["encode", "decode", "measure"], required=True)
    add("--method", choices=METHODS, default="lossless", help="(default: lossless)")
    add("--images", type=Path, metavar="FILE", help="encode: .npz (arr_0 uint8 [n,h,w,c]) or .png (default: a data split)")
    add("--split", choices=SPLITS, default="test", help="encode, measure: without --images (default: test)")
    add("--num_images", type=int, default=100, metavar="N", help="encode, measure: the first N (default: 100)")
    add("--input", type=Path, metavar="FILE", help="decode: the coded file")
    add("--output", type=Path, metavar="FILE", help="encode: the coded file; decode: .npz, or .png for a grid")
    add("--rate", type=float, metavar="R", help="decode: stop after R bits/dim of a progressive file, for a lossy picture")
    add("--group", type=int, metavar="N", help="images side by side (default: lossless 20, progressive all)")
    add("--step_rate", type=float, default=0.02, metavar="R", help="bits/dim of a progressive step (default: 0.02)")
    add("--lanes", type=int, default=64, metavar="N", help="of the lossless stack, 64 bits each (default: 64)")
    add("--clip", choices=["true", "false"], default="true", help="clip x0_hat to [-1, 1] (default: true)")
    add("--cdf", choices=sorted(CDFS), default="tanh", help="of the decoder p(x_0 | x_1) (default: tanh)")
    add("--seed", type=int, default=0, help="of initial bits, or of the shared noise (default: 0)")
    add("--weights", default="ema", metavar="NAME", help="ema, raw, or a decay such as 0.9999 (default: ema)")
    add("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    options = flags.parse_args(argv)
    check(options.num_images >= 1, f"--num_images={options.num_images}: must be at least 1")
    check(0 <= options.seed < 2**32, f"--seed={options.seed}: must be in 0..2^32-1")
    check(options.rate is None or options.rate >= 0, f"--rate={options.rate}: must be at least 0")
    for flag, modes in (("input", ("decode",)), ("output", ("encode", "decode"))):
        needed = options.mode in modes
        check(not needed or getattr(options, flag) is not None, f"--mode={options.mode} needs --{flag}")
    if options.mode == "decode":
        check(options.output.suffix in (".npz", ".png"), f"--output={options.output}: must end in .npz or .png")

    devices = Devices(Devices().local[:1])
    cli.find_run(options, devices)
    trained = open_trained(options.workdir, devices, weights=options.weights, step=options.step)
    {"encode": encode, "decode": decode, "measure": measure}[options.mode](trained, devices, options)


def encode(trained: Trained, devices: Devices, options: argparse.Namespace) -> Coded:
    if options.images is None:
        levels = test_images(trained, options)
    elif options.images.suffix == ".npz":
        check(options.images.is_file(), f"--images={options.images}: no such file")
        try:
            with open(options.images, "rb") as file:
                levels = np.load(file)["arr_0"]
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise CodingError(f"--images={options.images}: no .npz file with an array arr_0 ({error})") from error
    else:
        levels = images.load_png(options.images)[None]
    coded, seconds = timed_compress(trained, levels, settings_of(options, len(levels)))
    if options.output is not None:
        coded.save(options.output)
        size = options.output.stat().st_size
        print(f"wrote {options.output}: {len(levels)} images, {size:,} bytes ({coded.payload_bytes:,} after the header)")
        print(f"{seconds:.0f} s")
    return coded


def decode(trained: Trained, devices: Devices, options: argparse.Namespace) -> None:
    coded = Coded.load(options.input)
    count = coded.header["shape"][0]
    if options.rate is None:
        levels, _ = timed_decompress(trained, coded)
        what = "bit for bit"
    else:
        with Progress(None, "decoding step") as shown:
            x0, bits = pictures_at(list(receive(trained, coded, shown.update)), options.rate)
        levels = images.to_uint8(x0)
        what = f"lossy, from {bits / levels.size:.4f} bits/dim"
    if options.output.suffix == ".npz":
        images.save_npz(options.output, levels)
    else:
        images.save_png(options.output, images.grid(levels))
    print(f"wrote {options.output}: {count} images, {what}")


def measure(trained: Trained, devices: Devices, options: argparse.Namespace) -> None:
    levels = test_images(trained, options)
    settings = settings_of(options, len(levels))
    coded, encoding = timed_compress(trained, levels, settings)
    decoded, decoding = timed_decompress(trained, Coded.from_bytes(coded.to_bytes(), "coded"))
    check(np.array_equal(decoded, levels), "the decoded images differ from the encoded ones")
    print(f"round trip of {len(levels)} images: equal bit for bit; encoding {encoding:.0f} s, decoding {decoding:.0f} s")
    nll = evaluate_nll(
        trained.config,
        trained.params,
        load_source(trained.config.data, options.data_dir, options.split),
        devices,
        protocol=Protocol(clip=settings.clip, cdf=settings.cdf, seed=options.seed),
        num_images=len(levels),
        progress=True,
    )
    dims = levels.size
    file_bits = 8 * len(coded.to_bytes())
    single = 8 * sum(len(images.encode_png(image)) for image in levels)
    together = 8 * len(images.encode_png(images.grid(levels, gap=0)))
    rows = [("bound", nll.total.mean * dims), ("file, with its header", file_bits)]
    record: dict[str, Any] = {"bound": nll.total.mean, "bound_standard_error": nll.total.standard_error}
    if settings.method == "lossless":
        net, initial = coded.header["net_bits"], coded.header["initial_bits"]
        rows[1:1] = [("coded, net of initial bits", net), ("initial bits, given back", initial)]
        record |= {"coded": net / dims, "initial": initial / dims, "over_bound": net / (nll.total.mean * dims) - 1}
    else:
        rows[1:1] = [("coded", 8 * coded.payload_bytes)]
        record |= {"coded": 8 * coded.payload_bytes / dims, "over_bound": 8 * coded.payload_bytes / (nll.total.mean * dims) - 1}
    rows += [("PNG, one file each", single), ("PNG, one file for all", together), ("not coded", 8 * dims)]
    print(f"\n{'':28}{'bytes':>12}{'bits/dim':>12}{'of the bound':>14}")
    for name, bits in rows:
        print(f"{name:28}{bits / 8:12,.0f}{bits / dims:12.4f}{bits / (nll.total.mean * dims):14.4f}")
    print(f"standard error of the bound: {nll.total.standard_error:.4f} bits/dim")
    if settings.method == "progressive":
        record["points"] = print_points(trained, coded, levels, nll.curve)
    record |= {
        "metric": "coding",
        "weights": trained.weights,
        "step": trained.step,
        "data": trained.config.data.name,
        "split": options.split,
        "num_images": len(levels),
        "unit": "bits/dim",
        "file_bytes": file_bits // 8,
        "png_bytes": single // 8,
        "encoding_seconds": round(encoding, 1),
        "decoding_seconds": round(decoding, 1),
        "settings": coded.header["settings"],
        "computed_by": coded.header["model"]["computed_by"],
    }
    append_evaluation(options.workdir, record)
    print(f"appended to {options.workdir / NAME}")


def pictures_at(steps: list[tuple[slice, Received]], rate: float) -> tuple[np.ndarray, int]:
    """x0_hat of all images when each group stops after `rate` bits/dim, and the bits read."""
    last = {rows.start: known for rows, known in steps if known.bits <= rate * known.x0.size}
    return np.concatenate([known.x0 for known in last.values()]), sum(known.bits for known in last.values())


def print_points(trained: Trained, coded: Coded, levels: np.ndarray, curve: RateDistortion) -> list[dict[str, float]]:
    """Rate and RMSE of what a receiver has who stops early, and the rate where the curve has the same RMSE."""
    x0, points = images.from_uint8(levels), []
    lowest = np.minimum.accumulate(curve.rmse)  # at the noisy end the measured curve is not monotone
    print(f"\n{'rate (bits/dim)':>16}{'RMSE (0-255)':>15}{'curve at this RMSE':>21}{'ratio':>9}")
    steps = list(receive(trained, coded))
    for stop in (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 8):
        known, bits = pictures_at(steps, stop)
        rate, rmse = bits / x0.size, 127.5 * float(np.sqrt(np.mean((known - x0) ** 2)))
        ideal = float(np.interp(-rmse, -lowest, curve.rate))
        if points and rate == points[-1]["rate"]:
            continue
        print(f"{rate:16.4f}{rmse:15.2f}{ideal:21.4f}" + (f"{rate / ideal:9.3f}" if rate else ""))
        points.append({"rate": rate, "rmse": rmse, "curve_rate": ideal})
    return points


def settings_of(options: argparse.Namespace, count: int) -> Settings:
    group = options.group or {"lossless": min(20, count), "progressive": count}[options.method]
    return Settings(
        method=options.method,
        group=group,
        clip=options.clip == "true",
        cdf=options.cdf,
        step_rate=options.step_rate,
        lanes=options.lanes,
        seed=options.seed,
    )


def test_images(trained: Trained, options: argparse.Namespace) -> np.ndarray:
    source = load_source(trained.config.data, options.data_dir, options.split)
    return source.read(np.arange(min(options.num_images, len(source))))["image"]


def timed_compress(trained: Trained, levels: np.ndarray, settings: Settings) -> tuple[Coded, float]:
    started = time.monotonic()
    with Progress(forward_passes(trained, len(levels), settings), "encoding step") as shown:
        coded = compress(trained, levels, settings, shown.update)
    return coded, time.monotonic() - started


def timed_decompress(trained: Trained, coded: Coded) -> tuple[np.ndarray, float]:
    started = time.monotonic()
    settings = Settings(**coded.header["settings"])
    with Progress(forward_passes(trained, coded.header["shape"][0], settings), "decoding step") as shown:
        decoded = decompress(trained, coded, shown.update)
    return decoded, time.monotonic() - started


def check(condition: bool, message: str) -> None:
    if not condition:
        raise CodingError(message)


if __name__ == "__main__":
    cli.run(main)
