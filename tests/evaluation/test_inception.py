"""Test the network behind the numbers: its layers, its eyes, its weights and its devices.

That it computes what PyTorch's computes is tests/interop/test_interop_inception.py.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto import graph_pb2

from ddpm_jax.errors import EvaluationError, WeightsError
from ddpm_jax.evaluation.image_sets import ImageSet, of_array
from ddpm_jax.evaluation.inception import features as features_file
from ddpm_jax.evaluation.inception import network as inception
from ddpm_jax.evaluation.inception import weights as inception_weights
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.files import Layers, fold, read_graph, read_npz
from ddpm_jax.evaluation.inception.network import WIDTHS, Inception
from ddpm_jax.evaluation.inception.resize import bilinear_matrix, to_inception
from ddpm_jax.evaluation.inception.weights import (
    FEATURES,
    InceptionWeights,
    inception_of,
    layer_shapes,
    load_inception,
)
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.weights.pickled import read_tensors
from tests.support.inception import pictures, random_layers
from tests.support.programs import precisions


@pytest.fixture(scope="module")
def weights() -> InceptionWeights:
    """Return the first three layers: a cheap network, wide enough to see everything around it."""
    return inception_of(random_layers("64"), "three.npz")


# -------------------------------------------------------------------------------------- the network


def test_network_has_the_layers_of_2015() -> None:
    """Count 94 convolutions, 70 of them and 8,956,448 numbers up to 768."""
    counts = {
        tap: sum(int(np.prod(s)) for parts in layer_shapes(tap).values() for s in parts.values())
        for tap in WIDTHS
    }
    assert (
        len(layer_shapes("768")) == len(layer_shapes("spatial")) == 70
        and counts["768"] == 8_956_448
    )
    assert len(layer_shapes("2048")) == 94
    assert counts["logits"] - counts["2048"] == 2048 * 1008 + 1008
    # torchvision's has 21,785,568 without its auxiliary and last layers: kernels, and a scale and
    # an offset for each channel.
    biases = sum(parts["bias"][0] for parts in layer_shapes("2048").values())
    assert counts["2048"] + biases == 21_785_568


def test_taps_have_their_widths_and_run_no_further_than_asked() -> None:
    for tap, width in WIDTHS.items():
        x = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
        params = {
            layer: {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in p.items()}
            for layer, p in layer_shapes(tap).items()
        }
        out = jax.eval_shape(
            lambda p, x, tap=tap: Inception((tap,)).apply({"params": p}, x), params, x
        )
        assert {name: leaf.shape for name, leaf in out.items()} == {tap: (2, width)}


@pytest.mark.parametrize("resize", ["tf", "half_pixel"])
def test_no_matrix_unit_rounds_what_inception_sees(resize: str) -> None:
    """Of 94 convolutions, the class scores and both sides of the resize: a CPU would not show it."""
    params = {
        layer: {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in p.items()}
        for layer, p in layer_shapes("logits").items()
    }
    traced = jax.make_jaxpr(
        lambda p, x: Inception(tuple(WIDTHS)).apply({"params": p}, to_inception(x, resize))
    )(params, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8))
    for primitive, count in (("conv_general_dilated", 94), ("dot_general", 3)):
        found = precisions(traced.jaxpr, primitive)
        assert found == [(jax.lax.Precision.HIGHEST,) * 2] * count, primitive


@pytest.mark.parametrize(
    "taps, most, deepest",
    [
        (("64",), "2048", "64"),
        (("64", "192", "768", "spatial"), "2048", "768"),
        (("64", "192", "768", "spatial"), "192", "192"),
        (("64", "192", "768", "2048", "spatial", "logits"), "2048", "2048"),
        (("64", "192", "768", "2048", "spatial", "logits"), "64", "64"),
    ],
)
def test_the_deepest_features_are_the_last_that_weights_reach(
    taps: tuple[str, ...], most: str, deepest: str
) -> None:
    assert InceptionWeights({}, taps, "some.npz", "0").deepest(most) == deepest
    assert set(FEATURES) < set(WIDTHS)


def test_mean_pools_leave_the_padding_out() -> None:
    """Pool a constant map, where a padded mean would fall off at the border."""
    ones = jnp.ones((1, 5, 5, 2))
    np.testing.assert_allclose(inception._mean_pool(ones), np.ones((1, 5, 5, 2)), rtol=1e-6)


# ------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("size", [8, 32, 299, 400])
def test_resizes_reproduce_what_is_linear(size: int) -> None:
    """Resize a ramp: it comes out as the ramp at each convention's positions."""
    for resize in ("tf", "half_pixel"):
        matrix = bilinear_matrix(size, resize)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
        assert matrix.min() >= 0 and (matrix > 0).sum(1).max() <= 2
        ramp = matrix @ np.arange(size)
        i = np.arange(299)
        position = i * size / 299 if resize == "tf" else (i + 0.5) * size / 299 - 0.5
        np.testing.assert_allclose(ramp, np.clip(position, 0, size - 1), atol=1e-9)
    np.testing.assert_array_equal(bilinear_matrix(299, "tf"), np.eye(299))


