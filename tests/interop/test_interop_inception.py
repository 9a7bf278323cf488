"""Inception-v3 2015-12-05 as a PyTorch function with batch norm unfolded, and the distance as pytorch-fid computes it.

Written from the published description of the checkpoint; nothing here is shared with ddpm_jax.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from ddpm_jax.evaluation.inception.network import WIDTHS, Inception
from ddpm_jax.evaluation.inception.resize import to_inception
from ddpm_jax.evaluation.inception.weights import load_inception
from ddpm_jax.evaluation.metrics.frechet import Gaussian, frechet_distance
from ddpm_jax.evaluation.metrics.moments import Moments
from ddpm_jax.weights.pickled import read_tensors

pytestmark = pytest.mark.interop
torch.set_num_threads(2)


class State(dict):
    """A checkpoint that makes itself up when first used, under pytorch-fid's names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, name: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        if name not in self:
            self[name] = low + (high - low) * torch.rand(shape, generator=self.random)
        return self[name]

    def conv(
        self, name: str, x: torch.Tensor, width: int, size=1, stride: int = 1, same: bool = True
    ) -> torch.Tensor:
        """BasicConv2d: convolution without bias, batch norm (epsilon 0.001) by its running moments, ReLU."""
        kernel = (size, size) if isinstance(size, int) else size
        bound = (6 / (x.shape[1] * kernel[0] * kernel[1])) ** 0.5
        weight = self.draw(f"{name}.conv.weight", (width, x.shape[1], *kernel), -bound, bound)
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        x = F.conv2d(x, weight, None, stride, padding)
        ends = {
            "running_mean": (-0.2, 0.2),
            "running_var": (0.6, 1.4),
            "weight": (0.8, 1.2),
            "bias": (-0.2, 0.2),
        }
        moments = [self.draw(f"{name}.bn.{part}", (width,), *two) for part, two in ends.items()]
        self.setdefault(f"{name}.bn.num_batches_tracked", torch.tensor(7))
        return F.relu(F.batch_norm(x, *moments, training=False, eps=0.001))


def mean_pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def block_a(v: State, m: str, x: torch.Tensor, pooled: int) -> torch.Tensor:
    fives = v.conv(f"{m}.branch5x5_2", v.conv(f"{m}.branch5x5_1", x, 48), 64, 5)
    threes = v.conv(f"{m}.branch3x3dbl_2", v.conv(f"{m}.branch3x3dbl_1", x, 64), 96, 3)
    threes = v.conv(f"{m}.branch3x3dbl_3", threes, 96, 3)
    return torch.cat(
        [
            v.conv(f"{m}.branch1x1", x, 64),
            fives,
            threes,
            v.conv(f"{m}.branch_pool", mean_pool(x), pooled),
        ],
        1,
    )


def block_b(v: State, m: str, x: torch.Tensor) -> torch.Tensor:
    threes = v.conv(f"{m}.branch3x3dbl_2", v.conv(f"{m}.branch3x3dbl_1", x, 64), 96, 3)
    threes = v.conv(f"{m}.branch3x3dbl_3", threes, 96, 3, 2, same=False)
    return torch.cat(
        [v.conv(f"{m}.branch3x3", x, 384, 3, 2, same=False), threes, F.max_pool2d(x, 3, 2)], 1
    )


def block_c(v: State, m: str, x: torch.Tensor, inner: int) -> list[torch.Tensor]:
    row, column = (1, 7), (7, 1)
    once = v.conv(f"{m}.branch7x7_2", v.conv(f"{m}.branch7x7_1", x, inner), inner, row)
    twice = v.conv(f"{m}.branch7x7dbl_1", x, inner)
    for number, kernel in ((2, column), (3, row), (4, column)):
        twice = v.conv(f"{m}.branch7x7dbl_{number}", twice, inner, kernel)
    return [
        v.conv(f"{m}.branch1x1", x, 192),
        v.conv(f"{m}.branch7x7_3", once, 192, column),
        v.conv(f"{m}.branch7x7dbl_5", twice, 192, row),
        v.conv(f"{m}.branch_pool", mean_pool(x), 192),
    ]


