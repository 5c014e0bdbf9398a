"""Windows per second: the real training step and inference, alone or in turns with a peer on the same machine.

Training is timed as `ralenet train` runs it: batches put together on the host, K scanned steps in one dispatch over
all devices, noise mixed there, scalars fetched before the next dispatch. Only the data is made up. Inference is the
model alone on a batch that lies on the devices. Every measurement is one JSON line on stdout.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ralenet_jax import __version__, evaluate, input_pipeline, optim, provenance, steps
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config, use_all_cores

_SHAPE = (256, 2)  # samples and leads of a window
_NOISE_SAMPLES = 650_000  # a recording of nstdb
_MEASURES = ("train_windows_per_s", "infer_windows_per_s")


def _made_up_windows(count: int) -> input_pipeline.Windows:
    rng = np.random.default_rng(0)
    return input_pipeline.Windows(
        signal=rng.integers(-1024, 1024, (count, *_SHAPE), np.int16),
        gain=np.full((count, _SHAPE[1]), 200, np.float32),
        baseline=np.zeros((count, _SHAPE[1]), np.int32),
        record=np.full(count, "100"),
        symbol=np.full(count, "N"),
        id=np.arange(count, dtype=np.int32),
    )


def training(config: ConfigDict, devices: Sequence[jax.Device], state) -> Callable[[], int]:
    """A function that trains K steps from `state` on and returns how many windows that were."""
    batch, count = config.train.batch_size, config.train.steps_per_dispatch
    windows = _made_up_windows(batch * count * 4)
    recordings = np.random.default_rng(1).standard_normal((3, _NOISE_SAMPLES, _SHAPE[1]), np.float32)
    kind = (config.noise.kind, config.noise.snr_db, config.noise.snr_db_high)
    source = evaluate.noise_source(config, steps.replicate(recordings, devices), "train", *kind)
    model = train_state.model_from_config(config, steps.AXIS)
    optimizer = optim.build_optimizer(config, total_steps=1)
    key, state = jax.random.key(config.seed), steps.replicate(state, devices)
    block = steps.build_train_block(model, optimizer, config.protocol, config.noise.fresh, devices)
    step = 0

    def train() -> int:
        nonlocal state, step
        indices = input_pipeline.batch_indices(config.seed, step, count, len(windows), batch)
        state, scalars = block(state, input_pipeline.train_block(windows, indices, len(devices)), source, key)
        jax.device_get(scalars)
        step += count
        return count * batch

    return train


def inference(config: ConfigDict, devices: Sequence[jax.Device], variables) -> Callable[[], int]:
    """A function that denoises one batch and returns how many windows that were."""
    batch = config.train.batch_size
    model = train_state.model_from_config(config)
    noisy = np.random.default_rng(2).standard_normal((batch, *_SHAPE), np.float32)
    noisy = jax.device_put(noisy, NamedSharding(Mesh(np.array(devices), (steps.AXIS,)), PartitionSpec(steps.AXIS)))
    variables = steps.replicate(variables, devices)
    apply = jax.jit(model.apply)

    def infer() -> int:
        apply(variables, noisy).block_until_ready()
        return batch

    return infer


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


def run_peer(command: Sequence[str]) -> dict:
    """Runs a peer; gives the last JSON line it prints, with `train_` and `infer_segments_per_s` under our names.

    Raises:
        UserError: if it does not start, fails, or prints no such line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        result = json.loads(done.stdout.strip().rpartition("\n")[2])
        measures = {name: result.pop(name.replace("windows", "segments")) for name in _MEASURES}
    except OSError as error:
        raise UserError(f"the peer {command[0]} does not start: {error.strerror}; see --peer-python") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        last = done.stderr.strip().rpartition("\n")[2] or done.stdout.strip().rpartition("\n")[2]
        raise UserError(
            f"the peer (exit {done.returncode}) printed no JSON with train_ and infer_segments_per_s, but: {last!r}"
        ) from error
    return result | measures


def summary(rows: list[dict], peer_rows: list[dict]) -> dict:
    """Median, lowest and highest of each measure, of the peer's, and of the ratio ours/peer within a round."""
    table = {}
    for name in _MEASURES:
        ours, theirs = ([row[name] for row in group] for group in (rows, peer_rows))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)] if theirs else []
        for label, values in ((name, ours), (f"peer_{name}", theirs), (f"{name}_ratio", ratios)):
            if values:
                median, low, high = statistics.median(values), min(values), max(values)
                table[label] = {"median": round(median, 3), "min": round(low, 3), "max": round(high, 3)}
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ralenet benchmark", description="Windows trained and denoised per second.")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step, over all devices (%(default)s)")
    parser.add_argument("--devices", type=int, default=0, help="how many; 0: all, on a CPU one for each core")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="for each measurement (%(default)s)")
    parser.add_argument("--peer", help="script to take turns with, and its options; gets --batch, --seconds, --device")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that runs the peer (this one)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; raises `UserError` for what the user can mend."""
    args = _parser().parse_args(argv)
    if args.repeats < 1 or not args.seconds > 0 or args.batch < 1:
        raise UserError("--batch and --repeats are whole numbers from 1, --seconds is above 0")
    use_all_cores()
    config = load_config("ralenet", [f"train.batch_size={args.batch}", f"num_devices={args.devices}"])
    devices = evaluate.choose_devices(config, args.batch)
    optimizer = optim.build_optimizer(config, total_steps=1)
    state = train_state.create_state(train_state.model_from_config(config), optimizer, jax.random.key(0), _SHAPE)
    state = jax.device_get(state)  # the training gives up its own copy
    train, infer = training(config, devices, state), inference(config, devices, state.variables)
    head = {
        "ralenet_jax": __version__,
        "revision": provenance.revision(),
        "jax": version("jax"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "batch": args.batch,
        "steps_per_dispatch": config.train.steps_per_dispatch,
        "train_compile_s": round(compile_seconds(train), 2),
        "infer_compile_s": round(compile_seconds(infer), 2),
    }
    print(json.dumps(head), flush=True)
    options = {"batch": args.batch, "seconds": args.seconds, "device": devices[0].platform.replace("gpu", "cuda")}
    peer = [args.peer_python, *shlex.split(args.peer or "")] + [f"--{name}={value}" for name, value in options.items()]
    rows, peer_rows = [], []
    for number in range(args.repeats):
        rates = (windows_per_second(run, args.seconds) for run in (train, infer))
        rows.append(dict(zip(_MEASURES, (round(rate, 1) for rate in rates), strict=True)))
        print(json.dumps({"round": number} | rows[-1]), flush=True)
        if args.peer:
            peer_rows.append(run_peer(peer))
            print(json.dumps({"round": number} | peer_rows[-1]), flush=True)
    print(json.dumps({"summary": summary(rows, peer_rows)}))
    return 0
