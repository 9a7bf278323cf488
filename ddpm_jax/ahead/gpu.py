"""Read off a program compiled for GPUs what it consists of: memory, launches, products.

There is no time among it. XLA's cost model is for the choice between programs, and says nothing
that could be published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax

from ddpm_jax.ahead.hlo import Program
from ddpm_jax.ahead.launches import CONVOLUTIONS, SMALL, Counts, count
from ddpm_jax.ahead.memory import Memory, OutOfMemory, gib
from ddpm_jax.ahead.topology import GpuTopology

POOL = 0.75  # the share of a GPU's memory that JAX takes by itself


@dataclass(frozen=True)
class Compiled:
    """What a program for GPUs is: figures of one GPU.

    Attributes:
      counts: of one step.
      endless: loops of unknown length, counted as one turn.
    """

    memory: Memory
    counts: Counts
    endless: list[str]


def read(executable: jax.stages.Compiled, topology: GpuTopology, steps: int) -> Compiled:
    """Read what a compiled program consists of.

    Args:
      steps: of one call of the program.

    Raises:
      OutOfMemory: it needs more memory than a GPU has. The compiler does not mind.
    """
    memory = Memory.of(executable)
    if memory.peak > topology.memory:
        raise OutOfMemory(f"{gib(memory.peak)} GiB", memory.peak)
    program = Program(executable.as_text(), topology.chips)
    return Compiled(memory, count(program, steps), program.endless)


def figures(
    compiled: Compiled, topology: GpuTopology, images_per_gpu: int, flops_per_image: int
) -> dict[str, Any]:
    """Return the figures of one program, ready for JSON.

    All but the memory are those of one step on one GPU.

    Args:
      flops_per_image: of the network's convolutions and matrix products in one step.
    """
    counts, memory = compiled.counts, asdict(compiled.memory)
    return {
        "peak_bytes": memory.pop("peak"),
        "device_bytes": topology.memory,
        "memory": memory,
        "launches": sum(counts.launches.values()),
        "launches_by_kind": counts.launches,
        "small_launches": counts.small,
        "launches_outside_steps": counts.outside,
        "convolutions": [
            asdict(convolution) | {"count": number}
            for convolution, number in counts.convolutions.items()
        ],
        "collectives": counts.collectives,
        "flops": {"compiled": counts.products, "model": flops_per_image * images_per_gpu},
        "loops_of_unknown_length": compiled.endless,
    }


def words(report: dict[str, Any]) -> str:
    """Write a few lines for people about a program."""
    memory, flops = report["memory"], report["flops"]
    peak, device = report["peak_bytes"], report["device_bytes"]
    step = {"train": "a training step", "sample": "a denoising step"}.get(
        report["what"], "a term of the bound"
    )
    gpus = f"{report['chips']} GPU{'s' * (report['chips'] > 1)}"
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in report["launches_by_kind"].items())
    lines = [
        f"{report['what']} on {report['target']}: {gpus}, "
        f"batch {report['batch_size']:,}, {report['images_per_chip']:,} images a GPU",
        f"  memory       {gib(peak)} of {gib(device)} GiB a GPU: "
        f"arguments {gib(memory['arguments'])}, outputs {gib(memory['outputs'])} "
        f"({gib(memory['aliased'])} in place of arguments), "
        f"temporaries {gib(memory['temporaries'])}; libraries take more",
        f"  launches     {report['launches']:,} {step}: {kinds}",
        f"               {report['small_launches']:,} of them write {SMALL:,} elements or fewer",
        f"  products     {flops['compiled'] / 1e9:,.1f} GFLOP {step} and GPU; "
        f"{flops['model'] / 1e9:,.1f} of the network alone",
    ]
    if peak > POOL * device:
        share = f"more than the {POOL:.0%} that JAX takes by itself"
        lines.insert(2, f"               {share}: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95")
    if report["steps"] > 1:
        outside = f"{report['launches_outside_steps']:,} more a call of {report['steps']:,} steps"
        lines.insert(-1, f"               {outside}")
    lines += [
        f"  convolution  {c['count']} x {c['kind']}, {c['dtype']}, {c['layout']}"
        + (", with its bias" if c["bias"] else "")
        for c in report["convolutions"]
    ]
    lines += [
        f"  {c['kind']:<12} {c['count']} x, {c['bytes'] / 1e6:,.4g} MB together, "
        f"{', '.join(c['dtypes'])}, among {c['group']} GPUs"
        + (", asynchronous" if c["asynchronous"] else "")
        for c in report["collectives"]
    ] or ["  collectives  none"]
    if report["loops_of_unknown_length"]:
        loops = ", ".join(report["loops_of_unknown_length"])
        lines.append(f"  too low: loops of unknown length, {loops}, counted as one turn")
    return "\n".join(lines)


HEAD = (
    *("config", "GPUs", "batch", "a GPU", "memory, GiB", "launches a step", "fusions", "copies"),
    *("forward / filter / input gradient", "all-reduce, MB", "GFLOP a step and GPU", "flops.py"),
)


def row(config: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a program under HEAD."""
    kinds, flops = report["launches_by_kind"], report["flops"]
    reductions = [c for c in report["collectives"] if c["kind"] == "all-reduce"]
    convolutions = (
        sum(c["count"] for c in report["convolutions"] if c["kind"] == kind)
        for kind in dict.fromkeys(CONVOLUTIONS.values())
    )
    sizes = f"{sum(c['bytes'] for c in reductions) / 1e6:,.1f}"
    return (
        f"{config}, {report['what']}",
        report["target"],
        f"{report['batch_size']:,}",
        f"{report['images_per_chip']:,}",
        f"{gib(report['peak_bytes'])} of {gib(report['device_bytes'])}",
        f"{report['launches']:,}",
        f"{kinds.get('fusions', 0):,}",
        f"{kinds.get('copies', 0):,}",
        " / ".join(f"{number or '-'}" for number in convolutions),
        f"{sizes} in {sum(c['count'] for c in reductions)}" if reductions else "none",
        f"{flops['compiled'] / 1e9:,.1f}",
        f"{flops['model'] / 1e9:,.1f}",
    )
