"""Compiling for GPUs that are not there.

What needs JAX's plugin for CUDA is marked gpu_ahead. The rest reads a program that was written by
hand after those of small networks, and does sums that can be done on paper.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from ddpm_jax.ahead import gpu
from ddpm_jax.ahead.batches import largest_batch
from ddpm_jax.ahead.gpus import GPUS
from ddpm_jax.ahead.hlo import Program
from ddpm_jax.ahead.launches import SMALL, Convolution, Counts, count
from ddpm_jax.ahead.memory import GIB, Memory
from ddpm_jax.ahead.programs import LOWER, PROGRAMS, steps_a_call
from ddpm_jax.ahead.report import format_report, format_table
from ddpm_jax.ahead.topology import (
    CHIPS,
    GpuTopology,
    Topology,
    compile_only_devices,
    parse_target,
    plugin_version,
    prepare_environment,
)
from ddpm_jax.build import abstract_params, forward_flops
from ddpm_jax.config import load_config
from ddpm_jax.errors import TopologyError
from ddpm_jax.parallel.devices import Devices
from tests.support.commands import command_module
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "benchmarks" / "gpu"

# -------------------------------------------------------------------------------- reading programs


HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_many (p: f32[8,16]) -> (f32[8,16], f32[8,16], f32[8,16], f32[8,16], f32[8,16], /*index=5*/f32[8,16], f32[8192]) {
  %p = f32[8,16]{1,0} parameter(0)
  %c = f32[8192]{0} constant({...})
  ROOT %t = (f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, /*index=5*/f32[8,16]{1,0}, f32[8192]{0}) tuple(%p, %p, %p, %p, %p, /*index=5*/%p, %c)
}

%inner (q: bf16[16,32]) -> bf16[16,32] {
  ROOT %q = bf16[16,32]{1,0} parameter(0)
}

%gemm_computation (l: bf16[16,32], r: bf16[32,40]) -> bf16[16,40] {
  %l = bf16[16,32]{1,0} parameter(0)
  %r = bf16[32,40]{1,0} parameter(1)
  %block = bf16[16,32]{1,0} fusion(%l), kind=kCustom, calls=%inner
  ROOT %dot.1 = bf16[16,40]{1,0} dot(%block, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_compare (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %bound = s32[] constant(20)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%condition (carry: (s32[], bf16[2,8,8,4])) -> pred[] {
  %carry = (s32[], bf16[2,8,8,4]{3,2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%carry), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%turn), kind=kLoop, calls=%fused_compare
}

%body (carry.1: (s32[], bf16[2,8,8,4])) -> (s32[], bf16[2,8,8,4]) {
  %carry.1 = (s32[], bf16[2,8,8,4]{3,2,1,0}) parameter(0)
  %x = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%carry.1), index=1
  %w = bf16[16,3,3,4]{3,2,1,0} constant({...})
  %bias = bf16[16]{0} constant({...})
  %v = f32[8,16]{1,0} constant({...})
  %m = bf16[32,40]{1,0} constant({...})
  %many = (f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, f32[8,16]{1,0}, /*index=5*/f32[8,16]{1,0}, f32[8192]{0}) fusion(%v), kind=kLoop, calls=%fused_many
  %conv.1 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w, %bias), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", backend_config={"cudnn_conv_backend_config":{"activation_mode":"kNone"}}
  %image = bf16[2,8,8,16]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %rows = bf16[16,32]{1,0} bitcast(%image)
  %gemm = bf16[16,40]{1,0} fusion(%rows, /*index=1*/%m), kind=kCustom, calls=%gemm_computation
  ROOT %out = (s32[], bf16[2,8,8,4]{3,2,1,0}) tuple(%turn.1, %x)
}

ENTRY %main (g: f32[2,4,8,8], h: f32[2,16,4,4], s: s32[]) -> f32[1000] {
  %g = f32[2,4,8,8]{3,2,1,0} parameter(0)
  %h = f32[2,16,4,4]{3,2,1,0} parameter(1)
  %k = f32[16,3,3,4]{3,2,1,0} parameter(2)
  %d = f32[2,4,4,16]{3,2,1,0} parameter(3)
  %n = f32[8,64,16]{2,1,0} parameter(4)
  %o = f32[8,64,32]{2,1,0} parameter(5)
  %flat = f32[1000]{0} parameter(6)
  %copy.1 = f32[2,4,8,8]{3,2,1,0} copy(%g)
  %copy-start.1 = (f32[1000]{0}, f32[1000]{0}, u32[]) copy-start(%flat)
  %copy-done.1 = f32[1000]{0} copy-done(%copy-start.1)
  %self = u32[] partition-id()
  %while.1 = (s32[], bf16[2,8,8,4]{3,2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"20"}}
  %bw-filter = (f32[16,4,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%copy.1, %h), window={size=3x3 stride=2x2}, dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convBackwardFilter"
  %bw-input = (f32[2,8,8,4]{3,2,1,0}, u8[4096000]{0}) custom-call(%d, %k), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %blas = (f32[8,16,32]{2,1,0}, s8[4194304]{0}) custom-call(%n, %o), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %sorted = (f32[1000]{0}, u8[512]{0}) custom-call(%flat), custom_call_target="__cub$DeviceRadixSort"
  %all-reduce-start = f32[1000]{0} all-reduce-start(%flat), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":false}}
  ROOT %all-reduce-done = f32[1000]{0} all-reduce-done(%all-reduce-start)
}
"""

