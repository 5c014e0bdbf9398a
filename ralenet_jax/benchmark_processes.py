"""The training step in several processes on the loopback, against one process with the same batch on each device.

`compare` starts the workers (this module, run), which compile once and then train as many dispatches as they are told
on their standard input, so that the two sides take turns. Every worker has its share of the cores to itself, the one
process too: what is compared is machines of that size, not one that has the cores of all.
"""

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time

import jax

from ralenet_jax import benchmark_parts, state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

_SCALARS = 2  # loss and SNR


def all_reduced_bytes(program: str) -> int:
    """Bytes that one step all-reduces on a device: from the optimised HLO of a dispatch, a loop over steps.

    Counts each all-reduce in the body of a loop, and in what that calls, once: none stands in a loop within a step.
    """
    lines, name = {}, None
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
            lines[name] = []
        elif name:
            lines[name].append(line)
    calls = {name: set(re.findall(r"%([\w.\-]+)", "\n".join(body))) & lines.keys() for name, body in lines.items()}
    waiting, inside = re.findall(r" while\(.*\bbody=%?([\w.\-]+)", program), set()
    while waiting:
        inside.add(name := waiting.pop())
        waiting += calls[name] - inside
    return sum(
        int(bits) // 8 * math.prod(map(int, filter(None, shape.split(","))))
        for name in inside
        for line in lines[name]
        for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", line)
        for bits, shape in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", result)
    )


def expected_bytes(train_state) -> int:
    """The same, counted by hand: gradients and scalars, and BatchNorm's statistics forward and backward; float32."""
    statistics_size = sum(leaf.size for leaf in jax.tree.leaves(train_state.batch_stats))
    return 4 * (state.count_parameters(train_state.params) + _SCALARS + 2 * statistics_size)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # it ended before, with words unread
        process.stdin.close()


class _Workers:
    """Processes that train one model together; `reports` is what each of them said when it had compiled."""

    def __init__(self, stack: contextlib.ExitStack, cores: list[list[int]], settings: dict):
        """Starts a process on each list of `cores` (empty: on any); `stack` ends them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            settings = settings | {"processes": len(cores), "port": free.getsockname()[1]}
        # What the user's shell says of backends and devices is not for the workers.
        environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
        environment["JAX_PLATFORMS"] = "cpu"
        self._errors, self._running = [], []
        for number, own in enumerate(cores):
            command = [sys.executable, "-m", f"{__package__}.benchmark_processes"]
            command.append(json.dumps(settings | {"number": number, "cores": own}))
            self._errors.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors[-1]}
            self._running.append(stack.enter_context(subprocess.Popen(command, **pipes, text=True, env=environment)))
            stack.callback(_end, self._running[-1])
        self.reports = [self._answer(number) for number in range(len(cores))]

    def _answer(self, number: int) -> dict:
        for line in self._running[number].stdout:
            if line.startswith("{"):  # the collectives' library speaks there too
                return json.loads(line)
        self._errors[number].seek(0)
        last = self._errors[number].read().strip().rpartition("\n")[2]
        raise UserError(f"process {number} of {len(self._running)} ended with: {last!r}")

    def dispatch_seconds(self, dispatches: int) -> float:
        """Seconds of a dispatch, the mean of so many, in the process that takes longest."""
        for process in self._running:
            with contextlib.suppress(BrokenPipeError):  # it has ended; its answer says why
                print(dispatches, file=process.stdin, flush=True)
        return max(self._answer(number)["seconds"] for number in range(len(self._running))) / dispatches


def compare(processes: int, batch: int, length: int, devices: int, repeats: int, seconds: float, say) -> dict:
    """Takes turns between `processes` processes and one.

    Args:
        processes: at least 2.
        batch: windows in a step, of each process; divides by `devices`.
        length: samples of a window.
        devices: CPU devices of each process; 0: one for each of its cores.
        repeats: rounds.
        seconds: for each measurement, about.
        say: takes a row for each round.

    Returns:
        The summary: seconds of a step, efficiency (one process' step / that of several), bytes all-reduced in a step.

    Raises:
        UserError: if a process ends.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // processes
    devices = devices or max(number for number in range(1, max(each, 1) + 1) if not batch % number)
    where = {"batch": batch, "length": length, "devices": devices}
    rounds = []
    with contextlib.ExitStack() as stack:
        own = [cores[number * each : (number + 1) * each] for number in range(processes)]
        one, several = (_Workers(stack, own[:n], where) for n in (1, processes))
        steps = one.reports[0]["steps"]
        # Every process of a side runs the same number of dispatches: they wait for each other in each.
        counts = [max(1, round(seconds / side.dispatch_seconds(1))) for side in (one, several)]
        for number in range(repeats):
            times = [side.dispatch_seconds(n) / steps for side, n in zip((one, several), counts, strict=True)]
            rounds.append({"one_process_step_s": times[0], "step_s": times[1], "efficiency": times[0] / times[1]})
            row = {"part": "processes", "processes": processes} | where | {"round": number}
            say(row | {name: round(value, 5) for name, value in rounds[-1].items()})
        first = several.reports[0]
    spreads = {name: benchmark_parts.spread([row[name] for row in rounds], 5) for name in rounds[0]}
    more = {"cores_of_a_process": each or None, "one_process_compile_s": one.reports[0]["compile_s"]}
    return {"part": "processes", "processes": processes} | where | more | spreads | first


def _work(settings: dict) -> None:
    if settings["cores"]:
        os.sched_setaffinity(0, settings["cores"])
    jax.config.update("jax_num_cpu_devices", settings["devices"])
    if settings["processes"] > 1:
        address = f"127.0.0.1:{settings['port']}"
        jax.distributed.initialize(address, settings["processes"], settings["number"])
    config = load_config("ralenet", [f"train.batch_size={settings['batch']}"])
    train = benchmark_parts.Training(config, jax.devices(), settings["length"])
    report = {
        "steps": benchmark_parts.dispatch_steps(config),
        "compile_s": round(benchmark_parts.compile_seconds(train), 2),
        "all_reduced_bytes": all_reduced_bytes(train.program()),
        "all_reduced_bytes_expected": expected_bytes(benchmark_parts.fresh_state(config)),
    }
    print(json.dumps(report | benchmark_parts.peak_memory(jax.local_devices())), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            train()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
