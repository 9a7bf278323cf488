"""Encode, decode and measure images with a trained network."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_jax import images
from ddpm_jax.coding.container import Coded, Settings
from ddpm_jax.coding.files import compress, decompress, forward_passes, receive
from ddpm_jax.coding.progressive import Received
from ddpm_jax.diffusion.bound import RateDistortion
from ddpm_jax.errors import CodingError
from ddpm_jax.evaluation.nll import Nll, Protocol, evaluate_nll
from ddpm_jax.files import NpzError, open_npz
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.progress import Progress
from ddpm_jax.runs.evaluations import NAME, append_evaluation
from ddpm_jax.trained import Trained

MODES = ("encode", "decode", "measure")
GROUPS = {"lossless": 20, "progressive": 200}  # images side by side, if there are as many
STOPS = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 8)  # bits/dim that a receiver reads


@dataclass(frozen=True)
class CodingOptions:
    """What is coded, and how.

    Attributes:
      mode: one of MODES.
      data_dir: the prepared data sets.
      images: to encode, a .npz with an array arr_0 or a .png; None takes a split of the data set.
      split: of the data set, where there are no `images`.
      num_images: the first so many of the split.
      input: the coded file that is decoded.
      output: where the result of encoding or decoding goes.
      rate: bits/dim after which decoding a progressive file stops; None reads all of it.
      group: as in `Settings`; None takes GROUPS, or all images if they are fewer.
      method, clip, cdf, step_rate, lanes, seed: as in `Settings`.

    Raises:
      CodingError: a value out of range, or an argument that the mode needs and does not have.
    """

    mode: str
    data_dir: Path = Path("data")
    images: Path | None = None
    split: str = "test"
    num_images: int = 100
    input: Path | None = None
    output: Path | None = None
    rate: float | None = None
    method: str = Settings.method
    group: int | None = None
    clip: bool = Settings.clip
    cdf: str = Settings.cdf
    step_rate: float = Settings.step_rate
    lanes: int = Settings.lanes
    seed: int = Settings.seed

    def __post_init__(self) -> None:
        check(self.mode in MODES, f"mode={self.mode}: one of {', '.join(MODES)}")
        check(self.num_images >= 1, f"num_images={self.num_images}: must be at least 1")
        check(0 <= self.seed < 2**32, f"seed={self.seed}: must be in 0..2^32-1")
        check(self.rate is None or self.rate >= 0, f"rate={self.rate}: must be at least 0")
        for name, modes in (("input", ("decode",)), ("output", ("encode", "decode"))):
            is_there = getattr(self, name) is not None
            check(is_there or self.mode not in modes, f"mode={self.mode} needs {name}=FILE")
        for name, mode in (("images", "encode"), ("rate", "decode")):
            value = getattr(self, name)
            what = f"{name}={value}: of no use with mode={self.mode}, only with mode={mode}"
            check(value is None or self.mode == mode, what)
        if self.mode == "decode":
            right = self.output.suffix in (".npz", ".png")
            check(right, f"output={self.output}: must end in .npz or .png")
        self.settings(1)  # raises where no file can have such settings

    def settings(self, count: int) -> Settings:
        """Return the settings for `count` images."""
        most = GROUPS.get(self.method, 1)
        group = max(1, min(most, count)) if self.group is None else self.group
        return Settings(
            method=self.method,
            group=group,
            clip=self.clip,
            cdf=self.cdf,
            step_rate=self.step_rate,
            lanes=self.lanes,
            seed=self.seed,
        )


def code(trained: Trained, workdir: Path, devices: Devices, options: CodingOptions) -> None:
    """Encode, decode or measure, as `options.mode` says, and print what came of it."""
    if options.mode == "encode":
        encode(trained, options)
    elif options.mode == "decode":
        decode(trained, options)
    else:
        measure(trained, workdir, devices, options)


def encode(trained: Trained, options: CodingOptions) -> Coded:
    """Code the images of `options`, and write them to `options.output`."""
    levels = read_images(trained, options)
    coded, seconds = timed_compress(trained, levels, options.settings(len(levels)))
    coded.save(options.output)
    size = options.output.stat().st_size
    print(
        f"wrote {options.output}: {len(levels)} images, "
        f"{size:,} bytes ({coded.payload_bytes:,} after the header)"
    )
    print(f"{seconds:.0f} s")
    return coded


def decode(trained: Trained, options: CodingOptions) -> None:
    """Decode `options.input`, whole or up to `options.rate`, and write the images."""
    coded = Coded.load(options.input)
    count = coded.header["shape"][0]
    if options.rate is None:
        levels, _ = timed_decompress(trained, coded)
        what = "bit for bit"
    else:
        with Progress(None, "decoding step") as progress:
            steps = receive(trained, coded, progress.update)
            x0, bits = pictures_at(steps, options.rate)
        levels = images.to_uint8(x0)
        what = f"lossy, from {bits / levels.size:.4f} bits/dim"
    if options.output.suffix == ".npz":
        images.save_npz(options.output, levels)
    else:
        images.save_png(options.output, images.grid(levels))
    print(f"wrote {options.output}: {count} images, {what}")


def measure(trained: Trained, workdir: Path, devices: Devices, options: CodingOptions) -> None:
    """Code and decode test images, compare with the bound and with PNG, and record the numbers.

    Raises:
      CodingError: the decoded images differ from the encoded ones.
    """
    levels = split_images(trained, options)
    settings = options.settings(len(levels))
    coded, encoding = timed_compress(trained, levels, settings)
    decoded, decoding = timed_decompress(trained, Coded.from_bytes(coded.to_bytes(), "coded"))
    check(np.array_equal(decoded, levels), "the decoded images differ from the encoded ones")
    print(
        f"round trip of {len(levels)} images: equal bit for bit; "
        f"encoding {encoding:.0f} s, decoding {decoding:.0f} s"
    )
    nll = evaluate_nll(
        trained.config,
        trained.params,
        trained.open_split(options.data_dir, options.split),
        devices,
        protocol=Protocol(clip=settings.clip, cdf=settings.cdf, seed=options.seed),
        num_images=len(levels),
        progress=True,
    )
    record = {"bound": nll.total.mean, **print_sizes(coded, levels, nll)}
    if nll.images > 1:  # one image leaves the error unknown
        record["bound_standard_error"] = nll.total.standard_error
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
        "file_bytes": len(coded.to_bytes()),
        "png_bytes": sum(len(images.encode_png(image)) for image in levels),
        "encoding_seconds": round(encoding, 1),
        "decoding_seconds": round(decoding, 1),
        "settings": coded.header["settings"],
        "computed_by": coded.header["model"]["computed_by"],
    }
    append_evaluation(workdir, record)
    print(f"appended to {workdir / NAME}")


def print_sizes(coded: Coded, levels: np.ndarray, nll: Nll) -> dict[str, float]:
    """Print the sizes of the file, of the bound and of PNG files; return the file's in bits/dim."""
    dims, bound = levels.size, nll.total.mean * levels.size
    if coded.header["settings"]["method"] == "lossless":
        size, initial = coded.header["net_bits"], coded.header["initial_bits"]
        parts = [("coded, net of initial bits", size), ("initial bits, given back", initial)]
        record = {"coded": size / dims, "initial": initial / dims}
    else:
        size = 8 * coded.payload_bytes
        parts = [("coded", size)]
        record = {"coded": size / dims}
    single = 8 * sum(len(images.encode_png(image)) for image in levels)
    together = 8 * len(images.encode_png(images.grid(levels, gap=0)))
    print(f"\n{'':28}{'bytes':>12}{'bits/dim':>12}{'of the bound':>14}")
    for name, bits in (
        ("bound", bound),
        *parts,
        ("file, with its header", 8 * len(coded.to_bytes())),
        ("PNG, one file each", single),
        ("PNG, one file for all", together),
        ("not coded", 8 * dims),
    ):
        print(f"{name:28}{bits / 8:12,.0f}{bits / dims:12.4f}{bits / bound:14.4f}")
    if nll.images > 1:
        print(f"standard error of the bound: {nll.total.standard_error:.4f} bits/dim")
    return record | {"over_bound": size / bound - 1}


