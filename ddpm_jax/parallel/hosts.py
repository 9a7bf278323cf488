"""Let several processes make one run: they find one another, agree, and leave together.

A "host" is a process. All of them run the same program on their own rows of the same batches. What
must not differ between them is compared, and what one of them refuses all refuse, so that none
waits for a partner that has gone. Two hosts, each with this program and its own `index`:

    hosts.join("10.0.0.1:9012", 2, index)        # both now count the devices of both
    with hosts.together():                       # one says no: both raise, at this line
        source = load_source(...)                #   host 0: DataError("no such set")
                                                 #   host 1: HostError("host 0 says: no such set")
    hosts.same("the config", save_json(config))  # they differ: HostError on both
    newest = hosts.from_main(newest)             # both go on from what host 0 sees on its disk
    ...                                          # steps, in which the devices exchange gradients
    hosts.barrier("end")                         # neither goes while the other still writes

On a single host each of these returns at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import HostError, UserError
from ddpm_jax.parallel import HOST_TIMEOUT, START_TIMEOUT

LEAVE_TIMEOUT = 5  # seconds that an error waits for the others to have had it too
_MESSAGE = 400  # bytes of an error that go around
_here = threading.local()  # .together: whether this thread is inside `together`


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    host_timeout: int = HOST_TIMEOUT,
) -> None:
    """Make this process one of several; it must come before anything that asks JAX for devices.

    A host that dies or hangs ends the others within `host_timeout` seconds, by SIGABRT (code 134)
    from JAX's coordination service.

    Args:
      coordinator_address: HOST:PORT of the first process. With None JAX asks SLURM, Open MPI or
        the TPU pod; where there is none of them the process is alone.
      num_processes, process_id: how many there are, and which this is; with an address only.

    Raises:
      HostError: an incomplete or impossible triple, or no answer from the address within
        `start_timeout` seconds.
    """
    triple = (coordinator_address, num_processes, process_id)
    explicit = triple != (None, None, None)
    if explicit:
        _check(*triple)
        if process_id:
            _await_coordinator(coordinator_address, start_timeout)
    elif not _scheduled() and not _on_tpu():
        return
    # Its sync manager would take SIGTERM from us and knows no SIGINT; the loop carries stop
    # requests through the devices.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *triple,
            local_device_ids=[] if explicit else _local_devices(),
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=host_timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, RuntimeError) and not explicit and not _scheduled():
            if isinstance(error, OSError):
                print(
                    "note: nobody answers what pod these TPUs belong to, so this process is taken "
                    "to be alone: --coordinator_address, --num_processes and --process_id join it",
                    flush=True,
                )
            return  # a machine with TPUs that is no part of a pod
        raise HostError(
            f"the hosts of this run cannot be joined: {str(error).splitlines()[0]}"
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # what is printed here, the first host prints too


def _check(address: str | None, count: int | None, index: int | None) -> None:
    if address is None or count is None or index is None:
        raise HostError(
            "coordinator_address, num_processes and process_id: give all three, or none"
        )
    name, _, port = address.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise HostError(f"coordinator_address={address}: write HOST:PORT, of the first process")
    if not 0 <= index < count:
        raise HostError(f"process_id={index}: must be in 0..{count - 1}, num_processes={count}")


def _await_coordinator(address: str, seconds: float) -> None:
    """Wait until something listens there.

    Where the first host never comes, the library would abort without a word of ours.
    """
    name, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((name.strip("[]"), int(port)), timeout=seconds):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                why = error.strerror or error
                raise HostError(
                    f"coordinator_address={address}: no answer within {seconds:g} s ({why})"
                ) from error
            time.sleep(0.2)


def _scheduled() -> bool:
    """Return whether SLURM or Open MPI has started several of us."""
    several = (
        max(int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")) > 1
    )
    return several and (
        "SLURM_STEP_NODELIST" in os.environ or "OMPI_MCA_orte_hnp_uri" in os.environ
    )


def _on_tpu() -> bool:
    """Return whether JAX will use TPUs: where it finds some it names them first, before a CPU."""
    return (jax.config.jax_platforms or "").partition(",")[0] == "tpu"


def _local_devices() -> list[int] | None:
    """Return [], all of the machine's devices, unless it has several of our processes.

    Then it is None, with which JAX gives each its own.
    """
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 1(x2) or 4,2
    most = max(int(part.partition("(")[0]) for part in tasks.split(","))
    return None if max(most, int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))) > 1 else []


def leave(seconds: float = LEAVE_TIMEOUT) -> None:
    """Say goodbye to the other hosts, for at most so many seconds.

    A host that goes without a word is dead to the others, who then abort.
    """
    if jax.distributed.is_initialized():
        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(seconds)


# ---------------------------------------------------------------------------------------- agreement


def meeting(what: str) -> None:
    """Check that a call which waits for the other hosts does not stand inside `together`.

    One of them may have refused there: it would never come, and the others would wait for ever.
    Whatever exchanges anything between hosts calls this first, on a single host as well, so that
    any test finds a misplaced call.

    Raises:
      RuntimeError: it does, a fault of the code.
    """
    if getattr(_here, "together", False):
        raise RuntimeError(f"{what} waits for the other hosts inside hosts.together()")


def barrier(name: str) -> None:
    """Return when every host has called it with this name."""
    meeting(f"barrier {name!r}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(values: np.ndarray) -> np.ndarray:
    """Return `values` as the first host has them, on every host.

    It serves decisions that depend on what is on a disk.
    """
    meeting("from_main")
    return multihost_utils.broadcast_one_to_all(values) if jax.process_count() > 1 else values


def same(what: str, value: object) -> None:
    """Check that `value` is the same on all hosts, by its repr.

    Raises:
      HostError: it is not; on every host.
    """
    meeting("same")
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    first, *rest = multihost_utils.process_allgather(digest)
    others = [str(host) for host, row in enumerate(rest, 1) if not np.array_equal(row, first)]
    if others:
        raise HostError(
            f"{what} of host {', '.join(others)} is not that of host 0: start all hosts alike"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make all hosts refuse what one host refuses in this block.

    Its UserError or OSError is a HostError on the others. The block itself must not wait for other
    hosts: one that has refused would answer something else (`meeting` finds such calls).
    """
    meeting("together")
    refusal: UserError | OSError | None = None
    _here.together = True
    try:
        yield
    except (UserError, OSError) as error:
        refusal = error
    finally:
        _here.together = False
    if jax.process_count() > 1:
        message = np.zeros(_MESSAGE, np.uint8)
        if refusal is not None:
            text = (str(refusal) or type(refusal).__name__).encode()[:_MESSAGE]
            message[: len(text)] = np.frombuffer(text, np.uint8)
        rows = multihost_utils.process_allgather(message)
        if refusal is None:
            for host, row in enumerate(rows):
                if row.any():
                    raise HostError(
                        f"host {host} says: {bytes(row).rstrip(bytes(1)).decode(errors='replace')}"
                    )
    if refusal is not None:
        raise refusal
