"""Compiling for TPU slices that are not there.

What needs libtpu is marked tpu. The rest reads hand-written and CPU programs, and does sums that
can be done on paper.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.ahead import compile, programs, tpu
from ddpm_jax.ahead.batches import fitting_batch, round_down
from ddpm_jax.ahead.compile import compile_lowered
from ddpm_jax.ahead.hlo import Collective, Program, array_bytes
from ddpm_jax.ahead.memory import GIB, Memory, OutOfMemory
from ddpm_jax.ahead.programs import LOWER
from ddpm_jax.ahead.report import format_report, format_table
from ddpm_jax.ahead.topology import CHIPS, Topology, compile_only_devices, libtpu_version
from ddpm_jax.ahead.tpu import Compiled, figures
from ddpm_jax.build import abstract_params, denoiser, forward_flops
from ddpm_jax.config import load_config
from ddpm_jax.errors import ConfigError, TopologyError
from ddpm_jax.network.flops import count_flops
from ddpm_jax.parallel.devices import AXIS, Devices
from ddpm_jax.training.form import TreeForm
from ddpm_jax.training.state import abstract_state
from ddpm_jax.training.step import build_train_step
from tests.support.commands import command_module
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "benchmarks" / "tpu"
QUICK = {"xla_backend_optimization_level": 0}

# -------------------------------------------------------------------------------------- reading HLO


HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b), backend_config={"window_config":{"estimated_cycles":"999999"}}
}

%fused_computation.2 (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %copy.9 = f32[8,128]{1,0:T(8,128)} copy(%p), backend_config={"window_config":{"estimated_cycles":"555555"}}
}

%body (carry: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %fusion.2 = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused_computation.2, backend_config={"window_config":{"estimated_cycles":"30"}}
  %all-gather-start.1 = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}) all-gather-start(%fusion.2), replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done.1 = f32[32,128]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%x, %x)
}

%condition (carry.2: (s32[], f32[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(50), metadata={op_name="jit(step)/while"}
  %carry.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main.3 (g: f32[3,3,128,256], h: bf16[256], s: pred[]) -> (f32[3,3,128,256], bf16[256]) {
  %g = f32[3,3,128,256]{3,2,1,0:T(8,128)S(1)} parameter(0)
  %h = bf16[256]{0:T(256)(128)(2,1)} parameter(1)
  %all-reduce.7 = (f32[3,3,128,256]{3,2,1,0:T(8,128)S(1)}, bf16[256]{0:T(256)(128)(2,1)}, /*index=2*/f32[]{:T(128)}) all-reduce(%g, %h, %s), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum, backend_config={"collective_algorithm_config":{"emitter":"E","strategy":"UniDirection1DRingStrategy"}}
  %reduce-scatter.1 = f32[16]{0:T(128)} reduce-scatter(%h), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, to_apply=%sum
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.1), condition=%condition, body=%body
  ROOT %copy.1 = f32[4]{0} copy(%g), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_hlo_collectives_of_a_text_that_can_be_read_by_eye():
    found = {c.kind: c for c in Program(HLO, 8).collectives}
    assert len(found) == len(Program(HLO, 8).collectives) == 3
    ring = "UniDirection1DRingStrategy"
    size = 3 * 3 * 128 * 256 * 4 + 256 * 2 + 4
    assert found["all-reduce"] == Collective("all-reduce", size, 3, ("bf16", "f32"), 8, 1, ring)
    assert found["reduce-scatter"] == Collective(
        "reduce-scatter", 2 * 16 * 4, 1, ("f32",), 2, 1, ""
    )
    assert found["all-gather"] == Collective("all-gather", 32 * 128 * 4, 1, ("f32",), 4, 50, "")


def test_hlo_cycles_count_a_loop_as_often_as_it_turns_and_a_fusion_once():
    assert Program(HLO, 8).cycles == 7 + 50 * 30
    assert Program(HLO, 8).turns == 50
    known = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert Program(known, 8).cycles == 7 + 3 * 30


def test_hlo_loop_of_unknown_length_is_one_turn_and_named():
    program = Program(HLO.replace("direction=LT", "direction=NE"), 8)
    assert (program.cycles, program.endless) == (7 + 30, ["condition"])
    assert not Program(HLO, 8).endless


def test_hlo_group_is_all_devices_where_none_is_named():
    text = HLO.replace("replica_groups={{0,1,2,3,4,5,6,7}}", "replica_groups={}")
    assert [c.group for c in Program(text, 64).collectives if c.kind == "all-reduce"] == [64]


def test_hlo_refuses_what_is_none():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("%sum (a: f32[]) -> f32[] {\n}\n", 8)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "bfloat16", "float16", "int32", "float32", "complex64"]
)
def test_array_bytes_are_those_of_numpy(dtype):
    names = {
        "bool": "pred",
        "uint8": "u8",
        "bfloat16": "bf16",
        "float16": "f16",
        "int32": "s32",
        "float32": "f32",
    }
    assert array_bytes(names.get(dtype, "c64"), "3,3,5") == jnp.zeros((3, 3, 5), dtype).nbytes
    assert array_bytes(names.get(dtype, "c64"), "") == jnp.zeros((), dtype).nbytes


def test_each_chip_sends_what_a_ring_sends():
    """A ring of n passes chunks of 1/n of the value, n-1 times to sum and n-1 times to spread."""
    for n in (2, 8, 256):
        chunks = sum(1 for phase in ("reduce-scatter", "all-gather") for _ in range(n - 1))
        reduce = Collective("all-reduce", 1000 * n, 1, ("f32",), n, 1, "")
        assert reduce.sent == pytest.approx(chunks * 1000)
        gather = Collective("all-gather", 1000 * n, 1, ("f32",), n, 3, "")
        assert gather.sent == pytest.approx(3 * (n - 1) * 1000)


def test_hlo_of_a_cpu_program_has_the_collectives_that_were_written():
    def function(x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, 7, lambda _, x: jax.lax.psum(x, AXIS) / 8, x)
        return x + jax.lax.all_gather(x.astype(jnp.bfloat16), AXIS, tiled=True).sum()

    mapped = jax.pmap(function, AXIS).lower(jax.ShapeDtypeStruct((8, 5, 128), jnp.float32))
    found = {
        (c.kind, c.bytes, c.group, c.times)
        for c in Program(mapped.compile(QUICK).as_text(), 8).collectives
    }
    # A CPU has no bfloat16 in its collectives; XLA may widen the gathered value.
    gathered = {
        size for kind, size, group, times in found if (kind, group, times) == ("all-gather", 8, 1)
    }
    assert ("all-reduce", 5 * 128 * 4, 8, 7) in found
    assert len(found) == 2 and gathered <= {8 * 5 * 128 * 2, 8 * 5 * 128 * 4}


# -------------------------------------------------------------------------------- the training step


def reductions(jaxpr, turns=1):
    """(how often, array) of everything that is summed over the chips."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            found += [(turns, value.aval) for value in equation.invars]
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += reductions(inner, turns * equation.params.get("length", 1))
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_gradient_travels_once_in_float32_whatever_the_network_computes_in(accumulation):
    """Not once for each microbatch; whether all travel together is for the tests with libtpu."""
    config = tiny_config(train={"accumulation": accumulation}, model={"dtype": "bfloat16"})
    batch = {"image": jax.ShapeDtypeStruct((8, 2, 8, 8, 1), jnp.uint8)}
    step = Devices().map_step(build_train_step(config))
    found = reductions(jax.make_jaxpr(step)(abstract_state(config), batch).jaxpr)
    leaves = [leaf.size for leaf in jax.tree.leaves(abstract_params(config))]
    metrics = len(found) - len(leaves)
    assert 1 <= metrics <= 3
    assert sorted(value.size for _, value in found) == sorted(leaves + [1] * metrics)
    assert {(turns, value.dtype.name) for turns, value in found} == {(1, "float32")}


