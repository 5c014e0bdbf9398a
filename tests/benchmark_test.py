"""The benchmark: its arithmetic by hand, the peers' protocol, what it runs, and short real runs."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ralenet_jax import benchmark, benchmark_parts, benchmark_processes
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

PEER = """
import json, sys
print("warming up")
result = {"peer": "stand-in" + "".join(a for a in sys.argv if a == "--fast"), "train_segments_per_s": 100.0}
print(json.dumps(result | {"infer_segments_per_s": 400.0, "got": sys.argv[1:]}))
"""


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return path


def test_rate_counts_windows_and_leaves_out_the_first_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark_parts.time, "perf_counter", lambda: now[0])
    calls = []

    def run():
        now[0] += 100.0 if not calls else 0.5  # the first call compiles
        calls.append(now[0])
        return 32

    # 4 calls of half a second fill 2 seconds: 128 windows in 2 s.
    assert benchmark_parts.windows_per_second(run, 2.0) == 64.0
    assert len(calls) == 5


def test_compile_time_is_what_the_first_call_takes_longer(monkeypatch):
    now, costs = [0.0], iter((30.0, 0.5))
    monkeypatch.setattr(benchmark_parts.time, "perf_counter", lambda: now[0])
    assert benchmark_parts.compile_seconds(lambda: now.__setitem__(0, now[0] + next(costs))) == 29.5


def rows_of(part, rates, peer=None, batch=32, length=256):
    """Rows as the command prints them, one for each round."""
    where = {"part": part, "batch": batch, "length": length, "devices": 2}
    name = {"peer": peer} if peer else {"compile_s": 9.5, "peak_memory_mib": 7.0, "peak_memory_of": "process"}
    return [where | name | {"round": number, "windows_per_s": rate} for number, rate in enumerate(rates)]


def test_summary_is_of_rounds():
    ours, eager, compiled = (10.0, 30.0, 20.0), (5.0, 10.0, 20.0), (40.0, 40.0, 40.0)
    rows = rows_of("train", ours) + rows_of("train", eager, "eager") + rows_of("train", compiled, "compiled")
    rows += rows_of("train", (1.0, 1.0, 4.0), batch=512) + rows_of("infer", (8.0,), length=512)
    first, second, third = benchmark.summary(rows)
    assert (first["part"], first["batch"], first["length"], first["devices"]) == ("train", 32, 256, 2)
    assert first["windows_per_s"] == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert first["peers"]["eager"]["windows_per_s"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    # Within a round: 2, 3, 1; the ratio of medians would be 2 by chance, its spread not.
    assert first["peers"]["eager"]["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert first["peers"]["compiled"]["ratio"] == {"median": 0.5, "min": 0.25, "max": 0.75}
    assert (first["compile_s"], first["peak_memory_mib"]) == (9.5, 7.0)
    assert second["batch"] == 512 and second["windows_per_s"] == {"median": 1.0, "min": 1.0, "max": 4.0}
    assert "peers" not in second
    assert (third["part"], third["length"]) == ("infer", 512)


def test_reading_is_compared_with_training_at_its_length():
    rows = rows_of("read", (1000.0, 3000.0), batch=None)
    rows += rows_of("train", (100.0, 300.0)) + rows_of("train", (500.0, 500.0), batch=512)
    rows += rows_of("train", (1.0, 1.0), batch=64, length=512)
    # medians: 2000 against 200 and 500; there are no shards of length 512
    assert benchmark.summary(rows)[0]["per_train"] == {32: 10.0, 512: 4.0}
    assert "per_train" not in benchmark.summary(rows[:2])[0]


def test_peer_is_read_under_our_names(peer):
    command = [sys.executable, str(peer), "--batch", "32"]
    common = {"peer": "stand-in", "got": ["--batch", "32"]}
    train, infer = benchmark.run_peer(command, ["train", "infer"])
    assert train == common | {"part": "train", "windows_per_s": 100.0}
    assert infer == common | {"part": "infer", "windows_per_s": 400.0}
    assert benchmark.run_peer(command, ["infer"]) == [infer]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import no_such_module", r"\(exit 1\).*No module named 'no_such_module'"),
        ("print('{\"rate\": 3}')", r"\(exit 0\).*rate"),
        ("print('[3]')", r"\(exit 0\).*\[3\]"),
        ("pass", r"\(exit 0\) printed no JSON"),
    ],
)
def test_a_peer_that_fails_is_named(code, expected):
    with pytest.raises(UserError, match=expected):
        benchmark.run_peer([sys.executable, "-c", code], ["train"])


def test_a_peer_that_does_not_start_is_named(tmp_path):
    with pytest.raises(UserError, match="does not start: No such file.*--peer-python"):
        benchmark.run_peer([str(tmp_path / "python")], ["train"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--repeats", "0"], "from 1"),
        (["--repeats", "two"], "--repeats"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--batch", "0"], "--batch: '0'; expected whole numbers from 1"),
        (["--batch", "32,x"], "--batch: '32,x'"),
        (["--batch", "32,33", "--devices", "2"], "--batch 33 does not divide by --devices 2"),
        (["--length", "256,250"], "--length 250; .* divisible by 16"),
        (["--length", "16"], "--length 16; expected 32 or more"),
        (["--devices", "-1"], "--devices"),
        (["--parts", "train,trian"], "'trian' is not known; choose from prepare, start, cell, read, input, train, "),
        (["--parts", "prepare"], "prepare needs --source"),
        (["--parts", "read"], "read needs --data-dir"),
        (["--parts", "train,start"], "start needs --data-dir"),
        (["--parts", "cell"], "cell needs --data-dir"),
        (["--parts", "input", "--peer", "peer.py"], "--peer needs the part train or infer"),
        (["--length", "512", "--peer", "peer.py"], "--length 256"),
        (["--processes", "1"], "2 or more"),
        (["--epochs", "0"], "1 or more"),
        (["--minutes", "0"], "0.1 to 10000"),
        (["--minutes", "nan"], "0.1 to 10000"),
        (["--no-such"], "--no-such"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, expected):
    with pytest.raises(UserError, match=expected) as raised:
        benchmark.main(argv)
    assert "\n" not in str(raised.value)


def test_host_blocks_are_those_of_the_training():
    config = load_config("ralenet", ["train.batch_size=6", "train.steps_per_dispatch=3", "data.num_train=40"])
    blocks = benchmark_parts.Input(config, jax.devices()[:2], length=32)
    first, second = blocks.block(), blocks.block()
    assert first["clean"].shape == (2, 3, 3, 32, 2) and first["id"].shape == (2, 3, 3)
    # 40 windows are an epoch of six steps: no window comes twice in it.
    assert len({*first["id"].ravel(), *second["id"].ravel()}) == 36
    assert blocks() == 18


@pytest.mark.parametrize(("batch", "expected"), [(32, 50), (512, 15), (10_000, 1)])
def test_a_dispatch_is_no_longer_than_an_epoch_of_the_paper(batch, expected):
    # 8,000 windows: 250, 15 and no whole batches
    config = load_config("ralenet", [f"train.batch_size={batch}", "train.steps_per_dispatch=50"])
    assert benchmark_parts.dispatch_steps(config) == expected


def test_reading_and_host_blocks_run(data_dir, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which the command sets
    options = ["--batch", "4,8", "--length", "32", "--repeats", "2", "--seconds", "0.02", "--devices", "2"]
    assert benchmark.main(["--parts", "input,read", "--data-dir", str(data_dir), *options]) == 0
    head, *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert head["jax"] == jax.__version__ and head["devices"] == 2
    assert [(row["part"], row["batch"], row["round"]) for row in rows] == [
        *(("read", None, number) for number in (0, 1)),
        *(("input", batch, number) for batch in (4, 8) for number in (0, 1)),
    ]
    assert all(row["windows_per_s"] > 0 and row["peak_memory_mib"] > 10 for row in rows)
    assert [entry["part"] for entry in last["summary"]] == ["read", "input", "input"]


def test_peak_memory_is_of_the_fullest_device_or_of_the_process():
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n * 2**20}) for n in (3, 5, 4)]
    assert benchmark_parts.peak_memory(devices) == {
        "peak_memory_mib": 5.0,
        "peak_memory_of": "device peak_bytes_in_use",
    }
    cpu = benchmark_parts.peak_memory([types.SimpleNamespace(memory_stats=lambda: None)])
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert cpu["peak_memory_mib"] == pytest.approx(peak / 1024, rel=0.02)
    assert cpu["peak_memory_of"] == "process ru_maxrss"


def test_a_command_is_timed_to_its_end_or_to_a_line(tmp_path, monkeypatch):
    seconds, peak = benchmark_parts.run_command(["--version"])
    assert 0 < seconds < 20 and peak > 1
    with pytest.raises(UserError, match=r"`ralenet benhcmark` \(exit 2\) ended with: .*unknown command"):
        benchmark_parts.run_command(["benhcmark"])
    with pytest.raises(UserError, match=r"`ralenet --version` \(exit 0\) ended with"):
        benchmark_parts.run_command(["--version"], until="step ")
    # What stands in for Python would go on for a minute.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, time\nprint('starting')\n"
        "print('step', os.environ['XDG_CACHE_HOME'], 'JAX_COMPILATION_CACHE_DIR' in os.environ, flush=True)\n"
        "time.sleep(60)"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert benchmark_parts.run_command(["train"], "folder", until="step folder False")[0] < 20


@pytest.fixture
def commands(monkeypatch):
    """What was run: arguments, line waited for, folder of the cache. Each takes a second longer, and 10 MiB less."""
    ran = []

    def run(arguments, cache="", until=""):
        ran.append((arguments, until, cache))
        return float(len(ran)), 50.0 - 10 * len(ran)

    monkeypatch.setattr(benchmark_parts, "run_command", run)
    return ran


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_start_is_a_training_as_it_comes_with_an_empty_cache_then_a_filled_one(commands):
    row = benchmark_parts.start(load_config("ralenet", ["num_devices=2"]), "shards")
    assert (row["first_start_s"], row["second_start_s"], row["peak_memory_mib"], row["devices"]) == (1.0, 2.0, 40.0, 2)
    (first, until, cache), (second, _, same_cache) = commands
    assert first[0] == "train" and option(first, "--data-dir") == "shards" and until == "step "
    assert cache == same_cache and cache
    assert option(first, "--workdir") != option(second, "--workdir")
    assert first[5:] == second[5:] == ["--config.num_devices=2"]


def test_a_cell_is_training_then_evaluation_as_they_come(commands):
    row = benchmark_parts.cell(load_config("ralenet", ["num_devices=1"]), "shards")
    assert {name: row[name] for name in ("seconds", "train_s", "evaluate_s", "epochs", "peak_memory_mib")} == {
        "seconds": 3.0,
        "train_s": 1.0,
        "evaluate_s": 2.0,
        "epochs": 100,
        "peak_memory_mib": 40.0,
    }
    (train, _, cache), (evaluate, _, same_cache) = commands
    assert cache == same_cache and cache
    assert train[0] == "train" and evaluate[0] == "evaluate"
    assert option(train, "--workdir") == option(evaluate, "--workdir")
    assert train[5:] == ["--config.num_devices=1", "--config.train.epochs=100"]


HLO = """HloModule jit__fun, is_scheduled=true, entry_computation_layout={(s32[])->f32[8]{0}}

