"""Damaged files and random configs: each ends well, or in one line.

Seeded, and bounded by DDPM_FUZZ: so many configs go through one step of training and two of
sampling (default 2), and so many hundreds of files and flags are tried. The counts are printed:

    DDPM_FUZZ=500 pytest -m slow tests/cli/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ddpm_jax.build import abstract_params
from ddpm_jax.cli import sample
from ddpm_jax.cli.run import outcome
from ddpm_jax.config import Config, load_config, save_json, validate
from ddpm_jax.data.folder import decode_file
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.spacing import SPACING_NAMES
from ddpm_jax.errors import UserError
from ddpm_jax.images import load_png
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.training.loop import train
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts.registry import LAYOUTS
from tests.support.tiny import tiny_config
from tests.support.torch_files import write_torch

pytestmark = pytest.mark.slow

CONFIGS = int(os.environ.get("DDPM_FUZZ", "2"))
FILES = 100 * CONFIGS
SEED = int(os.environ.get("DDPM_FUZZ_SEED", "0"))


@pytest.fixture
def report(capsys) -> Iterator[Counter[str]]:
    """Counts, printed at the end."""
    counts: Counter[str] = Counter()
    yield counts
    with capsys.disabled():
        print(f"\n{dict(sorted(counts.items()))}")


def damage(blob: bytes, draw: random.Random) -> bytes:
    """Change a file as disks, networks and strangers do."""
    broken = bytearray(blob)
    for _ in range(draw.choice([1, 1, 1, 3])):
        at = draw.randrange(len(broken) + 1)
        match draw.choice([0, 0, 0, 0, 1, 2, 3, 4, 5]):
            case 0:  # a flipped bit
                if at < len(broken):
                    broken[at] ^= 1 << draw.randrange(8)
            case 1:
                del broken[at:]
            case 2:
                del broken[at : at + draw.choice([1, 4, 64])]
            case 3:
                broken[at:at] = draw.randbytes(draw.choice([1, 4, 64]))
            case 4:  # a length or an offset
                value = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1])
                broken[at : at + 8] = value.to_bytes(8, draw.choice(["little", "big"]))
            case 5:
                broken[at:at] = broken[: draw.randrange(len(broken) + 1)]
    return bytes(broken)


def tried(
    counts: Counter[str], what: str, act: Callable[[], object], error: type = UserError
) -> None:
    """Count whether `act` ends well or in one line; anything else fails the test."""
    try:
        act()
    except error as caught:
        line = str(caught)
        assert "\n" not in line and 10 < len(line) < 2000, line[:2000]
        counts[f"{what}: one line"] += 1
    else:
        counts[f"{what}: well"] += 1


def image_files(folder: Path) -> Iterator[Path]:
    """One file of each format and kind of pixels."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    kinds = {
        "rgb": Image.fromarray(levels),
        "grey": Image.fromarray(levels[..., 0]),
        "palette": Image.fromarray(levels).convert("P"),
        "alpha": Image.fromarray(np.dstack([levels, levels[..., :1]])),
        "wide": Image.fromarray(levels[..., 0].astype(np.uint16) * 257),
    }
    exif = Image.Exif()
    exif[274] = 6
    for kind, image in kinds.items():
        for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif"):
            path = folder / f"{kind}{suffix}"
            with contextlib.suppress(OSError, ValueError, KeyError):  # of which there is no such
                image.save(path, exif=exif)
                yield path


def test_image_files(tmp_path, report):
    draw, blobs = random.Random(SEED), {p: p.read_bytes() for p in image_files(tmp_path)}
    assert len(blobs) > 15
    for _ in range(FILES):
        path, blob = draw.choice(list(blobs.items()))
        broken = tmp_path / f"x{path.suffix}"
        broken.write_bytes(damage(blob, draw))
        crop = draw.choice(["none", "center"])
        tried(report, "image", partial(decode_file, broken, crop, (8, 8), draw.choice([1, 3])))
        tried(report, "mask", partial(load_png, broken))


