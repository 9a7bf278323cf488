"""Count what a program for GPUs launches and multiplies, in the HLO text of what was compiled.

A launch is whatever the host, or a graph, hands to the GPU: a kernel, a call of a library, a copy,
an exchange between GPUs. Counts are those of one step. A program of one step has no loop over
steps; a chain of 1,000 has one, and what stands outside of it is counted apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ddpm_jax.ahead.hlo import COLLECTIVES, Instruction, Program

CONVOLUTIONS = {
    "__cudnn$convForward": "forward",
    "__cudnn$convBiasActivationForward": "forward",
    "__cudnn$convForwardGraph": "forward",
    "__cudnn$convBackwardFilter": "filter gradient",
    "__cudnn$convBackwardInput": "input gradient",
}
SMALL = 4096  # elements: a kernel that writes no more is done before the next one is launched

# What takes no time of the GPU: names for memory, and calls, whose insides are counted.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("add-dependency", "opt-barrier", "domain", "while", "call", "conditional", "async-start"),
}
_KINDS = {
    "fusion": "fusions",
    "copy": "copies",
    "partition-id": "memsets",  # the number of the GPU is written into memory
    "replica-id": "memsets",
    **{name: "collectives" for name in COLLECTIVES},
}
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_LAYOUT = re.compile(r"\w+\[[\d,]*\]\{([\d,]+)")
_CONTRACTED = re.compile(
    r'lhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([^\]]*)\]'
)


@dataclass(frozen=True)
class Convolution:
    """One kind of convolution of a program.

    Attributes:
      kind: a value of CONVOLUTIONS, or "other" for one that is no call of cuDNN.
      dtype: of what is multiplied.
      layout: of the images in memory, as NHWC.
      bias: whether the bias is added in the same call.
    """

    kind: str
    dtype: str
    layout: str
    bias: bool


@dataclass(frozen=True)
class Counts:
    """What one step of a program for GPUs consists of.

    Attributes:
      launches: how many of each kind: fusions (kernels that XLA generates), convolutions and
        matrix_products (calls of libraries), copies, collectives, memsets, others by their name.
      small: launches that write SMALL elements or fewer.
      outside: launches of a call that belong to no step.
      convolutions: how many of each kind.
      collectives: entries {"kind", "dtypes", "group", "count", "asynchronous", "bytes"}, where
        bytes are those of all `count` together.
      products: 2 a multiplication, of convolutions and matrix products.
    """

    launches: dict[str, int]
    small: int
    outside: int
    convolutions: dict[Convolution, int]
    collectives: list[dict[str, Any]]
    products: int


def count(program: Program, steps: int) -> Counts:
    """Count what a step of `program` consists of.

    Args:
      steps: of one call of the program.
    """
    scope = _Step(program, steps)
    launches: Counter[str] = Counter()
    convolutions: Counter[Convolution] = Counter()
    small = outside = 0
    for computation, instruction, times in program.run():
        kind = kind_of(instruction)
        if kind is None:
            continue
        if computation not in scope:
            outside += times
            continue
        launches[kind] += times
        small += times * (elements(instruction) <= SMALL)
        if kind == "convolutions":
            convolutions[_convolution(program, computation, instruction)] += times
    return Counts(
        {kind: scope.share(number) for kind, number in sorted(launches.items())},
        scope.share(small),
        outside,
        {kind: scope.share(number) for kind, number in convolutions.items()},
        _collectives(program, scope),
        scope.share(sum(_products(program, scope))),
    )


class _Step:
    """The computations of a program that belong to its steps.

    They are the body of the loop with as many turns; all of the program, where there is none.
    """

    def __init__(self, program: Program, steps: int) -> None:
        self._inside = program.inside(steps) if steps > 1 else set()
        self._steps = steps

    def __contains__(self, computation: str) -> bool:
        return not self._inside or computation in self._inside

    def share(self, number: int) -> int:
        return -(-number // self._steps)


def kind_of(instruction: Instruction) -> str | None:
    """Return the kind of launch that an instruction is, None if it is none.

    What has no kind of its own keeps its name: a new instruction is counted rather than lost.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode in _NOTHING or opcode.endswith(("-done", "-update")):
        return None
    if opcode == "convolution":
        return "convolutions"
    if opcode == "custom-call":
        target = target_of(instruction)
        if target in CONVOLUTIONS:
            return "convolutions"
        return "matrix_products" if target.startswith("__cublas$") else target
    return _KINDS.get(opcode, opcode)