%inner.2 (a: f32[3,5], b: bf16[2]) -> (f32[3,5], bf16[2]) {
  %all-reduce.4 = (f32[3,5]{1,0}, /*index=1*/bf16[2]{0}) all-reduce(%a, %b), metadata={op_name="main"}
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %psum.1 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%region_1
  %psum.2 = f32[] all-reduce-start(%y), channel_id=2, to_apply=%region_1
  %psum.3 = f32[] all-reduce-done(%psum.2)
  %call.1 = (f32[3,5]{1,0}, bf16[2]{0}) call(%c, %d), to_apply=%inner.2
  %more = f32[100]{0} add(%psum.1, %psum.1), metadata={op_name="all-reduce"}
}

ENTRY %main.9 (p: f32[7]) -> f32[7] {
  %while.1 = (s32[], f32[8]{0}) while(%tuple.1), condition=%condition.3, body=%body.1, metadata={op_name="while"}
  ROOT %last = f32[7]{0} all-reduce(%p), channel_id=9, to_apply=%region_1
}
"""


def test_bytes_all_reduced_are_those_inside_the_loop():
    # 8 floats, one float, and 3 x 5 floats with two of two bytes; not the 7 floats after the loop
    assert benchmark_processes.all_reduced_bytes(HLO) == 32 + 4 + 64
    state = types.SimpleNamespace(
        params={"kernel": np.zeros((3, 4)), "bias": np.zeros(4)},
        batch_stats={"mean": np.zeros(2), "var": np.zeros(2)},
    )
    # 16 gradients, loss and SNR, 4 statistics forward and backward
    assert benchmark_processes.expected_bytes(state) == 4 * (16 + 2 + 2 * 4)


def test_processes_take_turns_with_one(monkeypatch):
    took, said = [], []

    class Workers:
        def __init__(self, stack, cores, settings):
            self.number, self.settings = len(cores), settings
            self.reports = [{"steps": 10, "compile_s": 8.0 * len(cores), "all_reduced_bytes": 12}] * len(cores)
            # seconds of a dispatch, the measured ones after the first: 2 s are 10 dispatches of one, 8 of two
            self.times = iter({1: (0.2, 0.2, 0.3, 0.2), 2: (0.25, 0.25, 0.5, 0.2)}[len(cores)])

        def dispatch_seconds(self, dispatches):
            took.append((self.number, dispatches))
            return next(self.times)

    monkeypatch.setattr(benchmark_processes, "_Workers", Workers)
    found = benchmark_processes.compare(2, 32, 256, devices=1, repeats=3, seconds=2.0, say=said.append)
    assert took == [(1, 1), (2, 1)] + [(1, 10), (2, 8)] * 3
    assert [row["efficiency"] for row in said] == [0.8, 0.6, 1.0]
    assert [row["round"] for row in said] == [0, 1, 2]
    assert found["one_process_step_s"] == {"median": 0.02, "min": 0.02, "max": 0.03}
    assert found["step_s"] == {"median": 0.025, "min": 0.02, "max": 0.05}
    assert found["efficiency"] == {"median": 0.8, "min": 0.6, "max": 1.0}
    assert (found["one_process_compile_s"], found["compile_s"], found["all_reduced_bytes"]) == (8.0, 16.0, 12)


def test_a_process_that_ends_is_named():
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match="process 0 of 1 ended with: .*'devices'"):
        benchmark_processes._Workers(stack, [[]], {"batch": 4})


def run(*options):
    done = subprocess.run(
        [sys.executable, "-m", "ralenet_jax.cli", "benchmark", *map(str, options)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
    )
    assert done.returncode == 0, done.stderr
    head, *rows, last = map(json.loads, done.stdout.splitlines())
    return head, rows, last["summary"]


@pytest.mark.slow
def test_a_short_run_with_two_peers(peer):
    peers = ["--peer", peer, "--peer", f"{peer} --fast"]
    parts = ["--parts", "train,evaluate,infer", "--length", "256,32"]
    head, rows, table = run("--batch", 4, "--repeats", 2, "--seconds", 0.1, "--devices", 2, *parts, *peers)
    assert head["devices"] == 2
    # At the peers' length they take their turns in each round.
    turns = [(row["part"], row.get("peer")) for row in rows if row["length"] == 256]
    ours = [("train", None), ("evaluate", None), ("infer", None)]
    theirs = [(part, name) for name in ("stand-in", "stand-in--fast") for part in ("train", "infer")]
    assert turns == (ours + theirs) * 2
    assert [row["part"] for row in rows if row["length"] == 32] == ["train", "evaluate", "infer"] * 2
    assert all(row["windows_per_s"] > 0 and row["compile_s"] > 0 for row in rows if "peer" not in row)
    assert rows[3]["got"] == ["--batch=4", "--seconds=0.1", "--device=cpu"]
    trained = sorted(row["windows_per_s"] for row in (rows[0], rows[7]))
    assert table[0]["windows_per_s"]["max"] == trained[-1]
    assert table[0]["peers"]["stand-in"]["ratio"]["min"] == pytest.approx(trained[0] / 100.0, abs=1e-3)
    assert [(entry["part"], entry["length"]) for entry in table] == [
        (part, length) for length in (256, 32) for part in ("train", "evaluate", "infer")
    ]


@pytest.mark.slow
def test_a_short_run_of_two_processes():
    options = ["--processes", 2, "--batch", 4, "--length", 32, "--devices", 1, "--repeats", 2, "--seconds", 0.5]
    _, rows, (found,) = run(*options)
    assert [row["round"] for row in rows] == [0, 1]
    assert found["efficiency"]["median"] > 0
    # 1,087,282 parameters, two scalars, mean and variance of 8 channels forward and backward; float32
    assert found["all_reduced_bytes"] == found["all_reduced_bytes_expected"] == 4 * (1_087_282 + 2 + 32)


@pytest.mark.slow
def test_a_short_recording_is_denoised():
    _, (row,), (last,) = run("--parts", "denoise", "--minutes", 0.2, "--repeats", 2)
    assert row["part"] == "denoise" and row["minutes"] == 0.2 and row["leads"] == 2
    assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"] < row["first_s"]
    assert last == row


@pytest.mark.slow
def test_a_short_run_of_commands(data_dir):
    parts = ["--parts", "prepare,start", "--source", data_dir.parent / "simulated", "--data-dir", data_dir]
    _, (prepared, started), _ = run(*parts)
    assert prepared["windows"] > 400 and prepared["seconds"] > 0 and prepared["peak_memory_mib"] > 10
    # The test's own cache may be filled; the command's is not.
    assert started["first_start_s"] > started["second_start_s"] > 0