# --------------------------------------------------------------------------------------- operations


def test_flops_of_what_can_be_counted_by_hand():
    f = jnp.zeros

    def flops(function, *arguments):
        return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def product(a, b):
        return a @ b

    def convolution(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops(product, f((3, 5)), f((5, 7))) == 2 * 3 * 5 * 7
    assert (
        flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), f((4, 3, 5)), f((4, 6, 5)))
        == 2 * 4 * 3 * 6 * 5
    )
    assert flops(convolution, f((2, 8, 8, 3)), f((3, 3, 3, 10))) == 2 * (2 * 4 * 4 * 10) * (
        3 * 3 * 3
    )
    looped = flops(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, length=11)[0], f((5, 5)))
    assert looped == 11 * 2 * 5**3
    assert (
        flops(lambda a: jax.lax.cond(a.sum() > 0, lambda: a @ a, lambda: a @ a @ a), f((5, 5)))
        == 2 * 2 * 5**3
    )
    forms = {"tpu": lambda a: a @ a @ a, "default": lambda a: a @ a}
    assert flops(lambda a: jax.lax.platform_dependent(a, **forms), f((5, 5))) == 2 * 5**3
    assert flops(jax.jit(jax.checkpoint(product)), f((3, 5)), f((5, 7))) == 2 * 3 * 5 * 7
    assert flops(jnp.sin, f((3, 5))) == 0


