"""Import and export foreign weights: published names, forms that lose nothing, wrong files named.

What other code bases compute with the same files is compared in tests/interop; here is what needs
no PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from ddpm_jax import trained
from ddpm_jax.build import abstract_params, build_model
from ddpm_jax.cli import export_weights as export_script
from ddpm_jax.cli import import_weights as import_script
from ddpm_jax.cli import sample as sample_script
from ddpm_jax.cli import train as train_script
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, TrainConfig, UNetConfig, save_json
from ddpm_jax.errors import UserError, WeightsError, WorkdirError
from ddpm_jax.network.unet import timestep_embedding
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import append_evaluation
from ddpm_jax.trained import SHIPPED, WEIGHTS, names, open_trained, unpack
from ddpm_jax.training.imported import write_workdir
from ddpm_jax.training.state import init_state
from ddpm_jax.weights import files, forms
from ddpm_jax.weights.exporting import export_weights
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.layout import entries, read_params, write_tensors
from ddpm_jax.weights.layouts import diffusers_config
from ddpm_jax.weights.layouts.registry import EXPORTS, LAYOUTS
from ddpm_jax.weights.plan import Plan, places
from ddpm_jax.weights.recognise import Architecture, recognise
from tests.support.torch_files import Global, write_torch

OWN_NAMES = [
    name for name in LAYOUTS if name not in ("ermongroup", "kimrass")
]  # these two wrap another's
OPENAI = dict(embedding_denominator="half", group_norm_epsilon=1e-5, down_padding="symmetric")


def config_of(layout: str, size: int = 8, channels: int = 3, **model) -> Config:
    """A tiny network that the layout can express."""
    own = OPENAI if layout in ("openai", "w86763777", "kimrass") else {}
    fields = dict(
        base_channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        dropout=0.0,
    )
    data = DataConfig(name="cifar10", image_size=size, channels=channels)
    return Config(data=data, model=UNetConfig(**fields | own | model))


def random_params(config: Config, seed: int = 0) -> dict:
    """Any values, all different, where initial ones would be zero or one."""
    random = np.random.default_rng(seed)
    shapes = flatten_dict(abstract_params(config))
    return unflatten_dict(
        {path: random.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    )


def assert_same(a: dict, b: dict) -> None:
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def save_run(folder: Path, config: Config, params: dict) -> Path:
    folder.mkdir()
    path = folder / "run"
    write_workdir(
        path, config, init_state(config, jax.device_put(params)), {"params": "raw", "ema": "ema"}
    )
    return path


class Call:
    """Pickles as the call of a global."""

    def __init__(self, function: Global, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ------------------------------------------------------------ names

# Of the CIFAR-10 network, as paper.md and the projects' own files have them: name, shape.
PUBLISHED = {
    "ho": {
        "temb/dense0/W": (128, 512),
        "down_1/block_0/conv1/W": (3, 3, 128, 256),
        "down_1/block_0/nin_shortcut/W": (128, 256),
        "down_1/attn_1/proj_out/W": (256, 256),
        "down_0/downsample/conv/W": (3, 3, 128, 128),
        "mid/attn_1/norm/gamma": (256,),
        "up_3/block_0/conv1/W": (3, 3, 512, 256),
        "up_0/block_2/norm1/beta": (256,),
        "up_1/upsample/conv/b": (256,),
        "conv_out/W": (3, 3, 128, 3),
    },
    "pesser": {
        "temb.dense.1.weight": (512, 512),
        "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.1.attn.1.q.weight": (256, 256, 1, 1),
        "down.2.downsample.conv.weight": (256, 256, 3, 3),
        "mid.block_1.temb_proj.weight": (256, 512),
        "up.0.block.0.conv1.weight": (128, 384, 3, 3),
        "up.3.upsample.conv.bias": (256,),
        "norm_out.weight": (128,),
    },
    "diffusers": {
        "time_embedding.linear_1.weight": (512, 128),
        "down_blocks.1.attentions.0.to_q.weight": (256, 256),
        "down_blocks.1.attentions.1.to_out.0.bias": (256,),
        "down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
        "mid_block.attentions.0.group_norm.weight": (256,),
        "mid_block.resnets.1.time_emb_proj.weight": (256, 512),
        "up_blocks.0.resnets.0.conv1.weight": (256, 512, 3, 3),
        "up_blocks.3.resnets.0.conv1.weight": (128, 384, 3, 3),
        "up_blocks.2.attentions.2.to_v.weight": (256, 256),
        "up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
        "conv_norm_out.bias": (128,),
    },
    "openai": {
        "time_embed.0.weight": (512, 128),
        "input_blocks.0.0.weight": (128, 3, 3, 3),
        "input_blocks.3.0.op.weight": (128, 128, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.5.1.qkv.weight": (768, 256, 1),
        "middle_block.1.proj_out.weight": (256, 256, 1),
        "middle_block.2.emb_layers.1.weight": (256, 512),
        "output_blocks.2.1.conv.weight": (256, 256, 3, 3),
        "output_blocks.8.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.11.0.out_layers.3.bias": (128,),
        "out.2.weight": (3, 128, 3, 3),
    },
    "w86763777": {
        "time_embedding.timembedding.1.weight": (512, 128),
        "head.weight": (128, 3, 3, 3),
        "downblocks.2.main.weight": (128, 128, 3, 3),
        "downblocks.3.block1.2.weight": (256, 128, 3, 3),
        "downblocks.4.attn.proj_q.weight": (256, 256, 1, 1),
        "middleblocks.0.attn.group_norm.bias": (256,),
        "upblocks.3.main.weight": (256, 256, 3, 3),
        "upblocks.14.block2.3.weight": (128, 128, 3, 3),
        "tail.2.bias": (3,),
    },
    "tqch": {
        "embed.2.weight": (512, 512),
        "in_conv.weight": (128, 3, 3, 3),
        "downsamples.level_0.2.1.weight": (128, 128, 3, 3),
        "downsamples.level_1.0.0.skip.weight": (256, 128, 1, 1),
        "downsamples.level_1.1.1.project_in.weight": (768, 256, 1, 1),
        "middle.1.project_out.weight": (256, 256, 1, 1),
        "upsamples.level_1.3.1.weight": (256, 256, 3, 3),
        "upsamples.level_0.2.fc.weight": (128, 512),
        "out_conv.0.weight": (128,),
    },
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(layout):
    own = OPENAI if layout in ("openai", "w86763777") else {}
    config = Config(model=UNetConfig(**own))
    found = {entry.theirs: entry.shape for entry in entries(LAYOUTS[layout], config)}
    for name, shape in PUBLISHED[layout].items():
        assert found.get(name) == shape, name
    assert sum(int(np.prod(shape)) for shape in found.values()) == 35_746_307


def test_every_module_of_a_plan_has_one_place_in_every_layout():
    plan = Plan(5, 3, frozenset({1, 4}), True, "conv")
    for layout in LAYOUTS.values():
        where = layout.modules(plan)
        assert len(set(where.values())) == len(where)
        assert {place.name for place in places(plan)} <= set(where)


# ------------------------------------------------------------ forms


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
@pytest.mark.parametrize("width", [8, 7])
def test_rows_of_the_time_embedding_follow_its_order(order, width):
    rows = forms.embedding_rows(width, order)
    t = jnp.array([3, 700])
    standard, other = (
        timestep_embedding(t, UNetConfig(base_channels=width, embedding_order=name))
        for name in ("sin_cos", order)
    )
    np.testing.assert_array_equal(other, np.asarray(standard)[:, rows])


@pytest.mark.parametrize("order", ["fused", "fused_by_head"])
def test_fused_q_k_v_are_where_the_layout_says(order):
    heads, d = 2, 3
    fused = np.arange(18)
    q, k, v = forms.split_qkv(fused, order, heads)
    shape = (3, heads, d) if order == "fused" else (heads, 3, d)
    for part, got in enumerate((q, k, v)):
        for head in range(heads):
            index = (part, head) if order == "fused" else (head, part)
            np.testing.assert_array_equal(
                got[head * d : (head + 1) * d], fused.reshape(shape)[index]
            )
    np.testing.assert_array_equal(forms.join_qkv([q, k, v], order, heads), fused)


def test_rearranged_parameters_compute_the_same():
    """Whatever form a config asks for, the network it describes is one and the same."""
    standard = config_of("ho", 4, heads=2, channel_mult=(2,), attention_resolutions=())
    params = jax.tree.map(lambda x: 0.1 * x, random_params(standard))
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), jnp.array([5, 900])
    flat = flatten_dict(params, sep="/")

    def output(model: UNetConfig, flat: dict) -> np.ndarray:
        config = dataclasses.replace(standard, model=model)
        return np.asarray(
            build_model(config).apply({"params": unflatten_dict(flat, sep="/")}, x, t)
        )

    expected = output(standard.model, flat)
    for qkv_layout, embedding_order in [("fused", "interleaved"), ("fused_by_head", "cos_sin")]:
        model = dataclasses.replace(
            standard.model, qkv_layout=qkv_layout, embedding_order=embedding_order
        )
        other = forms.from_standard(flat, model)
        np.testing.assert_allclose(
            output(model, other), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )
        assert_same(forms.to_standard(other, model), flat)


@pytest.mark.parametrize("layout", OWN_NAMES)
@pytest.mark.parametrize(
    "model",
    [
        {},
        dict(qkv_layout="fused_by_head", embedding_order="interleaved"),
        dict(blocks_per_level=2, channel_mult=(1, 1, 2)),
    ],
    ids=["plain", "rearranged", "three levels"],
)
def test_out_and_in_again_is_bit_equal(layout, model):
    config = config_of(layout, **model)
    params = random_params(config)
    tensors = write_tensors(LAYOUTS[layout], config, params)
    assert_same(read_params(LAYOUTS[layout], config, tensors, "file"), params)


@pytest.mark.parametrize(
    "model",
    [
        dict(heads=4, qkv_layout="fused"),
        dict(
            resampling="residual",
            conditioning="scale_shift",
            head_channels=16,
            qkv_layout="fused_by_head",
        ),
        dict(num_classes=3, resampling="pool"),
    ],
    ids=["new order", "residual", "classes"],
)
def test_out_and_in_again_with_the_switches_of_openai(model):
    config = config_of("openai", **model)
    params = random_params(config)
    tensors = write_tensors(LAYOUTS["openai"], config, params)
    assert_same(read_params(LAYOUTS["openai"], config, tensors, "file"), params)


def test_elements_lie_where_the_layouts_say():
    """Single numbers, by hand: what a round trip cannot see, as it makes every mistake twice."""
    config = config_of("pesser")
    ours, theirs = random_params(config), {}
    for layout in ("pesser", "diffusers", "ho", "tqch"):
        theirs[layout] = write_tensors(LAYOUTS[layout], config, ours)
    assert theirs["pesser"]["conv_in.weight"][5, 1, 0, 2] == ours["conv_in"]["kernel"][0, 2, 1, 5]
    assert theirs["ho"]["conv_in/W"][0, 2, 1, 5] == ours["conv_in"]["kernel"][0, 2, 1, 5]
    assert (
        theirs["pesser"]["down.1.block.0.nin_shortcut.weight"][40, 3, 0, 0]
        == ours["down_1_block_0"]["shortcut"]["kernel"][3, 40]
    )
    assert (
        theirs["diffusers"]["mid_block.attentions.0.to_q.weight"][40, 3]
        == ours["mid_attn"]["q"]["kernel"][3, 40]
    )
    assert (
        theirs["tqch"]["middle.1.project_in.weight"][64 + 40, 3, 0, 0]
        == ours["mid_attn"]["k"]["kernel"][3, 40]
    )

    # Inputs of the first dense layer: [sin, cos] here, [cos, sin] in openai, in turn in w86763777;
    # half is 16.
    config = config_of("openai", heads=2)
    ours = random_params(config)
    rows = ours["time_embedding_0"]["kernel"]
    openai = write_tensors(LAYOUTS["openai"], config, ours)
    assert openai["time_embed.0.weight"][7, 3] == rows[16 + 3, 7]
    assert openai["time_embed.0.weight"][7, 16 + 3] == rows[3, 7]
    w86763777 = write_tensors(LAYOUTS["w86763777"], config_of("w86763777"), ours)
    assert w86763777["time_embedding.timembedding.1.weight"][7, 2 * 3] == rows[3, 7]
    assert w86763777["time_embedding.timembedding.1.weight"][7, 2 * 3 + 1] == rows[16 + 3, 7]

    # k of the second head, its 5th channel: of 2 heads of 32 channels, head by head in the old
    # order, apart in the new.
    key = ours["mid_attn"]["k"]["kernel"][3, 32 + 5]
    assert openai["middle_block.1.qkv.weight"][(3 * 1 + 1) * 32 + 5, 3, 0] == key
    new = dataclasses.replace(config, model=dataclasses.replace(config.model, qkv_layout="fused"))
    fused = unflatten_dict(forms.from_standard(flatten_dict(ours, sep="/"), new.model), sep="/")
    assert (
        write_tensors(LAYOUTS["openai"], new, fused)["middle_block.1.qkv.weight"][64 + 32 + 5, 3, 0]
        == key
    )


# ------------------------------------------------------------ recognising


@pytest.mark.parametrize("layout", OWN_NAMES)
@pytest.mark.parametrize(
    "size, model",
    [
        (8, {}),
        (8, dict(channel_mult=(1, 2, 3), blocks_per_level=3, attention_resolutions=(8, 2))),
        (4, dict(channel_mult=(2,), attention_resolutions=())),
    ],
)
def test_a_network_is_recognised_by_its_names(layout, size, model):
    config = config_of(layout, size, **model)
    found = recognise(
        LAYOUTS[layout], write_tensors(LAYOUTS[layout], config, random_params(config))
    )
    assert found.plan == Plan.of(config)
    assert (found.base_channels, found.channel_mult) == (32, config.model.channel_mult)
    assert (found.in_channels, found.out_channels, found.conditioning, found.num_classes) == (
        3,
        3,
        "add",
        0,
    )
    assert found.attention_resolutions(size) == tuple(
        sorted(config.model.attention_resolutions, reverse=True)
    )


@pytest.mark.parametrize(
    "layout, model, expected",
    [
        ("pesser", {}, dict(image_size=32, schedule="linear", variance="fixed_large", dropout=0.1)),
        (
            "ho",
            dict(channel_mult=(1, 1, 2, 2, 4, 4)),
            dict(image_size=256, variance="fixed_small", dropout=0.0, learning_rate=2e-5),
        ),
        (
            "ermongroup",
            dict(channel_mult=(1, 2, 2, 2, 4), attention_resolutions=(64,)),
            dict(image_size=64, variance="fixed_large"),
        ),
        (
            "tqch",
            dict(attention_resolutions=(64,)),
            dict(image_size=64, variance="fixed_small", dropout=0.0),
        ),
        (
            "openai",
            dict(
                channel_mult=(1, 2, 3, 4),
                conditioning="scale_shift",
                attention_resolutions=(64, 32),
                out=6,
            ),
            dict(
                image_size=64,
                schedule="cosine",
                timesteps=4000,
                timestep_scale=0.25,
                heads=4,
                variance="learned_range",
            ),
        ),
        (
            "openai",
            dict(channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,), out=6),
            dict(image_size=256, schedule="linear", timesteps=1000, timestep_scale=1.0, heads=1),
        ),
        (
            "openai",
            dict(
                channel_mult=(1, 1, 2, 2, 4, 4),
                attention_resolutions=(32, 16, 8),
                resampling="residual",
                conditioning="scale_shift",
                num_classes=10,
                out=6,
            ),
            dict(
                image_size=256,
                schedule="linear",
                timesteps=1000,
                head_channels=64,
                qkv_layout="fused_by_head",
            ),
        ),
    ],
    ids=["cifar10", "256", "celeba", "tqch celeba", "improved 64", "improved lsun", "guided 256"],
)
def test_the_recipe_of_a_published_network_is_found(layout, model, expected, tmp_path):
    """By its build alone, in small.

    Attention sizes are those of a 256 pixel image here, as the file does not know its own.
    """
    model = {"channel_mult": (1, 2, 2, 2), "attention_resolutions": (128,), **model}
    if len(model["channel_mult"]) == 6 and layout == "ho":
        model["attention_resolutions"] = (16,)
    learned = model.pop("out", 3) == 6
    config = config_of(layout, 256, **{"group_norm_groups": 32, **model})
    config.diffusion.variance = "learned_range" if learned else "fixed_large"
    save_file(
        write_tensors(LAYOUTS[layout], config, random_params(config)),
        tmp_path / "model.safetensors",
    )
    path = tmp_path / "model.safetensors"
    if layout == "ermongroup":  # a flat file is pesser's
        layout = "pesser"
    if layout == "ho":
        np.savez(tmp_path / "model.npz", **load_file(path))
        path = tmp_path / "model.npz"
    imported = import_weights(layout, path)
    sections = (
        imported.config.data,
        imported.config.model,
        imported.config.diffusion,
        imported.config.optimizer,
    )
    for name, value in expected.items():
        values = [getattr(section, name) for section in sections if hasattr(section, name)]
        assert values[0] == value, name
    assert_same(
        imported.params,
        read_params(
            LAYOUTS[layout], imported.config, load_file(tmp_path / "model.safetensors"), ""
        ),
    )


# By guided-diffusion's published flags: what the file of each network tells, and what it does not.
GUIDED = {
    "64": ((192, (1, 2, 3, 4), 3, 1000), ("cosine", {"model.head_channels": 64}, "fused")),
    "128": ((256, (1, 1, 2, 3, 4), 2, 1000), ("linear", {"model.heads": 4}, "fused_by_head")),
    "256": (
        (256, (1, 1, 2, 2, 4, 4), 2, 1000),
        ("linear", {"model.head_channels": 64}, "fused_by_head"),
    ),
    "256 without classes": (
        (256, (1, 1, 2, 2, 4, 4), 2, 0),
        ("linear", {"model.head_channels": 64}, "fused_by_head"),
    ),
    "512": (
        (128, (1, 2, 2, 4, 4, 8, 8), 2, 1000),
        ("linear", {"model.head_channels": 64}, "fused_by_head"),
    ),
}


@pytest.mark.parametrize("build, flags", GUIDED.values(), ids=GUIDED)
def test_the_recipe_of_guided_diffusion_is_that_of_its_flags(build, flags):
    """diffusion_steps, noise_schedule, num_head_channels or num_heads, use_new_attention_order."""
    (width, factors, blocks, classes), (schedule, heads, order) = build, flags
    plan = Plan(len(factors), blocks, frozenset({len(factors) - 1}), resampling="residual")
    network = Architecture(plan, width, factors, 3, 6, "scale_shift", classes)
    recipe = LAYOUTS["openai"].recipe(network)
    assert (recipe["diffusion.schedule"], recipe["model.qkv_layout"]) == (schedule, order)
    assert recipe | heads == recipe and len({"model.heads", "model.head_channels"} & {*recipe}) == 1
    assert (recipe["diffusion.timesteps"], recipe["model.timestep_scale"]) == (1000, 1.0)
    assert (recipe["diffusion.variance"], recipe["loss.kind"]) == ("learned_range", "hybrid")


# ------------------------------------------------------------ whole roads


@pytest.mark.parametrize("layout", EXPORTS)
def test_import_of_an_export_is_the_same_run(layout, tmp_path, capsys):
    config = config_of(layout, channels=1, qkv_layout="fused" if layout == "openai" else "separate")
    params = random_params(config)
    run = save_run(tmp_path / "a", config, params)
    export_script.main([f"--workdir={run}", f"--layout={layout}", f"--output={tmp_path / 'out'}"])
    import_script.main(
        [f"--layout={layout}", f"--input={tmp_path / 'out'}", f"--workdir={tmp_path / 'back'}"]
    )
    printed = capsys.readouterr().out
    assert "weights: averaged (EMA) ones only" in printed
    back = open_trained(tmp_path / "back", Devices(jax.devices()[:1]))
    assert_same(back.params, params)
    assert back.weights == "ema, imported"
    assert back.config.data.image_size == 8
    assert back.config.diffusion == config.diffusion
    other = (
        back.config.model
        if layout != "diffusers"
        else dataclasses.replace(back.config.model, qkv_layout="separate")
    )
    assert other == config.model
    record = json.loads((tmp_path / "back" / "weights.json").read_text())
    assert (
        record["layout"] == layout
        and record["ema"] == "ema"
        and record["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    )
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert record["files"] == [files.fingerprint(file)]
    assert len(record["files"][0]["sha256"]) == 64


@pytest.mark.slow
def test_an_imported_run_samples_and_trains(tmp_path, capsys):
    """Sampling needs nothing but the folder; training goes on with the config that lies in it."""
    config = config_of(
        "pesser", channels=1, channel_mult=(1,), attention_resolutions=(8,), group_norm_groups=32
    )
    config.data.name, config.data.flip = "digits", False
    config.diffusion = DiffusionConfig(timesteps=20)
    config.train = TrainConfig(steps=2, batch_size=8, eval_images=0, sample_every=0)
    settings = tmp_path / "config.json"
    settings.write_text(save_json(config))
    params = random_params(config)
    save_file(write_tensors(LAYOUTS["pesser"], config, params), tmp_path / "ema_model.safetensors")
    run = tmp_path / "run"
    flags = ["--layout=pesser", f"--input={tmp_path / 'ema_model.safetensors'}", f"--workdir={run}"]
    import_script.main([*flags, f"--config={settings}"])
    sample_script.main(
        [f"--workdir={run}", f"--output={tmp_path / 'grid.png'}", "--num_images=8", "--steps=2"]
    )
    assert "8 samples of ema, imported, step 0" in capsys.readouterr().out
    assert (tmp_path / "grid.png").stat().st_size > 100
    assert train_script.main([f"--config={run / 'config.json'}", f"--workdir={run}"]) == 0
    after = open_trained(run, Devices())
    assert (after.step, after.weights) == (2, "ema 0.9999")
    # An average of 0.9999 after two steps is still the imported one to four digits: training went
    # on from it, not anew.
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after.params)):
        np.testing.assert_allclose(now, before, atol=1e-3)


def test_config_of_a_diffusers_network_there_and_back():
    path = Path("config.json")
    for model in (
        {},
        dict(
            head_channels=16,
            conditioning="scale_shift",
            resampling="residual",
            down_padding="symmetric",
        ),
        dict(
            attention_in_mid=False,
            embedding_denominator="half",
            group_norm_groups=16,
            num_classes=4,
        ),
        dict(
            channel_mult=(1, 2, 2),
            attention_resolutions=(8, 2),
            group_norm_epsilon=1e-5,
            blocks_per_level=3,
        ),
    ):
        config = config_of("diffusers", **model)
        facts = diffusers_config.network_facts(
            path, json.loads(json.dumps(diffusers_config.network_config(config)))
        )
        for name, value in facts.items():
            section, field = name.split(".")
            assert getattr(getattr(config, section), field) == value, name


def test_the_order_of_the_embedding_is_the_one_the_config_names():
    """An absent flip_sin_to_cos is True, the default of the class: [cos, sin]."""
    orders = [
        diffusers_config.layout_of(unet).embedding_order
        for unet in ({}, {"flip_sin_to_cos": True}, {"flip_sin_to_cos": False})
    ]
    assert orders == ["cos_sin", "cos_sin", "sin_cos"]


def test_half_precision_is_read_exactly(tmp_path):
    config = config_of("pesser")
    params = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), random_params(config))
    tensors = write_tensors(LAYOUTS["pesser"], config, params)
    for name, dtype in (("half", np.float16), ("double", np.float64)):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.astype(dtype) for key, value in tensors.items()}, path)
        imported = import_weights("pesser", path, overrides=["data.image_size=8"])
        assert_same(imported.params, params)


def test_bfloat16_halves_an_export_and_rounds_to_eight_bits(tmp_path):
    config, sizes = config_of("pesser", channels=1), {}
    params = random_params(config)
    for dtype in ("float32", "bfloat16"):
        file = export_weights("pesser", config, params, "ema 0.9", tmp_path / dtype, dtype=dtype)
        sizes[dtype] = sum(tensor.nbytes for tensor in load_file(file).values())
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    back = import_weights("pesser", file)
    assert back.config == config
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(back.ema)):
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before, rtol=2**-8, atol=0)
    with pytest.raises(WeightsError, match="dtype=bfloat16: only format=safetensors"):
        export_weights(
            "pesser", config, params, "raw", tmp_path / "no", form="torch", dtype="bfloat16"
        )


# ------------------------------------------------------------ weights that ship


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """`ship(seed)` puts other weights, which it returns, where those of the network dots ship."""
    config = config_of("diffusers", channels=1)
    config.data.name, config.train.steps = "fashion_mnist", 7
    monkeypatch.setattr(trained, "SHIPPED", tmp_path / "shipped")

    def put(seed: int) -> dict:
        params = random_params(config, seed)
        shutil.rmtree(tmp_path / "shipped" / "dots", ignore_errors=True)
        export_weights("diffusers", config, params, "ema 0.9", tmp_path / "shipped" / "dots")
        (tmp_path / "shipped" / "dots" / "config.json").write_text(save_json(config))
        return params

    put.config = config
    return put


def test_a_shipped_network_becomes_a_run_once(tmp_path, ship):
    first, devices = ship(0), Devices(jax.devices()[:2])
    run = unpack("dots", devices, tmp_path / "runs")
    assert_same(open_trained(run, devices).params, first)
    assert open_trained(run, devices).weights == "ema, imported"
    assert open_trained(run, devices).config == ship.config
    (run / "samples").mkdir()
    assert unpack("dots", devices, tmp_path / "runs") == run and (run / "samples").is_dir()
    (run / "samples").rmdir()
    second = ship(1)  # a new version of the code brings other weights
    assert_same(open_trained(unpack("dots", devices, tmp_path / "runs"), devices).params, second)
    with pytest.raises(WorkdirError, match="pretrained=cats: one of dots"):
        unpack("cats", devices, tmp_path / "runs")


@pytest.mark.parametrize("seed", [0, 1])
def test_two_processes_may_open_what_ships_at_once(tmp_path, ship, seed, monkeypatch):
    """Both find nothing there, and one is late: the same weights serve it, and no others."""
    params, devices, runs = ship(0), Devices(jax.devices()[:1]), tmp_path / "runs"
    rename, others = Path.rename, []

    def late(part, target):
        if target == runs / "dots" and not others:
            others.append(part)
            if seed != 0:
                ship(seed)
            unpack("dots", devices, runs)
        return rename(part, target)

    monkeypatch.setattr(Path, "rename", late)
    if seed == 0:
        assert_same(open_trained(unpack("dots", devices, runs), devices).params, params)
    else:
        with pytest.raises(OSError, match="not empty"):
            unpack("dots", devices, runs)
    assert [path.name for path in runs.iterdir()] == ["dots"]


@pytest.mark.parametrize("trained_on, newer", [(True, False), (True, True), (False, True)])
def test_what_was_done_in_the_run_of_a_shipped_network_stays(tmp_path, ship, trained_on, newer):
    """Trained on, it no longer gives the weights that its name asks for, whether they changed."""
    devices, runs = Devices(jax.devices()[:1]), tmp_path / "runs"
    ship(0)
    run = unpack("dots", devices, runs)
    append_evaluation(run, {"metric": "nll", "total": 3.5})
    assert unpack("dots", devices, runs) == run
    if trained_on:
        shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "5")
    if newer:
        ship(1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(WorkdirError, match=f"pretrained=dots: .* give workdir={run} .* or move it"):
        unpack("dots", devices, runs)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    run.rename(runs / "mine")
    assert unpack("dots", devices, runs) == run
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0"]


def test_what_ships_is_small_and_opens(tmp_path):
    assert names() == ["cifar10_small", "digits", "faces", "fashion_mnist"]
    for name in names():
        folder = SHIPPED / name
        assert (folder / WEIGHTS).stat().st_size < 8e6
        assert json.loads((folder / "config.json").read_text())["data"]["name"] in (
            "celeba32",
            "cifar10",
            "digits",
            "fashion_mnist",
        )
        assert {"nll"} <= {
            json.loads(line)["metric"]
            for line in (folder / "evaluations.jsonl").read_text().splitlines()
        }
    run = unpack("digits", Devices(jax.devices()[:1]), tmp_path)
    sample_script.main(
        [f"--workdir={run}", f"--output={tmp_path / 'grid.png'}", "--num_images=4", "--steps=2"]
    )
    assert (tmp_path / "grid.png").stat().st_size > 100


# ------------------------------------------------------------ raw or averaged


def ho_file(path: Path, config: Config, raw: dict | None, ema: dict | None) -> Path:
    arrays: dict = {"global_step": np.int64(5), "beta1_power": np.float32(0.9)}
    for params, ending in ((raw, ""), (ema, "/ExponentialMovingAverage")):
        if params is not None:
            tensors = write_tensors(LAYOUTS["ho"], config, params)
            arrays |= {f"model/{name}{ending}": tensor for name, tensor in tensors.items()}
            arrays["model/conv_in/W/Adam"] = tensors["conv_in/W"]
    np.savez(path, **arrays)
    return path


def test_raw_and_averaged_weights_go_where_they_belong(tmp_path, capsys):
    config = config_of("ho")
    raw, ema = random_params(config, 1), random_params(config, 2)
    path = ho_file(tmp_path / "both.npz", config, raw, ema)
    flags = [
        "--layout=ho",
        f"--input={path}",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.image_size=8",
    ]
    import_script.main(flags)
    assert "weights: raw and averaged (EMA) ones, each in its place" in capsys.readouterr().out
    devices = Devices(jax.devices()[:1])
    for weights, params, label in (("ema", ema, "ema, imported"), ("raw", raw, "raw, imported")):
        trained = open_trained(tmp_path / "run", devices, weights=weights)
        assert_same(trained.params, params)
        assert trained.weights == label


@pytest.mark.parametrize(
    "name, said, label, warned",
    [
        ("model", None, "unknown", True),
        ("model", "ema", "ema", False),
        ("model", "raw", "raw", True),
        ("ema_0.9999_050000", None, "ema", False),
        ("ddpm-ema-church", None, "ema", False),
        ("schema", None, "unknown", True),
    ],
)
def test_an_unlabelled_file_is_asked_about(name, said, label, warned, tmp_path):
    config = config_of("pesser")
    path = tmp_path / f"{name}.safetensors"
    save_file(write_tensors(LAYOUTS["pesser"], config, random_params(config)), path)
    imported = import_weights("pesser", path, overrides=["data.image_size=8"], weights=said)
    assert (imported.record["params"], imported.record["ema"]) == (label, label)
    assert ("WARNING" in imported.messages[1]) == warned


def test_one_kind_only_stands_for_both_and_says_so(tmp_path):
    config = config_of("ho")
    params = random_params(config)
    raw = import_weights(
        "ho", ho_file(tmp_path / "raw.npz", config, params, None), overrides=["data.image_size=8"]
    )
    assert "WARNING, raw ones only" in raw.messages[1]
    ema = import_weights(
        "ho", ho_file(tmp_path / "ema.npz", config, None, params), overrides=["data.image_size=8"]
    )
    assert ema.record["params"] == "ema"
    assert_same(raw.ema, params)
    assert_same(ema.params, params)
    with pytest.raises(
        WeightsError, match="weights=ema: .*raw.npz says itself what it holds, raw weights"
    ):
        import_weights("ho", tmp_path / "raw.npz", overrides=["data.image_size=8"], weights="ema")


# ------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def good() -> tuple[Config, dict]:
    config = config_of("pesser")
    return config, write_tensors(LAYOUTS["pesser"], config, random_params(config))


def refused(
    tmp_path: Path, *flags: str, layout: str = "pesser", name: str = "model.safetensors"
) -> str:
    """The message of an import that must fail, one line, leaving nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        import_script.main(
            [
                f"--layout={layout}",
                f"--input={tmp_path / name}",
                f"--workdir={tmp_path / 'run'}",
                *flags,
            ]
        )
    message = str(caught.value)
    assert "\n" not in message
    assert sorted(tmp_path.iterdir()) == before
    return message


