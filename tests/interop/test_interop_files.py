"""Read PyTorch's own files without running what is in them, and write what torch.load reads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_jax.build import build_model
from ddpm_jax.cli import export_weights as export_script
from ddpm_jax.cli import import_weights as import_script
from ddpm_jax.config import Config, DataConfig, UNetConfig
from ddpm_jax.errors import UserError, WeightsError
from ddpm_jax.training.imported import write_workdir
from ddpm_jax.training.state import init_state
from ddpm_jax.weights import files
from ddpm_jax.weights.importing import import_weights
from tests.interop import torch_networks as networks
from tests.interop.torch_networks import Spec, Variables
from tests.support.torch_files import write_torch

pytestmark = pytest.mark.interop
SPEC = Spec(ch=32, mult=(1, 2), blocks=1, attention=(1,))
SIZE = "data.image_size=8"


def random_input() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(5)), torch.tensor(
        [3, 977]
    )


def state_dict(network, spec: Spec = SPEC) -> Variables:
    variables = Variables(4)
    with torch.no_grad():
        network(variables, *random_input(), spec)
    return variables


class Runs:
    """What a hostile file holds: unpickling it calls os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(tmp_path: Path, path: Path, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        import_script.main(
            ["--layout=pesser", f"--input={path}", f"--workdir={tmp_path / 'run'}", *flags]
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("run.part*"))
    return str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_that_wants_to_run_something_does_not(legacy, tmp_path):
    path, sentinel = tmp_path / "model.ckpt", tmp_path / "ran"
    torch.save(
        {"conv_in.weight": Runs(f"touch {sentinel}")},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    message = refused(tmp_path, path)
    assert (
        "holds more than tensors (posix.system), which could run code: nothing was loaded"
        in message
    )
    assert not sentinel.exists()
    path.write_bytes(pickle.dumps(Runs(f"touch {sentinel}")))
    assert "model.ckpt" in refused(tmp_path, path)
    assert not sentinel.exists()


def test_the_hostile_file_is_hostile(tmp_path):
    """Loaded as old code loads it, it does run: so the test above means something."""
    torch.save(Runs(f"touch {tmp_path / 'ran'}"), tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_files_are_told(legacy, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(dict(state_dict(networks.pesser)), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:cut])
        assert "model.ckpt is damaged or no PyTorch file" in refused(tmp_path, path)
    path.write_bytes(whole)
    import_weights("pesser", path, overrides=[SIZE])


def test_other_things_that_torch_saves_are_told(tmp_path):
    path = tmp_path / "model.ckpt"
    for contents, expected in [
        (3, "holds no state dict: a int"),
        ({}, "holds no state dict: an empty dict"),
        ([1, 2], "holds no state dict: a list of 2"),
        (
            {"model": {"a": torch.zeros(2)}, "step": 3},
            "holds no state dict: a dict of 'model', 'step'",
        ),
    ]:
        torch.save(contents, path)
        assert expected in refused(tmp_path, path)
    checkpoint = {"net_model": dict(state_dict(networks.w86763777)), "step": 7}
    torch.save(checkpoint, path)
    assert refused(tmp_path, path).endswith("it looks like layout=w86763777")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_files_written_without_pytorch_are_what_it_writes(legacy, tmp_path):
    """The default tests import files of tests/support/torch_files.py: PyTorch reads them so too."""
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16),
        "transposed": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "integers": np.array([2**40, -3]),
    }
    path = write_torch(tmp_path / "model.pt", arrays, legacy=legacy)
    tensors = torch.load(path, weights_only=True)
    for name, array in arrays.items():
        expected = array.astype(np.float32) if name == "bfloat16" else array
        tensor = tensors[name].float() if name == "bfloat16" else tensors[name]
        np.testing.assert_array_equal(tensor.numpy(), expected)
    torch.save(tensors, tmp_path / "theirs.pt", _use_new_zipfile_serialization=not legacy)
    for file in (path, tmp_path / "theirs.pt"):
        contents = files.read(file).contents
        for name, array in arrays.items():
            np.testing.assert_array_equal(contents[name], array.astype(contents[name].dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_exactly(dtype, tmp_path):
    variables = {name: value.to(dtype) for name, value in state_dict(networks.pesser).items()}
    torch.save(variables, tmp_path / "model.pt")
    save_file(
        {name: value.contiguous() for name, value in variables.items()},
        tmp_path / "model.safetensors",
    )
    for name in ("model.pt", "model.safetensors"):
        contents = files.read(tmp_path / name).contents
        for key, value in variables.items():
            assert contents[key].dtype == np.float32
            np.testing.assert_array_equal(contents[key], value.float().numpy())


def test_scores_beside_the_weights_do_no_harm(tmp_path):
    """Training loops save NumPy numbers along; weights_only alone would refuse them."""
    path = tmp_path / "model.pt"
    torch.save(
        {
            "net_model": dict(state_dict(networks.w86763777)),
            "fid": np.float64(3.2),
            "is": np.float32(9.4),
        },
        path,
    )
    assert import_weights("w86763777", path, overrides=[SIZE]).record["params"] == "raw"
    torch.save({"net_model": {}, "history": np.array([{"an": "object"}], dtype=object)}, path)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        import_weights("w86763777", path)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("layout", ["pesser", "openai"])
def test_the_other_code_base_runs_our_export(layout, form, tmp_path):
    """The way out: a network of ours, written, computes the same in the reference of the layout."""
    own = (
        {}
        if layout == "pesser"
        else dict(
            embedding_denominator="half", group_norm_epsilon=1e-5, down_padding="symmetric", heads=2
        )
    )
    config = Config(
        data=DataConfig(image_size=8),
        model=UNetConfig(
            base_channels=32,
            channel_mult=(1, 2),
            blocks_per_level=1,
            attention_resolutions=(4,),
            **own,
        ),
    )
    x, t = random_input()
    inputs = x.numpy().transpose(0, 2, 3, 1), t.numpy()
    model = build_model(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.1 * random.normal(size=x.shape)).astype(np.float32), shapes)
    write_workdir(
        tmp_path / "run",
        config,
        init_state(config, jax.device_put(params)),
        {"params": "raw", "ema": "ema"},
    )
    out = tmp_path / "out"
    export_script.main(
        [
            f"--workdir={tmp_path / 'run'}",
            f"--layout={layout}",
            f"--output={out}",
            f"--format={form}",
        ]
    )
    (file,) = out.iterdir()
    assert file.name == f"ema_{layout}{'.safetensors' if form == 'safetensors' else '.pt'}"
    state = load_file(file) if form == "safetensors" else torch.load(file, weights_only=True)
    variables = Variables(0)
    variables.update(state)
    network, spec = (
        getattr(networks, layout),
        Spec(ch=32, mult=(1, 2), blocks=1, attention=(1,), heads=own.get("heads", 1)),
    )
    with torch.no_grad():
        expected = network(variables, x, t, spec).numpy()
    assert set(variables) == set(state)  # nothing had to be made up
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model.apply({"params": params}, *inputs)).transpose(0, 3, 1, 2)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    imported = import_weights(
        layout, file, overrides=[SIZE, f"model.heads={spec.heads}", "model.qkv_layout=separate"]
    )
    for back, sent in zip(jax.tree.leaves(imported.ema), jax.tree.leaves(params)):
        np.testing.assert_array_equal(back, sent)


def test_a_tensorflow_checkpoint_is_read(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="needs the extra tensorflow")
    raw, ema = state_dict(networks.ho), Variables(8)
    with torch.no_grad():
        networks.ho(ema, *random_input(), SPEC)
    variables = {name: tf.Variable(value.numpy(), name=name) for name, value in raw.items()}
    variables |= {
        f"{name}/ExponentialMovingAverage": tf.Variable(value.numpy())
        for name, value in ema.items()
    }
    variables |= {
        "global_step": tf.Variable(790000),
        "model/conv_in/W/Adam": tf.Variable(raw["model/conv_in/W"].numpy()),
    }
    prefix = str(tmp_path / "model.ckpt-790000")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[variable.value() for variable in variables.values()],
    )
    imported = import_weights("ho", Path(prefix), overrides=[SIZE])
    assert (imported.record["params"], imported.record["ema"]) == ("raw", "ema")
    np.testing.assert_array_equal(
        imported.params["conv_in"]["kernel"], raw["model/conv_in/W"].numpy()
    )
    np.testing.assert_array_equal(
        imported.ema["conv_out"]["kernel"], ema["model/conv_out/W"].numpy()
    )
    data = next(tmp_path.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:-3000])
    with pytest.raises(WeightsError, match="is damaged or incomplete"):
        import_weights("ho", Path(prefix))
