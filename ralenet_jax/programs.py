"""Compiled programs, kept for the next start.

JAX keeps what XLA compiled, but traces and lowers every program anew to know what to look for, which takes a third of a
start with everything compiled. Here a program is found by what it is made of: the source of this package, versions,
devices, settings and the arguments' shapes; and where another version of this package made the same of it, by what was
lowered, as JAX finds it. A file has a name for each. What is kept here for a CPU JAX does not keep as well.
"""

import contextlib
import functools
import gc
import hashlib
import math
import os
import pickle
import platform
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from ralenet_jax import startup

_MOST = 256  # names of programs, six for each configuration that is trained: those used longest ago go
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


def begin(function: Callable, *arguments) -> None:
    """Begins to find or compile the program of a function that `kept` gave, for such arguments, beside what comes next.

    It is traced here and now, since that is Python's work; the rest is a thread's, which the first call waits for.
    """
    if isinstance(function, _Kept):
        function.begin(arguments)


def shapes(function: Callable, *arguments) -> Any:
    """What a function that is jitted, or that `kept` gave, will give, as `jax.ShapeDtypeStruct`s."""
    return function.shapes(arguments) if isinstance(function, _Kept) else jax.eval_shape(function, *arguments)


def is_known(function: Callable, *arguments) -> bool:
    """Whether a function that `kept` gave has its program for such arguments, or `jax.ShapeDtypeStruct`s of them."""
    return isinstance(function, _Kept) and function.path(arguments).is_file()


class _Kept:
    def __init__(self, function: Callable, devices: list[jax.Device], folder: Path, made_of: tuple[str, ...]):
        self._function, self._devices, self._folder = function, devices, folder
        self._made_of, self._where = made_of, str([device.id for device in devices])
        self._programs: dict[tuple, Callable] = {}
        self._begun: dict[tuple, Future] = {}

    def __call__(self, *arguments):
        given = self._given(arguments)
        if given in self._programs:
            return self._programs[given](*arguments)
        begun = self._begun.pop(given, None)
        self._programs[given], keep = begun.result() if begun else self._find(arguments)
        results = self._programs[given](*arguments)
        keep()  # while the devices compute
        return results

    def begin(self, arguments: tuple) -> None:
        known = self.path(arguments).is_file()
        work = (self._find, arguments) if known else (self._make, arguments, self._lower(arguments))
        thread = ThreadPoolExecutor(1, "ralenet_compile")
        self._begun[self._given(arguments)] = thread.submit(*work)
        thread.shutdown(wait=False)

    def shapes(self, arguments: tuple) -> Any:
        with contextlib.suppress(Exception):
            program = self._programs[self._given(arguments)] = _read(self.path(arguments), self._devices)
            return program.out_info
        with _no_garbage():
            return jax.eval_shape(self._function, *arguments)

    def path(self, arguments: tuple) -> Path:
        """Where the program for such arguments is kept."""
        return self._path(_source(), *self._made_of, *map(str, self._given(arguments)))

    @staticmethod
    def _given(arguments: tuple) -> tuple:
        leaves, tree = jax.tree.flatten(arguments)
        return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def _find(self, arguments: tuple) -> tuple[Callable, Callable[[], None]]:
        """The program for such arguments, and what keeps it."""
        # Whatever a damaged or foreign file brings up: the program is made again.
        with contextlib.suppress(Exception):
            return _read(self.path(arguments), self._devices), lambda: None
        return self._make(arguments, self._lower(arguments))

    def _lower(self, arguments: tuple) -> jax.stages.Lowered:
        with _no_garbage():
            return self._function.lower(*arguments)

    def _make(self, arguments: tuple, lowered: jax.stages.Lowered) -> tuple[Callable, Callable[[], None]]:
        path = self.path(arguments)
        twin = self._path(lowered.as_text(), str(lowered.out_tree), *map(str, self._given(arguments)))
        with contextlib.suppress(Exception):
            return _read(twin, self._devices), lambda: _name(twin, path)
        program, is_new = _compile(lowered, self._devices[0].platform == "cpu")

        def keep():
            # Not every device's programs can be kept, and a disk may be full; the next start takes longer then.
            with contextlib.suppress(Exception):
                _write(twin, program)
                _name(twin, path)

        return program, keep if is_new else lambda: None

    def _path(self, *made_of: str) -> Path:
        digest = hashlib.sha256("\n".join([*_surroundings(), self._where, *made_of]).encode())
        return self._folder / f"{_PREFIX}{digest.hexdigest()}"


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Spares Python to look for garbage among all that is traced, a tenth of that time."""
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def _compile(lowered: jax.stages.Lowered, for_cpu: bool) -> tuple[Callable, bool]:
    """The compiled program, and whether it is not one that JAX has kept.

    Such a one cannot be written once more: for a CPU it would lack its functions. So there JAX is to keep none.
    """
    events = []

    def note(event, **_):
        events.append((threading.get_ident(), event))

    jax.monitoring.register_event_listener(note)
    try:
        with _jax_keeps_none if for_cpu else contextlib.nullcontext():
            program = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(note)
    return program, (threading.get_ident(), "/jax/compilation_cache/cache_hits") not in events


class _JaxKeepsNone:
    """While any thread is in it, JAX keeps no program."""

    _SETTING = "jax_persistent_cache_min_compile_time_secs"

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, 0.0

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._before = jax.config.values[self._SETTING]
                jax.config.update(self._SETTING, math.inf)
            self._inside += 1

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                jax.config.update(self._SETTING, self._before)


_jax_keeps_none = _JaxKeepsNone()


def _read(path: Path, devices: list[jax.Device]) -> Callable:
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged")
    parts = pickle.loads(zlib.decompress(content[32:]))
    program = serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _write(path: Path, program: jax.stages.Compiled) -> None:
    content = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
    with _part(path) as part:
        part.write_bytes(hashlib.sha256(content).digest() + content)
        part.rename(path)
    others = sorted(path.parent.glob(f"{_PREFIX}{'?' * 64}"), key=lambda other: other.stat().st_mtime)
    for other in others[: 1 - _MOST]:
        other.unlink(missing_ok=True)


def _name(path: Path, name: Path) -> None:
    """Gives a file one more name, if the file system has it have two."""
    with contextlib.suppress(OSError), _part(name) as part:
        part.hardlink_to(path)
        part.rename(name)


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A name to write under before the file is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def _source() -> str:
    """Digest of the source of this package."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """All that programs depend on besides the source, and that stays the same in a process."""
    devices, instructions = jax.devices(), ""
    # A program for a CPU is made for what that CPU can do.
    with contextlib.suppress(OSError):
        instructions = _instructions()
    return (
        instructions,
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