def test_half_pixel_is_pillow_when_enlarging() -> None:
    """Pillow's bilinear filter has the same pixel centres, and antialiases only when it shrinks."""
    image = pictures(1, 32)[0]
    ours = np.asarray(to_inception(jnp.asarray(image[None]), "half_pixel"))[0]
    planes = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(
            (299, 299), Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    np.testing.assert_allclose(
        (ours + 1) * 127.5, np.stack([np.asarray(plane) for plane in planes], -1), atol=2e-3
    )


def test_scales_of_the_two_conventions_differ() -> None:
    ends = jnp.asarray(np.stack([np.zeros((4, 4, 1)), np.full((4, 4, 1), 255)]).astype(np.uint8))
    for resize, low, high in (("tf", -1, 127 / 128), ("half_pixel", -1, 1)):
        result = np.asarray(to_inception(ends, resize))
        assert result.shape == (2, 299, 299, 3)  # grey is repeated
        np.testing.assert_allclose(result[0], low, atol=1e-6)
        np.testing.assert_allclose(result[1], high, atol=1e-6)


# ------------------------------------------------------------------------------------------ weights


def test_fold_is_batch_norm() -> None:
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(1, 1, 3, 5)), rng.normal(size=(7, 3))
    mean, variance, offset, scale = (
        rng.normal(size=5),
        rng.uniform(0.1, 2, 5),
        rng.normal(size=5),
        rng.normal(size=5),
    )
    folded = fold(kernel, mean, variance, offset, scale)
    expected = scale * (x @ kernel[0, 0] - mean) / np.sqrt(variance + 1e-3) + offset
    np.testing.assert_allclose(x @ folded["kernel"][0, 0] + folded["bias"], expected, rtol=1e-12)


def test_npz_in_half_precision_and_cut_short(tmp_path: Path, weights: InceptionWeights) -> None:
    path = tmp_path / "trunk.npz"
    parts = {
        f"{layer}/{part}": array
        for layer, two in random_layers("192").items()
        for part, array in two.items()
    }
    np.savez(path, **{name: array.astype(np.float16) for name, array in parts.items()})
    result = load_inception(path, tmp_path)
    assert result.taps == ("64", "192") and result.params["conv"]["kernel"].dtype == np.float32
    assert (
        result.sha256 != weights.sha256 and result.sha256 == load_inception(path, tmp_path).sha256
    )
    with pytest.raises(
        EvaluationError,
        match="FID needs the 2048 features of Inception, and trunk.npz ends at 192: "
        "fetch https.*=192",
    ):
        result.require("2048", "FID")
    with pytest.raises(
        EvaluationError, match="IS needs the 1008 class scores of Inception.*6726825d.pth"
    ):
        result.require("logits", "IS")