def test_forward_flops_are_those_that_xla_counts():
    """XLA leaves out what multiplies padding, and adds what works element by element.

    Both are a few per cent of a wide network.
    """
    wide = {"base_channels": 64, "channel_mult": (1, 2), "attention_resolutions": (16,)}
    config = tiny_config(data={"image_size": 32, "channels": 3}, model=wide)
    bind, image, t = (
        denoiser(config),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    traced = jax.jit(lambda params, x, t: bind(params)(x, t)).trace(
        abstract_params(config), image, t
    )
    xla = traced.lower(lowering_platforms=("tpu",)).cost_analysis()["flops"]
    assert 0.9 < xla / forward_flops(config) < 1.0


def test_forward_flops_of_the_networks_of_the_paper():
    """12.44 and 497 GFLOP, counted for the same networks written in another framework."""
    assert forward_flops(load_config(ROOT / "configs/cifar10.py")) / 1e9 == pytest.approx(
        12.44, abs=0.01
    )


# --------------------------------------------------------------------------------- chips and slices


@pytest.mark.parametrize("kind", CHIPS)
def test_peak_is_what_the_matrix_units_do_in_a_second(kind):
    chip = CHIPS[kind]
    units, multiply_and_add = 4 * 128 * 128, 2
    assert chip.peak == pytest.approx(chip.cores * units * multiply_and_add * chip.clock, rel=0.01)


@pytest.mark.parametrize("kind", CHIPS)
def test_slices_of_8_16_64_and_256_chips(kind):
    sizes = [Topology(f"{kind}:{shape}").chips for shape in CHIPS[kind].shapes]
    assert {8, 16, 64, 256} <= set(sizes)
    assert len(set(sizes)) == len(sizes) and max(sizes) == 256


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e:2x2", 2),
        ("v5e:8x8", 2),
        ("v5e:8x16", 3),
        ("v5e:16x16", 4),
        ("v4:2x2x1", 2),
        ("v4:2x2x4", 3),
        ("v5p:4x4x4", 6),
    ],
)
def test_links_of_the_chip_in_the_corner(name, links):
    assert Topology(name).egress == links * Topology(name).chip.link


@pytest.mark.parametrize(
    "name",
    [
        "v9:2x2",
        "v3:2x2",
        "v5e:3x3",
        "v5e:4x2",
        "v5e",
        "",
        "v5e:2x2x1",
        "v4:8x8x8",
        "v5e:2x2;x",
        ":",
    ],
)
def test_unknown_slice_lists_the_known(name):
    with pytest.raises(TopologyError) as error:
        Topology(name)
    message = str(error.value)
    assert message.startswith(f"topology={name}: ") and "\n" not in message
    assert all(f"{kind}:{chip.shapes[0]}" in message for kind, chip in CHIPS.items())


def test_without_libtpu_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'ddpm_jax\[tpu\]'"):
        compile_only_devices(Topology("v5e:2x2"))


# -------------------------------------------------------------------------------- a batch that fits