def test_missing_surplus_and_misshapen_tensors_are_named(good, tmp_path):
    _, tensors = good
    size = "--config.data.image_size=8"
    path = tmp_path / "model.safetensors"

    save_file(
        {name: x for name, x in tensors.items() if name != "down.1.block.0.conv2.weight"}, path
    )
    assert "model.safetensors lacks down.1.block.0.conv2.weight (64, 64, 3, 3)" in refused(
        tmp_path, size
    )

    save_file({name: x for name, x in tensors.items() if not name.startswith("mid.block_1.")}, path)
    assert "mid.block_1.conv1.weight" in refused(tmp_path, size) and " and 7 more" in refused(
        tmp_path, size
    )

    save_file(tensors | {"logvar": np.zeros(1000, np.float32)}, path)
    assert "has logvar, which layout pesser does not know" in refused(tmp_path, size)

    save_file(tensors | {"mid.attn_1.q.weight": np.zeros((64, 32, 1, 1), np.float32)}, path)
    assert "mid.attn_1.q.weight is (64, 32, 1, 1), not (64, 64, 1, 1)" in refused(tmp_path, size)

    save_file(tensors | {"conv_out.bias": np.array([0, np.nan, 1], np.float32)}, path)
    assert "is damaged: NaN or infinity in conv_out.bias" in refused(tmp_path, size)

    save_file({name: x for name, x in tensors.items() if name != "temb.dense.0.weight"}, path)
    assert "lacks temb.dense.0.weight" in refused(tmp_path, size)


