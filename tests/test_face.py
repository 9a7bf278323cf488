"""The public face: `import ddpm_jax as ddpm` is quick and silent, and a network is an object."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import ddpm_jax as ddpm
from ddpm_jax import model as model_module
from ddpm_jax.build import abstract_params, denoiser
from ddpm_jax.cli import evaluate, sample
from ddpm_jax.config import Config, DataConfig, SamplingConfig, UNetConfig
from ddpm_jax.data.load import load_source
from ddpm_jax.figures.reconstruction import reconstruction
from ddpm_jax.files import read_json
from ddpm_jax.images import from_uint8, to_uint8
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.sampling.sampler import with_sampling
from ddpm_jax.trained import SHIPPED, Trained, names, open_trained, unpack
from ddpm_jax.training import loop
from ddpm_jax.training.origin import Origin
from ddpm_jax.weights import files
from ddpm_jax.weights.detect import layout_of
from ddpm_jax.weights.exporting import export_weights
from ddpm_jax.weights.layout import write_tensors
from ddpm_jax.weights.layouts.registry import LAYOUTS
from tests.support.layers import ROOT
from tests.support.processes import assert_bit_equal
from tests.support.tiny import images, tiny_config

HEAVY = ("orbax", "tensorflow_datasets", "grain", "tensorflow", "torch", "clu")
CONFIG = tiny_config(
    model={"num_classes": 10, "label_dropout": 0.2},
    train={"steps": 2, "eval_images": 0, "ema_decays": (0.9,)},
)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory of a network with classes."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    devices = Devices(jax.devices()[:1])
    assert loop.train(CONFIG, workdir, data_dir=workdir.parent, devices=devices) == 0
    return workdir


@pytest.fixture(scope="module")
def tiny(run) -> ddpm.Model:
    return ddpm.load(run)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -------------------------------------------------------------------------------------- the names


def test_importing_is_silent_and_imports_nothing_before_it_is_used(tmp_path):
    code = f"""
import sys
import ddpm_jax as ddpm
heavy = {{"jax", "numpy", *{HEAVY}}}
print(sorted(heavy & set(sys.modules)))
assert set(ddpm.__all__) <= set(dir(ddpm))
for name in ddpm.__all__:
    assert getattr(ddpm, name) is not None
print(sorted((heavy - {{"jax", "numpy"}}) & set(sys.modules)))
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["[]", "[]"], "")
    assert not list(tmp_path.iterdir())