def test_round_down_to_batches_people_choose():
    numbers = [n for power in range(12) for n in (2**power, 3 * 2**power)]
    for count in range(1, 500):
        assert round_down(count) == max(n for n in numbers if n <= count)
    assert round_down(0) == 1


def compiler(needs):
    """A compiler that knows nothing but `needs(size)`, and remembers what it was asked."""
    asked = []

    def needed(size):
        asked.append(size)
        return needs(size)

    return needed, asked


@pytest.mark.parametrize("curve", [1.0, 1.2, 0.8])
@pytest.mark.parametrize("unit", [8, 256])
@pytest.mark.parametrize(("fixed", "start"), [(600, 4096), (14_000, 256)])
def test_a_batch_that_fits_is_found_and_was_tried(curve, unit, fixed, start):
    hbm = 16_000

    def needs(size):
        return fixed + 30 * (size / unit) ** curve

    needed, asked = compiler(needs)
    found = fitting_batch(needed, start * unit, unit, needs(start * unit), fixed, hbm)
    assert found == asked[-1] and found % unit == 0 and needs(found) <= hbm
    assert len(asked) <= 8
    if curve == 1.0:
        assert needs(2 * found) > hbm and len(asked) == 1


def test_a_batch_that_fits_where_the_compiler_gives_no_size():
    needed, asked = compiler(lambda size: 100 if size <= 24 else 1001)
    assert fitting_batch(needed, 640, 8, 1001, 50, 1000) == asked[-1] == 24


