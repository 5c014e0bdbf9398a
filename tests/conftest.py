"""Settings and data that all tests share."""

import fcntl
import os
import signal
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from ralenet_jax import readers_recording, startup

# Before any backend starts: the tests see two CPU devices, whatever the machine.
jax.config.update("jax_num_cpu_devices", 2)
# Most of their time is compilation, and the last optimisations take longer than they save. Child processes do alike.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell's background job is started deaf to Ctrl-C, and so would be the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A model is compiled once for all tests, those in other workers and in processes of their own included.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="ralenet_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# As in a command, so that what is compiled here and in processes of their own is the same.
startup.start_jax()

# Workers take whole files, one after the other: the longest ones first, so that all end at the same time. The second is
# one that does not wait for what the first one makes, `data_dir`.
_LONGEST = (
    *("train_test", "demo_test", "hosts_test", "parity_test", "real_data_test", "determinism_test", "export_test"),
    *("fuzz_test", "reproduce_test", "bfloat16_test", "ralenet_test", "attention_test", "denoise_test", "steps_test"),
    *("evaluate_test", "classify_test", "twelve_lead_test", "models_test"),
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_terminal_summary(terminalreporter):
    """Prints what tests have measured: a worker's own output is not seen."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that is not part of the checkout."""
    path = Path(os.environ.get("RALENET_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set RALENET_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def physionet(request) -> Path:
    """The real databases, laid out as on PhysioNet's file server."""
    given = os.environ.get("RALENET_PHYSIONET")
    path = Path(given) if given else request.getfixturevalue("shared") / "physionet"
    if not path.is_dir():
        pytest.skip(f"no databases at {path}; set RALENET_PHYSIONET to their folder")
    return path


@pytest.fixture
def model_alone(monkeypatch, request):
    """Neither slow course nor highs are taken out, so that what a made-up model does is all that happens."""
    from ralenet_jax import augment, streaming

    if "outside" not in request.fixturenames:
        monkeypatch.setattr(augment, "wander", np.zeros_like)
        monkeypatch.setattr(streaming, "highs", lambda *_: 0.0)


@pytest.fixture
def outside():
    """A test that asks for it has them taken out."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Recordings of a few hundred samples are worked on in several blocks."""
    monkeypatch.setattr(readers_recording, "_BLOCK", 90)


@pytest.fixture
def small_memory(monkeypatch):
    """A recording of a megabyte is too large where it takes more than four times its file."""
    monkeypatch.setattr(readers_recording, "_SPARE", 2**20)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Shards of the simulated databases, made once for all tests and workers."""
    from data_prep import prepare, simulate

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here; what they then find finished is left as it is
        source = simulate.write(folder / "simulated", seed=0)
        prepare.prepare(folder / "shards", source=source)
    return folder / "shards"