def test_editors_see_every_name_where_it_comes_from():
    """The imports for editors are the dict of names, written again."""
    tree = ast.parse(Path(ddpm.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ddpm_jax.")
        for alias in node.names
    }
    assert {name: getattr(ddpm, name).__name__ for name in ddpm.__all__} == {
        name: name for name in seen
    }
    for name, module in seen.items():
        assert getattr(ddpm, name) is getattr(sys.modules[module], name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        ddpm.lode  # noqa: B018


# -------------------------------------------------------------------------------------- one object


def test_samples_are_those_of_the_command(run, tiny, tmp_path):
    flags = [f"--workdir={run}", "--num_images=5", "--seed=3", "--sampler=ddim", "--steps=4"]
    flags += ["--spacing=trailing", "--eta=0.5", "--label=1,7", "--guidance=2"]
    flags += [f"--output={tmp_path / 'x.npz'}"]
    sample.main(flags)
    with np.load(tmp_path / "x.npz") as file:
        expected = file["arr_0"]
    options = {"sampler": "ddim", "steps": 4, "spacing": "trailing", "eta": 0.5}
    options |= {"labels": [1, 7], "guidance": 2}
    samples = tiny.sample(5, seed=3, **options)
    assert samples.dtype == np.uint8
    np.testing.assert_array_equal(samples, expected)
    assert not np.array_equal(samples, tiny.sample(5, seed=3, **options | {"spacing": None}))
    assert tiny.sample(1, 0, "ddim", 2, labels=3).shape == (1, 8, 8, 1)
    np.testing.assert_array_equal(tiny.sample(3, seed=3, first=1, **options), expected[1:4])


def test_classes_may_be_named_as_the_command_names_them(run, tmp_path):
    """The run remembers ten names; number, name and a name in other letters are one class."""
    named = Path(shutil.copytree(run, tmp_path / "named"))
    names = [*"abcdefgh", "Guinea pigs", "zebras"]
    origin = read_json(named / "data.json") | {"classes": names}
    (named / "data.json").write_text(json.dumps(origin))
    model = ddpm.load(named)
    assert model.classes == tuple(names)
    options = {"sampler": "ddim", "steps": 2}
    expected = model.sample(3, labels=[8, 9], **options)
    for labels in (["Guinea pigs", "zebras"], ["GUINEA PIGS", "9"], np.array(["8", "zebras"])):
        np.testing.assert_array_equal(model.sample(3, labels=labels, **options), expected)
    one = model.sample(1, labels="zebras", **options)
    np.testing.assert_array_equal(one, model.sample(1, labels=9, **options))
    with pytest.raises(ddpm.UserError, match="label=zebra: no such class; there are 'zebras'"):
        model.sample(1, labels="zebra")
    assert ddpm.load(run).classes == ()


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("optimizer", "schedule", "cosin", "config.optimizer.schedule=cosin: one of constant"),
        ("model", "dtype", "float16", "config.model.dtype=float16: one of float32, bfloat16"),
        ("loss", "kind", "l2", "config.loss.kind=l2: one of simple"),
        ("diffusion", "prediction", "epsilon", "config.diffusion.prediction=epsilon: one of eps"),
        (
            "optimizer",
            "learning_rate",
            "1e-4",
            "config.optimizer.learning_rate=1e-4: must be float",
        ),
        ("train", "steps", 1.5, "config.train.steps=1.5: must be int"),
    ],
)
def test_a_config_from_python_is_read_as_one_of_a_file(section, field, value, message, tmp_path):
    config = copy.deepcopy(CONFIG)
    setattr(getattr(config, section), field, value)
    with pytest.raises(ddpm.UserError, match=message):
        ddpm.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lists_and_whole_floats_of_a_config_from_python_are_taken(run, tmp_path):
    """What config.json has of them is what it has of the tuples and whole numbers."""
    config, workdir = copy.deepcopy(CONFIG), shutil.copytree(run, tmp_path / "run")
    config.model.channel_mult, config.train.ema_decays = [1], [0.9]
    config.train.steps = 2.0
    assert ddpm.train(config, workdir, workdir.parent).step == 2
    assert config.train.steps == 2.0 and config.model.channel_mult == [1]  # it stays the caller's
    with pytest.raises(ddpm.UserError, match="config=digits: must be a Config, such as load"):
        ddpm.train("digits", workdir)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[SamplingConfig, dict]]:
    """What generators are built for, in place of building them; each draws zeros."""
    built = []

    def build(config: Config, devices: Devices, **how: object) -> SimpleNamespace:
        built.append((config.sampling, how))
        shape = CONFIG.data.sides
        return SimpleNamespace(draw=lambda params, *, indices, **_: np.zeros((1, *shape, 1)))

    monkeypatch.setattr(model_module, "build_generator", build)
    return built


def bare(**sampling: object) -> ddpm.Model:
    """A model without parameters, of a run that samples so."""
    config = dataclasses.replace(CONFIG, sampling=SamplingConfig(**sampling))
    return ddpm.Model(Trained(config, {}, "raw", 0), Devices())


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "deis", "steps": 4, "order": 3},
        {"sampler": "ddim", "steps": 5, "spacing": "trailing", "eta": 0.5},
        {"sampler": "unipc", "steps": 3, "spacing": "logsnr", "order": 2},
        {"clip": False, "rederive_eps": False},
        {"dynamic_threshold": 0.9},
        {"steps": 0},
        {},
    ],
)
def test_a_chain_is_the_one_that_was_asked_for(asked, options):
    own = {"sampler": "ddim", "steps": 7, "spacing": "quadratic"}
    bare(**own).sample(1, labels=1, **options)
    ((chain, _),) = asked
    assert chain == SamplingConfig(**own | options)


