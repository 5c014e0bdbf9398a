"""The parts that `ralenet benchmark` measures.

Most are functions that do a piece of work and return how many windows that was, to be called again and again; data and
weights are made up, what is done with them is what `ralenet` does. The others are whole commands, run once in a process
of their own.
"""

import collections
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ralenet_jax import evaluate, input_pipeline, optim, steps
from ralenet_jax import state as train_state
from ralenet_jax.denoise import Denoiser
from ralenet_jax.errors import UserError

LENGTH = 256  # samples of a window of the paper, and of the peers
_LEADS = 2
_NOISE_SAMPLES = 650_000  # a recording of nstdb
_READ_WINDOWS = 8192


def made_up_windows(count: int, length: int) -> input_pipeline.Windows:
    """Windows of random numbers, as if read from shards."""
    rng = np.random.default_rng(0)
    return input_pipeline.Windows(
        signal=rng.integers(-1024, 1024, (count, length, _LEADS), np.int16),
        gain=np.full((count, _LEADS), 200, np.float32),
        baseline=np.zeros((count, _LEADS), np.int32),
        record=np.full(count, "100"),
        symbol=np.full(count, "N"),
        id=np.arange(count, dtype=np.int32),
    )


def fresh_state(config: ConfigDict):
    """A `TrainState` with initial values, on the host."""
    model = train_state.model_from_config(config)
    optimizer = optim.build_optimizer(config, 1, model)
    return jax.device_get(train_state.create_state(model, optimizer, config.seed, (LENGTH, _LEADS)))


