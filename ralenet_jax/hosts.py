"""Several processes that train one model: how they find each other, what they agree on, how they end.

Every process runs the same program on the same configuration; the first (process 0) alone writes logs and results.
With one process all of this does nothing.
"""

import contextlib
import itertools
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from ralenet_jax.errors import UserError

LOST = 3  # exit code of a process whose companions are gone
_Result = TypeVar("_Result")
_waits = itertools.count()


def connect(config: ConfigDict) -> None:
    """Joins the processes that `distributed.*` or the cluster's environment names, before JAX is first used.

    If not all come in time, JAX ends this process (SIGABRT, with words of its own).

    Raises:
        UserError: if they are named in part or wrongly, or no cluster is found.
    """
    coordinator, count = config.distributed.coordinator, config.distributed.num_processes
    named, number, auto = (coordinator, count), config.distributed.process_id, config.distributed.auto
    if not auto and (*named, number) == (None, None, None):
        return
    if not auto and None in (*named, number):
        raise UserError(
            f"distributed.coordinator is {coordinator}, num_processes {count} and process_id {number}; "
            "give all three, or distributed.auto=True in a cluster that tells them"
        )
    timeout, start_timeout = config.distributed.timeout_s, config.distributed.start_timeout_s
    if min(timeout, start_timeout) < 1:
        raise UserError(
            f"distributed.timeout_s is {timeout} and start_timeout_s {start_timeout}; expected 1 or more seconds"
        )
    asked = "distributed.auto=True" if auto else f"process {number} of {count}, process 0 at {coordinator}"
    print(f"{asked}: waiting for all processes, {start_timeout} s at most", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            *named,
            number,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{asked}: the processes did not come together ({reason}); see docs/pods.md") from error
    # JAX has taken SIGTERM for a protocol of its own, which would leave a process that is still starting alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def gather(value: int) -> np.ndarray:
    """One number of each process, int64 `[processes]`, on all of them."""
    if jax.process_count() == 1:
        return np.array([value])
    with bound_together():
        return multihost_utils.process_allgather(np.uint32(value)).astype(np.int64)


def wait(seconds: int) -> None:
    """Waits until all processes are here, so long at most.

    To be done before a computation over processes of which one may come late: gloo, which carries those on CPUs, gives
    up after 30 seconds.
    """
    with bound_together():
        multihost.get_barrier_sync_fn()(key=f"ralenet {next(_waits)}", timeout_ms=1000 * seconds)


def together(action: Callable[[], _Result], seconds: int) -> _Result:
    """Does on every process what may be refused on one: then it is refused on all, and none waits for the others.

    A process is waited for so many seconds.

    Raises:
        UserError: of this process, or telling which one was refused.
    """
    result = error = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    wait(seconds)
    refused = gather(error is not None)
    if error is not None:
        raise error
    if refused.any():
        raise UserError(f"process {refused.argmax()} of {len(refused)} was refused; its own message tells why")
    return result


def require_same(text: str, message: str) -> None:
    """Raises `UserError` on all processes unless all give the same text; `message` tells what it should have been."""
    digests = gather(zlib.crc32(text.encode()))
    if (other := digests != digests[0]).any():
        raise UserError(f"process {other.argmax()} of {len(digests)} differs from process 0: {message}")


@contextlib.contextmanager
def bound_together() -> Iterator[None]:
    """Ends this process, in one line, when a computation over several of them fails: another one is gone.

    At once: whatever else is open (a checkpoint being written, the orderly goodbye) would wait for the lost one. Where
    a computation does not notice, JAX does, by its heartbeat, and ends the process itself.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        print(
            f"ralenet: stopped: process {jax.process_index()} of {jax.process_count()} lost the others ({reason}); "
            "the same command on all goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(LOST)
