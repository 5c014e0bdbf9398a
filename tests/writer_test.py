import json
import struct
import time

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ralenet_jax.writer import Writer, read_history


def events(workdir):
    """All events below `tensorboard/`, file by file. A record is its length, a checksum, the event, a checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(workdir):
    return [(event.step, value.tag, value.simple_value) for event in events(workdir) for value in event.summary.value]


def restarts(workdir):
    """From which steps on TensorBoard is told to forget what it has seen."""
    return [event.step for event in events(workdir) if event.session_log.status == SessionLog.START]


def write(workdir, start, steps):
    with Writer(workdir, start) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 0.5 / step, "snr_db": step})


def test_lines_and_events_hold_the_scalars(tmp_path):
    with Writer(tmp_path, 0) as writer:
        writer.write(10, "train", {"loss": 0.25, "snr_db": -1.5})
        writer.write(20, "validation", {"epoch": 1, "rmse": 0.125})
        assert len(read_history(tmp_path)) == 2  # at once: a kill takes nothing that was written
    assert read_history(tmp_path) == [
        {"step": 10, "train/loss": 0.25, "train/snr_db": -1.5},
        {"step": 20, "validation/epoch": 1.0, "validation/rmse": 0.125},
    ]
    assert scalars(tmp_path) == [
        (10, "train/loss", 0.25),
        (10, "train/snr_db", -1.5),
        (20, "validation/epoch", 1.0),
        (20, "validation/rmse", 0.125),
    ]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    write(tmp_path, 0, [10, 20, 30, 40])
    write(tmp_path, 20, [25])
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20, 25]
    assert restarts(tmp_path)[-1] == 21


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    write(tmp_path, 0, [10, 20])
    write(tmp_path, 0, [15])
    assert [line["step"] for line in read_history(tmp_path)] == [15]
    assert 0 < restarts(tmp_path)[-1] <= 10  # TensorBoard forgets 10 and 20 too


def test_a_run_resumed_at_its_end_keeps_everything(tmp_path):
    write(tmp_path, 0, [10, 20])
    write(tmp_path, 20, [])
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20]


@pytest.mark.parametrize("cut", ['{"step": 30, "train/lo', '{"step": 3', "{", '{"step"'])
def test_a_line_cut_by_a_kill_is_left_out(tmp_path, cut):
    write(tmp_path, 0, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20]
    write(tmp_path, 20, [30])
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20, 30]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30]


def test_a_damaged_line_is_left_out(tmp_path):
    write(tmp_path, 0, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 20', b'\xfb"step": 20'))
    assert [line["step"] for line in read_history(tmp_path)] == [10]


def test_a_clock_that_is_set_back_stops_nothing(tmp_path, monkeypatch):
    with Writer(tmp_path, 0) as writer:
        monkeypatch.setattr(time, "time", lambda: 1e9)
        for step in range(20):  # more than any queue would hold
            writer.write(step, "train", {"loss": 1.0})
    assert [step for step, _, _ in scalars(tmp_path)] == list(range(20))


def test_no_run_has_no_history(tmp_path):
    assert read_history(tmp_path) == []
