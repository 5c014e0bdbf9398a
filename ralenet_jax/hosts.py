"""Several processes that train one model: how they find each other, what they agree on, how they end.

Every process runs the same program on the same configuration; the first (process 0) alone writes logs and results.
With one process all of this does nothing.
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # where JAX keeps the store that all processes see; Orbax takes it from there too
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from ralenet_jax.errors import UserError

LOST = 3  # exit code of a process whose companions are gone
_Result = TypeVar("_Result")
_waits = itertools.count()
_watch: "_Watch | None" = None
_at_abort: Callable | None = None  # kept from Python's memory management for as long as C may call it


def connect(config: ConfigDict) -> None:
    """Joins the processes that `distributed.*` or the cluster's environment names, before JAX is first used.

    If not all come in time, this process ends, with code `LOST`.

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
    _call_at_abort(lambda: _give_up(asked, start_timeout))
    try:
        jax.distributed.initialize(
            *named,
            number,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=2 * timeout,  # ours (`_Watch`) comes first
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        _call_at_abort(None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{asked}: the processes did not come together ({reason}); see docs/pods.md") from error
    # JAX has taken SIGTERM for a protocol of its own, which would leave a process that is still starting alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    global _watch
    _watch = _Watch(distributed.global_state.client, timeout)
    _call_at_abort(_watch.lose_store)  # JAX aborts as soon as the store is gone
    atexit.register(_watch.end)  # before JAX's own goodbye, which was registered earlier


def _call_at_abort(action: Callable[[], None] | None) -> None:
    """Has this called when JAX ends the process: with several lines, a stack trace and SIGABRT, if `action` returns."""
    global _at_abort
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action()) if action else None
    # A handler of Python's own would wait for the main thread to go on.
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, handler)
    _at_abort = handler


def _give_up(asked: str, seconds: int) -> None:
    _say(f"stopped: {asked}: not all came within {seconds} s; the same command on all tries again")
    os._exit(LOST)


def _say(line: str) -> None:
    print(f"ralenet: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()


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
    """Ends this process, in one line, when a computation over several of them fails (one is gone), or it is refused.

    At once: whatever else is open (a checkpoint being written, the orderly goodbye) would wait for the lost one, or the
    others for this one. Where a computation does not notice, `_Watch` does.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _watch is None:
            raise
        _watch.lose(str(error).splitlines()[0])
    except UserError as error:
        if _watch is None:
            raise
        _watch.refuse(error)


class _Watch:
    """Ends this process, in one line, when another one has shown no sign of life for `timeout` seconds.

    JAX's own heartbeat does so with a stack trace and SIGABRT. As there, process 0 keeps the store: every process
    changes its entry in it ever so often, process 0 looks at all of them and the others look at its entry alone, where
    it tells whom it lost, so that the traffic grows as the number of processes does.

    Args:
        client: of JAX's key-value store.
        timeout: s.
    """

    _ENTRY = "ralenet/alive/"
    _LOST = "lost "

    def __init__(self, client, timeout: float):
        self._client, self._timeout = client, timeout
        self._me, self._count = jax.process_index(), jax.process_count()
        self._every = max(timeout / 20, 0.5)
        watched = range(1, self._count) if self._me == 0 else [0]
        self._entries = dict.fromkeys(watched, "")
        self._changed = dict.fromkeys(watched, time.monotonic())
        self._word = ""  # the last one, if there is one to say
        self._ended, self._leaving, self._telling = threading.Event(), threading.Lock(), threading.Lock()
        # The store may not answer for as long as process 0 is frozen, so that one thread asks and the other one judges.
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """This process is through: what is left is JAX's own goodbye, with the same time to wait."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._every)

    def lose(self, reason: str) -> None:
        """Ends this process as one that lost the others."""
        line = f"stopped: process {self._me} of {self._count} lost the others ({reason})"
        self._leave(LOST, f"{line}; the same command on all goes on from the last checkpoint", reason)

    def refuse(self, error: UserError) -> None:
        """Ends this process as one that was refused what the others were not."""
        self._leave(2, f"error: {error}", f"process {self._me} was refused; its own message tells why")

    def lose_store(self) -> None:
        """Ends this process if the store is gone, and with it process 0."""
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), self._every).close()
        except OSError:
            self.lose("process 0 is gone")

    def _leave(self, code: int, line: str, reason: str) -> None:
        self._leaving.acquire()  # one thread does
        _say(line)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._me == 0 or code != LOST:
                self._word = self._LOST + reason
                self._telling.acquire(timeout=self._every)  # and kept: the other thread is not to write over it
                self._tell(self._word)
            if self._me == 0:  # without it JAX ends the others, with a stack trace
                time.sleep(2 * self._every)
        os._exit(code)

    def _tell(self, text: str) -> None:
        self._client.key_value_set(f"{self._ENTRY}{self._me}", text, allow_overwrite=True)

    def _read(self) -> dict[int, str]:
        if self._me:
            return {0: self._client.key_value_try_get(f"{self._ENTRY}0")}
        entries = self._client.key_value_dir_get(self._ENTRY)
        return {int(name.rpartition("/")[2]): text for name, text in entries}

    def _exchange(self) -> None:
        for count in itertools.count():
            # Errors: process 0 is gone, which is noticed by its silence, or has not written yet.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                with self._telling:
                    self._tell(self._word or str(count))
                for number, text in self._read().items():
                    if self._entries.get(number, text) != text:
                        self._entries[number], self._changed[number] = text, time.monotonic()
            if self._ended.wait(self._every):
                return

    def _judge(self) -> None:
        while not self._ended.wait(self._every / 2):
            for number, told in tuple(self._entries.items()):
                if told.startswith(self._LOST):
                    self.lose(told.removeprefix(self._LOST))
                if time.monotonic() - self._changed[number] > self._timeout:
                    self.lose(f"process {number} gave no sign of life for {self._timeout} seconds")