def test_batches_of_a_call_are_even(asked):
    """65 samples of at most 64 at once are drawn 33 by 33: 66 go through the network, not 128."""
    model = bare()
    model.sample(65, labels=1)
    model.encode(images(CONFIG, 5), labels=1, batch_size=4)
    assert [how["batch_size"] for _, how in asked] == [33, 3]


def test_codes_are_of_a_chain_that_can_be_turned_round(asked):
    """Whatever the run samples by: without noise, clip and threshold."""
    ours = bare(sampler="ddim", eta=0.7, steps=6, dynamic_threshold=0.9)
    ours.encode(images(CONFIG, 1), labels=1)
    ours.decode(np.zeros((1, 8, 8, 1)), steps=4, labels=1)
    (there, first), (back, second) = asked
    expected = SamplingConfig(sampler="ddim", eta=0.0, steps=6, clip=False)
    assert there == expected and first["inverted"] is True
    assert back == dataclasses.replace(expected, steps=4) and second["inverted"] is False


def test_bits_per_dim_are_those_of_the_command(run, tiny, tmp_path):
    flags = [f"--workdir={run}", "--metrics=nll", "--num_images=6", "--num_timesteps=3", "--seed=4"]
    evaluate.main([*flags, f"--data_dir={tmp_path}"])
    expected = read_evaluations(run)[-1]["total"]
    test = load_source(CONFIG.data, tmp_path, "test").read(np.arange(6))
    bits = tiny.bits_per_dim(test["image"], num_timesteps=3, seed=4, labels=test["label"])
    assert isinstance(bits, float) and bits == expected


def test_codes_are_those_of_reconstruction(tiny):
    originals, devices = images(CONFIG, 3), Devices()
    config = with_sampling(CONFIG, sampler="ddim", eta=0.0, clip=False, steps=5)
    encoder = build_generator(config, devices, batch_size=3, inverted=True)
    decoder = build_generator(config, devices, batch_size=3)
    panel, _ = reconstruction(
        encoder, decoder, tiny._trained.params, originals=from_uint8(originals), label=2
    )
    codes = tiny.encode(originals, steps=5, labels=2)
    assert codes.dtype == np.float32 and codes.shape == originals.shape
    np.testing.assert_array_equal(tiny.decode(codes, steps=5, labels=2), to_uint8(panel[1]))


