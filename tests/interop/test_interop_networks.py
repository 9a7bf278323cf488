"""Compare forward passes: an imported checkpoint computes what the network that wrote it computes.

The references are UNet2DModel of the diffusers package and, for the other layouts, the functions of
torch_networks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_jax.build import Params, denoiser
from ddpm_jax.cli import import_weights as import_script
from ddpm_jax.config import Config
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import open_trained
from ddpm_jax.weights.importing import import_weights
from tests.interop import torch_networks as networks
from tests.interop.torch_networks import Spec, Variables

pytestmark = pytest.mark.interop
TOLERANCE = 1e-4
torch.set_num_threads(2)

# Equal widths everywhere, attention at both levels: any wrong order of blocks still fits by shape.
# 64 channels in 32 groups: were a group a single channel, its norm would take the time embedding
# away again, and no error in it would show.
SMALL = Spec()
MIXED = Spec(mult=(1, 2), attention=(1,), blocks=1)
PAPER = Spec(ch=128, mult=(1, 2, 2, 2), attention=(1,))
IMPROVED = Spec(
    ch=128,
    mult=(1, 2, 2, 2),
    blocks=3,
    attention=(1, 2),
    out=6,
    heads=4,
    scale_shift=True,
    timesteps=4000,
    rescale=True,
)


@dataclasses.dataclass
class Checkpoint:
    """A file, the flags it needs, and what its network makes of x and t."""

    layout: str
    path: Path
    overrides: list[str]
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    labels: torch.Tensor | None = None


def image_size(spec: Spec) -> int:
    return 32 if spec.ch == 128 else 8


def noise(spec: Spec, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    size = image_size(spec)
    x = torch.randn((batch, spec.channels, size, size), generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([3, spec.timesteps - 23, 500, 0][:batch])


def functional(
    layout: str,
    network: Callable,
    spec: Spec,
    folder: Path,
    wrap: Callable[[Any, Any], Any],
    **options: Any,
) -> Checkpoint:
    """A checkpoint of `network` with raw and averaged weights; the reference is the latter's."""
    raw, ema = Variables(1), Variables(2)
    x, t = noise(spec)
    with torch.no_grad():
        for variables in (raw, ema):
            network(variables, x, t, spec, **options)
    path = wrap(raw, ema)(folder)
    overrides = [f"--config.data.image_size={image_size(spec)}"]
    return Checkpoint(layout, path, overrides, lambda x, t: network(ema, x, t, spec, **options))