IN_THE_LOOP = 2 * (2 * 8 * 8 * 16) * (3 * 3 * 4) + 2 * (16 * 40) * 32
GRADIENT = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 4)
MATRICES = 2 * (8 * 16 * 32) * 64


def test_launches_of_a_step_that_can_be_counted_by_hand():
    """The body of the loop: a kernel, a matrix product that is one, and a call of cuDNN."""
    counts = count(Program(HLO, 8), steps=20)
    assert counts.launches == {"fusions": 2, "convolutions": 1}
    assert counts.outside == 8
    assert counts.small == 2  # one of the seven results of %many is larger
    assert counts.convolutions == {Convolution("forward", "bf16", "NHWC", bias=True): 1}
    assert counts.products == IN_THE_LOOP and counts.collectives == []


def test_launches_of_a_program_of_one_step():
    counts = count(Program(HLO, 8), steps=1)
    assert counts.launches == {
        "fusions": 40,
        "convolutions": 22,
        "copies": 2,
        "matrix_products": 1,
        "memsets": 1,
        "collectives": 1,
        "__cub$DeviceRadixSort": 1,
    }
    assert counts.outside == 0
    # All but %many; the 4,096,000 bytes beside a result are cuDNN's to work in.
    assert counts.small == sum(counts.launches.values()) - 20
    assert counts.convolutions == {
        Convolution("forward", "bf16", "NHWC", bias=True): 20,
        Convolution("filter gradient", "f32", "NCHW", bias=False): 1,
        Convolution("input gradient", "f32", "NHWC", bias=False): 1,
    }
    assert counts.products == 20 * IN_THE_LOOP + 2 * GRADIENT + MATRICES
    (reduction,) = counts.collectives
    assert reduction == {
        "kind": "all-reduce",
        "dtypes": ["f32"],
        "group": 8,
        "asynchronous": True,
        "count": 1,
        "bytes": 4000,
    }


def test_the_condition_of_a_loop_runs_where_the_compiler_does_not_know_its_turns():
    text = HLO.replace(', backend_config={"known_trip_count":{"n":"20"}}', "")
    text = text.replace("%turn = s32[] get", "%bound = s32[] constant(20)\n  %turn = s32[] get")
    text = text.replace(
        "ROOT %loop_compare_fusion = pred[] fusion(%turn), kind=kLoop, calls=%fused_compare",
        "ROOT %less.1 = pred[] compare(%turn, %bound), direction=LT",
    )
    counts = count(Program(text, 8), steps=1)
    assert counts.launches["fusions"] == 40 and counts.launches["compare"] == 20


def test_an_exchange_that_is_waited_for_is_not_called_asynchronous():
    text = HLO.replace('"is_sync":false', '"is_sync":true')
    (reduction,) = count(Program(text, 8), steps=1).collectives
    assert not reduction["asynchronous"]


def test_a_fusion_that_cannot_be_read_is_noticed():
    """Types of six and more parts carry a remark, on which readers of lines trip."""
    assert Program(HLO, 8).fusions == 4
    line = "%gemm = bf16[16,40]{1,0} fusion("
    assert line in HLO
    with pytest.raises(ValueError, match="3 fusions were read of a text that has 4"):
        Program(HLO.replace(line, "%gemm = bf16[16,40]{1,0} /*strange*/ fusion("), 8)


# ------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize(
    ("name", "hosts", "gpus"),
    [("h100", 1, 1), ("a100", 1, 1), ("h100:8", 1, 8), ("2x8xh100", 2, 16), ("32x8xa100", 32, 256)],
)
def test_names_of_gpus(name, hosts, gpus):
    target = parse_target(name)
    assert (target.hosts, target.chips) == (hosts, gpus)
    assert target.shape == f"1x{hosts}x{gpus // hosts}"
    assert target.memory == GPUS[name[-4:] if "x" in name else name[:4]].memory