def small_network() -> dict[str, np.ndarray]:
    """The tensors of a network of layout pesser."""
    config = tiny_config(
        model={"base_channels": 32, "group_norm_groups": 32, "attention_resolutions": (8,)}
    )
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_params(config))
    return write_tensors(LAYOUTS["pesser"], config, params)


def test_checkpoints(tmp_path, report):
    draw, tensors = random.Random(SEED + 1), small_network()
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **tensors)
    write_torch(tmp_path / "a.pt", {"model": tensors, "epoch": 3})
    write_torch(tmp_path / "a.ckpt", {"state_dict": tensors, "x": np.float64(3)}, legacy=True)
    blobs = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in blobs:
        import_weights("auto", path, overrides=["data.image_size=8"])
    for number in range(FILES):
        path, blob = draw.choice(list(blobs.items()))
        broken = tmp_path / f"x{number % 2}{path.suffix}"
        # Half of the damage goes where the names and sizes stand, not into numbers.
        head = draw.random() < 0.5
        cut = draw.choice([2000, len(blob) - 4000])
        whole = damage(blob[:cut], draw) + blob[cut:] if head else damage(blob, draw)
        broken.write_bytes(whole)
        tried(
            report,
            f"weights {path.suffix}",
            partial(import_weights, "auto", broken, overrides=["data.image_size=8"]),
        )


def test_config_files(tmp_path, report):
    draw, text = random.Random(SEED + 2), save_json(tiny_config()).encode()
    path = tmp_path / "config.json"
    for _ in range(2 * FILES):
        path.write_bytes(damage(text, draw))
        tried(report, "config.json", partial(load_config, path))
    values = [None, [], {}, "", -1, 0, 2**70, 1e308, True, "x" * 5000, [[]], float("nan")]
    for _ in range(2 * FILES):
        config = json.loads(text)
        section = draw.choice([name for name in config if isinstance(config[name], dict)])
        config[section][draw.choice(list(config[section]))] = draw.choice(values)
        path.write_text(json.dumps(config))
        tried(report, "config.json, a value", partial(load_config, path))


# Values of which a random config takes some: small, so that a step takes seconds.
CHOICES: dict[str, list] = {
    "data.image_size": [8],
    "data.flip": [True, False],
    "data.in_memory": [True, False],
    "model.base_channels": [4, 8],
    "model.channel_mult": [(1,), (1, 2), (2, 1), (1, 1, 2)],
    "model.blocks_per_level": [1, 2],
    "model.attention_resolutions": [(), (8,), (4,), (8, 4)],
    "model.heads": [1, 2, 4],
    "model.head_channels": [0, 2, 4],
    "model.dropout": [0.0, 0.3],
    "model.group_norm_groups": [1, 2, 4],
    "model.skip_scale": [1.0, 0.7],
    "model.num_classes": [0, 10],
    "model.label_dropout": [0.0, 0.2],
    "model.remat": [True, False],
    "diffusion.timesteps": [2, 7, 20],
    "diffusion.beta_end": [0.02, 0.5],
    "diffusion.rescale_betas": [False, True],
    "loss.timestep_sampling": ["uniform", "importance"],
    "optimizer.warmup_steps": [0, 2],
    "optimizer.gradient_clip": [0.0, 1.0],
    "train.batch_size": [1, 2, 6],
    "train.accumulation": [1, 2],
    "train.ema_decays": [(0.9,), (0.0, 0.999)],
    "train.ema_warmup": [False, True],
    "train.sample_every": [0, 1],
    "sampling.sampler": sorted(SAMPLERS),
    "sampling.spacing": sorted(SPACING_NAMES),
    "sampling.eta": [0.0, 0.5],
    "sampling.order": [0, 2, 3],
    "sampling.clip": [True, False],
    "sampling.rederive_eps": [True, False],
    "sampling.dynamic_threshold": [0.0, 0.9],
}