def test_a_file_of_another_layout_is_named(good, tmp_path):
    config, tensors = good
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path, layout="tqch")
    assert "is not of layout tqch" in message and message.endswith("it looks like layout=pesser")
    assert "it looks like layout=pesser" in refused(tmp_path, layout="ermongroup")
    assert "it looks like layout=pesser" in refused(tmp_path, layout="ho")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    assert "is not of layout pesser: its tensors are called weight, not" in refused(tmp_path)


def test_a_config_that_contradicts_the_weights_is_refused(good, tmp_path):
    save_file(good[1], tmp_path / "model.safetensors")
    size = "--config.data.image_size=8"
    cases = {
        "--config.model.channel_mult=(1,1)": "config.model.channel_mult=(1, 1) (the file: (1, 2))",
        "--config.model.base_channels=64": "config.model.base_channels=64 (the file: 32)",
        "--config.model.attention_resolutions=(8,)": (
            "config.model.attention_resolutions=(8,) (the file: (4,))"
        ),
        "--config.data.channels=1": "config.data.channels=1 (the file: 3)",
        "--config.model.group_norm_epsilon=1e-5": (
            "cannot have config.model.group_norm_epsilon=1e-05 (only 1e-06)"
        ),
        "--config.model.heads=2": "cannot have config.model.heads=2 (only 1)",
        "--config.diffusion.variance=learned": (
            "config.diffusion.variance=learned contradicts the file"
        ),
        "--config.model.chanel_mult=(1,1)": "did you mean channel_mult?",
    }
    for flag, expected in cases.items():
        assert expected in refused(tmp_path, size, flag)