def test_slices_are_targets_too():
    assert parse_target("v5e:4x4") == Topology("v5e:4x4")


@pytest.mark.parametrize(
    "name",
    ["h200", "", "h100:", "h100:0", "h100:9", "h100:08", "2x9xh100", "33x8xh100", "0x8xh100"]
    + ["8xh100", "2x8xh100:8", "v5e:3x3", "v5e", "H100", "h100 ", "h100:8;x"],
)
def test_an_unknown_target_lists_the_known(name):
    with pytest.raises(TopologyError) as error:
        parse_target(name)
    message = str(error.value)
    assert message.startswith(f"target={name}: ") and "\n" not in message
    assert all(kind in message for kind in (*GPUS, *CHIPS))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_descriptions_of_gpus_are_complete(gpu):
    lines = [line.strip() for line in gpu.description.strip().splitlines()]
    assert gpu.description.count("{") == gpu.description.count("}") == 3
    assert len(lines) == 26 and f"device_memory_size: {gpu.memory}" in lines
    assert 70 * GIB < gpu.memory < 80 * GIB


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_without_the_plugin_the_remedy_is_told(version, monkeypatch):
    def find(package):
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", find)
    needed = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    with pytest.raises(TopologyError, match=f"pip install --no-deps {needed}$"):
        compile_only_devices(GpuTopology("h100"))


def test_blank_flags_are_not_taken_for_a_file(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " ")
    prepare_environment()
    assert "XLA_FLAGS" not in os.environ and jax.config.jax_platforms == "cpu"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    prepare_environment()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"


# ------------------------------------------------------------------------------------ the programs


def test_each_program_is_lowered_for_all_devices():
    config = tiny_config(model={"num_classes": 3})
    for what in PROGRAMS:
        assert "num_partitions = 8" in LOWER[what](config, Devices(), 16).as_text()
    assert [steps_a_call(config, what) for what in PROGRAMS] == [1, 20, 20]
    assert steps_a_call(tiny_config(diffusion={"timesteps": 7}), "evaluate") == 7
    assert steps_a_call(tiny_config(sampling={"spacing": "sections:2,3"}), "sample") == 5


# ---------------------------------------------------------------------- the largest batch that fits