def random_config(draw: random.Random) -> Config:
    """Choose every field that has choices."""
    config = tiny_config(train={"steps": 1, "eval_images": 4, "eval_every": 1, "sample_images": 2})
    for section in (field.name for field in dataclasses.fields(Config) if field.name != "seed"):
        holder = getattr(config, section)
        for name, annotation in typing.get_type_hints(type(holder)).items():
            choices = CHOICES.get(f"{section}.{name}")
            if typing.get_origin(annotation) is typing.Literal and name != "crop":
                choices = list(typing.get_args(annotation))
            if choices and draw.random() < 0.4:
                setattr(holder, name, draw.choice(choices))
    return config


def test_configs_train_and_sample(tmp_path, report):
    """One step and two steps of sampling, for as many configs as are asked for."""
    draw, devices, done = random.Random(SEED + 3), Devices(jax.devices()[:1]), 0
    while done < CONFIGS:
        try:
            config = validate(random_config(draw))
        except UserError as error:
            assert "\n" not in str(error)
            report["config: refused"] += 1
            continue
        run, done = tmp_path / str(done), done + 1
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = outcome(partial(train, config, run, data_dir=tmp_path, devices=devices))
        if code:
            line = said.getvalue().splitlines()[-1]
            assert line.startswith("error: "), (config, line)
            report["config: refused by training"] += 1
            continue
        record = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [float(row["loss"]) for row in record if "loss" in row]
        assert losses and np.isfinite(losses).all(), config
        report["config: trained"] += 1
        flags = [f"--workdir={run}", f"--output={run / 'x.npz'}", "--num_images=2"]
        steps = ["--steps=2"] if draw.random() < 0.8 else []
        label = ["--label=3"] if config.model.num_classes else []
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = outcome(partial(sample.main, [*flags, *steps, *label]))
        if code:
            line = said.getvalue().splitlines()[-1]
            assert line.startswith("error: "), (config, line)
            report["samples: refused"] += 1
        else:
            shape = np.load(run / "x.npz")["arr_0"].shape
            assert shape == (2, config.data.image_size, config.data.image_size, 1)
            report["samples: drawn"] += 1
        jax.clear_caches()  # programs of one config serve no other


def test_flags(tmp_path, report, monkeypatch):
    """Random flags of sample.py are refused in one line, or reach the drawing."""
    config = tiny_config(train={"steps": 1, "eval_images": 0})
    assert (
        train(config, tmp_path / "run", data_dir=tmp_path, devices=Devices(jax.devices()[:1])) == 0
    )

    class Reached(Exception):
        pass

    def reached(*arguments: object, **options: object) -> None:
        raise Reached

    monkeypatch.setattr(Devices, "map_batch", lambda self, function: reached)
    monkeypatch.chdir(tmp_path)
    draw, known = random.Random(SEED + 4), sample.parser()._option_string_actions
    names = sorted({name for name in known if name.startswith("--") and name != "--help"})
    hosts = ("--coordinator_address", "--num_processes", "--process_id", "--start_timeout")
    names = [name for name in names if name not in (*hosts, "--host_timeout", "--inception")]
    words = ["", "0", "1", "2", "-1", "3,4", "1,2,3,4", "0.5", "nan", "1e999", "9" * 30, "true"]
    words += [
        "é",
        "\udcff",
        "x.png",
        "x.npz",
        "x.gif",
        "/dev/full",
        "none/x.png",
        "digits",
        "[",
        "ema",
    ]
    for _ in range(FILES):
        flags = ["--workdir=run", f"--output={draw.choice(['x.png', 'x.npz', 'x.gif', 'folder'])}"]
        for name in draw.sample(names, draw.choice([1, 2, 3])):
            if name in ("--workdir", "--pretrained"):
                continue
            choices = known[name].choices
            value = draw.choice([*words, *(list(choices) * 3 if choices else [])])
            flags.append(f"{name}={value}")
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = outcome(partial(sample.main, flags))
        except Reached:
            report["flags: reached the drawing"] += 1
            continue
        except SystemExit as end:
            code = end.code
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert code in (1, 2) and len(lines) == 1, (flags, code, said.getvalue())
        report["flags: one line"] += 1
