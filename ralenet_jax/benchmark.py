"""The command `ralenet benchmark`: what training, inference and the rest cost, alone or in turns with peers.

Training is timed as `ralenet train` runs it: batches put together on the host, K steps in one dispatch over
all devices, noise mixed there, scalars fetched before the next dispatch. Only the data is made up. Inference is the
model alone on a batch that lies on the devices. Every measurement is one JSON line on stdout; the last sums them up.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

import jax

from ralenet_jax import __version__, benchmark_parts, benchmark_processes, evaluate, provenance, startup
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

# Part: the option it needs.
PARTS = {
    "prepare": "source",
    "start": "data_dir",
    "cell": "data_dir",
    "read": "data_dir",
    "input": None,
    "train": None,
    "evaluate": None,
    "infer": None,
    "denoise": None,
}
_ROUNDS = {  # measured in rounds, for each batch and length
    "input": benchmark_parts.Input,
    "train": benchmark_parts.Training,
    "evaluate": benchmark_parts.evaluation,
    "infer": benchmark_parts.inference,
}
_PEER_PARTS = ("train", "infer")
_LENGTH_UNIT = 16  # a window is halved four times
_WHERE = ("part", "batch", "length", "devices")


def run_peer(command: Sequence[str], parts: Sequence[str]) -> list[dict]:
    """Runs a peer; makes a row for each part of the last JSON line it prints, which holds `PART_segments_per_s`.

    Raises:
        UserError: if it does not start, fails, or prints no such line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        result = json.loads(done.stdout.strip().rpartition("\n")[2])
        rates = {part: float(result.pop(f"{part}_segments_per_s")) for part in _PEER_PARTS}
    except OSError as error:
        raise UserError(f"the peer {command[0]} does not start: {error.strerror}; see --peer-python") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        last = done.stderr.strip().rpartition("\n")[2] or done.stdout.strip().rpartition("\n")[2]
        raise UserError(
            f"the peer (exit {done.returncode}) printed no JSON with train_ and infer_segments_per_s, but: {last!r}"
        ) from error
    name = {"peer": shlex.join(command)}  # of one that does not tell its own
    return [name | result | {"part": part, "windows_per_s": rates[part]} for part in parts]


def summary(rows: Sequence[dict]) -> list[dict]:
    """Median, lowest and highest rate of each part at each batch and length, over the rounds.

    With those of each peer, by its own name, and of the ratio ours/peer within a round; "per_train" of reading is its
    rate over that of the training at each batch, by medians.
    """
    table = []
    for where in dict.fromkeys(tuple(row[name] for name in _WHERE) for row in rows if "peer" not in row):
        group = [row for row in rows if tuple(row[name] for name in _WHERE) == where]
        ours = {row["round"]: row["windows_per_s"] for row in group if "peer" not in row}
        entry = dict(zip(_WHERE, where, strict=True)) | {"windows_per_s": benchmark_parts.spread(ours.values())}
        for name in dict.fromkeys(row["peer"] for row in group if "peer" in row):
            theirs = [(row["round"], row["windows_per_s"]) for row in group if row.get("peer") == name]
            entry.setdefault("peers", {})[name] = {
                "windows_per_s": benchmark_parts.spread([rate for _, rate in theirs]),
                "ratio": benchmark_parts.spread([ours[number] / rate for number, rate in theirs]),
            }
        last = next(row for row in reversed(group) if "peer" not in row)
        table.append(entry | {name: last[name] for name in ("compile_s", "peak_memory_mib", "peak_memory_of")})
    trained = {e["batch"]: e for e in table if e["part"] == "train" and e["length"] == benchmark_parts.LENGTH}
    for entry in table:
        if entry["part"] == "read" and trained:
            rate = entry["windows_per_s"]["median"]
            entry["per_train"] = {b: round(rate / e["windows_per_s"]["median"], 3) for b, e in trained.items()}
    return table


