"""Read what a compiled program says about itself: XLA's optimised HLO, as text.

Everything is counted as often as it runs: the body of a loop as many times as the loop goes round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FUSIONS = ("fusion", "fusion-start")
_FUSION = re.compile(r"^\s+(?:ROOT )?%\S+ = .* fusion(?:-start)?\(", re.MULTILINE)
# Where an instruction names what it runs. Others, as a reduction's to_apply, are parts of it.
_CALLS = {
    "while": ("condition", "body"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "async-start": ("calls",),
    "fusion": ("calls",),
    "fusion-start": ("calls",),
}
_PARENTHESES = re.compile(r"[()]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: of its result.
      opcode: what it does.
      type: the text of the result's type.
      rest: all that follows the opcode.
    """

    name: str
    opcode: str
    type: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Return the names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest[: _end_of_parentheses("(" + self.rest, 0) - 1])

    @property
    def calls(self) -> list[str]:
        """Return the names of the computations that it runs."""
        return self.called(*_CALLS.get(self.opcode, ()))

    @property
    def arrays(self) -> list[tuple[str, str]]:
        """Return the arrays of the result, each as ("f32", "3,3,128,256")."""
        return _ARRAY.findall(self.type)

    def called(self, *attributes: str) -> list[str]:
        """Return the names of the computations that stand in these attributes."""
        matches = (
            re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest) for name in attributes
        )
        return [
            name.lstrip("%")
            for match in matches
            if match
            for name in re.findall(r"%?[\w.-]+", match[1])
        ]


@dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of the whole value that the group holds: of an all-reduce its result, of an all-gather
        what is gathered.
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
        """Return the bytes that each chip must send, at least, all times together.

        Each phase sends (n-1)/n of the value; an all-reduce has two, a reduce-scatter and an
        all-gather.
        """
        phases = {
            "all-reduce": 2 * (self.group - 1) / self.group,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }
        return self.times * self.bytes * phases.get(self.kind, (self.group - 1) / self.group)


