"""What a process may use of its machine, and how it is set up for a CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_jax as ddpm
from ddpm_jax import machine
from tests.support.layers import ROOT

FLAG = f"--{machine.YNNPACK}={machine.WITHOUT_PRODUCTS}"
FREE = ("XLA_FLAGS", "JAX_PLATFORMS", "LD_PRELOAD", "GLIBC_TUNABLES")


@pytest.fixture
def linux(monkeypatch, tmp_path) -> None:
    """An environment in which nothing is set, on Linux, whose pages are large where asked for."""
    for name in (*FREE, *(name for name in os.environ if name.startswith("MALLOC_"))):
        # Set first, so that what `tune_cpu` sets is taken back as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(machine.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setattr(machine, "PAGE_MODES", tmp_path / "enabled")
    machine.PAGE_MODES.write_text("always [madvise] never\n")


def test_a_cpu_is_set_up(linux, tmp_path):
    assert ddpm.tune_cpu(tmp_path) == ["XLA_FLAGS"]
    assert os.environ["XLA_FLAGS"] == FLAG
    assert ddpm.tune_cpu(tmp_path) == [] and os.environ["XLA_FLAGS"] == FLAG


@pytest.mark.parametrize(
    "before, after",
    [
        ("--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"),
        (" ", FLAG),
        (f"--{machine.YNNPACK}=+dot", f"--{machine.YNNPACK}=+dot"),
        ("flags.txt", "flags.txt"),  # XLA reads them from this file
    ],
)
def test_what_the_user_has_set_stays(before, after, linux, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    machine.tune_cpu(tmp_path)
    assert os.environ["XLA_FLAGS"] == after


def test_large_pages_are_asked_for_in_the_environment(linux, tmp_path):
    before = dict(os.environ)
    assert machine.with_huge_pages(tmp_path) == before | {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    }
    assert os.environ == before


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_the_users_allocator_stays(name, linux, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "x")
    assert machine.with_huge_pages(tmp_path) is None
    monkeypatch.delenv(name)


@pytest.mark.parametrize("modes", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_pages_that_nobody_can_ask_for_are_not_asked_for(modes, linux, tmp_path):
    machine.PAGE_MODES.unlink() if modes is None else machine.PAGE_MODES.write_text(modes)
    assert machine.with_huge_pages(tmp_path) is None


COMMAND = """
import os, sys, types
from ddpm_jax.cli.run import run_named
command = types.ModuleType("ddpm_jax.cli.command")
command.main = lambda: print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
sys.modules[command.__name__] = command
run_named("command")
"""


@pytest.mark.parametrize("words", [["a b", "--c=d"], [], ["a", "--help"]])
def test_a_command_that_computes_starts_anew_with_large_pages_once(words):
    environment = {k: v for k, v in os.environ.items() if k not in FREE}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    there = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    asked = there and machine.PAGE_MODES.is_file() and "[madvise]" in machine.PAGE_MODES.read_text()
    pages = machine.HUGE_PAGES if asked and words[-1:] == ["--c=d"] else None
    assert done.stdout == f"{pages} {words}\n" and not done.stderr


@pytest.mark.parametrize(
    "version, known",
    [
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.11.2", True),
        ("0.12.0", False),
        ("0.10.2.dev1", True),
    ],
)
def test_a_jaxlib_that_may_not_know_the_flag_is_not_given_it(
    version, known, linux, tmp_path, monkeypatch
):
    """XLA would end the process."""
    monkeypatch.setattr(machine.metadata, "version", lambda name: version)
    machine.tune_cpu(tmp_path)
    assert os.environ.get("XLA_FLAGS") == (FLAG if known else None)


@pytest.mark.parametrize(
    "device, platforms, set_up",
    [
        ("nvidia0", None, False),
        ("dxg", None, False),
        ("kfd", None, False),
        ("accel/accel0", None, False),
        ("accel0", None, False),
        ("vfio/0", None, False),
        ("nvidia0", "cpu", True),
        (None, "cuda,cpu", False),
        (None, "cpu", True),
        ("vfio/vfio", None, True),
    ],
)
def test_machines_with_another_device_are_left_alone(
    device, platforms, set_up, linux, tmp_path, monkeypatch
):
    if device is not None:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert bool(machine.with_huge_pages(tmp_path)) == set_up
    assert bool(machine.tune_cpu(tmp_path)) == set_up
    assert ("XLA_FLAGS" in os.environ) == set_up


@pytest.mark.parametrize("system, library", [("darwin", ""), ("win32", ""), ("linux", "musl")])
def test_other_systems_are_left_alone(system, library, linux, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    assert machine.tune_cpu(tmp_path) == [] and "XLA_FLAGS" not in os.environ
    assert machine.with_huge_pages(tmp_path) is None


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="it does nothing elsewhere"
)
def test_the_installed_jaxlib_knows_the_flag_and_programs_lose_their_calls_of_ynnpack():
    """A command's process compiles a product without YNNPACK, and by default with it."""
    code = (
        "import sys; from ddpm_jax.machine import tune_cpu\n"
        "if len(sys.argv) > 1: tune_cpu()\n"
        "assert 'jax' not in sys.modules\n"
        "import jax, jax.numpy as jnp\n"
        "x = jnp.zeros((256, 256))\n"
        "print('ynn' in jax.jit(jnp.dot).lower(x, x).compile().as_text())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in FREE} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    lines = [
        subprocess.run(
            [sys.executable, "-c", code, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for words in ([], ["tuned"])
    ]
    assert lines == ["True", "False"]


# -------------------------------------------------------------------------------------- memory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, limits",
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n"}, []),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "4096\n"}, [4096]),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/memory.max": "8192\n",
                "sys/fs/memory.max": "1\n",
            },
            [8192],
        ),
        # A container of version 1, in which its own group is mounted as the root.
        (
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/1\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "2048\n",
            },
            [2048],
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job/step\n",
                f"{V1}/job/step/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/job/memory.limit_in_bytes": "512\n",
            },
            [9223372036854771712, 512],
        ),
    ],
)
def test_the_limits_of_containers_are_read(files, limits, tmp_path):
    assert list(machine._container_limits(write(tmp_path, files))) == limits


def test_memory_is_the_least_of_what_the_machine_has_and_the_container_may(monkeypatch):
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.memory() <= installed
    monkeypatch.setattr(machine, "_container_limits", lambda root: iter([2**63, 1000]))
    assert machine.memory() == 1000
    monkeypatch.setattr(machine, "_container_limits", lambda root: iter([2**63]))
    assert machine.memory() == installed
