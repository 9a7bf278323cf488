"""Imports of what training loops and hubs really hand out: wrappers, prefixes, shards, pointers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from ddpm_jax.build import abstract_params, build_process
from ddpm_jax.cli import import_weights as import_script
from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    SamplingConfig,
    UNetConfig,
    load_config,
)
from ddpm_jax.errors import UserError, WeightsError
from ddpm_jax.files import parse_json
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.trained import open_trained
from ddpm_jax.weights import settings
from ddpm_jax.weights.exporting import export_weights
from ddpm_jax.weights.importing import import_weights
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts import diffusers, diffusers_config
from ddpm_jax.weights.layouts.registry import LAYOUTS
from ddpm_jax.weights.recognise import recognise_process
from tests.support.layers import ROOT
from tests.support.torch_files import write_torch

SIZE = ["data.image_size=8"]


def network_of(layout: str) -> Config:
    """The smallest network of a layout."""
    fixed = {name: values[0] for name, values in LAYOUTS[layout].switches.items()}
    fields = {"base_channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1}
    fields |= {"attention_resolutions": (4,), "dropout": 0.0} | fixed
    return Config(data=DataConfig(name="cifar10", image_size=8), model=UNetConfig(**fields))


def params_of(config: Config, seed: int) -> dict:
    random = np.random.default_rng(seed)
    shapes = flatten_dict(abstract_params(config))
    return unflatten_dict(
        {path: random.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    )


@pytest.fixture(scope="module")
def pesser() -> tuple[dict, dict, dict, dict]:
    """(raw parameters, averaged ones, the tensors of each)."""
    config = network_of("pesser")
    raw, ema = params_of(config, 1), params_of(config, 2)
    tensors = [write_tensors(LAYOUTS["pesser"], config, params) for params in (raw, ema)]
    return raw, ema, *tensors


def assert_same(a: dict, b: dict) -> None:
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: x for name, x in tensors.items()}


# ------------------------------------------------------------------------------- around the weights


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "model.", "module.", "module._orig_mod.", "diffusion.model.", "net.", "unet."],
)
def test_what_wraps_a_network_is_taken_off_its_names(prefix, pesser, tmp_path):
    raw, _, tensors, _ = pesser
    save_file(prefixed(prefix, tensors), tmp_path / "x.safetensors")
    imported = import_weights("auto", tmp_path / "x.safetensors", overrides=SIZE)
    assert_same(imported.params, raw)
    assert imported.record["layout"] == "pesser"
    assert "layout: pesser, by the names of its tensors" in imported.messages
    if prefix != "module.":  # which layouts themselves take off
        assert f"unwrapped: weights in {prefix[:-1]}" in imported.messages


WRAPPERS = {
    "state_dict": lambda raw, ema: {"state_dict": raw, "epoch": 3},
    "model": lambda raw, ema: {"model": raw, "optimizer": {"state": {0: {"m": np.ones(3)}}}},
    "model and ema": lambda raw, ema: {"model": raw, "ema": ema, "step": 7},
    "parallel": lambda raw, ema: {"net": prefixed("module.", raw), "ema_net": ema},
    "ema of a module": lambda raw, ema: {"ema": {"module": ema, "decay": 0.999}, "model": raw},
    "ema-pytorch": lambda raw, ema: {
        "model": raw,
        "ema": prefixed("online_model.", raw) | prefixed("ema_model.", ema),
    },
    "lightning": lambda raw, ema: {
        "state_dict": prefixed("model.", raw) | prefixed("model_ema.", ema),
        "hyper_parameters": {"lr": 1e-4, "betas": [0.9, 0.999]},
        "pytorch-lightning_version": "2.0",
    },
    "torch_ema": lambda raw, ema: {"model": raw, "ema": {"shadow_params": list(ema.values())}},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_opened(name, pesser, tmp_path):
    raw, ema, raw_tensors, ema_tensors = pesser
    path = write_torch(tmp_path / "last.ckpt", WRAPPERS[name](raw_tensors, ema_tensors))
    imported = import_weights("auto", path, overrides=SIZE)
    assert_same(imported.params, raw)
    both = name not in ("state_dict", "model")
    assert_same(imported.ema, ema if both else raw)
    kinds = (imported.record["params"], imported.record["ema"])
    assert kinds == (("raw", "ema") if both else ("unknown", "unknown"))


def test_several_networks_in_one_file_are_told(pesser, tmp_path):
    _, _, raw, ema = pesser
    path = write_torch(tmp_path / "x.ckpt", {"model": raw, "best_model": ema})
    for layout in ("auto", "pesser"):
        with pytest.raises(WeightsError, match=r"several sets of .* \(best_model, model\): save"):
            import_weights(layout, path, overrides=SIZE)


def test_buffers_are_left_out_and_tell_the_process(pesser, tmp_path):
    """betas of 500 steps to 0.03 stand in the file, whatever the recipe of the layout says."""
    raw, _, tensors, _ = pesser
    betas = np.linspace(2e-4, 0.03, 500)
    buffers = {
        "betas": betas.astype(np.float32),
        "alphas_cumprod": np.cumprod(1 - betas).astype(np.float32),
        "sqrt_recipm1_alphas_cumprod": np.ones(500, np.float32),
        "posterior_mean_coef1": np.ones(500, np.float32),
        "num_timesteps": np.array(500),
    }
    save_file(prefixed("model.", tensors) | buffers, tmp_path / "x.safetensors")
    imported = import_weights("auto", tmp_path / "x.safetensors", overrides=SIZE)
    assert_same(imported.params, raw)
    np.testing.assert_allclose(build_process(imported.config).schedule.betas, betas, rtol=1e-6)
    left_out = "left out, as no parameters of a network: alphas_cumprod, betas, num_timesteps and 2"
    assert any(message.startswith(left_out) for message in imported.messages)
    with pytest.raises(UserError, match="config.diffusion contradicts the file, whose 500 betas"):
        import_weights(
            "auto", tmp_path / "x.safetensors", overrides=[*SIZE, "diffusion.timesteps=1000"]
        )
    buffers["betas"] = np.linspace(0.5, 0.1, 500).astype(np.float32) ** 3
    save_file(tensors | buffers, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="betas, from 0.125 to 0.001, are of no schedule"):
        import_weights("auto", tmp_path / "x.safetensors", overrides=SIZE)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"timesteps": 250, "rescale_betas": True},
        {"timesteps": 4000, "schedule": "cosine"},
        {"schedule": "quad", "beta_start": 8.5e-4, "beta_end": 0.012},
        {"schedule": "sigmoid", "timesteps": 300},
        {"schedule": "jsd", "timesteps": 10},
    ],
)
def test_a_schedule_is_known_by_its_betas(fields):
    config = Config(diffusion=DiffusionConfig(**fields, prediction="x0"))
    betas = build_process(config).schedule.betas
    for name, value in recognise_process(betas.astype(np.float32)).items():
        setattr(config.diffusion, name.removeprefix("diffusion."), value)
    np.testing.assert_allclose(build_process(config).schedule.betas, betas, rtol=1e-5)


def test_another_network_beside_it_is_not_passed_over(pesser, tmp_path):
    """As in a latent diffusion model, whose network does not see pixels."""
    tensors = prefixed("model.", pesser[2]) | {"first_stage.encoder.weight": np.ones((3, 3))}
    path = write_torch(tmp_path / "x.ckpt", {"state_dict": tensors})
    with pytest.raises(WeightsError, match="has first_stage.encoder.weight, which layout pesser"):
        import_weights("auto", path, overrides=SIZE)


# ------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"diffusers"}))
def test_auto_takes_the_layout_that_fits(layout, tmp_path):
    config = network_of(layout)
    tensors = write_tensors(LAYOUTS[layout], config, params_of(config, 0))
    contents = {
        "ermongroup": [prefixed("module.", tensors), {}, 1, 2, tensors],
        "kimrass": {"epoch": 3, "model": prefixed("model.", tensors)},
        "tqch": {"model": tensors, "ema": {"shadow": tensors, "decay": 0.9}},
        "w86763777": {"net_model": tensors, "ema_model": tensors},
    }.get(layout, tensors)
    imported = import_weights("auto", write_torch(tmp_path / "x.pt", contents), overrides=SIZE)
    assert imported.record["layout"] == layout
    assert imported.messages[0] == f"layout: {layout}, by the names of its tensors"


def test_where_no_layout_fits_all_are_named_and_the_nearest(pesser, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"encoder.0.weight": np.ones((3, 3)), "decoder.0.weight": np.ones(3)}, path)
    for layout in ("auto", "pesser", "ermongroup"):
        with pytest.raises(UserError, match=r"fits none of the 8 layouts \(diffusers, ") as caught:
            import_weights(layout, path)
        assert "its 2 tensors are called decoder.0.weight, encoder.0.weight" in str(caught.value)
    save_file({n: x for n, x in pesser[2].items() if not n.startswith("mid.")}, path)
    with pytest.raises(UserError, match=r"none of the 8 .*nearest is pesser, with \d+ of \d+ mod"):
        import_weights("auto", path)
    with pytest.raises(UserError, match="there are no named tensors in it"):
        import_weights("auto", write_torch(tmp_path / "x.pt", {"epoch": 3}))


# -------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """A diffusers folder."""
    config = network_of("diffusers")
    export_weights("diffusers", config, params_of(config, 0), "raw", tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_file_in_shards_is_read_by_its_index(folder):
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    expected, tensors = import_weights("diffusers", folder), load_file(whole)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        part = {name: tensors[name] for name, place in places.items() if place == shard}
        save_file(part, whole.with_name(shard))
    whole.unlink()
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (folder, folder / "unet", index):
        imported = import_weights("auto", path)
        assert_same(imported.params, expected.params)
        assert [entry["name"] for entry in imported.record["files"]] == names
    change(index, weight_map=places | {"more": names[0]})
    with pytest.raises(WeightsError, match="names more, which no shard holds"):
        import_weights("auto", folder)
    for place in ("../x.safetensors", index.name, 3):
        change(index, weight_map=places | {"conv_in.bias": place})
        with pytest.raises(WeightsError, match="index.json is damaged"):
            import_weights("auto", folder)
    change(index, weight_map=places)
    whole.with_name(names[1]).unlink()
    with pytest.raises(WeightsError, match="names 2 shards, of which .*00002-of.* is not there"):
        import_weights("auto", folder)


def test_weights_of_another_name_are_listed_or_taken(folder):
    usual = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = usual.rename(usual.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert import_weights("auto", folder).record["files"][0]["name"] == half.name
    half.with_name("diffusion_pytorch_model.non_ema.bin").write_bytes(half.read_bytes())
    with pytest.raises(WeightsError, match="but diffusion_pytorch_model.fp16.safetensors, diff"):
        import_weights("auto", folder)
    assert import_weights("auto", half).record["files"][0]["name"] == half.name
    for path in (folder / "unet").glob("diffusion*"):
        path.unlink()
    with pytest.raises(WeightsError, match="neither diff.*safetensors nor diff.*bin in .*unet$"):
        import_weights("auto", folder)


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_a_json_of_the_folder_names_it(name, folder):
    assert_same(import_weights("auto", folder / name).params, import_weights("auto", folder).params)


def test_a_size_that_is_null_is_asked_for(folder):
    change(folder / "unet" / "config.json", sample_size=None)
    with pytest.raises(WeightsError, match="add config.data.image_size=N"):
        import_weights("auto", folder)
    imported = import_weights("auto", folder, overrides=SIZE)
    assert imported.config.data.image_size == 8
    assert imported.config.model.attention_resolutions == (4,)


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
BAD_FIELDS = {
    UNET: {
        "layers_per_block": ["2", 0, None, 1.5, True],
        "norm_num_groups": [None, 0, "32"],
        "norm_eps": [None, "1e-6", 0],
        "dropout": [None, "0.1", 1.0, -0.1],
        "in_channels": [None, "3", 2],
        "out_channels": [None, "3", []],
        "block_out_channels": [None, [], 32, [0, 0], [-32, 64], [32, "64"], [None], {}],
        "down_block_types": [None, [], "DownBlock2D", [1, 2]],
        "up_block_types": [None, {}, [None, None]],
        "downsample_type": [["conv"], {}],
        "add_attention": [None, "true", 1],
        "attention_head_dim": ["8", [8, 8], -1],
        "num_class_embeds": ["10", -1],
        "flip_sin_to_cos": ["false", []],
        "sample_size": ["8", [], [8], [8, None], 0],
        "freq_shift": [None, "0", []],
        "_class_name": [None, [], 3],
    },
    SCHEDULER: {
        "num_train_timesteps": [None, "1000", 0, []],
        "beta_start": [None, "1e-4", 0, [1e-4]],
        "beta_end": [None, 1.5, {}],
        "beta_schedule": [[], {}, "warmup", 1],
        "prediction_type": [[], 3],
        "variance_type": [{}, True],
        "timestep_spacing": [["leading"]],
        "clip_sample": [None, "true"],
        "clip_sample_range": [None, "1", []],
        "trained_betas": [3, "linear", [[]], [0.1, "x"]],
        "_class_name": [None, [], {}],
    },
}


@pytest.mark.parametrize(
    "file, field",
    [(file, field) for file, fields in BAD_FIELDS.items() for field in fields],
)
def test_a_field_that_nothing_can_be_made_of_is_named_with_its_file(file, field, folder):
    whole = (folder / file).read_text()
    for value in BAD_FIELDS[file][field]:
        (folder / file).write_text(whole)
        change(folder / file, **{field: value})
        with pytest.raises(WeightsError, match=f"^{folder / file}: ") as caught:
            settings.settle_diffusers(diffusers.read_folder(folder), folder, None, [])
        message = str(caught.value)
        assert "\n" not in message and len(message) < 700
        assert field in message or field in ("_class_name", "down_block_types", "up_block_types")


def test_fields_that_json_writes_otherwise_are_the_same(folder):
    """What others than diffusers write: whole numbers with a point or without, null for absent."""
    read = import_weights("diffusers", folder).config
    change(folder / UNET, layers_per_block=1.0, norm_num_groups=32.0, dropout=0)
    change(folder / UNET, num_class_embeds=None, attention_head_dim=None, time_embedding_dim=None)
    change(folder / SCHEDULER, num_train_timesteps=1e3, trained_betas=None, thresholding=None)
    again = import_weights("diffusers", folder).config
    assert again == read and type(again.model.blocks_per_level) is int


def test_an_export_with_rescaled_betas_comes_back(tmp_path):
    config = network_of("diffusers")
    config.diffusion = DiffusionConfig(timesteps=250, rescale_betas=True)
    export_weights("diffusers", config, params_of(config, 0), "raw", tmp_path / "model")
    assert import_weights("auto", tmp_path / "model").config.diffusion == config.diffusion
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    for betas in ([0.5, 0.1, 0.3], "cosine", [None], {}):
        change(scheduler, trained_betas=betas)
        with pytest.raises(WeightsError, match="trained_betas is set: "):
            import_weights("auto", tmp_path / "model")


@pytest.mark.parametrize("schedule", [{}, {"rescale_betas": True, "timesteps": 250}])
def test_an_export_that_ends_in_noise_comes_back(schedule, tmp_path):
    """The betas of a file, listed or by name, are those before they are rescaled."""
    config, plain = network_of("diffusers"), {"prediction": "v"} | schedule
    config.diffusion = DiffusionConfig(**plain, zero_terminal_snr=True)
    noted = diffusers_config.scheduler_config(config)
    assert noted.pop("rescale_betas_zero_snr") is True
    before = dataclasses.replace(config, diffusion=DiffusionConfig(**plain))
    without = diffusers_config.scheduler_config(before)
    assert without.pop("rescale_betas_zero_snr") is False and noted == without
    export_weights("diffusers", config, params_of(config, 0), "raw", tmp_path / "model")
    assert import_weights("auto", tmp_path / "model").config.diffusion == config.diffusion
    change(tmp_path / "model" / SCHEDULER, prediction_type="epsilon")
    with pytest.raises(WeightsError, match="rescale_betas_zero_snr is set: .* epsilon cannot give"):
        import_weights("auto", tmp_path / "model")
    change(tmp_path / "model" / SCHEDULER, rescale_betas_zero_snr=None)
    assert not import_weights("auto", tmp_path / "model").config.diffusion.zero_terminal_snr


@pytest.mark.parametrize("clip, spacing", [(False, "trailing"), (True, "leading")])
def test_the_sampler_of_an_export_comes_back(clip, spacing, tmp_path):
    config = network_of("diffusers")
    config.sampling = SamplingConfig(clip=clip, spacing=spacing)
    export_weights("diffusers", config, params_of(config, 0), "raw", tmp_path / "model")
    noted = parse_json((tmp_path / "model" / SCHEDULER).read_text())
    assert (noted["clip_sample"], noted["timestep_spacing"]) == (clip, spacing)
    sampling = import_weights("auto", tmp_path / "model").config.sampling
    assert (sampling.clip, sampling.spacing) == (clip, spacing)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.npz"])
def test_what_stands_for_a_file_is_not_taken_for_it(name, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 143\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(WeightsError, match="is a pointer of Git LFS, .*: run git lfs pull"):
        import_weights("auto", tmp_path / name)
    (tmp_path / name).write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
    with pytest.raises(WeightsError, match="is a web page, not a file of weights"):
        import_weights("auto", tmp_path / name)


# ---------------------------------------------------------------------------------------- data sets

PAPER = parse_json((ROOT / "benchmarks" / "paper.json").read_text())


@pytest.mark.parametrize("row", [name for name, row in PAPER["rows"].items() if "import" in row])
def test_a_published_file_is_of_its_rows_data_set_by_its_name(row):
    described = PAPER["rows"][row]
    expected = load_config(ROOT / described["config"]).data.name
    named, _ = settings._guess_data(Path(described["import"]["file"]), Config())
    assert named == expected


# ------------------------------------------------------------------------------------- a second try


def test_an_import_that_nothing_was_done_with_makes_room(pesser, tmp_path, capsys):
    """A wrong size is put right by the same command; what was worked on stays."""
    save_file(pesser[2], tmp_path / "x.safetensors")
    run = tmp_path / "run"
    flags = [f"--input={tmp_path / 'x.safetensors'}", f"--workdir={run}"]
    import_script.main(flags)  # guesses 32, as attention would be at 16
    assert open_trained(run, Devices(jax.devices()[:1])).config.data.image_size == 32
    assert f"wrote {run}\n" in capsys.readouterr().out
    import_script.main([*flags, "--config.data.image_size=8"])
    opened = open_trained(run, Devices(jax.devices()[:1]))
    assert opened.config.data.image_size == 8
    assert_same(opened.params, pesser[0])
    assert "in the place of an import that nothing was done with" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.safetensors"]
    assert "before" not in {path.name for path in run.iterdir()}
    for trace in ("metrics.jsonl", "checkpoints/1"):
        (run / trace).mkdir()
        with pytest.raises(UserError, match="is not empty: take another"):
            import_script.main(flags)
        (run / trace).rmdir()
