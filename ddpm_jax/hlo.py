"""What a compiled program says about itself: XLA's optimised HLO, read as text.

Everything is counted as often as it runs: the body of a loop as many times as the loop goes round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """`type` is the text of the result's type; `rest` is all that follows the opcode."""

    opcode: str
    type: str
    rest: str

    def called(self, *attributes: str) -> list[str]:
        found = (re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest) for name in attributes)
        return [name.lstrip("%") for match in found if match for name in re.findall(r"%?[\w.-]+", match[1])]


@dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of the whole value that the group holds: of an all-reduce its result, of an all-gather what is gathered.
      tensors: how many arrays it carries; more than one where the compiler combined several.
      dtypes: of the arrays, each once.
      group: chips that meet.
      times: how often a call of the program does it.
      strategy: how the compiler routes it; empty where it does not say.
    """

    kind: str
    bytes: int
    tensors: int
    dtypes: tuple[str, ...]
    group: int
    times: int
    strategy: str

    @property
    def sent(self) -> float:
        """Bytes that each chip must send, at least, all times together.

        (n-1)/n of the value for each of the phases: an all-reduce is a reduce-scatter and an all-gather.
        """
        phases = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.bytes * phases.get(self.kind, (self.group - 1) / self.group)


class Program:
    """The text of `Compiled.as_text()`.

    Args:
      devices: that the program runs on: the group of a collective that names none.
    """

    def __init__(self, text: str, devices: int) -> None:
        self._devices = devices
        self._computations, self._entry = _parse(text)
        self.endless: list[str] = []  # loops of unknown length, counted as one turn
        self._times: Counter[str] = Counter()
        self._fused: set[str] = set()
        self._visit(self._entry, 1)

    @cached_property
    def cycles(self) -> int:
        """The compiler's estimate for all operations of one call but the collectives, one after the other."""
        total = 0
        for name, instructions in self._computations.items():
            if name not in self._fused:  # a fusion carries the estimate of the whole
                estimates = (_CYCLES.search(instruction.rest) for instruction in instructions)
                total += self._times[name] * sum(int(match[1]) for match in estimates if match)
        return total

    @property
    def turns(self) -> int:
        """How often the innermost of its loops goes round in one call; 1 without loops."""
        return max(self._times.values())

    @cached_property
    def collectives(self) -> list[Collective]:
        return [
            self._collective(instruction, self._times[name])
            for name, instructions in self._computations.items()
            for instruction in instructions
            if self._times[name] and instruction.opcode.removesuffix("-start") in COLLECTIVES
        ]

    def _visit(self, name: str, times: int) -> None:
        self._times[name] += times
        for instruction in self._computations[name]:
            if instruction.opcode == "while":
                turns = self._turns(instruction)
                for part in instruction.called("condition", "body"):
                    self._visit(part, times * turns)
            elif instruction.opcode in ("fusion", "call", "async-start", "conditional"):
                attributes = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
                for part in instruction.called(*attributes):
                    if instruction.opcode == "fusion":
                        self._fused.add(part)
                    self._visit(part, times)

    def _turns(self, loop: Instruction) -> int:
        """As the compiler says, or the bound of `i < bound` where the condition is just that."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        (condition,) = loop.called("condition")
        instructions = self._computations[condition]
        bounds = [i.rest for i in instructions if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)]
        compares = [i.rest for i in instructions if i.opcode == "compare"]
        if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0]:
            return int(bounds[0].partition(")")[0])
        self.endless.append(condition)
        return 1

    def _collective(self, instruction: Instruction, times: int) -> Collective:
        kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
        shapes = _ARRAY.findall(instruction.type)
        if started and kind != "all-reduce":
            # The type is (operands, results, ...), each an array or as many of them; what else there is are scalars.
            shapes = [shape for shape in shapes if shape[1]]
            shapes = shapes[len(shapes) // 2 :]
        group = self._group(instruction.rest)
        size = sum(array_bytes(*shape) for shape in shapes) * (group if kind == "reduce-scatter" else 1)
        strategy = re.search(r'"strategy":"(\w+)"', instruction.rest)
        dtypes = tuple(sorted({dtype for dtype, _ in shapes}))
        return Collective(kind, size, len(shapes), dtypes, group, times, strategy[1] if strategy else "")

    def _group(self, rest: str) -> int:
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):  # groups x chips of each
            return int(match[1])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return match[1].count(",") + 1
        return self._devices


def array_bytes(dtype: str, dimensions: str) -> int:
    """Of one array, `f32` and `3,3,128,256`, without the padding of its layout."""
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8  # pred
    return math.ceil(math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the first to run. ValueError if there is none."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if line[:1].isspace():
            if match := _INSTRUCTION.match(line):
                end = _end_of_type(line, match.end())
                if opcode := _OPCODE.match(line, end):
                    current.append(Instruction(opcode[1], line[match.end() : end], line[opcode.end() :]))
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return computations, entry


def _end_of_type(line: str, start: int) -> int:
    """A tuple ends where its parenthesis closes, an array at the next space."""
    if line[start] != "(":
        return line.index(" ", start)
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is never closed: {line.strip()[:80]}")