def saved(name: str, contents: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        torch.save(contents, folder / name)
        return folder / name

    return save


def ho_file(raw: Variables, ema: Variables) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        arrays = {name: value.numpy() for name, value in raw.items()}
        arrays |= {f"{name}/Adam": value for name, value in list(arrays.items())[:3]}
        arrays |= {f"{name}/ExponentialMovingAverage": value.numpy() for name, value in ema.items()}
        np.savez(
            folder / "model.npz", global_step=np.int64(7), beta1_power=np.float32(0.1), **arrays
        )
        return folder / "model.npz"

    return save


def ermongroup_file(raw: Variables, ema: Variables) -> Callable[[Path], Path]:
    parallel = {f"module.{name}": value for name, value in raw.items()}
    return saved(
        "ckpt.pth", [parallel, {"state": {}, "param_groups": [{"lr": 2e-4}]}, 3, 1000, dict(ema)]
    )


def w86763777_file(raw: Variables, ema: Variables) -> Callable[[Path], Path]:
    rest = {
        "sched": {"last_epoch": 7, "lr_lambdas": [None]},
        "optim": {"state": {}},
        "step": 7,
        "x_T": torch.zeros(2, 3, 4, 4),
    }
    return saved("ckpt.pt", {"net_model": dict(raw), "ema_model": dict(ema), **rest})


def tqch_file(raw: Variables, ema: Variables) -> Callable[[Path], Path]:
    average = {"decay": 0.9999, "shadow": dict(ema), "num_updates": 12}
    scores = {"epoch": 2, "loss": 0.03, "fid": np.float64(3.2)}
    return saved(
        "cifar10_2.pt", {"model": dict(raw), "optimizer": {"state": {}}, "ema": average, **scores}
    )


def diffusers_folder(
    spec: Spec, folder: Path, *, updown: bool = False, old: bool = False, **options: Any
) -> Checkpoint:
    """A UNet2DModel with random weights, saved by DDPMPipeline; or, `old`, as google/ddpm-* are."""
    levels = range(len(spec.mult))
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if updown
        else ("DownBlock2D", "UpBlock2D")
    )
    settings = dict(
        sample_size=image_size(spec),
        block_out_channels=[spec.ch * mult for mult in spec.mult],
        down_block_types=["AttnDownBlock2D" if i in spec.attention else down for i in levels],
        up_block_types=["AttnUpBlock2D" if i in spec.attention else up for i in reversed(levels)],
        layers_per_block=spec.blocks,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
    )
    net = UNet2DModel(**settings | options)
    random = Variables(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(random(name, *parameter.shape, fan_in=fan_in, mean=mean))
    scheduler = DDPMScheduler(variance_type="fixed_large")
    if old:
        renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {}
        for name, value in net.state_dict().items():
            for new, before in renames.items():
                name = name.replace(f".{new}.", f".{before}.")
            state[name] = value
            if "downsamplers.0.conv." in name:
                state[name.replace(".conv.", ".Conv2d_0.")] = value
        net.save_config(folder)
        scheduler.save_config(folder)
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    else:
        DDPMPipeline(net, scheduler).save_pretrained(folder)
    return Checkpoint("diffusers", folder, [], lambda x, t: net(x, t).sample)


def build(name: str, spec: Spec, folder: Path) -> Checkpoint:
    def flat(raw: Variables, ema: Variables) -> Callable[[Path], Path]:
        return saved("ema_model.pt", dict(ema))

    if name == "diffusers":
        return diffusers_folder(spec, folder)
    if name == "ho":
        return functional("ho", networks.ho, spec, folder, ho_file)
    if name == "pesser":
        return functional("pesser", networks.pesser, spec, folder, flat)
    if name == "ermongroup":
        return functional("ermongroup", networks.pesser, spec, folder, ermongroup_file)
    if name == "w86763777":
        return functional("w86763777", networks.w86763777, spec, folder, w86763777_file)
    if name == "kimrass":

        def wrapped(raw, ema):
            return saved("celeba.pth", {f"model.{key}": value for key, value in ema.items()})

        return functional("kimrass", networks.w86763777, spec, folder, wrapped)
    if name == "tqch":
        return functional("tqch", networks.tqch, spec, folder, tqch_file)
    checkpoint = functional("openai", networks.openai, spec, folder, flat)
    model = {
        "heads": spec.heads,
        "head_channels": spec.head_channels,
        "qkv_layout": "fused" if spec.new_order else "fused_by_head",
        "timestep_scale": 1000 / spec.timesteps if spec.rescale else 1.0,
    }
    checkpoint.overrides += [f"--config.model.{field}={value}" for field, value in model.items()]
    return checkpoint


def load(checkpoint: Checkpoint, tmp_path: Path) -> tuple[Config, Params]:
    """Through the script, the run directory and its checkpoint: what sample.py would get."""
    flags = [
        f"--layout={checkpoint.layout}",
        f"--input={checkpoint.path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    import_script.main([*flags, *checkpoint.overrides])
    trained = open_trained(tmp_path / "run", Devices(jax.devices()[:1]))
    return trained.config, trained.params


def difference(
    checkpoint: Checkpoint, config: Config, params: Params, spec: Spec, batch: int = 2
) -> float:
    """Largest error relative to the largest output."""
    x, t = noise(spec, batch)
    with torch.no_grad():
        expected = checkpoint.forward(x, t).numpy()
    with jax.default_matmul_precision("highest"):
        labels = None if checkpoint.labels is None else checkpoint.labels.numpy()
        run = denoiser(config)(params, labels)
        ours = np.asarray(run(x.numpy().transpose(0, 2, 3, 1), t.numpy())).transpose(0, 3, 1, 2)
    assert ours.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


LAYOUTS = ("ho", "pesser", "ermongroup", "diffusers", "openai", "w86763777", "kimrass", "tqch")


@pytest.mark.parametrize("spec", [SMALL, MIXED], ids=["small", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_network_computes_the_same(layout, spec, tmp_path):
    spec = dataclasses.replace(spec, heads=2) if layout == "openai" else spec
    checkpoint = build(layout, spec, tmp_path)
    config, params = load(checkpoint, tmp_path)
    assert difference(checkpoint, config, params, spec) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        dict(scale_shift=True, out=6, timesteps=4000, rescale=True),
        dict(scale_shift=True, updown=True, head_channels=16, out=6),
        dict(new_order=True, updown=True, head_channels=16, scale_shift=True),
    ],
    ids=["improved", "guided", "new order"],
)
def test_the_switches_of_openai(options, tmp_path):
    spec = Spec(**{"heads": 2, **options})
    checkpoint = build("openai", spec, tmp_path)
    config, params = load(checkpoint, tmp_path)
    assert config.diffusion.variance == ("learned_range" if spec.out == 6 else "fixed_large")
    assert config.model.resampling == ("residual" if spec.updown else "conv")
    assert config.model.conditioning == ("scale_shift" if spec.scale_shift else "add")
    assert difference(checkpoint, config, params, spec) < TOLERANCE


def test_classes_of_openai(tmp_path):
    spec = Spec(classes=5, heads=2)
    labels = torch.tensor([4, 1])
    flat = lambda raw, ema: saved("ema_model.pt", dict(ema))  # noqa: E731
    checkpoint = functional("openai", networks.openai, spec, tmp_path, flat, labels=labels)
    checkpoint.labels = labels
    checkpoint.overrides += ["--config.model.heads=2"]
    config, params = load(checkpoint, tmp_path)
    assert config.model.num_classes == 5
    assert difference(checkpoint, config, params, spec) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        dict(old=True),
        dict(
            flip_sin_to_cos=True,
            freq_shift=0,
            norm_eps=1e-5,
            downsample_padding=1,
            attention_head_dim=8,
        ),
        dict(
            updown=True,
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32,
            attention_head_dim=16,
        ),
        dict(add_attention=False, norm_num_groups=16, out_channels=6),
    ],
    ids=["as on the hub", "class defaults", "residual resampling", "no attention in the middle"],
)
def test_the_switches_of_diffusers(options, tmp_path):
    checkpoint = diffusers_folder(MIXED, tmp_path, **options)
    if options.get("out_channels"):
        checkpoint.overrides += [
            "--config.diffusion.variance=learned_range",
            "--config.loss.kind=hybrid",
        ]
    config, params = load(checkpoint, tmp_path)
    assert difference(checkpoint, config, params, MIXED) < TOLERANCE