def _numbers(text: str) -> list[int]:
    if not all(number.isdecimal() and int(number) for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers from 1, with commas")
    return [int(number) for number in text.split(",")]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of `ralenet` does."""

    def error(self, message):
        raise UserError(f"{message}; see ralenet benchmark --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ralenet benchmark", allow_abbrev=False, description="What the parts of the work cost.")
    add = parser.add_argument
    add("--parts", help=f"with commas, of {', '.join(PARTS)} (train,infer; none with --processes)")
    add("--batch", type=_numbers, default="32", help="windows in a step over all devices; with commas (%(default)s)")
    add("--length", type=_numbers, default="256", help="samples of a window; with commas (%(default)s)")
    add("--devices", type=int, default=0, help="how many; 0: all, on a CPU one for each core")
    add("--repeats", type=int, default=5, help="rounds (%(default)s)")
    add("--seconds", type=float, default=5, help="for each measurement of a round (%(default)s)")
    add("--peer", action="append", default=[], help="script to take turns with, and its options; may come again")
    add("--peer-python", default=sys.executable, help="Python that runs the peers (this one)")
    add("--processes", type=int, help="the training step in so many processes against one; --batch is of each (CPU)")
    add("--source", help="for prepare: local copy in PhysioNet's layout")
    add("--data-dir", help="for read, start and cell: folder of the shards")
    add("--minutes", type=float, default=30, help="for denoise: of two leads at 360 Hz (%(default)s)")
    add("--epochs", type=int, help="for cell: other than the paper's")
    return parser


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    args = _parser().parse_args(argv)
    if args.parts is None:
        args.parts = "train,infer" if args.processes is None else ""
    args.parts = args.parts.split(",") if args.parts else []
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"--parts {part!r} is not known; choose from {', '.join(PARTS)}")
        if PARTS[part] and not getattr(args, PARTS[part]):
            raise UserError(f"the part {part} needs --{PARTS[part].replace('_', '-')}")
    if args.repeats < 1 or not 0 < args.seconds < float("inf") or args.devices < 0:
        raise UserError("--repeats is a whole number from 1, --devices one from 0, --seconds is above 0")
    if args.devices and (bad := [batch for batch in args.batch if batch % args.devices]):
        raise UserError(f"--batch {bad[0]} does not divide by --devices {args.devices}")
    if args.processes is not None and args.processes < 2:
        raise UserError(f"--processes {args.processes}; expected 2 or more, they are compared with one")
    if not 0.1 <= args.minutes <= 10_000:
        raise UserError(f"--minutes {args.minutes:g}; expected 0.1 to 10000")
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}; expected 1 or more")
    if bad := [length for length in args.length if length % _LENGTH_UNIT or length < 2 * _LENGTH_UNIT]:
        raise UserError(f"--length {bad[0]}; expected 32 or more, divisible by {_LENGTH_UNIT}")
    if args.peer and not (set(args.parts) & set(_PEER_PARTS) and benchmark_parts.LENGTH in args.length):
        raise UserError(
            f"--peer needs the part train or infer, and --length {benchmark_parts.LENGTH} among the lengths"
        )
    return args


def _say(row: dict) -> dict:
    print(json.dumps(row), flush=True)
    return row


def _in_rounds(runs: dict[str, Callable[[], int]], where: dict, args, devices, peers: Sequence[Sequence[str]]):
    """Measures `runs` and the peers in turns; gives the rows."""
    compiles = {
        part: None if part in ("read", "input") else round(benchmark_parts.compile_seconds(run), 2)
        for part, run in runs.items()
    }
    rows = []
    for number in range(args.repeats):
        for part, run in runs.items():
            rate = round(benchmark_parts.windows_per_second(run, args.seconds), 1)
            row = {"part": part} | where | {"round": number, "windows_per_s": rate, "compile_s": compiles[part]}
            rows.append(_say(row | benchmark_parts.peak_memory(devices)))
        for peer in peers:
            asked = [part for part in _PEER_PARTS if part in runs]
            rows += [_say(row | where | {"round": number}) for row in run_peer(peer, asked)]
    return rows


def _head(devices: Sequence[jax.Device]) -> dict:
    return {
        "ralenet_jax": __version__,
        "revision": provenance.revision(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        # Full float32 products, or what the device's default is; kept programs make compile_s smaller.
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
    }


def _commands(args: argparse.Namespace, num_devices: int) -> list[dict]:
    """Runs the parts that are whole commands, once each."""
    config = load_config("ralenet", [f"num_devices={num_devices}"])
    if args.epochs:
        config.train.epochs = args.epochs
    commands = {
        "prepare": functools.partial(benchmark_parts.prepare, args.source),
        "start": functools.partial(benchmark_parts.start, config, args.data_dir),
        "cell": functools.partial(benchmark_parts.cell, config, args.data_dir),
    }
    return [_say(run()) for part, run in commands.items() if part in args.parts]


def main(argv: Sequence[str]) -> int:
    """Runs the command; raises `UserError` for what the user can mend."""
    args = _arguments(argv)
    startup.start_jax()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", None)  # compile_s is to be of compilation
    # The peers and the commands need memory of the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = load_config("ralenet", [f"num_devices={args.devices if args.parts else 0}"])
    default = [config.train.batch_size] if {"start", "cell"} & set(args.parts) else []
    devices = evaluate.choose_devices(config, *(args.batch if args.parts else []), *default)
    _say(_head(devices))
    table = _commands(args, len(devices))
    rows = []
    if "read" in args.parts:
        where = {"batch": None, "length": benchmark_parts.LENGTH, "devices": None}
        rows += _in_rounds({"read": benchmark_parts.reading(args.data_dir)}, where, args, devices, [])
    if "denoise" in args.parts:
        table.append(_say(benchmark_parts.denoise(devices, args.minutes, args.repeats)))
    chosen = {part: build for part, build in _ROUNDS.items() if part in args.parts}
    for batch in args.batch if chosen else ():
        config = load_config("ralenet", [f"train.batch_size={batch}"])
        for length in args.length:
            runs = {part: build(config, devices, length) for part, build in chosen.items()}
            where = {"batch": batch, "length": length, "devices": len(devices)}
            peers = _peers(args, batch, devices) if length == benchmark_parts.LENGTH else []
            rows += _in_rounds(runs, where, args, devices, peers)
    table += summary(rows)
    for batch in args.batch if args.processes else ():
        for length in args.length:
            settings = (batch, length, args.devices, args.repeats, args.seconds)
            table.append(benchmark_processes.compare(args.processes, *settings, _say))
    _say({"summary": table})
    return 0


def _peers(args: argparse.Namespace, batch: int, devices: Sequence[jax.Device]) -> list[list[str]]:
    options = {"batch": batch, "seconds": args.seconds, "device": devices[0].platform.replace("gpu", "cuda")}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [[args.peer_python, *shlex.split(peer), *given] for peer in args.peer]