def graph_of(layers: Layers, path: Path, *, scaled: bool) -> dict[str, dict[str, np.ndarray]]:
    """Write a frozen graph, nodes named as by TensorFlow, and return what folding it must give.

    Its batch norms are drawn at random.
    """
    rng, graph, expected = np.random.default_rng(1), graph_pb2.GraphDef(), {}

    def constant(name: str, array: np.ndarray) -> None:
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = 1
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = array.astype("<f4").tobytes()

    for layer, parts in layers.items():
        if layer == "softmax":
            continue
        scope = (
            layer.replace("_conv", "/conv")
            .replace("_tower", "/tower")
            .replace("/tower_mixed", "/tower/mixed")
        )
        scope = (
            scope.replace("_1_mixed", "_1/mixed")
            if "mixed/conv" in scope or "_1_mixed" in scope
            else scope
        )
        width = parts["kernel"].shape[-1]
        mean, beta = rng.normal(size=(2, width)).astype(np.float32)
        variance, gamma = rng.uniform(0.5, 2, (2, width)).astype(np.float32)
        constant(f"{scope}/conv2d_params", parts["kernel"])
        for name, array in (
            ("beta", beta),
            ("gamma", gamma),
            ("moving_mean", mean),
            ("moving_variance", variance),
        ):
            constant(f"{scope}/batchnorm/{name}", array)
        norm = graph.node.add(name=f"{scope}/batchnorm", op="BatchNormWithGlobalNormalization")
        norm.attr["variance_epsilon"].f = 0.001
        norm.attr["scale_after_normalization"].b = scaled
        factor = (gamma.astype(float) if scaled else 1) / np.sqrt(variance.astype(float) + 0.001)
        expected[layer] = {"kernel": parts["kernel"] * factor, "bias": beta - mean * factor}
    constant("softmax/weights", np.ones((2048, 1008), np.float32))
    constant("softmax/biases", np.ones(1008, np.float32))
    path.write_bytes(graph.SerializeToString())
    return expected


@pytest.mark.parametrize("scaled", [True, False])
def test_frozen_graph(tmp_path: Path, scaled: bool) -> None:
    path = tmp_path / "graph.pb"
    layers = {"conv": random_layers("64")["conv"]}
    for name, shape in (
        ("conv_1", (1, 1, 32, 8)),
        ("mixed_tower_1_conv_2", (1, 1, 4, 4)),
        ("mixed_9_conv", (1, 1, 4, 4)),
    ):
        layers[name] = {"kernel": np.random.default_rng(2).normal(size=shape).astype(np.float32)}
    layers["mixed_10_tower_1_mixed_conv_1"] = {
        "kernel": np.random.default_rng(3).normal(size=(3, 1, 4, 4)).astype(np.float32)
    }
    expected = graph_of(layers, path, scaled=scaled)
    result = read_graph(path)
    assert set(result) == {*expected, "softmax"}
    for layer, parts in expected.items():
        for part, array in parts.items():
            np.testing.assert_allclose(result[layer][part], array, rtol=1e-6, atol=1e-7)