def test_no_batch_fits():
    needed, asked = compiler(lambda size: 2000)
    assert fitting_batch(needed, 64, 8, 2000, 1900, 1000) == 0
    assert asked[-1] == 8
    needed, asked = compiler(lambda size: 0)
    assert fitting_batch(needed, 8, 8, 2000, 100, 1000) == 0 and not asked


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (24.25G) exceeds "
            "available HBM (15.75G).",
            24.25 * GIB,
        ),
        ("Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_the_compiler_says_when_memory_runs_out(message, needed):
    assert OutOfMemory(message).needed == needed


# --------------------------------------------------------------------------------------- the report


def a_program(**changes):
    reduce = Collective("all-reduce", 100_000_000, 30, ("f32",), 8, 2, "Ring")
    memory = Memory(4 * GIB, 2 * GIB, 2 * GIB, GIB, 3 * GIB, GIB // 2)
    values = {
        "memory": memory,
        "flops": 4e12,
        "cycles": 30_000_000,
        "collectives": [reduce],
        "endless": [],
        "seconds": 61.04,
    }
    return Compiled(**values | changes)


def test_figures_by_hand():
    report = figures(a_program(), Topology("v5e:2x4"), 16, 10**11)
    estimate = report["estimate"]
    assert estimate["compute_seconds"] == pytest.approx(0.020)  # 30 M cycles at 1.5 GHz
    assert estimate["collective_seconds"] == pytest.approx(
        2 * 2 * 7 / 8 * 100e6 / 100e9
    )  # over two links of 50 GB/s
    assert estimate["images_per_second_per_chip"] == pytest.approx(16 / (0.020 + 0.0035))
    assert estimate["images_per_second"] == pytest.approx(8 * 16 / 0.0235)
    assert estimate["mfu"] == pytest.approx(1.6e12 / 0.0235 / 197e12)
    assert report["all_reduce"] == {
        "operations": 2,
        "tensors": 60,
        "bytes": 200_000_000,
        "dtypes": ["f32"],
        "combined": True,
    }
    assert report["memory"]["peak"] == 4 * GIB and report["memory"]["hbm"] == 15.75 * GIB
    json.dumps(report)


@pytest.mark.parametrize("what, passes", [("train", 3), ("sample", 20)])
def test_a_report_counts_what_the_network_does_in_a_call(what, passes, monkeypatch):
    """In a training step once forwards and twice for the gradients; in a chain once a step."""
    monkeypatch.setattr(compile, "compile_only_devices", lambda target: jax.devices()[:4])
    monkeypatch.setattr(compile, "compiler_version", lambda target: {})
    monkeypatch.setattr(compile._Trials, "compile", lambda trials, size: a_program())
    config = tiny_config()
    report = compile.report(config, Topology("v5e:2x2"), what, 16)
    assert report["images_per_chip"] == 4 and report["batch_size"] == 16
    assert report["flops"]["model"] == 4 * passes * forward_flops(config)


def test_one_chip_has_nobody_to_talk_to():
    report = figures(a_program(collectives=[]), Topology("v5e:1x1"), 16, 10**11)
    assert report["estimate"]["collective_seconds"] == 0
    assert report["all_reduce"] == {
        "operations": 0,
        "tensors": 0,
        "bytes": 0,
        "dtypes": [],
        "combined": False,
    }


def a_report(**changes):
    facts = {
        "what": "train",
        "topology": "v5e:2x4",
        "chips": 8,
        "batch_size": 128,
        "images_per_chip": 16,
        "steps": 1,
    }
    return facts | figures(a_program(**changes), Topology("v5e:2x4"), 16, 10**11)


def test_the_report_in_words():
    text = format_report(a_report())
    assert "train on v5e:2x4: 8 chips, batch 128, 16 images a chip (compiled in 61 s)" in text
    assert (
        "4.00 of 15.75 GiB a chip: arguments 2.00, outputs 2.00 (1.00 in place of arguments), "
        "temporaries 3.00, code 0.50" in text
    )
    assert "4,000.0 GFLOP a chip; 1,600.0 of the network alone" in text
    assert "all-reduce   2 x 100 MB, 30 tensors of f32, among 8 chips" in text
    assert "combined, 60 tensors in 2, f32" in text
    assert "23.5 ms a step: 20.0 of operations, at least 3.5 of collectives" in text
    assert "681 images/s a chip, 5,447 on all; MFU 35%" in text
    assert "unknown length" not in text

    alone = [Collective("all-reduce", 4, 1, ("f32",), 8, 1, "")] * 3
    text = format_report(a_report(collectives=alone, endless=["region_7"]))
    assert "NOT combined, 3 tensors in 3" in text and "region_7" in text
    assert "collectives  none" in format_report(a_report(collectives=[]))


def test_the_table_has_a_row_for_each_program():
    sampler = a_report(collectives=[]) | {"what": "sample", "steps": 1000}
    table = format_table(
        [
            {"config": "configs/cifar10.py", "train": a_report(), "sample": sampler},
            {"config": "x.py", "train": a_report()},
        ]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["cifar10, train", "cifar10, sample", "x, train"]
    assert len({len(row) for row in rows}) == 1
    train, sample = (dict(zip(rows[0], row)) for row in rows[2:4])
    assert (train["ms a step"], sample["ms a step"]) == ("23.5", "0.0")
    assert (train["gradients"], sample["gradients"]) == ("60 in 2, f32", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/digits.py"], "--topology"),
        (["--topology=v5e:2x2"], "--config"),
        (["--config=configs/digits.py", "--topology=v2:2x2"], "topology=v2:2x2: not a TPU slice"),
        (
            ["--config=configs/digits.py", "--topology=v5e:2x2", "--what=draw"],
            "what=draw: any of train, sample, evaluate",
        ),
        (
            ["--config=configs/digits.py", "--topology=v5e:2x2", "--samples_per_chip=0"],
            "must be at least 1",
        ),
        (["--config=configs/nothing.py", "--topology=v5e:2x2"], "configs/nothing.py"),
        (
            ["--config=configs/digits.py", "--topology=v5e:2x2", "--config.model.width=3"],
            "config.model has no field 'width'",
        ),
        (["--table", "README.md"], "not a report"),
        (["--table", "pretrained/digits/config.json"], "config.json: not a report"),
        (["--table", "benchmarks/results/cpu-epyc-digits.json"], "digits.json: not a report"),
        (["--table", "no/such/file"], "no/such/file"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script = command_module("compile_for_tpu")
    with pytest.raises((ValueError, OSError)) as error:
        script.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the committed reports


def committed():
    return {path.name: json.loads(path.read_text()) for path in sorted(REPORTS.glob("*.json"))}


def test_reports_are_of_the_networks_as_they_are():
    reported = {}
    for file in committed().values():
        load_config(ROOT / file["config"], file["overrides"])
        reported.setdefault(file["config"], set()).update(
            file[what]["parameters"] for what in ("train", "sample") if what in file
        )
    for path, counts in reported.items():
        assert counts == {
            sum(x.size for x in jax.tree.leaves(abstract_params(load_config(ROOT / path))))
        }, path


def test_the_table_of_the_documentation_is_that_of_the_reports():
    assert format_table(committed().values()) in (ROOT / "docs/ahead.md").read_text()


def test_reported_temporary_memory_does_not_grow_with_the_slice():
    """It depends on the images a chip alone.

    Randomness drawn for the whole batch on every chip would show here.
    """
    seen = {}
    for name, file in committed().items():
        if "train" in file:
            key = file["config"], file["train"]["images_per_chip"]
            peak, temporaries = (file["train"]["memory"][part] for part in ("peak", "temporaries"))
            first = seen.setdefault(key, (peak, temporaries))
            assert peak < 1.02 * first[0] and temporaries < 1.05 * first[1] + GIB // 100, name


# -------------------------------------------------------------------------------------- with libtpu


def compile_program(lowered: jax.stages.Lowered, chips: int) -> Compiled:
    """What the compiler says of a program for so many chips."""
    executable, seconds = compile_lowered(lowered)
    return tpu.read(executable, chips, seconds)


def compiled(what, config, name, batch_size):
    topology = Topology(name)
    return compile_program(
        LOWER[what](config, Devices(compile_only_devices(topology)), batch_size), topology.chips
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command, as it is typed, for a small network on v5e:2x2."""
    output = tmp_path_factory.mktemp("tpu") / "smoke.json"
    small = [
        "base_channels=8",
        "channel_mult=(1,)",
        "attention_resolutions=()",
        "blocks_per_level=1",
        "dropout=0.1",
    ]
    flags = [
        "--config=configs/digits.py",
        "--topology=v5e:2x2",
        f"--output={output}",
        "--samples_per_chip=8",
    ]
    flags += [f"--config.model.{field}" for field in small] + [
        "--config.diffusion.timesteps=100",
        "--config.data.flip=true",
    ]
    command = [sys.executable, str(ROOT / "scripts/compile_for_tpu.py"), *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done


def of_report(report):
    return load_config(ROOT / report["config"], report["overrides"])


@pytest.mark.tpu
def test_smoke_config_compiles_for_four_chips(smoke):
    reports, done = smoke
    train, sample = reports["train"], reports["sample"]
    assert done.stdout.strip() == f"{format_report(train)}\n{format_report(sample)}"
    assert (train["chips"], train["batch_size"], train["images_per_chip"]) == (4, 128, 32)
    assert (sample["chips"], sample["batch_size"], sample["steps"]) == (4, 32, 100)
    for report in (train, sample):
        assert 0 < report["memory"]["peak"] < report["memory"]["hbm"]
        assert 0 < report["estimate"]["mfu"] < 1 and report["compile_seconds"] > 0
        assert not report["estimate"]["loops_of_unknown_length"]


@pytest.mark.tpu
def test_one_combined_float32_all_reduce_of_all_gradients(smoke):
    train = smoke[0]["train"]
    reduce = train["all_reduce"]
    assert reduce["operations"] == 1 and reduce["combined"] and reduce["dtypes"] == ["f32"]
    assert [c["kind"] for c in train["collectives"]] == ["all-reduce"]
    # Two biases that are added to the same activation have one gradient, which XLA sends once.
    assert 0.98 * 4 * train["parameters"] <= reduce["bytes"] <= 4 * (train["parameters"] + 3)


@pytest.mark.tpu
def test_the_sampler_has_no_collectives(smoke):
    assert smoke[0]["sample"]["collectives"] == []


@pytest.mark.tpu
def test_the_state_is_donated(smoke):
    """Parameters, both moments and the average, 4 bytes each, are updated in place."""
    memory = smoke[0]["train"]["memory"]
    assert memory["aliased"] >= 4 * 4 * smoke[0]["train"]["parameters"]
    assert memory["outputs"] - memory["aliased"] < 16_384  # what is left are the metrics


@pytest.mark.tpu
def test_vectors_joined_cost_less_than_leaf_by_leaf(smoke, monkeypatch):
    """By the compiler's cycles: a small operation has a price of its own."""
    joined = smoke[0]["train"]["estimate"]["compute_seconds"]
    monkeypatch.setattr(programs, "state_form", lambda config, devices: TreeForm())
    leaves = compiled("train", of_report(smoke[0]), "v5e:2x2", 128)
    assert joined < 0.95 * leaves.cycles / Topology("v5e:2x2").chip.clock


@pytest.mark.tpu
def test_memory_does_not_grow_with_the_slice(smoke):
    small = smoke[0]["train"]["memory"]
    large = compiled("train", of_report(smoke[0]), "v5e:8x8", 16 * 128).memory
    assert abs(large.peak - small["peak"]) < 0.01 * small["peak"]
    assert large.arguments == small["arguments"]
    assert abs(large.temporaries - small["temporaries"]) < 65_536


@pytest.mark.tpu
def test_memory_of_the_chain_does_not_grow_with_its_steps():
    short, long = (
        compiled("sample", tiny_config(diffusion={"timesteps": steps}), "v5e:2x2", 16)
        for steps in (20, 1000)
    )
    table = 8 * 4 * 1000  # at most eight columns of float32
    assert long.memory.peak - short.memory.peak <= table
    assert long.cycles == pytest.approx(50 * short.cycles, rel=0.2)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1"])
def test_a_large_matrix_product_costs_what_the_data_sheet_says(name):
    """So clock, cores and peak are those that the compiler reckons with."""
    topology = Topology(name)
    devices = Devices(compile_only_devices(topology))
    assert len(devices.devices) == topology.chips
    w = devices.abstract_replicated(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((topology.chips, 2**14, 4096), jnp.bfloat16)
    cycles = compile_program(
        devices.map_batch(lambda w, x: x @ w).lower(w, x), topology.chips
    ).cycles
    share = 2 * 2**14 * 4096**2 / (cycles / topology.chip.clock) / topology.chip.peak
    assert 0.85 < share <= 1.0


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1"])
def test_memory_a_program_may_use_is_the_compilers(name):
    topology = Topology(name)
    devices = Devices(compile_only_devices(topology))
    x = jax.ShapeDtypeStruct((topology.chips, 2**24, 4096), jnp.bfloat16)
    with pytest.raises(
        OutOfMemory, match=rf"available HBM \({topology.chip.hbm / GIB:.2f}G\)"
    ) as error:
        compile_program(
            devices.map_batch(lambda a, x: a * x).lower(jax.ShapeDtypeStruct((), jnp.bfloat16), x),
            topology.chips,
        )
    assert error.value.needed == pytest.approx(2 * 2**24 * 4096 * 2, rel=0.01)


@pytest.mark.tpu
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    config, said = tiny_config(), []
    with pytest.raises(compile.DoesNotFit) as error:
        compile.report(config, Topology("v5e:2x2"), "sample", 4 * 2**22, say=said.append)
    message = str(error.value)
    assert message.startswith(
        "samples_per_chip=4194304 on v5e:2x2: sample needs "
    ) and message.endswith(" fits")
    fits = int(message.rpartition("samples_per_chip=")[2].split()[0])
    assert 4194304 // 30 < fits < 4194304 // 8  # ten times too many, as near as round numbers come
    assert f" {fits} a chip" in said[-1]  # compiled, not just reckoned


@pytest.mark.tpu
def test_a_batch_that_the_chips_do_not_divide_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError,
        match="config.train.batch_size=100: must be divisible by 64 devices; try 64 or 128",
    ):
        compile.report(tiny_config(train={"batch_size": 100}), Topology("v5e:8x8"), "train", 100)


@pytest.mark.tpu
def test_every_slice_has_its_chips():
    for kind, chip in CHIPS.items():
        for shape in chip.shapes:
            topology = Topology(f"{kind}:{shape}")
            assert (
                len(compile_only_devices(topology))
                == topology.chips
                == math.prod(map(int, shape.split("x")))
            )
    assert libtpu_version()