def test_denoise_takes_numpy_and_serves_the_maths(tiny):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    out = tiny.denoise(x, 7, labels=3)
    bound = denoiser(CONFIG)(tiny.params, np.array([3, 3]))
    np.testing.assert_allclose(out, bound(x, np.array([7, 7])), atol=1e-5)
    np.testing.assert_array_equal(out, tiny.denoise(jax.numpy.asarray(x), np.array([7, 7]), [3, 3]))
    keys = jax.random.split(jax.random.key(0), 2)
    table = ddpm.ddim_table(tiny.process, 3)
    x0 = ddpm.reverse_chain(tiny.process, table, tiny.denoise, jax.numpy.asarray(x), keys)
    assert x0.shape == x.shape and np.isfinite(x0).all()


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda m: m.sample(0, labels=1), "n=0: must be at least 1"),
        (lambda m: m.sample(1, seed=-1, labels=1), "seed=-1: must be in"),
        (lambda m: m.sample(1, first=-1, labels=1), r"first=-1: must be in 0\.\.4294967295$"),
        (
            lambda m: m.sample(2, first=2**32 - 1, labels=1),
            r"first=.*: must be in 0\.\.4294967294$",
        ),
        (
            lambda m: m.sample(1, labels=1, sampler="unipc", rederive_eps=False),
            "rederive_eps: only ddim and deis use eps_hat",
        ),
        (lambda m: m.sample(1, labels=10), "labels=10: must be in 0..9"),
        (lambda m: m.sample(1, labels=-1), "labels=-1: must be in 0..9"),
        (lambda m: m.sample(1, labels=[]), r"labels=\[\]: must be in 0..9"),
        (lambda m: m.sample(1, labels=[[1], [2, 3]]), r"labels=.*: must be in 0..9"),
        (lambda m: m.sample(1, labels=1.5), "labels=1.5: must be in 0..9"),
        (lambda m: m.sample(1, labels="cat"), "label=cat: the names .* are not known: a number in"),
        (lambda m: m.sample(1, labels="9" * 5000), "label=9*: must be in 0..9"),
        (lambda m: m.sample(1, guidance=2), "guidance=2: give labels"),
        (lambda m: m.sample(1, sampler="euler"), "euler"),
        (lambda m: m.encode(np.zeros((1, 8, 8), np.uint8)), r"must be \[n,8,8,1\]"),
        (lambda m: m.encode(np.zeros((1, 8, 8, 1))), "must be uint8"),
        (lambda m: m.bits_per_dim(np.zeros((0, 8, 8, 1), np.uint8)), r"must be \[n,8,8,1\]"),
    ],
)
def test_what_cannot_be_is_one_line(tiny, ask, message):
    with pytest.raises(ddpm.UserError, match=message) as error:
        ask(tiny)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


# -------------------------------------------------------------------------------------- opening


def test_a_run_opens_without_a_word(run, here, capfd, caplog):
    with caplog.at_level(logging.DEBUG, "absl"):
        opened = ddpm.load(run, weights="0.9", step=2)
    assert (opened.step, opened.weights, opened.config) == (2, "ema 0.9", CONFIG)
    assert "8x8x1" in repr(opened) and "step 2" in repr(opened)
    assert [r for r in caplog.records if r.name == "absl"] == [] and capfd.readouterr() == ("", "")
    assert_bit_equal(opened.params, open_trained(run, Devices()).params)


def test_what_ships_is_what_its_run_directory_holds(here):
    opened = ddpm.load("digits")
    assert not list(here.iterdir())
    devices = Devices()
    run = open_trained(unpack("digits", devices, here / "runs"), devices)
    assert_bit_equal(opened._trained.params, run.params)
    assert (opened.config, opened.weights, opened.step) == (run.config, run.weights, 0)
    assert ddpm.load(SHIPPED / "digits").config == run.config
    assert any("digits" in name for name in names())


def random_params(config: Config) -> dict:
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return random.normal(size=leaf.shape).astype(np.float32)

    return jax.tree.map(draw, abstract_params(config))


def network_of(layout: str) -> Config:
    """A small network that the layout can express."""
    fixed = {name: values[0] for name, values in LAYOUTS[layout].switches.items()}
    if layout in ("openai",):
        fixed |= {"conditioning": "scale_shift"}
    network = {"base_channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1}
    fields = network | {"attention_resolutions": (4,), "dropout": 0.0} | fixed
    return Config(data=DataConfig(name="cifar10", image_size=8), model=UNetConfig(**fields))


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"ermongroup"}))
def test_layouts_are_told_apart(layout, tmp_path):
    config = network_of(layout)
    tensors = write_tensors(LAYOUTS[layout], config, random_params(config))
    save_file(tensors, tmp_path / "x.safetensors")
    # A bare state dict of kimrass is one of w86763777, the same network.
    expected = "w86763777" if layout == "kimrass" else layout
    file = files.find_file(tmp_path)
    assert layout_of(files.read(file).contents, file) == expected