def test_what_is_no_inception_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.pb").write_bytes(b"this is not a graph")
    graph_pb2_bytes = graph_pb2.GraphDef()
    graph_pb2_bytes.node.add(name="x", op="NoOp")
    (tmp_path / "other.pb").write_bytes(graph_pb2_bytes.SerializeToString())
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    layers = random_layers("64")
    layers["conv_1"]["kernel"] = layers["conv_1"]["kernel"][:2]
    with pytest.raises(
        EvaluationError,
        match=r"x: conv_1/kernel is \(2, 3, 32, 32\), in Inception-v3 2015-12-05 it is",
    ):
        inception_of(layers, "x")
    layers = random_layers("64")
    layers["conv"]["bias"][0] = np.inf
    with pytest.raises(EvaluationError, match="x: conv/bias holds numbers that are not finite"):
        inception_of(layers, "x")
    for name, message in (
        ("none.npz", "none.npz: no such file"),
        ("other.npz", "other.npz holds no Inception-v3 2015-12-05: it has no layer conv"),
        ("torn.npz", "torn.npz is damaged or no .npz file"),
        ("text.pb", "text.pb is damaged or no frozen TensorFlow graph"),
        ("other.pb", "other.pb is not the graph of 2015-12-05: it has no constant softmax/weights"),
    ):
        with pytest.raises(EvaluationError, match=message) as error:
            load_inception(tmp_path / name, tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(EvaluationError, match="must end in .pth, .pb, .npz"):
        load_inception(tmp_path / "x.safetensors", tmp_path)
    np.savez(
        tmp_path / "pickled.npz",
        **{"conv/kernel": np.array([{}], object), "conv/bias": np.zeros(1)},
    )
    with pytest.raises(EvaluationError, match="Object arrays cannot be loaded"):
        read_npz(tmp_path / "pickled.npz")


def test_without_a_network_one_line_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        inception_weights, "URL", "http://localhost:9/pt_inception-2015-12-05-6726825d.pth"
    )
    with pytest.raises(
        EvaluationError,
        match="no Inception weights: .*cannot be downloaded.*inception=FILE",
    ) as error:
        load_inception(None, tmp_path)
    assert "\n" not in str(error.value)