def block_d(v: State, m: str, x: torch.Tensor) -> torch.Tensor:
    threes = v.conv(f"{m}.branch3x3_2", v.conv(f"{m}.branch3x3_1", x, 192), 320, 3, 2, same=False)
    sevens = v.conv(f"{m}.branch7x7x3_2", v.conv(f"{m}.branch7x7x3_1", x, 192), 192, (1, 7))
    sevens = v.conv(
        f"{m}.branch7x7x3_4",
        v.conv(f"{m}.branch7x7x3_3", sevens, 192, (7, 1)),
        192,
        3,
        2,
        same=False,
    )
    return torch.cat([threes, sevens, F.max_pool2d(x, 3, 2)], 1)


def block_e(v: State, m: str, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    one = v.conv(f"{m}.branch3x3_1", x, 384)
    two = v.conv(f"{m}.branch3x3dbl_2", v.conv(f"{m}.branch3x3dbl_1", x, 448), 384, 3)
    forks = [
        v.conv(f"{m}.branch3x3_2{side}", one, 384, kernel)
        for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
    ]
    forks += [
        v.conv(f"{m}.branch3x3dbl_3{side}", two, 384, kernel)
        for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
    ]
    return torch.cat(
        [v.conv(f"{m}.branch1x1", x, 320), *forks, v.conv(f"{m}.branch_pool", pooled, 192)], 1
    )


def network(v: State, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every feature of images x [b,3,299,299]."""
    x = v.conv("Conv2d_1a_3x3", x, 32, 3, 2, same=False)
    x = v.conv("Conv2d_2a_3x3", x, 32, 3, same=False)
    x = first = F.max_pool2d(v.conv("Conv2d_2b_3x3", x, 64, 3), 3, 2)
    x = v.conv("Conv2d_4a_3x3", v.conv("Conv2d_3b_1x1", x, 80), 192, 3, same=False)
    x = second = F.max_pool2d(x, 3, 2)
    for block, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = block_a(v, f"Mixed_{block}", x, pooled)
    x = block_b(v, "Mixed_6a", x)
    for block, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        branches = block_c(v, f"Mixed_{block}", x, inner)
        if block == "6d":
            spatial = (
                branches[0][:, :7].permute(0, 2, 3, 1).flatten(1)
            )  # TensorFlow's order: channels last
        x = torch.cat(branches, 1)
    third = x
    x = block_d(v, "Mixed_7a", x)
    x = block_e(v, "Mixed_7b", x, mean_pool(x))
    x = block_e(v, "Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    means = {
        str(maps.shape[1]): F.adaptive_avg_pool2d(maps, 1).flatten(1)
        for maps in (first, second, third, x)
    }
    weight, bias = (
        v.draw("fc.weight", (1008, 2048), -0.05, 0.05),
        v.draw("fc.bias", (1008,), -0.5, 0.5),
    )
    return means | {"spatial": spatial, "logits": F.linear(means["2048"], weight, bias)}


def seen_by_pytorch(images: np.ndarray, resize: str) -> torch.Tensor:
    """pytorch-fid's input; or TensorFlow 1's, with the four neighbours of each position gathered one by one."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    if resize == "half_pixel":
        return (
            2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
        ).float()
    size = images.shape[1]
    position = torch.arange(299).double() * (size / 299)
    low = position.floor().long()
    high, share = (low + 1).clamp(max=size - 1), position - low
    rows = x[:, :, low] * (1 - share)[:, None] + x[:, :, high] * share[:, None]
    return (((rows[..., low] * (1 - share) + rows[..., high] * share) - 128) / 128).float()


@pytest.fixture(scope="module")
def state() -> State:
    v = State(3)
    with torch.no_grad():
        network(v, torch.zeros(1, 3, 299, 299))
    return v


@pytest.fixture(scope="module")
def path(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the older format of PyTorch, with the weights as parameters: what published files of that age look like."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(dict(state), path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("resize", ["tf", "half_pixel"])
def test_every_feature_is_pytorchs(state: State, path: Path, resize: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images[2] = np.arange(32, dtype=np.uint8)[:, None, None] * 8  # not all noise
    x = seen_by_pytorch(images, resize)
    ours = to_inception(jnp.asarray(images), resize)
    np.testing.assert_allclose(ours, x.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in network(state, x).items()}
    weights = load_inception(path, path.parent)
    assert set(weights.taps) == set(WIDTHS) == set(expected)
    found = jax.jit(Inception(tuple(WIDTHS)).apply)({"params": weights.params}, ours)
    for tap, features in expected.items():
        assert found[tap].shape == features.shape == (3, WIDTHS[tap])
        assert features.std(axis=0).max() > 0.01 * np.abs(features).max(), (
            f"{tap} does not tell images apart"
        )
        scale = np.abs(features).max()
        worst = np.abs(np.asarray(found[tap]) - features).max() / scale
        print(f"{resize} {tap}: largest difference {worst:.1e} of the largest feature")
        assert worst < 1e-4, tap


def test_speed_beside_pytorch(state: State, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 2048 features, in turns, so that whatever else the machine does falls on both."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    params = load_inception(path, path.parent).params
    ours = jax.jit(
        lambda x: (
            Inception(("2048",)).apply({"params": params}, to_inception(x, "tf"))["2048"].mean()
        )
    )

    def theirs(x: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return network(state, seen_by_pytorch(x, "tf"))["2048"].mean()

    rates: dict[str, list[float]] = {"jax": [], "torch": []}
    for turn in range(4):
        for name, run in (("jax", ours), ("torch", theirs)):
            started = time.monotonic()
            float(run(images))
            if turn:  # the first one compiles
                rates[name].append(len(images) / (time.monotonic() - started))
    with capsys.disabled():
        print(
            "\nfeatures/s: "
            + ", ".join(
                f"{name} {max(values):.1f} ({min(values):.1f})" for name, values in rates.items()
            )
        )
    assert max(rates["jax"]) > 0.3 * max(rates["torch"])


def test_files_of_both_formats_are_read_as_pytorch_reads_them(
    path: Path, state: State, tmp_path: Path
) -> None:
    """Parameters, buffers, integers, halves, views with strides and offsets, nested dicts."""
    base = torch.arange(24.0).reshape(4, 6)
    contents = {
        "model": {
            "view": base[1:, ::2],
            "transposed": base.T,
            "parameter": torch.nn.Parameter(base * 2),
            "half": base.half(),
            "count": torch.tensor(5),
            "empty": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]),
        },
        "list": [torch.ones(2, dtype=torch.float64), 3, "text"],
    }
    for new in (True, False):
        torch.save(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
        found = read_tensors(tmp_path / "x.pth")
        for name, tensor in contents["model"].items():
            array = found["model"][name]
            np.testing.assert_array_equal(array, tensor.detach().numpy())
            assert array.dtype == tensor.detach().numpy().dtype
        assert found["list"][1:] == [3, "text"]
    torch.save(dict(state), tmp_path / "new.pth")
    assert (
        load_inception(tmp_path / "new.pth", tmp_path).sha256
        == load_inception(path, tmp_path).sha256
    )


def test_distance_is_pytorch_fids() -> None:
    """Its formula, on the features of more and of fewer images than there are features."""
    for count in (400, 60):
        rng = np.random.default_rng(count)
        mixing = rng.normal(size=(96, 96)) / 10
        x, y = (
            np.maximum(rng.normal(size=(count, 96)) @ mixing + shift, 0).astype(np.float32)
            for shift in (0.2, 0.4)
        )
        (m1, s1), (m2, s2) = (
            (z.astype(np.float64).mean(0), np.cov(z.astype(np.float64), rowvar=False))
            for z in (x, y)
        )
        root = scipy.linalg.sqrtm(s1 @ s2)
        if not np.isfinite(root).all():  # singular product
            offset = np.eye(96) * 1e-6
            root = scipy.linalg.sqrtm((s1 + offset) @ (s2 + offset))
        expected = (m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
        found = frechet_distance(Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y)))
        print(f"{count} images: {found:.6f}, pytorch-fid {expected:.6f}")
        assert abs(found - expected) < 1e-3