# ------------------------------------------------------------ the test can fail


def other_skip_order(params: Params) -> Params:
    """As if the up blocks had [skip, h]: at equal widths, halves of what reads the pair swap."""

    def swap(block: Params) -> Params:
        halves = lambda x, axis: np.roll(np.asarray(x), x.shape[axis] // 2, axis)  # noqa: E731
        block = dict(block)
        block["norm1"] = {leaf: halves(x, 0) for leaf, x in block["norm1"].items()}
        block["conv1"] = {**block["conv1"], "kernel": halves(block["conv1"]["kernel"], 2)}
        block["shortcut"] = {**block["shortcut"], "kernel": halves(block["shortcut"]["kernel"], 0)}
        return block

    return {
        name: swap(x) if name.startswith("up_") and "_block_" in name else x
        for name, x in params.items()
    }


def other_level_order(params: Params) -> Params:
    """As if up_0 were the lowest resolution."""

    def other(name: str) -> str:
        return {"up_0": "up_1", "up_1": "up_0"}[name[:4]] + name[4:]

    return {
        name: params[other(name)] if name.startswith("up_") and "upsample" not in name else x
        for name, x in params.items()
    }


def flips(config: Config) -> dict[str, dict[str, Any]]:
    model = config.model
    found = {
        "padding": {
            "down_padding": "symmetric" if model.down_padding == "asymmetric" else "asymmetric"
        },
        "epsilon": {"group_norm_epsilon": 1e-5 if model.group_norm_epsilon == 1e-6 else 1e-6},
        "embedding order": {
            "embedding_order": "cos_sin" if model.embedding_order == "sin_cos" else "sin_cos"
        },
        "embedding denominator": {
            "embedding_denominator": "half"
            if model.embedding_denominator == "half_minus_one"
            else "half_minus_one"
        },
        "head count": {"heads": 2 * model.heads},
        "time scale": {"timestep_scale": 2 * model.timestep_scale},
    }
    if model.qkv_layout != "separate":
        found["order of q, k, v"] = {
            "qkv_layout": "fused" if model.qkv_layout == "fused_by_head" else "fused_by_head"
        }
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_switch_flipped_is_noticed(layout, tmp_path):
    spec = dataclasses.replace(SMALL, blocks=1, heads=2 if layout == "openai" else 1)
    checkpoint = build(layout, spec, tmp_path)
    config, params = load(checkpoint, tmp_path)
    errors = {"none": difference(checkpoint, config, params, spec)}
    for name, fields in flips(config).items():
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
        errors[name] = difference(checkpoint, other, params, spec)
    errors["skip order"] = difference(checkpoint, config, other_skip_order(params), spec)
    errors["up-block order"] = difference(checkpoint, config, other_level_order(params), spec)
    print(layout, {name: f"{error:.1e}" for name, error in errors.items()})
    assert errors.pop("none") < TOLERANCE
    assert min(errors.values()) > 10 * TOLERANCE, errors


# ------------------------------------------------------------ full size


# The other layouts have the sizes of the first of these two, and their small networks are above.
@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in ("ho", "openai") else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_a_network_of_full_size_computes_the_same(layout, tmp_path):
    spec = IMPROVED if layout == "openai" else PAPER
    checkpoint = build(layout, spec, tmp_path)
    # Of the published CIFAR-10 checkpoints: the importer finds their settings without a flag.
    imported = import_weights(layout, checkpoint.path)
    size = sum(x.size for x in jax.tree.leaves(imported.ema))
    assert size == (52_546_438 if layout == "openai" else 35_746_307)
    error = difference(checkpoint, imported.config, imported.ema, spec, batch=3)
    print(f"{layout}: {size:,} parameters, largest relative error {error:.1e}")
    assert error < TOLERANCE
