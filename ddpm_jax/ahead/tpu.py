"""Read off a program compiled for TPUs what it costs: memory, exchanges, estimates of time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax

from ddpm_jax.ahead.hlo import Collective, Program
from ddpm_jax.ahead.memory import Memory, gib
from ddpm_jax.ahead.topology import Topology


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program: figures of one call on one chip.

    Attributes:
      flops: all that is computed, element by element operations included. The compiler counts the
        body of a loop once; here its count is multiplied by the turns, as if all of the program
        were in the loop.
      cycles: estimated for everything but the collectives, one operation after the other.
      endless: loops of unknown length, which `cycles` and `collectives` count as one turn.
      seconds: that compiling took.
    """

    memory: Memory
    flops: float
    cycles: int
    collectives: list[Collective]
    endless: list[str]
    seconds: float


def read(executable: jax.stages.Compiled, chips: int, seconds: float) -> Compiled:
    """Read what a compiled program says of itself.

    Args:
      chips: that it runs on.
      seconds: that compiling took.
    """
    program = Program(executable.as_text(), chips)
    return Compiled(
        Memory.of(executable),
        executable.cost_analysis()["flops"] * program.turns,
        program.cycles,
        program.collectives,
        program.endless,
        seconds,
    )


def figures(
    compiled: Compiled, topology: Topology, images_per_chip: int, flops_per_image: int
) -> dict[str, Any]:
    """Return the figures of one program, ready for JSON.

    compute_seconds are the compiler's cycles over the clock. collective_seconds is a bound from
    below: the bytes that each chip must send, over the links of the chip with the fewest. Nothing
    is taken to overlap. mfu is `flops_per_image` over what the chip's matrix units could do in
    that time.

    Args:
      flops_per_image: of the network's convolutions and matrix products.
    """
    chip, reductions = topology.chip, [c for c in compiled.collectives if c.kind == "all-reduce"]
    operations = sum(c.times for c in reductions)
    tensors = sum(c.times * c.tensors for c in reductions)
    compute = compiled.cycles / chip.clock
    exchange = (
        sum(c.sent for c in compiled.collectives) / topology.egress if topology.chips > 1 else 0.0
    )
    seconds, work = compute + exchange, flops_per_image * images_per_chip
    return {
        "memory": {**asdict(compiled.memory), "hbm": chip.hbm},
        "flops": {"compiled": round(compiled.flops), "model": work},
        "collectives": [asdict(c) for c in compiled.collectives],
        "all_reduce": {
            "operations": operations,
            "tensors": tensors,
            "bytes": sum(c.times * c.bytes for c in reductions),
            "dtypes": sorted({dtype for c in reductions for dtype in c.dtypes}),
            "combined": operations < tensors,
        },
        "estimate": {
            "compute_seconds": compute,
            "collective_seconds": exchange,
            "seconds": seconds,
            "images_per_second_per_chip": images_per_chip / seconds,
            "images_per_second": topology.chips * images_per_chip / seconds,
            "mfu": work / (seconds * chip.peak),
            "loops_of_unknown_length": compiled.endless,
        },
        "compile_seconds": round(compiled.seconds, 1),
    }


def rate(value: float) -> str:
    """Write images a second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def words(report: dict[str, Any]) -> str:
    """Write a few lines for people about a program."""
    memory, flops = report["memory"], report["flops"]
    estimate, steps = report["estimate"], report["steps"]
    lines = [
        f"{report['what']} on {report['topology']}: {report['chips']} chips, "
        f"batch {report['batch_size']:,}, {report['images_per_chip']} images a chip "
        f"(compiled in {report['compile_seconds']:.0f} s)",
        f"  memory       {gib(memory['peak'])} of {gib(memory['hbm'])} GiB a chip: "
        f"arguments {gib(memory['arguments'])}, outputs {gib(memory['outputs'])} "
        f"({gib(memory['aliased'])} in place of arguments), "
        f"temporaries {gib(memory['temporaries'])}, code {gib(memory['code'])}",
        f"  operations   {flops['compiled'] / 1e9:,.1f} GFLOP a chip; "
        f"{flops['model'] / 1e9:,.1f} of the network alone",
    ]
    lines += [
        f"  {c['kind']:<12} {c['times']} x {c['bytes'] / 1e6:,.4g} MB, {c['tensors']} tensors of "
        f"{', '.join(c['dtypes'])}, among {c['group']} chips"
        for c in report["collectives"]
    ] or ["  collectives  none"]
    if report["all_reduce"]["operations"]:
        lines.append(f"  gradients    {gradients(report['all_reduce'])}")
    milliseconds = {
        name: 1e3 * estimate[f"{name}seconds"] for name in ("compute_", "collective_", "")
    }
    each = f" for {steps} steps, {milliseconds[''] / steps:.2f} each" if steps > 1 else " a step"
    lines.append(
        f"  estimate     {milliseconds['']:,.1f} ms{each}: "
        f"{milliseconds['compute_']:,.1f} of operations, "
        f"at least {milliseconds['collective_']:,.1f} of collectives"
    )
    lines.append(
        f"  rate         {rate(estimate['images_per_second_per_chip'])} images/s a chip, "
        f"{rate(estimate['images_per_second'])} on all; MFU {estimate['mfu']:.0%}"
    )
    if estimate["loops_of_unknown_length"]:
        lines.append(
            "  too low: loops of unknown length, "
            f"{', '.join(estimate['loops_of_unknown_length'])}, counted as one turn"
        )
    return "\n".join(lines)


def gradients(all_reduce: dict[str, Any]) -> str:
    """Say whether the gradients travel together, and as what: "combined, 295 tensors in 2, f32"."""
    how = "combined" if all_reduce["combined"] else "NOT combined"
    dtypes = ", ".join(all_reduce["dtypes"])
    return f"{how}, {all_reduce['tensors']} tensors in {all_reduce['operations']}, {dtypes}"


HEAD = (
    *("config", "slice", "chips", "batch", "a chip", "memory, GiB", "temporaries"),
    *("all-reduce, MB", "gradients", "ms a step", "of it collectives", "images/s a chip"),
    *("images/s", "MFU"),
)


def row(config: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a program under HEAD."""
    memory, estimate, reduce = report["memory"], report["estimate"], report["all_reduce"]
    return (
        f"{config}, {report['what']}",
        report["topology"],
        f"{report['chips']}",
        f"{report['batch_size']:,}",
        f"{report['images_per_chip']}",
        f"{gib(memory['peak'])} of {gib(memory['hbm'])}",
        gib(memory["temporaries"]),
        f"{reduce['bytes'] / 1e6:,.1f}" if reduce["operations"] else "none",
        f"{reduce['tensors']} in {reduce['operations']}, {reduce['dtypes'][0]}"
        if reduce["operations"]
        else "",
        f"{1e3 * estimate['seconds'] / report['steps']:.1f}",
        f"{1e3 * estimate['collective_seconds'] / report['steps']:.1f}",
        rate(estimate["images_per_second_per_chip"]),
        rate(estimate["images_per_second"]),
        f"{estimate['mfu']:.0%}",
    )
