"""A network and images of one's own are trained by the same loop, and go on to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax.cli import evaluate
from ddpm_jax.data.batches import fingerprint
from ddpm_jax.data.load import as_source, load_source, own_sources
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.data_origin import read_origin
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.training import loop
from ddpm_jax.training.origin import Origin
from tests.support.processes import assert_bit_equal
from tests.support.tiny import images, tiny_config

CONFIG = tiny_config(
    data={"name": "own", "image_size": 4},
    train={"steps": 4, "eval_images": 6, "ema_decays": (0.5,)},
)
IMAGES = images(CONFIG, 40)


def linear() -> ddpm.Network:
    """eps_hat = kernel * x_t, with a kernel of one number."""
    return ddpm.Network(
        lambda key: {"kernel": jax.random.uniform(key, ())},
        lambda params, x_t, t, labels, dropout: params["kernel"] * x_t,
    )


def mixed() -> ddpm.Network:
    return ddpm.Network(
        lambda key: {"bias": jnp.zeros((), jnp.bfloat16), "kernel": jax.random.uniform(key, ())},
        lambda params, x_t, t, labels, dropout: params["kernel"] * x_t + params["bias"],
    )


def stream():
    for start in (0, 13, 30):  # of no size in particular
        yield IMAGES[start : {0: 13, 13: 30, 30: 40}[start]]


def labelled_stream():
    yield {"image": IMAGES, "label": np.zeros(len(IMAGES), int)}


class Floats:
    """A source of somebody's own, in [-1, 1] as networks take images."""

    image_shape, labelled = (4, 4, 1), False

    def __len__(self) -> int:
        return len(IMAGES)

    def read(self, indices) -> dict:
        return {"image": (IMAGES[indices] / 127.5 - 1).astype(np.float32)}


def train(folder, steps: int, **own) -> None:
    config = tiny_config(data=vars(CONFIG.data), train=vars(CONFIG.train) | {"steps": steps})
    devices = Devices(jax.devices()[:1])
    own = {"network": linear(), "held_out": IMAGES[:6]} | own
    assert loop.train(config, folder, data_dir=folder, devices=devices, **own) == 0


def params(folder) -> dict:
    return ddpm.load(folder, "raw", network=linear()).params


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "whole"
    train(folder, 4, source=stream)
    return folder


def test_a_run_of_ones_own_goes_on_to_the_bit(whole, tmp_path):
    train(tmp_path / "parts", 2, source=stream)
    train(tmp_path / "parts", 4, source=stream)
    assert_bit_equal(params(tmp_path / "parts"), params(whole))


def test_a_model_of_ones_own_does_what_models_do(whole):
    model = ddpm.load(whole, network=linear())
    assert f"{model!r}".startswith("<Model of own, 4x4x1: 1 parameters")
    x_t = np.ones((2, 4, 4, 1), np.float32)
    np.testing.assert_allclose(model.denoise(x_t, 3), float(model.params["kernel"]) * x_t)
    assert model.sample(2, sampler="ddim", steps=2).shape == (2, 4, 4, 1)
    assert np.isfinite(model.bits_per_dim(IMAGES[:2], num_timesteps=2))


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    """A step on the digits beside held-out images from Python, and these."""
    data = {"name": "digits", "image_size": 8}
    config = tiny_config(data=data, train=vars(CONFIG.train) | {"steps": 1})
    mine, devices = images(config, 6), Devices(jax.devices()[:1])
    folder = tmp_path_factory.mktemp("digits")
    own = {"network": linear(), "held_out": mine}
    assert loop.train(config, folder, data_dir=folder, devices=devices, **own) == 0
    return folder, mine


def test_held_out_images_alone_leave_the_set_of_the_config(on_digits):
    """The run remembers where that set is and what it was, and whose its held-out images are."""
    folder, mine = on_digits
    data = ddpm.load(folder, network=linear()).config.data
    assert read_origin(folder) == {
        "data_dir": str(folder),
        "crop": "none",
        "train": fingerprint(load_source(data, folder, "train")),
        "test": fingerprint(as_source(mine, data)),
    }