def test_a_published_file_opens_in_memory(tmp_path, here):
    config = network_of("pesser")
    params = random_params(config)
    file = export_weights("pesser", config, params, "ema 0.9999", tmp_path / "out")
    opened = ddpm.load(file)
    assert (opened.config, opened.weights, opened.step) == (config, "ema, imported", 0)
    assert_bit_equal(opened.params, params)
    assert any(note.startswith("pesser: ") for note in opened.notes) and not list(here.iterdir())
    assert ddpm.load(file.parent, "raw", layout="pesser").weights == "ema, imported"
    changed = ddpm.load(file, overrides=["sampling.steps=10"])
    assert changed.config.sampling.steps == 10
    with pytest.raises(ddpm.UserError, match="step=5: .* imported weights, which have no steps"):
        ddpm.load(file, step=5)
    with pytest.raises(ddpm.UserError, match="weights=0.5: this run has ema, raw, 0.9999"):
        ddpm.load(file, weights="0.5")


def test_names_that_are_missing_or_mean_two_things(run, here):
    with pytest.raises(ddpm.UserError, match="what=digit: no such .* did you mean digits?"):
        ddpm.load("digit")
    with pytest.raises(ddpm.UserError, match="what=nowhere: .* these ship: cifar10_small, digits"):
        ddpm.load("nowhere")
    with pytest.raises(ddpm.UserError, match="what=digits: no such .*; as a str, 'digits', it is"):
        ddpm.load(Path("digits"))
    assert ddpm.load("digits", overrides="sampling.steps=7").config.sampling.steps == 7
    shutil.copytree(run, here / "digits")
    with pytest.raises(ddpm.UserError, match="what=digits: .* write ./digits or .*pretrained"):
        ddpm.load("digits")
    assert ddpm.load("./digits").step == 2
    with pytest.raises(ddpm.UserError, match="is a run directory, whose settings stand"):
        ddpm.load("./digits", overrides=["seed=1"])
    (here / "digits" / "unet").mkdir()
    with pytest.raises(ddpm.UserError, match="is a run directory and holds weights of diffusers"):
        ddpm.load("./digits")
    (here / "notes.txt").write_text("no weights")
    with pytest.raises(ddpm.UserError):
        ddpm.load("notes.txt")
    (here / "config").mkdir()
    (here / "config" / "config.json").write_text(json.dumps({"diffusion": {}}))
    with pytest.raises(ddpm.UserError, match="no checkpoint yet"):
        ddpm.load("config")


# -------------------------------------------------------------------------------------- training


def test_training_returns_the_trained_network(run):
    again = ddpm.train(CONFIG, str(run))
    assert isinstance(again, ddpm.Model) and again.step == 2
    assert_bit_equal(again.params, ddpm.load(run).params)


@pytest.mark.parametrize("code, error", [(130, KeyboardInterrupt), (143, SystemExit)])
def test_a_training_that_was_stopped_raises(code, error, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "train", lambda *_, **__: code)
    with pytest.raises(error) as raised:
        ddpm.train(CONFIG, tmp_path / "run")
    assert error is KeyboardInterrupt or raised.value.code == 143


def test_a_training_is_told_all_that_was_said(monkeypatch, tmp_path):
    said = []

    def train(config, workdir, **options):
        said.append((config, workdir, options))
        return 143

    monkeypatch.setattr(loop, "train", train)
    own = {"network": object(), "source": object(), "held_out": object()}
    run = tmp_path / "other"
    with pytest.raises(SystemExit):
        ddpm.train(CONFIG, tmp_path / "run", tmp_path, step=7, from_=f"{run}:2", **own)
    with pytest.raises(SystemExit):
        ddpm.train(CONFIG, str(tmp_path / "run"), str(tmp_path), step="best", **own)
    (_, _, first), (config, workdir, second) = said
    own["data_dir"] = tmp_path
    assert first == own | {"parent": Origin(run, 2), "step": 7}
    assert second == own | {"parent": None, "step": "best"}
    assert config == CONFIG and workdir == tmp_path / "run"
