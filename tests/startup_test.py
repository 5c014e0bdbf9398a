"""What is settled before JAX is used, and what is left alone."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ralenet_jax import startup

_CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def config(monkeypatch, tmp_path):
    """JAX's configuration as it is in a fresh process, and what was set in it."""
    config = types.SimpleNamespace(jax_num_cpu_devices=-1, jax_compilation_cache_dir=None, seen={})
    config.update = lambda name, value: config.seen.update({name: value})
    monkeypatch.setattr(startup, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(startup.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(startup, "version", lambda package: "0.10.2")
    config.cpu = "flags\t: sse2 avx512f avx512dq\n"
    monkeypatch.setattr(startup.Path, "read_text", lambda path, encoding: config.cpu)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return config


def test_one_host_device_for_each_core(config):
    startup.start_jax()
    assert config.seen["jax_num_cpu_devices"] == 3


def test_cores_are_counted_where_they_cannot_be_chosen(config, monkeypatch):
    monkeypatch.delattr(startup.os, "sched_getaffinity")  # not on macOS
    monkeypatch.setattr(startup.os, "cpu_count", lambda: 4)
    startup.start_jax()
    assert config.seen["jax_num_cpu_devices"] == 4


def test_a_number_of_devices_that_was_said_stays(config, monkeypatch):
    config.jax_num_cpu_devices = 2  # by JAX_NUM_CPU_DEVICES, or whoever started this process
    startup.start_jax()
    config.jax_num_cpu_devices = -1
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=5")
    startup.start_jax()
    assert "jax_num_cpu_devices" not in config.seen


def test_devices_in_use_stay_as_they_are():
    code = (
        "import jax\nbefore = jax.devices()\nfrom ralenet_jax import startup\n"
        "startup.start_jax()\nprint(jax.devices() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_CHECKOUT)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_wide_vectors_where_the_cpu_has_them(config):
    startup.start_jax()
    assert "--xla_cpu_prefer_vector_width=512" in os.environ["XLA_FLAGS"].split()


def test_loops_stay_rolled(config, monkeypatch):
    config.cpu = ""
    startup.start_jax()
    assert "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true" in os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=b=1")
    startup.start_jax()
    assert "xla_cpu_disable_loop_unrolling" not in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("reason", ["no AVX-512", "said before", "a version that was not tried"])
def test_vectors_stay_as_they_are(config, monkeypatch, reason):
    flags = "--xla_cpu_prefer_vector_width=128" if reason == "said before" else "--xla_a=1"
    flags += " --xla_backend_extra_options=b=1"
    monkeypatch.setenv("XLA_FLAGS", flags)
    if reason == "no AVX-512":
        config.cpu = "flags\t: sse2 avx2\n"
    if reason == "a version that was not tried":
        monkeypatch.setattr(startup, "version", lambda package: "0.13.0")
    startup.start_jax()
    assert os.environ["XLA_FLAGS"] == flags


def test_kernels_overlap_where_jax_has_cuda(config, monkeypatch):
    config.cpu = ""
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    said = "--xla_gpu_graph_enable_concurrent_region=false --xla_backend_extra_options=b=1"
    monkeypatch.setenv("XLA_FLAGS", said)
    startup.start_jax()
    assert os.environ["XLA_FLAGS"] == f"{said} --xla_gpu_command_buffer_scheduling_mode=CONCURRENT"


def test_programs_are_kept_in_the_users_cache_folder(config, tmp_path):
    startup.start_jax()
    assert config.seen["jax_compilation_cache_dir"] == str(tmp_path / "cache/ralenet_jax")
    assert (tmp_path / "cache/ralenet_jax").is_dir()


@pytest.mark.parametrize("said", ["", "/elsewhere"])
def test_a_cache_that_was_named_or_refused_stays(config, monkeypatch, tmp_path, said):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", said)
    startup.start_jax()
    assert "jax_compilation_cache_dir" not in config.seen and not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(config, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    startup.start_jax()
    assert "jax_compilation_cache_dir" not in config.seen


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    code = (
        "from ralenet_jax import startup\nstartup.start_jax()\nimport jax, jax.numpy as jnp\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "heard = []\njax.monitoring.register_event_listener(lambda event, **_: heard.append(event))\n"
        "jax.jit(lambda x: jnp.sort(jnp.sin(x)))(jnp.arange(7.0)).block_until_ready()\n"
        "print('/jax/compilation_cache/cache_hits' in heard)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=_CHECKOUT,
            env=env | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        )
        for _ in range(2)
    ]
    assert [run.stdout for run in runs] == ["False\n", "True\n"], runs[-1].stderr
    assert runs[1].stderr == ""