def print_points(
    trained: Trained, coded: Coded, levels: np.ndarray, curve: RateDistortion
) -> list[dict[str, float]]:
    """Print and return the rate and RMSE of a receiver who stops early.

    Each point stands beside the rate at which the rate-distortion curve has the same RMSE.
    """
    x0, points, read = images.from_uint8(levels), [], {}
    # At the noisy end the measured curve is not monotone.
    lowest = np.minimum.accumulate(curve.rmse)
    print(f"\n{'rate (bits/dim)':>16}{'RMSE (0-255)':>15}{'curve at this RMSE':>21}{'ratio':>9}")
    for rows, state in receive(trained, coded):
        squares = np.sum(np.square(state.x0 - x0[rows]), dtype=np.float64)
        for stop in STOPS:
            if state.bits <= stop * state.x0.size:
                read[stop, rows.start] = state.bits, squares
    for stop in STOPS:
        bits, squares = np.sum([sums for (at, _), sums in read.items() if at == stop], axis=0)
        rate, rmse = float(bits) / x0.size, 127.5 * float(np.sqrt(squares / x0.size))
        ideal = float(np.interp(-rmse, -lowest, curve.rate))
        if points and rate == points[-1]["rate"]:
            continue
        print(f"{rate:16.4f}{rmse:15.2f}{ideal:21.4f}" + (f"{rate / ideal:9.3f}" if rate else ""))
        points.append({"rate": rate, "rmse": rmse, "curve_rate": ideal})
    return points


