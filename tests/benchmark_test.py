"""Windows per second: the arithmetic by hand, the peer's protocol, and one short real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ralenet_jax import benchmark
from ralenet_jax.errors import UserError

PEER = """
import json, sys
print("warming up")
result = {"peer": "stand-in", "train_segments_per_s": 100.0, "infer_segments_per_s": 400.0}
print(json.dumps(result | {"got": sys.argv[1:]}))
"""


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return path


def test_rate_counts_windows_and_leaves_out_the_first_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    calls = []

    def run():
        now[0] += 100.0 if not calls else 0.5  # the first call compiles
        calls.append(now[0])
        return 32

    # 4 calls of half a second fill 2 seconds: 128 windows in 2 s.
    assert benchmark.windows_per_second(run, 2.0) == 64.0
    assert len(calls) == 5


def test_compile_time_is_what_the_first_call_takes_longer(monkeypatch):
    now, costs = [0.0], iter((30.0, 0.5))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    assert benchmark.compile_seconds(lambda: now.__setitem__(0, now[0] + next(costs))) == 29.5


def test_summary_is_of_rounds():
    ours = [{"train_windows_per_s": t, "infer_windows_per_s": 8.0} for t in (10.0, 30.0, 20.0)]
    theirs = [{"train_windows_per_s": t, "infer_windows_per_s": 2.0} for t in (5.0, 10.0, 20.0)]
    table = benchmark.summary(ours, theirs)
    assert table["train_windows_per_s"] == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert table["peer_train_windows_per_s"] == {"median": 10.0, "min": 5.0, "max": 20.0}
    # within a round: 2, 3, 1; the ratio of medians would be 2 by chance, its spread not
    assert table["train_windows_per_s_ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert table["infer_windows_per_s_ratio"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert set(benchmark.summary(ours, [])) == {"train_windows_per_s", "infer_windows_per_s"}


def test_peer_is_read_under_our_names(peer):
    result = benchmark.run_peer([sys.executable, str(peer), "--batch", "32"])
    assert result == {
        "peer": "stand-in",
        "got": ["--batch", "32"],
        "train_windows_per_s": 100.0,
        "infer_windows_per_s": 400.0,
    }


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
        benchmark.run_peer([sys.executable, "-c", code])


def test_a_peer_that_does_not_start_is_named(tmp_path):
    with pytest.raises(UserError, match="does not start: No such file.*--peer-python"):
        benchmark.run_peer([str(tmp_path / "python")])


@pytest.mark.parametrize("argv", [["--repeats", "0"], ["--seconds", "0"], ["--batch", "0"]])
def test_numbers_out_of_range_are_refused(argv):
    with pytest.raises(UserError, match="from 1"):
        benchmark.main(argv)


@pytest.mark.slow
def test_a_short_run_with_a_peer(peer):
    options = ["--batch", "4", "--repeats", "2", "--seconds", "0.1", "--devices", "2", "--peer", f"{peer} --fast"]
    done = subprocess.run(
        [sys.executable, "-m", "ralenet_jax.cli", "benchmark", *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
    )
    assert done.returncode == 0, done.stderr
    head, *rounds, last = map(json.loads, done.stdout.splitlines())
    assert (head["devices"], head["batch"]) == (2, 4)
    assert head["train_compile_s"] > 0 and head["infer_compile_s"] > 0
    assert [line["round"] for line in rounds] == [0, 0, 1, 1]
    ours, theirs = rounds[0::2], rounds[1::2]
    assert all(line["train_windows_per_s"] > 0 and "peer" not in line for line in ours)
    assert all(line["got"] == ["--fast", "--batch=4", "--seconds=0.1", "--device=cpu"] for line in theirs)
    trained = sorted(line["train_windows_per_s"] for line in ours)
    assert last["summary"]["train_windows_per_s"]["max"] == trained[-1]
    assert last["summary"]["train_windows_per_s_ratio"]["min"] == pytest.approx(trained[0] / 100.0, abs=1e-3)