def target_of(instruction: Instruction) -> str:
    """Return the function that a custom-call calls; empty for other instructions."""
    match = _TARGET.search(instruction.rest)
    return match[1] if match else ""


def elements(instruction: Instruction) -> int:
    """Return the elements that an instruction writes, over all its results.

    A library's room to work in, the second result of its call, is left out.
    """
    arrays = instruction.arrays[:1] if target_of(instruction) else instruction.arrays
    return sum(math.prod(_sizes(shape)) for _, shape in arrays)


def _convolution(program: Program, computation: str, instruction: Instruction) -> Convolution:
    kind = CONVOLUTIONS.get(target_of(instruction), "other")
    operands = [program.operand(computation, name) for name in instruction.operands]
    images = instruction if kind == "input gradient" else operands[0]
    labels = _LABELS.search(instruction.rest)
    layout = _LAYOUT.search(images.type)
    order = [int(axis) for axis in reversed(layout[1].split(","))] if layout else []
    letters = {"b": "N", "f": "C"} | dict(zip("012", "HWD" if "2" not in labels[1] else "DHW"))
    bias = "BiasActivation" in target_of(instruction)
    return Convolution(
        kind, operands[0].arrays[0][0], "".join(letters[labels[1][axis]] for axis in order), bias
    )


def _products(program: Program, scope: _Step) -> Iterator[int]:
    """List the products of whatever multiplies matrices or images, in all steps."""
    for computation, instruction, times in program.run(fused=True):
        if computation in scope:
            target = target_of(instruction) if instruction.opcode.startswith("custom-call") else ""
            if target in CONVOLUTIONS or instruction.opcode == "convolution":
                yield times * _convolution_products(program, computation, instruction)
            elif target.startswith("__cublas$") or instruction.opcode == "dot":
                match = _CONTRACTED.search(instruction.rest)
                axes = re.findall(r"\d+", match[1] or match[2] or "")
                first = program.operand(computation, instruction.operands[0])
                sizes = _sizes(first.arrays[0][1])
                inner = math.prod(sizes[int(axis)] for axis in axes)
                outer = math.prod(_sizes(instruction.arrays[0][1]))
                yield times * 2 * outer * inner


def _convolution_products(program: Program, computation: str, instruction: Instruction) -> int:
    """Count 2 a multiplication, those with zero padding included, as `network.flops` does.

    The gradients take as many as the convolution itself: an element of its result meets each
    element of the kernel that leads to its feature.
    """
    kind = CONVOLUTIONS.get(target_of(instruction), "other")
    first, second = (program.operand(computation, name) for name in instruction.operands[:2])
    result, kernel = {
        "filter gradient": (second, instruction),
        "input gradient": (first, second),
    }.get(kind, (instruction, second))
    sizes = _sizes(kernel.arrays[0][1])
    features = sizes[_LABELS.search(instruction.rest)[2].index("o")]
    return 2 * math.prod(_sizes(result.arrays[0][1])) * math.prod(sizes) // features


def _collectives(program: Program, scope: _Step) -> list[dict[str, Any]]:
    """Group the exchanges of a step by what they do, with what, and among how many GPUs."""
    counts: Counter[tuple[Any, ...]] = Counter()
    bytes_: Counter[tuple[Any, ...]] = Counter()
    for computation, instruction, collective in program.exchanges():
        if computation in scope:
            key = (
                collective.kind,
                collective.dtypes,
                collective.group,
                instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.rest,
            )
            counts[key] += collective.times
            bytes_[key] += collective.times * collective.bytes
    return [
        {
            "kind": kind,
            "dtypes": list(dtypes),
            "group": group,
            "asynchronous": asynchronous,
            "count": scope.share(counts[kind, dtypes, group, asynchronous]),
            "bytes": scope.share(bytes_[kind, dtypes, group, asynchronous]),
        }
        for kind, dtypes, group, asynchronous in counts
    ]


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split(",") if size]