def pictures_at(steps: Iterable[tuple[slice, Received]], rate: float) -> tuple[np.ndarray, int]:
    """Return x0_hat of all images, each group stopped after `rate` bits/dim, and the bits read."""
    last = {rows.start: state for rows, state in steps if state.bits <= rate * state.x0.size}
    x0 = np.concatenate([state.x0 for state in last.values()])
    return x0, sum(state.bits for state in last.values())


def read_images(trained: Trained, options: CodingOptions) -> np.ndarray:
    """Read the images of `options.images`, or of the data set where there are none.

    Raises:
      CodingError: the file is missing, or is no .npz with an array arr_0.
    """
    path = options.images
    if path is None:
        return split_images(trained, options)
    if path.suffix != ".npz":
        return images.load_png(path)[None]
    check(path.is_file(), f"images={path}: no such file")
    try:
        with open_npz(path) as file:
            return file["arr_0"]
    except NpzError as error:
        raise CodingError(f"images={error}: name an .npz with an array arr_0") from error


def split_images(trained: Trained, options: CodingOptions) -> np.ndarray:
    """Read the first images of the split, uint8 [n, h, w, c]."""
    source = trained.open_split(options.data_dir, options.split)
    return source.read(np.arange(min(options.num_images, len(source))))["image"]


def timed_compress(trained: Trained, levels: np.ndarray, settings: Settings) -> tuple[Coded, float]:
    """Code images behind a progress bar; return the file and the seconds that it took."""
    start, passes = time.monotonic(), forward_passes(trained, len(levels), settings)
    with Progress(passes, "encoding step") as progress:
        coded = compress(trained, levels, settings, progress.update)
    return coded, time.monotonic() - start


def timed_decompress(trained: Trained, coded: Coded) -> tuple[np.ndarray, float]:
    """Decode images behind a progress bar; return them and the seconds that it took."""
    start, settings = time.monotonic(), Settings(**coded.header["settings"])
    passes = forward_passes(trained, coded.header["shape"][0], settings)
    with Progress(passes, "decoding step") as progress:
        decoded = decompress(trained, coded, progress.update)
    return decoded, time.monotonic() - start


def check(condition: bool, message: str) -> None:
    """Raise CodingError with `message` unless `condition` holds."""
    if not condition:
        raise CodingError(message)
