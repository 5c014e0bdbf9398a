"""Compiled programs, kept for the next start.

JAX keeps what XLA compiled, but traces and lowers every program anew to know what to look for, which takes a third of a
start with everything compiled. Here a program is found by what it is made of: the source of this package, versions,
devices, settings and the arguments' shapes.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from ralenet_jax import startup

_MOST = 32  # programs: those used longest ago go
_PREFIX = "ralenet-"


def kept(function: Callable, devices: Sequence[jax.Device], *made_of: str) -> Callable:
    """A jitted or pmapped function whose programs are kept where JAX keeps what it compiles, if it does.

    Those of several processes are not: they compile together.

    Args:
        function: its arguments are arrays and pytrees of such.
        devices: that it runs on, in their order.
        made_of: what its programs depend on besides its arguments' shapes.
    """
    folder = jax.config.jax_compilation_cache_dir
    there = folder and jax.config.jax_enable_compilation_cache and os.path.isdir(folder)
    if not there or jax.process_count() > 1 or not startup.is_known_jax():
        return function
    return _Kept(function, list(devices), Path(folder), made_of)


class _Kept:
    def __init__(self, function: Callable, devices: list[jax.Device], folder: Path, made_of: tuple[str, ...]):
        self._function, self._devices, self._folder = function, devices, folder
        self._made_of = (*made_of, str([device.id for device in devices]))
        self._programs: dict[tuple, Callable] = {}

    def __call__(self, *arguments):
        leaves, tree = jax.tree.flatten(arguments)
        given = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if given not in self._programs:
            self._programs[given] = self._find(arguments, given)
        return self._programs[given](*arguments)

    def _find(self, arguments: tuple, given: tuple) -> Callable:
        digest = hashlib.sha256("\n".join([*_surroundings(), *self._made_of, *map(str, given)]).encode())
        path = self._folder / f"{_PREFIX}{digest.hexdigest()}"
        # Whatever a damaged or foreign file brings up: the program is compiled again.
        with contextlib.suppress(Exception):
            return _read(path, self._devices)
        events = []
        note = lambda event, **_: events.append(event)  # noqa: E731
        jax.monitoring.register_event_listener(note)
        try:
            program = self._function.lower(*arguments).compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
        # What JAX has read itself cannot be written once more: on a CPU it would lack its functions.
        if "/jax/compilation_cache/cache_hits" not in events:
            # Not every device's programs can be kept, and a disk may be full; the next start takes longer then.
            with contextlib.suppress(Exception):
                _write(path, program)
        return program


def _read(path: Path, devices: list[jax.Device]) -> Callable:
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged")
    program = serialize_executable.deserialize_and_load(*pickle.loads(content[32:]), execution_devices=devices)
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _write(path: Path, program: jax.stages.Compiled) -> None:
    content = pickle.dumps(serialize_executable.serialize(program))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(hashlib.sha256(content).digest() + content)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    others = sorted(path.parent.glob(f"{_PREFIX}{'?' * 64}"), key=lambda other: other.stat().st_mtime)
    for other in others[:-_MOST]:
        other.unlink(missing_ok=True)


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """All that programs depend on and that stays the same in a process."""
    package = Path(__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(path.read_bytes())
    devices = jax.devices()
    # A program for a CPU is made for what that CPU can do.
    with contextlib.suppress(OSError):
        source.update(_instructions().encode())
    return (
        source.hexdigest(),
        *(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax")),
        f"{sys.version} {platform.machine()}",
        devices[0].client.platform_version,
        str([(device.id, device.device_kind) for device in devices]),
        str([os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]),
        str(sorted(jax.config.values.items())),
    )


def _instructions() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