def test_damaged_files_are_told_from_good_ones(good, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(good[1], path)
    whole = path.read_bytes()
    for cut in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "model.safetensors is damaged or no safetensors file" in refused(tmp_path)
    path.unlink()
    assert "model.safetensors: no such file" in refused(tmp_path)

    archive = tmp_path / "model.npz"
    np.savez(archive, **good[1])
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert "model.npz is damaged or no .npz file" in refused(
        tmp_path, layout="ho", name="model.npz"
    )
    np.savez(archive, W=np.array([{"anything": 1}], dtype=object), allow_pickle=True)
    assert "holds pickled objects, not arrays" in refused(tmp_path, layout="ho", name="model.npz")


def test_missing_packages_are_named(good, tmp_path, monkeypatch):
    """Only a TensorFlow checkpoint, and writing for torch.load, take another framework."""
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "model.ckpt-7.index").write_bytes(b"anything")
    assert "is a TensorFlow checkpoint: pip install 'ddpm_jax[tensorflow]'" in refused(
        tmp_path, layout="ho", name="model.ckpt-7"
    )
    with pytest.raises(WeightsError, match="must be written by PyTorch: pip install"):
        files.write(tmp_path / "model.pt", good[1], {})


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin"])
def test_pytorch_files_are_imported_without_pytorch(legacy, suffix, tmp_path, monkeypatch):
    """With an optimiser, scores and a schedule beside the weights, as training loops save them."""
    monkeypatch.setitem(sys.modules, "torch", None)
    config = config_of("w86763777")
    raw, ema = random_params(config, 1), random_params(config, 2)
    layout = LAYOUTS["w86763777"]
    contents = {
        "net_model": OrderedDict(write_tensors(layout, config, raw)),
        "ema_model": OrderedDict(write_tensors(layout, config, ema)),
        "optim": {"state": {0: {"step": 3, "exp_avg": np.zeros((2, 3), np.float32)}}},
        "sched": {"milestones": Counter({30: 1}), "lr": [2e-4]},
        "fid": np.float64(3.25),
        "is": np.float32(9.5),
        "best": np.bool_(True),
        "size": (8, 8),
        "step": 7,
    }
    path = write_torch(tmp_path / f"model{suffix}", contents, legacy=legacy)
    imported = import_weights("w86763777", path, overrides=["data.image_size=8"])
    assert_same(imported.params, raw)
    assert_same(imported.ema, ema)
    rest = files.read(path).contents
    assert (rest["fid"], rest["is"], rest["best"], rest["size"]) == (3.25, 9.5, True, [8, 8])
    assert rest["sched"] == {"milestones": {30: 1}, "lr": [2e-4]}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pytorch_tensors_of_every_kind_are_read_exactly(legacy, tmp_path):
    """Floats become float32; these few are exact at half precision already."""
    values = [[1.0, -2.5, 0.15625], [937.5, 0.5, -0.5]]
    kinds = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    contents = {np.dtype(kind).name: np.array(values, kind) for kind in kinds}
    contents["float64"] += 2**-40  # more digits than float32 has: rounded to the nearest
    contents["bfloat16"] = np.array([1.0, -2.5, 0.15625], ml_dtypes.bfloat16)
    contents["transposed"] = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    contents["integers"] = np.array([2**40, -3])
    contents["flags"] = np.array([True, False])
    tensors = files.read(write_torch(tmp_path / "model.pt", contents, legacy=legacy)).contents
    for name in ("float16", "float32", "float64"):
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], np.array(values, np.float32))
    np.testing.assert_array_equal(tensors["bfloat16"], np.float32([1.0, -2.5, 0.15625]))
    np.testing.assert_array_equal(tensors["transposed"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tensors["integers"], [2**40, -3])
    np.testing.assert_array_equal(tensors["flags"], [True, False])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pytorch_files_that_want_to_run_something_are_refused(legacy, tmp_path):
    """Through every name that is let in as well: object arrays, other codecs, other dtypes."""
    code = np.array([{"an": "object"}], dtype=object)
    cases = {
        "os.system": Call(Global("os", "system"), "touch ran"),
        "builtins.eval": Call(Global("builtins", "eval"), "1"),
        "numpy._core.multiarray._reconstruct": code,
        "numpy.dtype of 'O8'": Call(Global("numpy", "dtype"), "O8"),
        "_codecs.encode to 'rot13'": Call(Global("_codecs", "encode"), "a", "rot13"),
        "torch.nn.modules.linear.Linear": Call(Global("torch.nn.modules.linear", "Linear"), 1),
    }
    for name, value in cases.items():
        write_torch(tmp_path / "model.pt", {"conv_in.weight": value}, legacy=legacy)
        message = refused(tmp_path, name="model.pt")
        assert f"holds more than tensors ({name}), which could run code" in message


def test_pytorch_files_cannot_change_what_reads_them(tmp_path):
    """A pickle may set attributes of the objects that it is given; the next file finds them new."""
    path = tmp_path / "model.pt"
    for module, name in [
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
    ]:
        spoilt = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}U\x05spoilK\x01s\x86b."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", spoilt)
        try:
            files.read(path)
        except WeightsError as error:
            assert "is damaged or no PyTorch file" in str(error)
        for kind in (Counter, OrderedDict, np.dtype):
            assert not hasattr(kind, "spoil")
    contents = {"w": np.arange(3, dtype=np.float32), "n": Counter("aab"), "x": np.float64(2)}
    again = files.read(write_torch(path, contents)).contents
    np.testing.assert_array_equal(again["w"], [0, 1, 2])
    assert again["n"] == {"a": 2, "b": 1} and again["x"] == 2