def test_what_a_network_of_ones_own_draws_is_measured(on_digits, tmp_path):
    """As docs/evaluation.md has it: drawn in Python, measured by the command, which cannot draw."""
    folder, _ = on_digits
    model = ddpm.load(folder, network=linear())
    np.savez(tmp_path / "drawn.npz", model.sample(20, sampler="ddim", steps=2))
    flags = ["--metrics=pixels", f"--config={folder / 'config.json'}"]
    evaluate.main([f"--samples={tmp_path / 'drawn.npz'}", *flags])
    (record,) = read_evaluations(tmp_path)
    assert record["data"] == "digits" and record["value"] > 0
    message = "network to ddpm_jax.load or train; what it draws is measured as samples=FILE"
    with pytest.raises(ddpm.UserError, match=message):
        evaluate.main([f"--workdir={folder}", "--metrics=pixels"])


@pytest.mark.parametrize("sides", [(28, 28), (7, 12)])
def test_a_config_that_suits_any_size_is_said(sides):
    """What the docstring of `train` says of config.model, where the network is one's own."""
    changes = ["model.channel_mult=(1,)", "model.attention_resolutions=()"]
    changes.append(f"data.image_size={sides[0]},{sides[1]}")
    assert all(item.partition(".")[2] in ddpm.train.__doc__ for item in changes[:2])
    assert ddpm.load_config("cifar10", changes).data.sides == sides


def test_whose_network_it_is_must_be_said(whole, tmp_path):
    with pytest.raises(ddpm.UserError, match="network is not in its config: from Python, give net"):
        ddpm.load(whole)
    with pytest.raises(ddpm.UserError, match="network is not in its config"):
        train(whole, 4, source=stream, network=None)
    with pytest.raises(ddpm.UserError, match="^from=.*: its network is not in its config, and"):
        train(tmp_path, 4, source=stream, parent=Origin(whole))
    with pytest.raises(ddpm.UserError, match="imported weights, which belong to our own UNet"):
        ddpm.load("digits", network=linear())


@pytest.mark.parametrize(
    "own, message",
    [
        ({"source": stream, "held_out": None}, "held_out: give images that are not trained on"),
        ({"source": stream()}, "source: an iterator can be read once: give the function"),
        ({"source": stream, "held_out": stream}, "held_out: a stream has no end"),
        ({"source": lambda: iter([])}, "source: the stream is empty"),
        ({"source": lambda: [IMAGES / 255]}, "item 0 of the stream is float64"),
        ({"source": IMAGES[:, :2]}, "source: images of 2x4x1, not 4x4x1"),
        ({"source": (IMAGES, [1, 2])}, "one label for each"),
        ({"source": (IMAGES, [0.5] * len(IMAGES))}, "labels are float64: must be whole numbers"),
        ({"source": "images"}, "source is <U6"),
        ({"source": ddpm.ArraySource(IMAGES / 255)}, "source is float64 .*: must be images uint8"),
        ({"source": ddpm.ArraySource(IMAGES, np.ones(3, int))}, "one label for each"),
        ({"source": Floats()}, "source is float32 .*: must be images uint8"),
        ({"source": IMAGES, "held_out": ddpm.ArraySource(IMAGES / 255)}, "held_out is float64"),
        (
            {"source": (IMAGES, [0] * len(IMAGES))},
            "source has labels, .*num_classes=0: set model.num_classes, or leave the labels out",
        ),
        (
            {"source": IMAGES, "held_out": (IMAGES, [0] * len(IMAGES))},
            "held_out has labels, .* config.model.num_classes=0: set model.num_classes",
        ),
        ({"source": labelled_stream}, "source has labels, .* leave the labels out"),
        ({"source": IMAGES, "network": jnp.tanh}, "must be a Flax module"),
        (
            {"source": IMAGES, "network": mixed()},
            r"parameter \['bias'\] is bfloat16, must be float",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_anything_is_written(own, message, tmp_path):
    with pytest.raises(ddpm.UserError, match=message) as error:
        train(tmp_path / "run", 4, **own)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_labels_that_came_with_a_source_are_left_alone(tmp_path):
    """Those of a data set, which a network without classes has no need of."""
    config = tiny_config(data={"name": "digits", "image_size": 8})
    digits = load_source(config.data, tmp_path, "train")
    sources = own_sources(config, tmp_path, digits, digits.images[:6])
    assert sources["train"].labelled and not sources["test"].labelled
    classes = tiny_config(model={"num_classes": 10})
    assert own_sources(classes, tmp_path, (digits.images, digits.labels), digits)["train"].labelled