def test_download_is_believed_by_the_digits_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take a file whose hash begins as published from the cache; fetch any other again."""
    content = b"weights"
    monkeypatch.setattr(inception_weights, "URL", "http://localhost:9/w.npz")
    monkeypatch.setattr(
        inception_weights, "CHECKSUM", "sha256:" + hashlib.sha256(content).hexdigest()[:8]
    )
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(
        EvaluationError, match="w.npz is damaged"
    ):  # it got as far as reading the cached file
        load_inception(None, tmp_path)
    (tmp_path / "w.npz").write_bytes(b"others")
    with pytest.raises(EvaluationError, match="cannot be downloaded"):
        load_inception(None, tmp_path)


# ------------------------------------------------------------------ PyTorch's files without PyTorch


class _Call:
    def __reduce__(self):
        return (print, ("run",))


def zipped(pickled: bytes, path: Path, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def tensor_pickle(key: str, offset: int, shape: tuple, strides: tuple) -> bytes:
    """{"w": tensor} by hand, opcode by opcode: what torch.save writes for one float tensor."""
    out = io.BytesIO()

    class Writer(pickle._Pickler):  # the pure Python one lets its opcodes be written directly
        def save_tensor(self) -> None:
            self.write(b"}" + b"U\x01w" + b"ctorch._utils\n_rebuild_tensor_v2\n" + b"(")
            self.write(b"(" + b"U\x07storage" + b"ctorch\nFloatStorage\n")
            self.save(key), self.save("cpu"), self.save(6)
            self.write(b"tQ")
            self.save(offset), self.save(shape), self.save(strides)
            self.write(b"\x89" + b"N" + b"tR" + b"s" + b".")

    writer = Writer(out, protocol=2)
    writer.write(b"\x80\x02")
    writer.save_tensor()
    return out.getvalue()


def test_tensors_without_pytorch(tmp_path: Path) -> None:
    raw = np.arange(6, dtype="<f4").tobytes()
    path = zipped(tensor_pickle("0", 1, (2, 2), (1, 2)), tmp_path / "w.pth", {"0": raw})
    np.testing.assert_array_equal(read_tensors(path)["w"], [[1, 3], [2, 4]])
    for offset, shape, strides in (
        (3, (2, 2), (1, 2)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (7,), (1,)),
    ):
        with pytest.raises(WeightsError, match="w.pth is damaged .*beyond its storage"):
            read_tensors(zipped(tensor_pickle("0", offset, shape, strides), path, {"0": raw}))


def test_nothing_in_a_file_is_ever_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for contents in (_Call(), {"w": [_Call()]}):
        for path in (zipped(pickle.dumps(contents), tmp_path / "zip.pth"), tmp_path / "stream.pth"):
            if path.name == "stream.pth":
                magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
                path.write_bytes(
                    magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + pickle.dumps(contents)
                )
            with pytest.raises(
                WeightsError,
                match=r"holds more than tensors \(builtins.print\), which could run code",
            ):
                read_tensors(path)
    assert capsys.readouterr().out == ""
    for name, content in (
        ("short.pth", b""),
        ("text.pth", b"hello"),
        ("other.pth", pickle.dumps(7)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name} is damaged or no PyTorch file"):
            read_tensors(tmp_path / name)


# --------------------------------------------------------------------------------------- extraction


def extracted(extractor: Extractor, images: ImageSet) -> np.ndarray:
    return np.concatenate([block.features["64"] for block in extractor.blocks(images, ("64",))])


def test_features_are_those_of_the_image_alone(
    weights: InceptionWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take 13 images in blocks of 5 on 1, 3 and 8 devices, in several orders and batches.

    Rows that fill up a batch are never counted.
    """
    monkeypatch.setattr(features_file, "BLOCK", 5)
    images = pictures(13)
    one = extracted(
        Extractor(weights, Devices(jax.devices()[:1]), batch_size=5), of_array(images, {})
    )
    assert one.shape == (13, 64) and len(np.unique(one[:, 0])) == 13
    network = jax.jit(
        lambda x: Inception(("64",)).apply({"params": weights.params}, to_inception(x, "tf"))["64"]
    )
    np.testing.assert_allclose(one[7:9], network(images[7:9]), rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(13)
    for devices, batch in ((3, 1), (8, 2)):
        extractor = Extractor(weights, Devices(jax.devices()[:devices]), batch_size=batch)
        many = extracted(extractor, of_array(images[order], {}))
        np.testing.assert_allclose(many, one[order], rtol=1e-4, atol=1e-5)


def test_what_was_computed_is_looked_up(
    weights: InceptionWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run goes on; other pixels, other weights and another resize are other features."""
    monkeypatch.setattr(features_file, "BLOCK", 2)
    devices, images = Devices(jax.devices()[:1]), pictures(5)
    stopped = Extractor(weights, devices, cache=tmp_path, batch_size=2)
    blocks = stopped.blocks(of_array(images, {}), ("64",))
    first = next(blocks).features["64"]
    blocks.close()
    calls = []
    again = Extractor(weights, devices, cache=tmp_path, batch_size=2)
    network = again._network(("64",))
    monkeypatch.setattr(again, "_network", lambda taps: calls.append(taps) or network)
    result = extracted(again, of_array(images, {}))
    np.testing.assert_array_equal(result[:2], first)
    assert len(calls) == 2  # the second and the third block
    np.testing.assert_array_equal(extracted(again, of_array(images, {})), result)
    assert len(calls) == 2
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    assert (extracted(again, of_array(changed, {}))[0] != result[0]).any() and len(calls) == 3
    other = Extractor(weights, devices, cache=tmp_path, batch_size=2, resize="half_pixel")
    assert np.abs(extracted(other, of_array(images, {})) - result).max() > 1e-3
    others = Extractor(
        inception_of(random_layers("64", seed=1), "b.npz"), devices, cache=tmp_path, batch_size=2
    )
    own = Extractor(others.weights, devices, batch_size=2)
    np.testing.assert_array_equal(*(extracted(x, of_array(images, {})) for x in (others, own)))
    for path in tmp_path.rglob("*_64.npy"):
        path.write_bytes(b"torn")
    with pytest.raises(EvaluationError, match="is damaged .*: delete it"):
        extracted(again, of_array(images, {}))


def test_extractor_refuses_in_one_line(weights: InceptionWeights) -> None:
    devices = Devices(jax.devices()[:1])
    with pytest.raises(EvaluationError, match="resize=bicubic: one of tf, half_pixel"):
        Extractor(weights, devices, resize="bicubic")
    with pytest.raises(
        EvaluationError,
        match="samples needs the 768 features of Inception, and three.npz ends at 64",
    ):
        next(Extractor(weights, devices).blocks(of_array(pictures(3), {}), ("768",), "samples"))