class Program:
    """A compiled program, of the text of `Compiled.as_text()`.

    Args:
      devices: that the program runs on: the group of a collective that names none.

    Attributes:
      endless: loops of unknown length, counted as one turn.
      fusions: fusions in the text, each once, those inside others included.

    Raises:
      ValueError: the text is not that of a module, or not all of its fusions were read.
    """

    def __init__(self, text: str, devices: int) -> None:
        self._devices = devices
        self._computations, self._entry = _parse(text)
        self.endless: list[str] = []
        self._times: Counter[str] = Counter()
        self._fused: set[str] = set()
        self._idle: set[str] = set()  # conditions of loops whose turns the compiler knows
        self._bodies: list[tuple[str, int]] = []
        self._visit(self._entry, 1)
        self.fusions = sum(
            i.opcode in _FUSIONS for part in self._computations.values() for i in part
        )
        # Whoever trips over one type of one line counts too few without knowing.
        if self.fusions != (count := len(_FUSION.findall(text))):
            raise ValueError(f"{self.fusions} fusions were read of a text that has {count}")

    def operand(self, computation: str, name: str) -> Instruction:
        """Return the instruction of a computation whose result has this name."""
        return self._by_name[computation][name]

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {
            computation: {instruction.name: instruction for instruction in instructions}
            for computation, instructions in self._computations.items()
        }

    def run(self, *, fused: bool = False) -> Iterator[tuple[str, Instruction, int]]:
        """List what runs: (computation, instruction, how often in a call).

        The condition of a loop whose turns the compiler knows is not evaluated, and not listed.

        Args:
          fused: list the insides of fusions as well.
        """
        hidden = self._idle if fused else self._idle | self._fused
        for name, instructions in self._computations.items():
            if self._times[name] and name not in hidden:
                yield from ((name, instruction, self._times[name]) for instruction in instructions)

    def inside(self, turns: int) -> set[str]:
        """Return the computations that run in loops of so many turns, fusions included."""
        waiting, reached = [body for body, count in self._bodies if count == turns], set()
        while waiting:
            if (name := waiting.pop()) not in reached:
                reached.add(name)
                waiting += [part for i in self._computations[name] for part in i.calls]
        return reached

    @cached_property
    def cycles(self) -> int:
        """Return the compiler's estimate for one call, one operation after the other.

        Collectives are not in it.
        """
        total = 0
        for name, instructions in self._computations.items():
            if name not in self._fused:  # a fusion carries the estimate of the whole
                estimates = (_CYCLES.search(instruction.rest) for instruction in instructions)
                total += self._times[name] * sum(int(match[1]) for match in estimates if match)
        return total

    @property
    def turns(self) -> int:
        """Return how often the innermost loop goes round in one call; 1 without loops."""
        return max(self._times.values())

    @cached_property
    def collectives(self) -> list[Collective]:
        """Return the exchanges between chips that a call makes."""
        return [collective for _, _, collective in self.exchanges()]

    def exchanges(self) -> Iterator[tuple[str, Instruction, Collective]]:
        """List the exchanges of a call, each with its computation and its instruction."""
        for name, instructions in self._computations.items():
            for instruction in instructions:
                if self._times[name] and instruction.opcode.removesuffix("-start") in COLLECTIVES:
                    yield name, instruction, self._collective(instruction, self._times[name])

    def _visit(self, name: str, times: int, fused: bool = False) -> None:
        self._times[name] += times
        if fused:
            self._fused.add(name)
        for instruction in self._computations[name]:
            turns = 1
            if instruction.opcode == "while":
                turns = self._turns(instruction)
                self._bodies += [(body, turns) for body in instruction.called("body")]
                if _TURNS.search(instruction.rest):
                    self._idle.update(instruction.called("condition"))
            for part in instruction.calls:
                self._visit(part, times * turns, fused or instruction.opcode in _FUSIONS)

    def _turns(self, loop: Instruction) -> int:
        """Return the turns of a loop.

        The compiler says it, or it is the bound of `i < bound` where the condition is just that.
        """
        if match := _TURNS.search(loop.rest):
            return int(match[1])
        (condition,) = loop.called("condition")
        instructions = self._computations[condition]
        bounds = [
            i.rest
            for i in instructions
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
        ]
        compares = [i.rest for i in instructions if i.opcode == "compare"]
        if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0]:
            return int(bounds[0].partition(")")[0])
        self.endless.append(condition)
        return 1

    def _collective(self, instruction: Instruction, times: int) -> Collective:
        kind = instruction.opcode.removesuffix("-start")
        is_start = kind != instruction.opcode
        shapes = _ARRAY.findall(instruction.type)
        if is_start and kind != "all-reduce":
            # The type is (operands, results, ...), each an array or as many of them; what else
            # there is are scalars.
            shapes = [shape for shape in shapes if shape[1]]
            shapes = shapes[len(shapes) // 2 :]
        group = self._group(instruction.rest)
        size = sum(array_bytes(*shape) for shape in shapes) * (
            group if kind == "reduce-scatter" else 1
        )
        strategy = re.search(r'"strategy":"(\w+)"', instruction.rest)
        dtypes = tuple(sorted({dtype for dtype, _ in shapes}))
        return Collective(
            kind, size, len(shapes), dtypes, group, times, strategy[1] if strategy else ""
        )

    def _group(self, rest: str) -> int:
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):  # groups x chips of each
            return int(match[1])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return match[1].count(",") + 1
        return self._devices


def array_bytes(dtype: str, dimensions: str) -> int:
    """Return the bytes of one array, `f32` and `3,3,128,256`, without its layout's padding."""
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8  # pred
    return math.ceil(math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Read the instructions of each computation, and the name of the first to run.

    Raises:
      ValueError: there is none.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if line[:1].isspace():
            if match := _INSTRUCTION.match(line):
                end = _end_of_type(line, match.end())
                if opcode := _OPCODE.match(line, end):
                    current.append(
                        Instruction(
                            match[1], opcode[1], line[match.end() : end], line[opcode.end() :]
                        )
                    )
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return computations, entry


def _end_of_type(line: str, start: int) -> int:
    """Return where a type ends: a tuple at its closing parenthesis, an array at the next space."""
    return _end_of_parentheses(line, start) if line[start] == "(" else line.index(" ", start)


def _end_of_parentheses(text: str, start: int) -> int:
    """Return the position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESES.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is never closed: {text.strip()[:80]}")
