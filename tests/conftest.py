"""Eight simulated devices, no silent rank promotion: what a pod does to the code, on any machine."""

import gc
import os
import signal
from collections.abc import Iterator
from importlib.metadata import version

import pytest

# The compiled programs of one run serve the next, and the subprocesses that tests start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Most programs of the tests run once: compiling them costs more than they do. What users run is
# compiled in full, and so are the oracles when .ci/run runs them. Children inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    # A kernel of these small programs takes longer to emit than to run: the old emitters, and one
    # module of LLVM a program, save a quarter of the time on top.
    # XLA ends the process over a flag that it does not know, and has none of the first from 0.11 on.
    old_emitters = version("jaxlib").startswith("0.10.")
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false" * old_emitters,
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    ).strip()

# The threads of OpenBLAS spin while they wait for each other. Where two workers, or other programs,
# have the cores, a decomposition takes twelve times the processor seconds that it takes in one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

from tests.support.budget import Budget
from tests.support.hosts import Pair
from tests.support.leftovers import Leftovers
from tests.support.sharing import Programs, under_pressure

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell's background job ignores SIGINT, one under nohup SIGHUP, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

programs = Programs()
programs.install()


def keep_to_one_core(worker: str, count: int) -> None:
    """Give each worker of pytest-xdist a core of its own, with all that it starts from here on.

    XLA then cuts no loop of these small programs for several cores, whose threads would wake each
    other more often than they work.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if allowed and count >= len(allowed):
        os.sched_setaffinity(0, {allowed[int(worker.removeprefix("gw")) % len(allowed)]})


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        keep_to_one_core(config.workerinput["workerid"], config.workerinput["workercount"])
    # What is compiled in full takes what it takes.
    cheap = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    config.pluginmanager.register(Budget(enforced=cheap), "budget")
    if not hasattr(config, "workerinput"):  # the workers have that of the first process
        default = config.option.markexpr.startswith("not slow")
        config.pluginmanager.register(Leftovers(enforced=default), "leftovers")


def pytest_collection_finish() -> None:
    """Look for garbage rarely, and never among what was there before the first test.

    Tracing makes objects by the million, and each look goes through all modules and tests: a
    quarter of the time of a suite that mostly traces.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drop all programs between two files, where they take much memory."""
    yield
    if under_pressure():
        programs.forget()


@pytest.fixture(autouse=True)
def share_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests have each other's programs, but not one that changes the package or counts them."""
    programs.shared = not {"monkeypatch", "new_programs"} & set(request.fixturenames)
    yield
    programs.shared = True


@pytest.fixture
def new_programs() -> None:
    """Compile what a test runs anew (see `share_programs`)."""


@pytest.fixture
def compiled_in_full(new_programs: None) -> Iterator[None]:
    """Compile with all of XLA's passes, as users do, for a test that looks at the program."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two hosts that join at their first command, and serve the tests of all files."""
    hosts = Pair()
    yield hosts
    hosts.close()
