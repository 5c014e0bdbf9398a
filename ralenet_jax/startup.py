"""How a command starts JAX: a device for each core, plain loops of wide vectors, programs kept for the next start."""

import contextlib
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import jax


def start_jax() -> None:
    """Sets JAX up for a command, before it is first used. What the environment or the caller has settled stays."""
    _use_all_cores()
    _use_wide_vectors()
    _leave_loops_rolled()
    _overlap_gpu_kernels()
    _keep_compiled_programs()


def _use_all_cores() -> None:
    """On a CPU makes one host device for each core, unless it is already settled how many there are."""
    said = jax.config.jax_num_cpu_devices > 0  # by the environment too: JAX_NUM_CPU_DEVICES
    if said or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Too late where this process has used JAX before: then its devices are what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores)


def _use_wide_vectors() -> None:
    """Lets XLA fill the vectors of a CPU with AVX-512, of which it takes half by itself."""
    with contextlib.suppress(OSError):
        if " avx512f " in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            _set_flag("xla_cpu_prefer_vector_width", "512")


def _leave_loops_rolled() -> None:
    """Has LLVM not unroll a CPU's loops: they are done in vectors, and a fifth of the compilation is saved."""
    _set_flag("xla_backend_extra_options", "xla_cpu_disable_loop_unrolling=true")


def _overlap_gpu_kernels() -> None:
    """Lets XLA start those of a step's small kernels together that do not wait for each other."""
    if any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13)):
        _set_flag("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT")
        _set_flag("xla_gpu_graph_enable_concurrent_region", "true")


def is_known_jax() -> bool:
    """Whether what JAX may change at any time (XLA's flags, how programs are written) was looked up for its version."""
    return tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 12)


def _set_flag(name: str, value: str) -> None:
    """Sets a flag of XLA's that the environment leaves alone."""
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA ends the process over a flag it does not know.
    if is_known_jax() and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


def _keep_compiled_programs() -> None:
    """Has JAX keep compiled programs in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another ("": none)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        return
    # A home that is not there or cannot be written costs a compilation at every start, no more.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ralenet_jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            # Small programs are half of a start: dozens of them, each under JAX's own limit of a second.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