def dispatch_steps(config: ConfigDict) -> int:
    """Steps in one dispatch of a training on as many windows as the paper's."""
    return min(config.train.steps_per_dispatch, max(config.data.num_train // config.train.batch_size, 1))


def _made_up_noise(config: ConfigDict, devices: Sequence[jax.Device], split: str) -> steps.NoiseSource:
    recordings = np.random.default_rng(1).standard_normal((3, _NOISE_SAMPLES, _LEADS), np.float32)
    kind = (config.noise.kind, config.noise.snr_db, config.noise.snr_db_high)
    return evaluate.noise_source(config, steps.replicate(recordings, devices), split, *kind)


class Input:
    """Puts blocks of K batches together on the host, drawn from as many windows as the paper trains on.

    `config.train.batch_size` windows are a batch of this process, for those of `devices` that are its own.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device], length: int):
        self._config = config
        self._devices = sum(device.process_index == jax.process_index() for device in devices)
        self._windows = made_up_windows(max(config.data.num_train, config.train.batch_size), length)
        self._step = 0

    def block(self) -> dict[str, np.ndarray]:
        """The next block: "clean" `[devices, K, B, L, C]` and "id"."""
        batch, count = self._config.train.batch_size, dispatch_steps(self._config)
        indices = input_pipeline.batch_indices(self._config.seed, self._step, count, len(self._windows), batch)
        self._step += count
        return input_pipeline.train_block(self._windows, indices, self._devices)

    def __call__(self) -> int:
        """Puts a block together; gives its windows."""
        return self.block()["id"].size


class Training:
    """Trains K steps on, as `ralenet train` does: one dispatch, its scalars fetched before the next."""

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device], length: int):
        self._input = Input(config, devices, length)
        self._count = np.int32(dispatch_steps(config))
        self._windows = config.train.batch_size * dispatch_steps(config)
        self._source = _made_up_noise(config, devices, "train")
        self._key = jax.random.key(config.seed)
        self._state = steps.replicate(fresh_state(config), devices)
        model = train_state.model_from_config(config, steps.AXIS)
        optimizer = optim.build_optimizer(config, 1, model)
        self._block = steps.build_train_block(model, optimizer, config.protocol, config.noise.fresh, devices)

    def _arguments(self) -> tuple:
        return self._state, self._input.block(), self._count, self._source, self._key

    def __call__(self) -> int:
        """Runs a dispatch; gives its windows, those of this process."""
        self._state, scalars = self._block(*self._arguments())
        jax.device_get(scalars)
        return self._windows

    def program(self) -> str:
        """The compiled dispatch as optimised HLO."""
        return self._block.lower(*self._arguments()).compile().as_text()


def inference(config: ConfigDict, devices: Sequence[jax.Device], length: int) -> Callable[[], int]:
    """The model alone, without gradients, on one batch that lies on the devices.

    A batch is waited for when the next is under way, as whoever has a long recording to denoise does it.
    """
    batch = config.train.batch_size
    model = train_state.model_from_config(config)
    shape = (len(devices), batch // len(devices), length, _LEADS)
    noisy = np.random.default_rng(2).standard_normal(shape, np.float32)
    noisy = jax.device_put(noisy, NamedSharding(Mesh(np.array(devices), (steps.AXIS,)), PartitionSpec(steps.AXIS)))
    variables = steps.replicate(fresh_state(config).variables, devices)
    apply = steps.build_inference(model, devices)
    under_way = collections.deque()

    def infer() -> int:
        under_way.append(apply(variables, noisy))
        if len(under_way) > 1:
            under_way.popleft().block_until_ready()
        return batch

    return infer


def evaluation(config: ConfigDict, devices: Sequence[jax.Device], length: int) -> Callable[[], int]:
    """Four batches with all measures, as `ralenet evaluate` runs them under one condition."""
    batch = config.train.batch_size
    windows = made_up_windows(4 * batch, length)
    source = _made_up_noise(config, devices, "test")
    variables = steps.replicate(fresh_state(config).variables, devices)
    eval_step = steps.build_eval_step(train_state.model_from_config(config, steps.AXIS), config.protocol, devices)

    def measure() -> int:
        batches = input_pipeline.eval_batches(windows, batch, len(devices))
        evaluate.evaluate_windows(eval_step, variables, batches, source)
        return len(windows)

    return measure


def denoise(devices: Sequence[jax.Device], minutes: float, repeats: int) -> dict:
    """The same minute of two made-up leads at 360 Hz over and over, cleaned whole with the weights that come along."""
    rate, heart_rate = 360, 1.2
    time_s = np.arange(60 * rate) / rate
    beats = np.exp(-np.square((time_s * heart_rate % 1 - 0.5) / (0.02 * heart_rate)))
    noise = np.random.default_rng(0).standard_normal((len(time_s), _LEADS), np.float32)
    minute = (beats[:, None] + 0.3 * noise).astype(np.float32)
    recording = np.resize(minute, (round(minutes * 60 * rate), _LEADS))
    denoiser = Denoiser.from_pretrained(devices=devices)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.perf_counter()
        denoiser(recording, rate)
        seconds.append(time.perf_counter() - start)
    row = {"part": "denoise", "minutes": minutes, "leads": _LEADS, "devices": len(devices)}
    return row | {"first_s": round(seconds[0], 2), "seconds": spread(seconds[1:])} | peak_memory(devices)


def reading(data_dir: str) -> Callable[[], int]:
    """Reads windows drawn at random from the shards in `data_dir`; raises `UserError` where there are none."""
    builder = input_pipeline.open_shards(data_dir, "mitdb")
    total = builder.info.splits.total_num_examples
    ids = np.random.default_rng(0).permutation(total)[:_READ_WINDOWS]
    return lambda: len(input_pipeline.read_windows(builder, ids))


def compile_seconds(run: Callable[[], int]) -> float:
    """What the first call of `run` takes longer than the second."""
    times = [time.perf_counter()]
    for _ in range(2):
        run()
        times.append(time.perf_counter())
    return 2 * times[1] - times[0] - times[2]


def windows_per_second(run: Callable[[], int], seconds: float) -> float:
    """Calls `run`, which returns how many windows it did, for about so many seconds; the first call does not count."""
    run()  # what the caches hold is the peer's work
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += run()
    return count / elapsed


def _mebibytes(usage: resource.struct_rusage) -> float:
    return round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)  # Linux counts KiB


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest and highest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, float | str]:
    """The most memory in use so far, MiB: of the fullest device or, where devices do not tell, of this process."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("peak_bytes_in_use" in each for each in stats):
        peak = max(each["peak_bytes_in_use"] for each in stats) / 2**20
        return {"peak_memory_mib": round(peak, 1), "peak_memory_of": "device peak_bytes_in_use"}
    peak = _mebibytes(resource.getrusage(resource.RUSAGE_SELF))
    return {"peak_memory_mib": peak, "peak_memory_of": "process ru_maxrss"}


def run_command(arguments: Sequence[str], cache: str = "", until: str = "") -> tuple[float, float]:
    """Runs `ralenet` in a process of its own.

    Args:
        arguments: its arguments, the command first.
        cache: folder in place of the user's cache folder, for compiled programs; "": as the user has it.
        until: where it is stopped: at the first line that starts so; "": at its end.

    Returns:
        Seconds from its start, and the most memory it had in use, MiB (not what it has on a GPU).

    Raises:
        UserError: if it fails or never prints such a line.
    """
    command = [sys.executable, "-u", "-m", f"{__package__}.cli", *arguments]
    environment = dict(os.environ)
    if cache:
        environment["XDG_CACHE_HOME"] = cache
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    start, last, found = time.perf_counter(), "", False
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        try:
            for line in process.stdout:
                last = line.strip() or last
                if found := bool(until) and line.startswith(until):
                    break
            seconds = time.perf_counter() - start
            if found:
                process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
    if not found and (until or process.returncode):
        raise UserError(f"`ralenet {arguments[0]}` (exit {process.returncode}) ended with: {last!r}")
    return seconds, _mebibytes(usage)


def _command_row(part: str, seconds: dict[str, float], peaks: Sequence[float], **more) -> dict:
    rounded = {name: round(value, 2) for name, value in seconds.items()}
    return {"part": part} | more | rounded | {"peak_memory_mib": max(peaks), "peak_memory_of": "command ru_maxrss"}


def prepare(source: str) -> dict:
    """`ralenet prepare` of all databases from a local copy."""
    with tempfile.TemporaryDirectory(prefix="ralenet_benchmark_") as folder:
        seconds, peak = run_command(["prepare", "--source", source, "--data-dir", folder])
        windows = input_pipeline.open_shards(folder, "mitdb").info.splits.total_num_examples
    return _command_row("prepare", {"seconds": seconds}, [peak], windows=windows)


def start(config: ConfigDict, data_dir: str) -> dict:
    """`ralenet train` on all of a cell, until its first line of progress: nothing compiled before, then once more."""
    options = ["--data-dir", data_dir, f"--config.num_devices={config.num_devices}"]
    with tempfile.TemporaryDirectory(prefix="ralenet_benchmark_") as folder:
        runs = [
            run_command(["train", "--workdir", f"{folder}/{name}", *options], f"{folder}/cache", until="step ")
            for name in ("first", "second")
        ]
    seconds = {"first_start_s": runs[0][0], "second_start_s": runs[1][0]}
    where = {"batch": config.train.batch_size, "length": LENGTH, "devices": config.num_devices}
    return _command_row("start", seconds, [peak for _, peak in runs], **where)


def cell(config: ConfigDict, data_dir: str) -> dict:
    """A whole cell of the paper, by default, nothing compiled before: `ralenet train`, then `ralenet evaluate`."""
    settings = {"num_devices": config.num_devices, "train.epochs": config.train.epochs}
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory(prefix="ralenet_benchmark_") as folder:
        where = ["--workdir", f"{folder}/run", "--data-dir", data_dir]
        trained, peak = run_command(["train", *where, *options], f"{folder}/cache")
        evaluated, second_peak = run_command(["evaluate", *where], f"{folder}/cache")
    seconds = {"seconds": trained + evaluated, "train_s": trained, "evaluate_s": evaluated}
    more = {"batch": config.train.batch_size, "length": LENGTH, "devices": config.num_devices}
    return _command_row("cell", seconds, [peak, second_peak], **more, epochs=config.train.epochs)