@pytest.mark.parametrize("curve", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("unit", [1, 8, 96])
@pytest.mark.parametrize("start", [1, 16, 4000])
@pytest.mark.parametrize("fixed", [10, 5000])
def test_the_largest_batch_is_found_to_a_sixteenth_with_few_trials(curve, unit, start, fixed):
    tried = {}

    def needed(size):
        assert size % unit == 0 and size > 0 and size not in tried
        tried[size] = int(fixed + 20 * (size / unit) ** curve)
        return tried[size]

    fits, too_large = largest_batch(needed, start * unit, unit, fixed, 16_000)
    assert tried[fits] <= 16_000 < tried[too_large]
    assert too_large - fits <= max(unit, fits / 16)
    assert len(tried) <= 16


def test_no_batch_fits():
    tried = []

    def needed(size):
        tried.append(size)
        return 2000

    assert largest_batch(needed, 64, 8, 1900, 1000) == (0, 8)
    assert tried[-1] == 8


# -------------------------------------------------------------------------------------- the report


def a_report(**changes):
    convolutions = {
        Convolution("forward", "bf16", "NHWC", True): 52,
        Convolution("filter gradient", "f32", "NCHW", False): 51,
    }
    reduce = {"kind": "all-reduce", "dtypes": ["f32"], "group": 8, "asynchronous": True}
    reduce |= {"count": 5, "bytes": 143_000_000}
    counts = Counts(
        {"fusions": 3000, "copies": 600}, 2000, 58, convolutions, [reduce], 4_777_463_250_944
    )
    compiled = gpu.Compiled(Memory(4 * GIB, GIB, GIB, GIB // 2, 3 * GIB, 0), counts, [])
    facts = {"what": "train", "target": "h100:8", "chips": 8, "batch_size": 1024}
    facts |= {"images_per_chip": 128, "steps": 1}
    return facts | gpu.figures(compiled, GpuTopology("h100:8"), 128, 3 * 12_443_713_536) | changes


def test_figures_have_what_checks_rely_on():
    report = json.loads(json.dumps(a_report()))
    assert report["launches"] == 3600 == sum(report["launches_by_kind"].values())
    assert report["peak_bytes"] == 4 * GIB and report["device_bytes"] == GPUS["h100"].memory
    assert [c["count"] for c in report["convolutions"]] == [52, 51]
    assert report["collectives"][0]["bytes"] == 143_000_000
    assert report["flops"] == {"compiled": 4_777_463_250_944, "model": 128 * 3 * 12_443_713_536}
    assert "seconds" not in json.dumps(report)


def test_the_report_in_words():
    text = format_report(a_report())
    assert "train on h100:8: 8 GPUs, batch 1,024, 128 images a GPU" in text
    assert "4.00 of 79.11 GiB a GPU: arguments 1.00, outputs 1.00 (0.50 in place" in text
    assert "launches     3,600 a training step: fusions 3,000, copies 600" in text
    assert f"2,000 of them write {SMALL:,} elements or fewer" in text
    assert "4,777.5 GFLOP a training step and GPU; 4,778.4 of the network alone" in text
    assert "52 x forward, bf16, NHWC, with its bias" in text
    assert "all-reduce   5 x, 143 MB together, f32, among 8 GPUs, asynchronous" in text
    assert "MEM_FRACTION" not in text and "unknown length" not in text and "58" not in text

    text = format_report(a_report(peak_bytes=70 * GIB, steps=1000, what="sample", collectives=[]))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in text and "collectives  none" in text
    assert "a denoising step" in text and "58 more a call of 1,000 steps" in text
    assert "region_7" in format_report(a_report(loops_of_unknown_length=["region_7"]))


def test_the_table_keeps_gpus_and_tpus_apart():
    tpu = json.loads((ROOT / "benchmarks/tpu/cifar10_v5e_008.json").read_text())
    ours = {"config": "configs/cifar10.py", "train": a_report(), "evaluate": a_report()}
    first, second = format_table([ours, tpu]).split("\n\n")
    assert first == format_table([tpu]) and second == format_table([ours])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in second.splitlines()]
    assert len({len(row) for row in rows}) == 1
    train = dict(zip(rows[0], rows[2]))
    assert train["config"] == "cifar10, train" and train["launches a step"] == "3,600"
    assert train["forward / filter / input gradient"] == "52 / 51 / -"
    assert train["all-reduce, MB"] == "143.0 in 5"
    variant = format_table([ours | {"config": "configs/improved_ddpm.py:4k_cosine_vlb"}])
    assert "| improved_ddpm:4k_cosine_vlb, train |" in variant


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/digits.py"], "--target"),
        (["--target=h100"], "--config"),
        (["--config=configs/digits.py", "--target=h300"], "target=h300: not known"),
        (["--config=configs/digits.py", "--target=h100", "--what=draw"], "what=draw: any of"),
        (["--table", "README.md"], "not a report"),
        (["--table", "pretrained/digits/config.json"], "config.json: not a report"),
        (["--table", "benchmarks/results/cpu-epyc-digits.json"], "digits.json: not a report"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, OSError)) as error:
        command_module("compile_ahead").main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------- the committed reports


def committed():
    return {path.name: json.loads(path.read_text()) for path in sorted(REPORTS.glob("*.json"))}


def test_reports_are_of_the_networks_as_they_are():
    for name, file in committed().items():
        config = load_config(ROOT / file["config"], file["overrides"])
        parameters = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
        forward = forward_flops(config)
        for report in (file[what] for what in PROGRAMS if what in file):
            assert report["parameters"] == parameters, name
            work = forward * (3 if report["what"] == "train" else 1) * report["images_per_chip"]
            assert report["flops"]["model"] == work, name
            assert report["flops"]["compiled"] == pytest.approx(work, rel=0.01), name


def test_reports_add_up():
    for name, file in committed().items():
        for report in (file[what] for what in PROGRAMS if what in file):
            kinds = report["launches_by_kind"]
            assert report["launches"] == sum(kinds.values()), name
            assert kinds["convolutions"] == sum(c["count"] for c in report["convolutions"]), name
            assert report["peak_bytes"] < report["device_bytes"], name
            reduced = sum(c["bytes"] for c in report["collectives"])
            several = report["what"] == "train" and report["chips"] > 1
            low, high = (0.98, 1.001) if several else (0, 0)
            assert low * 4 * report["parameters"] <= reduced <= high * 4 * report["parameters"]


def test_the_table_of_the_documentation_is_that_of_the_reports():
    assert format_table(committed().values()) in (ROOT / "docs/ahead.md").read_text()


# --------------------------------------------------------------------------------- with the plugin


SMALL_NETWORK = [
    "--config=configs/digits.py",
    "--config.model.base_channels=8",
    "--config.model.channel_mult=(1,)",
    "--config.model.attention_resolutions=()",
    "--config.model.blocks_per_level=1",
    "--config.diffusion.timesteps=100",
]


def run(*flags, **variables):
    """Run the command as it is typed, in an environment that would hide the plugin."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables}
    command = [sys.executable, str(ROOT / "scripts/compile_ahead.py"), *SMALL_NETWORK, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def errors_of(done):
    """The lines of stderr that are the command's, not a library's."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu") / "one.json"
    done = run(
        f"--what={','.join(PROGRAMS)}",
        "--target=h100",
        f"--output={output}",
        XLA_FLAGS=" ",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done


@pytest.mark.gpu_ahead
def test_a_small_network_compiles_for_one_gpu(one_gpu):
    reports, done = one_gpu
    assert done.stdout.strip() == "\n".join(format_report(reports[what]) for what in PROGRAMS)
    config = load_config(ROOT / reports["config"], reports["overrides"])
    for what, passes, steps in (("train", 3, 1), ("sample", 1, 100), ("evaluate", 1, 20)):
        report = reports[what]
        assert report["launches"] > 0 and report["steps"] == steps
        assert 0 < report["peak_bytes"] < report["device_bytes"]
        work = passes * forward_flops(config) * report["batch_size"]
        assert report["flops"]["compiled"] == pytest.approx(work, rel=0.01)
        assert not report["collectives"] and not report["loops_of_unknown_length"]
    kinds = [c["kind"] for c in reports["train"]["convolutions"]]
    assert kinds == ["forward", "filter gradient", "input gradient"]
    forward, filters, inputs = (c["count"] for c in reports["train"]["convolutions"])
    assert forward == filters == inputs + 1  # nobody asks for the gradient of the image
    assert reports["sample"]["launches"] < reports["train"]["launches"] / 3


@pytest.mark.gpu_ahead
def test_a_step_launches_little_beside_its_network(one_gpu):
    """One norm, average or moment that goes leaf by leaf is two launches and more for each of 74 leaves."""
    reports, _ = one_gpu
    assert (
        reports["train"]["launches"] <= 275
    )  # 261 with jax 0.10.2; 471 with one norm leaf by leaf
    assert reports["sample"]["launches"] <= 70  # 64


@pytest.mark.gpu_ahead
def test_eight_gpus_exchange_the_gradients_once(tmp_path):
    output = tmp_path / "eight.json"
    done = run("--what=train", "--target=h100:8", f"--output={output}")
    assert done.returncode == 0, done.stderr
    train = json.loads(output.read_text())["train"]
    assert (train["chips"], train["images_per_chip"]) == (8, 16)
    assert {(c["kind"], *c["dtypes"], c["group"]) for c in train["collectives"]} == {
        ("all-reduce", "f32", 8)
    }
    # Two biases that are added to the same activation have one gradient, which travels once.
    size = sum(c["bytes"] for c in train["collectives"])
    assert 0.98 * 4 * train["parameters"] <= size <= 4 * (train["parameters"] + 3)


@pytest.mark.gpu_ahead
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    done = run("--what=sample", "--target=a100", "--samples_per_chip=8000000")
    assert done.returncode == 1 and done.stdout == ""
    (message,) = errors_of(done)
    assert message.startswith("error: --samples_per_chip=8000000 on a100: sample needs ")
    assert message.endswith(" fits")


@pytest.mark.gpu_ahead
def test_the_largest_batch_is_reported(tmp_path):
    output = tmp_path / "largest.json"
    flags = ["--what=sample", "--target=h100", "--largest_batch", f"--output={output}"]
    done = run(*flags, "--samples_per_chip=1000000")
    assert done.returncode == 0, done.stderr
    sample = json.loads(output.read_text())["sample"]
    assert sample["peak_bytes"] <= sample["device_bytes"]
    assert sample["batch_size"] < sample["too_large"] <= 17 / 16 * sample["batch_size"]


@pytest.mark.gpu_ahead
def test_a_jax_that_has_started_without_the_plugin_is_refused():
    code = (
        "import jax; jax.devices()\n"
        "from ddpm_jax.ahead.topology import GpuTopology, compile_only_devices\n"
        "compile_only_devices(GpuTopology('h100'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "TopologyError: target=h100: JAX has started without its plugin" in last


@pytest.mark.gpu_ahead
def test_every_kind_of_target_has_its_gpus():
    for name in ("h100", "a100:8", "2x8xh100"):
        target = GpuTopology(name)
        devices = compile_only_devices(target)
        assert len(devices) == target.chips
        assert len({device.process_index for device in devices}) == target.hosts
    assert plugin_version() == jax.__version__