def test_big_endian_and_truncated_pytorch_files_are_told(good, tmp_path):
    path = write_torch(tmp_path / "model.pt", good[1])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, blob in (members | {"archive/byteorder": b"big"}).items():
            archive.writestr(name, blob)
    assert "damaged or no PyTorch file (its numbers are big-endian)" in refused(
        tmp_path, name="model.pt"
    )
    for legacy in (False, True):
        whole = write_torch(path, good[1], legacy=legacy).read_bytes()
        for cut in (0, 1, 100, len(whole) // 2, len(whole) - 100):
            path.write_bytes(whole[:cut])
            assert "model.pt is damaged or no PyTorch file" in refused(tmp_path, name="model.pt")


def test_a_used_workdir_is_left_alone(good, tmp_path):
    save_file(good[1], tmp_path / "model.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "run is not empty: take another" in refused(tmp_path, "--config.data.image_size=8")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_the_current_folder_is_no_place_for_an_import(good, tmp_path, monkeypatch):
    """It is empty, and would pass for free until the network has been read and is put there."""
    save_file(good[1], tmp_path / "model.safetensors")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for place in (".", tmp_path / "run"):
        with pytest.raises(WorkdirError, match=f"workdir={place} is the current folder: name one"):
            import_script.main([f"--input={tmp_path / 'model.safetensors'}", f"--workdir={place}"])
    assert not any(Path().iterdir())


def test_a_failing_disk_leaves_no_half_run(good, tmp_path, monkeypatch):
    save_file(good[1], tmp_path / "model.safetensors")

    def full(*arguments, **options):
        raise WorkdirError("no space left")

    monkeypatch.setattr(Checkpoints, "save", full)
    assert refused(tmp_path, "--config.data.image_size=8") == "no space left"


def test_the_size_of_the_images_must_come_from_somewhere(tmp_path):
    config = config_of("pesser", attention_resolutions=())
    save_file(
        write_tensors(LAYOUTS["pesser"], config, random_params(config)),
        tmp_path / "model.safetensors",
    )
    assert "does not tell the size of its images: add config.data.image_size=N" in refused(tmp_path)


def test_the_stored_table_of_w86763777_is_checked(tmp_path):
    config = config_of("w86763777")
    tensors = write_tensors(LAYOUTS["w86763777"], config, random_params(config))
    name = "time_embedding.timembedding.0.weight"
    order = dataclasses.replace(config.model, embedding_order="interleaved")
    table = np.asarray(timestep_embedding(jnp.arange(1000), order))
    path = tmp_path / "model.safetensors"
    save_file(tensors | {name: table}, path)
    import_weights("w86763777", path, overrides=["data.image_size=8"])
    save_file(tensors | {name: table + 0.01}, path)
    assert "something else than the sinusoids" in refused(tmp_path, layout="w86763777")


def test_a_network_that_a_layout_cannot_express_is_refused(tmp_path):
    config = config_of("pesser", conditioning="scale_shift", heads=2)
    with pytest.raises(
        WeightsError,
        match=r"layout pesser cannot express config.model.heads=2 \(only 1\), config.model.cond",
    ):
        write_tensors(LAYOUTS["pesser"], config, random_params(config))
    with pytest.raises(WeightsError, match="cannot express config.model.skip_scale"):
        diffusers_config.network_config(config_of("diffusers", skip_scale=0.7))
    several = config_of("diffusers", heads=2, attention_resolutions=(8, 4))
    with pytest.raises(WeightsError, match=r"heads=2 at several widths \[32, 64\]"):
        diffusers_config.network_config(several)
    assert (
        diffusers_config.network_config(config_of("diffusers", heads=2))["attention_head_dim"] == 32
    )
    with pytest.raises(WeightsError, match="diffusion.prediction=mu"):
        diffusers_config.scheduler_config(Config(diffusion=DiffusionConfig(prediction="mu")))
    run = save_run(tmp_path / "a", config, random_params(config))
    with pytest.raises(WeightsError, match="layout openai cannot express"):
        export_script.main([f"--workdir={run}", "--layout=openai", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_configs_of_other_diffusers_models_are_refused(tmp_path):
    path = Path("config.json")
    theirs = diffusers_config.network_config(config_of("diffusers"))
    for change, expected in [
        (dict(_class_name="UNet2DConditionModel"), "a UNet2DConditionModel, not the UNet2DModel"),
        (dict(center_input_sample=True), "center_input_sample=True has no counterpart"),
        (dict(time_embedding_type="fourier"), "time_embedding_type='fourier'"),
        (
            dict(up_block_types=["UpBlock2D", "AttnUpBlock2D"]),
            "the way up must mirror the way down",
        ),
        (dict(down_block_types=["DownBlock2D", "SkipDownBlock2D"]), "no other types are known"),
        (dict(block_out_channels=[32, 48]), "must be multiples of the first"),
        (dict(sample_size=None), "sample_size=None"),
        (dict(act_fn="gelu"), "act_fn='gelu'"),
        (
            dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=None),
            "attn_norm_num_groups=None",
        ),
    ]:
        with pytest.raises(WeightsError, match="config.json: ") as caught:
            diffusers_config.network_facts(path, theirs | change)
        assert expected in str(caught.value)
    assert (
        diffusers_config.network_facts(path, theirs | dict(attention_head_dim=8))[
            "model.head_channels"
        ]
        == 8
    )
    assert (
        diffusers_config.network_facts(path, theirs | dict(sample_size=[8, 8]))["data.image_size"]
        == 8
    )
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json is damaged" in refused(tmp_path, layout="diffusers")
    (tmp_path / "config.json").unlink()
    assert "no config.json there" in refused(tmp_path, layout="diffusers")


@pytest.fixture
def exported(tmp_path) -> Path:
    """A diffusers folder that imports."""
    config = config_of("diffusers")
    export_weights("diffusers", config, random_params(config), "raw", tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "kind",
    [
        "FlowMatchEulerDiscreteScheduler",
        "CMStochasticIterativeScheduler",
        "EDMEulerScheduler",
        "ScoreSdeVeScheduler",
        "KarrasVeScheduler",
        "LCMScheduler",
        "SomethingNewScheduler",
    ],
)
def test_diffusers_schedulers_of_other_processes_are_refused(kind, exported, tmp_path):
    """By their class: none of them writes down that its process is another."""
    change(exported / "scheduler" / "scheduler_config.json", _class_name=kind)
    message = refused(tmp_path, layout="diffusers", name="model")
    assert f"scheduler_config.json: a {kind}, whose process is not known to be DDPM's" in message
    config = tmp_path / "config.json"
    config.write_text(save_json(config_of("diffusers")))
    assert kind in refused(tmp_path, f"--config={config}", layout="diffusers", name="model")


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(use_flow_sigmas=True), "use_flow_sigmas is set"),
        (dict(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (dict(sigma_max=700.0), "sigma_max is set"),
        (dict(timestep_type="continuous"), "timestep_type='continuous'"),
    ],
)
def test_solvers_that_are_told_another_process_are_refused(values, expected, exported, tmp_path):
    path = exported / "scheduler" / "scheduler_config.json"
    change(path, _class_name="DPMSolverMultistepScheduler", **values)
    assert expected in refused(tmp_path, layout="diffusers", name="model")


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_of_the_same_process_are_imported_with_their_betas(kind, exported):
    """They draw no noise: variance_type is null. The sampler stays ours, and a note says so."""
    path = exported / "scheduler" / "scheduler_config.json"
    change(path, _class_name=kind, variance_type=None, beta_start=2e-4, beta_end=0.03)
    imported = import_weights("diffusers", exported)
    assert imported.config.diffusion.schedule == "linear"
    assert (imported.config.diffusion.beta_start, imported.config.diffusion.beta_end) == (
        2e-4,
        0.03,
    )
    assert imported.config.sampling.sampler == "ancestral"
    assert f"not taken over from the scheduler: the sampler of {kind}" in imported.messages


def test_diffusers_pipelines_that_do_not_work_on_pixels_are_refused(exported, tmp_path):
    """The networks of latent diffusion are UNet2DModels of three channels like any other."""
    index, name = exported / "model_index.json", dict(layout="diffusers", name="model")
    whole = index.read_text()
    change(index, _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])
    assert "model_index.json: a LDMPipeline, not one of DDPMPipeline" in refused(tmp_path, **name)
    change(index, _class_name=["pipeline", "MyPipeline"])
    assert "model_index.json: a pipeline.MyPipeline, not one of" in refused(tmp_path, **name)
    index.write_text(whole)
    change(index, vae=["diffusers", "AutoencoderKL"])
    assert "is a pipeline with vae beside its network" in refused(tmp_path, **name)
    assert "with vae beside" in refused(tmp_path, layout="diffusers", name="model/unet")
    index.write_text(whole)
    change(index, safety_checker=[None, None])  # how diffusers writes an absent part
    import_weights("diffusers", exported)
    index.unlink()
    import_weights("diffusers", exported)
    (exported / "vqvae").mkdir()
    assert "is a pipeline with vqvae beside its network" in refused(tmp_path, **name)
