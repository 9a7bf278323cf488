"""Read Inception-v3 2015-12-05 from the files it is published in.

Batch norm is folded into kernel and bias.

  .pth   pytorch-fid's pt_inception-2015-12-05-6726825d.pth, which is also torch-fidelity's
  .pb    the frozen TensorFlow graph, classify_image_graph_def.pb of inception-2015-12-05.tgz
  .npz   NAME/kernel (HWIO) and NAME/bias, folded already, in the names of `network.py`; the later
         layers may be missing

Neither PyTorch nor TensorFlow is needed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import message

from ddpm_jax.errors import EvaluationError
from ddpm_jax.files import NpzError, open_file, open_npz
from ddpm_jax.weights.pickled import read_tensors

Layers = dict[str, dict[str, np.ndarray]]
_EPSILON = 1e-3  # of the batch norm
MOST_NUMBERS = 2**24  # in one constant; the largest of Inception has 2,064,384


def fold(
    kernel: np.ndarray,
    mean: Any,
    variance: Any,
    offset: Any,
    scale: Any = 1.0,
    epsilon: float = _EPSILON,
) -> dict:
    """Fold a batch norm into the convolution before it, in float64.

        scale (conv(x, kernel) - mean) / sqrt(variance + epsilon) + offset

    Args:
      kernel: HWIO.

    Returns:
      The kernel and bias of one convolution that computes this.
    """
    scale = np.asarray(scale, np.float64) / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    return {"kernel": kernel * scale, "bias": offset - mean * scale}


def read_npz(path: Path) -> Layers:
    """Read folded layers; EvaluationError for a damaged file."""
    try:
        with open_npz(path) as file:
            layers: Layers = {}
            for name in file.files:
                layer, _, part = name.rpartition("/")
                layers.setdefault(layer, {})[part] = file[name]
    except NpzError as error:
        raise EvaluationError(f"inception={error}: fetch it again") from error
    return {layer: parts for layer, parts in layers.items() if set(parts) == {"kernel", "bias"}}


def read_pytorch(path: Path) -> Layers:
    """Read pytorch-fid's weights; EvaluationError for others, WeightsError for a damaged file."""
    state = read_tensors(path)
    if not isinstance(state, dict) or "Conv2d_1a_3x3.conv.weight" not in state:
        raise EvaluationError(
            f"inception={path} is not pytorch-fid's Inception: it has no Conv2d_1a_3x3.conv.weight"
        )
    layers = {}
    for layer, name in _pytorch_names().items():
        if f"{name}.conv.weight" in state:
            norm = [
                state[f"{name}.bn.{part}"]
                for part in ("running_mean", "running_var", "bias", "weight")
            ]
            layers[layer] = fold(state[f"{name}.conv.weight"].transpose(2, 3, 1, 0), *norm)
    if "fc.weight" in state:
        layers["softmax"] = {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]}
    return layers


def _pytorch_names() -> dict[str, str]:
    """Return {layer: torchvision's name of it, without .conv and .bn}."""

    def chain(tower: str, branch: str, length: int) -> dict[str, str]:
        return {
            f"{tower}_conv" + (f"_{i}" if i else ""): f"{branch}_{i + 1}" for i in range(length)
        }

    ends = {"conv": "branch1x1", "tower_2_conv": "branch_pool"}
    block_35 = ends | chain("tower", "branch5x5", 2) | chain("tower_1", "branch3x3dbl", 3)
    to_17 = {"conv": "branch3x3"} | chain("tower", "branch3x3dbl", 3)
    block_17 = ends | chain("tower", "branch7x7", 3) | chain("tower_1", "branch7x7dbl", 5)
    to_8 = chain("tower", "branch3x3", 2) | chain("tower_1", "branch7x7x3", 4)
    block_8 = ends | chain("tower", "branch3x3", 1) | chain("tower_1", "branch3x3dbl", 2)
    for tower, branch in (("tower", "branch3x3_2"), ("tower_1", "branch3x3dbl_3")):
        block_8 |= {f"{tower}_mixed_conv": f"{branch}a", f"{tower}_mixed_conv_1": f"{branch}b"}
    blocks = dict(zip(("5b", "5c", "5d"), [block_35] * 3))
    blocks |= {"6a": to_17} | dict(zip(("6b", "6c", "6d", "6e"), [block_17] * 4))
    blocks |= {"7a": to_8} | dict(zip(("7b", "7c"), [block_8] * 2))

    stem = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
    names = {"conv" + (f"_{i}" if i else ""): f"Conv2d_{name}" for i, name in enumerate(stem)}
    for number, (block, layers) in enumerate(blocks.items()):
        prefix = f"mixed_{number}" if number else "mixed"
        names |= {f"{prefix}_{layer}": f"Mixed_{block}.{name}" for layer, name in layers.items()}
    return names


def read_graph(path: Path) -> Layers:
    """Read the frozen graph; EvaluationError for a damaged or another one."""
    from tensorboard.compat.proto import graph_pb2  # TensorFlow's own description of its graphs

    graph = graph_pb2.GraphDef()
    try:
        with open_file(path) as file:
            graph.ParseFromString(file.read())
    except message.DecodeError as error:
        raise EvaluationError(
            f"inception={path} is damaged or no frozen TensorFlow graph: fetch it again"
        ) from error
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> np.ndarray:
        if name not in nodes or nodes[name].op != "Const":
            raise EvaluationError(
                f"inception={path} is not the graph of 2015-12-05: it has no constant {name}"
            )
        tensor = nodes[name].attr["value"].tensor
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        flat = (
            np.frombuffer(tensor.tensor_content, "<f4")
            if tensor.tensor_content
            else np.array(tensor.float_val, np.float32)
        )
        if min(shape, default=0) < 0 or math.prod(shape) > MOST_NUMBERS:
            raise EvaluationError(f"inception={path}: constant {name} of shape {shape}")
        try:
            return np.broadcast_to(flat, shape) if len(flat) == 1 else flat.reshape(shape)
        except ValueError as error:
            raise EvaluationError(f"inception={path}: constant {name}: {error}") from error

    layers = {}
    for name in nodes:
        scope = name.removesuffix("/conv2d_params")
        if scope == name:
            continue
        norm = nodes[f"{scope}/batchnorm"].attr if f"{scope}/batchnorm" in nodes else {}
        parts = [
            constant(f"{scope}/batchnorm/{part}")
            for part in ("moving_mean", "moving_variance", "beta")
        ]
        scaled = "scale_after_normalization" not in norm or norm["scale_after_normalization"].b
        gamma = constant(f"{scope}/batchnorm/gamma") if scaled else 1.0
        epsilon = norm["variance_epsilon"].f if "variance_epsilon" in norm else _EPSILON
        layers[scope.replace("/", "_")] = fold(constant(name), *parts, gamma, epsilon)
    layers["softmax"] = {"kernel": constant("softmax/weights"), "bias": constant("softmax/biases")}
    return layers


READERS = {".pth": read_pytorch, ".pb": read_graph, ".npz": read_npz}
