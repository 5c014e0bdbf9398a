import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ralenet_jax import checkpoint, evaluate, main, optim, state, train
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config
from ralenet_jax.writer import read_history

_ROOT = Path(__file__).resolve().parents[1]
# Eight steps an epoch, in dispatches of two. The U-Net compiles fast; the demo's test trains an RA-LENet.
_SMALL = [
    *("model.name=unet", "train.batch_size=8", "train.steps_per_dispatch=2"),
    *("data.num_windows=80", "data.num_train=64"),
]
_LONG = ["train.epochs=16", "noise.fresh=True"]  # seconds, in which to stop or kill it


def _config(data_dir, *overrides):
    return load_config("ralenet", [f"data.dir={str(data_dir)!r}", *_SMALL, *overrides])


def _command(data_dir, workdir, *overrides):
    settings = [f"--config.{text}" for text in (*_SMALL, *overrides)]
    return [sys.executable, "-m", "ralenet_jax.main", "--workdir", workdir, "--data-dir", data_dir, *settings]


def _start(data_dir, workdir, *overrides):
    command = list(map(str, _command(data_dir, workdir, *overrides)))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=_ROOT, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"NPROC": "2"})


def _finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def _wait_for_line(process, start):
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"no line {start!r}: {process.stderr.read()}")


def _final_state(config, workdir):
    return jax.device_get(evaluate.restore_state(config, workdir, jax.devices()[:2], "last")[1])


@pytest.fixture(scope="module", params=["unet", pytest.param("ralenet", marks=pytest.mark.slow)])
def options(request):
    return [*_LONG, f"model.name={request.param}"]


@pytest.fixture(scope="module")
def whole(data_dir, options, tmp_path_factory):
    """A run of sixteen epochs that nothing interrupted: its configuration, folder and output."""
    workdir = tmp_path_factory.mktemp("whole")
    code, out, err = _finish(_start(data_dir, workdir, *options))
    assert code == 0, err
    return _config(data_dir, *options), workdir, out


def _assert_same_state(config, workdir, other):
    one, two = _final_state(config, workdir), _final_state(config, other)
    assert int(one.step) == int(two.step) == 128
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def _validations(workdir):
    lines = [line for line in read_history(workdir) if "validation/snr_db" in line]
    return zip(*((line["step"], line["validation/snr_db"]) for line in lines), strict=True)


def test_streamed_run_killed_at_a_random_moment_resumes_to_the_bits_of_one_in_memory(
    data_dir, options, whole, tmp_path
):
    config, workdir, _ = whole
    streamed = (*options, "data.stream=True")
    process = _start(data_dir, tmp_path, *streamed)
    _wait_for_line(process, f"epoch {random.choice((1, 2))}:")
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert _finish(process)[0] == -signal.SIGKILL
    code, out, err = _finish(_start(data_dir, tmp_path, *streamed))
    assert code == 0, err
    _assert_same_state(config, workdir, tmp_path)
    (steps, found), (_, expected) = map(_validations, (tmp_path, workdir))
    assert steps == tuple(range(8, 129, 8)) and found == expected
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert list(saved.input_position.values()) == [128]


_SIGTERM = pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)  # hosts_test.py sends it too


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), _SIGTERM])
def test_told_to_stop_it_saves_leaves_and_resumes_to_identical_bits(data_dir, options, whole, tmp_path, number, code):
    config, workdir, _ = whole
    process = _start(data_dir, tmp_path, *options)
    _wait_for_line(process, "epoch 1:")
    process.send_signal(number)
    left, _, err = _finish(process)
    assert left == code
    assert "saved" in err and "Traceback" not in err
    _, out, _ = _finish(_start(data_dir, tmp_path, *options))
    assert "resuming at step" in out
    _assert_same_state(config, workdir, tmp_path)


def test_validates_every_epoch_and_writes_scalars(whole):
    config, workdir, out = whole
    epochs = [line for line in read_history(workdir) if "validation/snr_db" in line]
    assert [(line["step"], line["validation/epoch"]) for line in epochs] == [(8 * n, n) for n in range(1, 17)]
    assert all(line["validation/windows"] == 16 for line in epochs)
    assert any("train/windows_per_s" in line for line in read_history(workdir))
    assert list((workdir / "tensorboard").glob("events.*"))
    assert {"unet": "10,374 parameters", "ralenet": "1,087,282 parameters"}[config.model.name] in out


def test_tells_of_the_first_step_at_once_and_of_a_rate_only_without_compilation(whole):
    first, *_, last = [line for line in whole[2].splitlines() if line.startswith("step ")]
    assert first.startswith("step 1/128 (epoch 0.1): loss ") and first.endswith(" dB")
    assert last.startswith("step 128/128 (epoch 16.0): loss ") and last.endswith(" windows/s")


@pytest.mark.parametrize(
    ("steps", "limit", "expected"),
    [(250, 50, [50] * 5), (31, 50, [31]), (251, 50, [42] * 5 + [41]), (7, 1, [1] * 7), (8, 3, [3, 3, 2])],
)
def test_an_epoch_is_cut_into_even_blocks(steps, limit, expected):
    part = train._even_part(steps, limit)
    assert [min(part, steps - start) for start in range(0, steps, part)] == expected


def test_learns(whole):
    _, workdir, _ = whole
    snr = [line["validation/snr_db"] for line in read_history(workdir) if "validation/snr_db" in line]
    # The noisy windows are at -4 dB; zeros would be at 0 dB.
    assert snr[-1] > snr[0] and snr[-1] > 3


def test_non_finite_loss_stops_with_the_step_and_the_last_good_checkpoint(data_dir, tmp_path, capsys):
    command = _command(data_dir, tmp_path, "optim.learning_rate=1e30", "optim.name=sgd", "train.epochs=1")
    assert main.main(list(map(str, command[3:]))) == 1
    err = capsys.readouterr().err
    assert "at step 2; no checkpoint yet" in err or "at step 1; no checkpoint yet" in err
    assert "Traceback" not in err
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert saved.latest_step is None


def test_state_that_the_last_update_spoiled_is_not_saved():
    saved = types.SimpleNamespace(latest_step=8, directory="checkpoints", save=lambda *_: pytest.fail("was saved"))
    spoiled = {"params": {"kernel": jax.numpy.array([1.0, np.nan])}, "batch_stats": {}}
    run = types.SimpleNamespace(state=types.SimpleNamespace(variables=spoiled))
    with pytest.raises(train.NonFiniteLoss, match="at step 16; the last good checkpoint is of step 8"):
        train._save(run, saved, 16, 1.0)


def test_finished_run_is_left_alone_and_may_be_prolonged(data_dir, tmp_path, capsys):
    assert train.train(_config(data_dir, "train.epochs=1"), tmp_path)["step"] == 8
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train.train(_config(data_dir, "train.epochs=1"), tmp_path)["validation"] is None
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert train.train(_config(data_dir, "train.epochs=2"), tmp_path)["step"] == 16
    assert "resuming at step 8" in capsys.readouterr().out
    # The result tells how it was learned, and what the training was started and resumed with.
    result = evaluate.evaluate(_config(data_dir, "train.epochs=2"), tmp_path, log=lambda line: None)
    assert [point["epoch"] for point in result["learning_curve"]] == [1, 2]
    assert result["learning_curve"][-1]["snr_db"] == pytest.approx(result["conditions"]["bw@-4"]["denoised"]["snr_db"])
    assert [start["step"] for start in result["trained_from"]] == [0, 8]
    assert result["trained_from"][0]["versions"]["jax"] == jax.__version__
    assert result["trained_from"][0]["window"] == [256, 2]


def test_initial_values_are_those_of_the_seed_also_from_a_kept_program(data_dir):
    made = []
    for seed in (0, 1, 0):  # the last one is found
        config = _config(data_dir, f"seed={seed}")
        run = train._Run(config)
        expected = state.create_state(run.model, optim.build_optimizer(config, 1), seed, run.train_windows.shape)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state), jax.device_get(expected))
        made.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run.state.params)]))
    assert (made[0] != made[1]).any()


def test_workdir_of_another_configuration_is_refused(data_dir, tmp_path):
    checkpoint.claim(tmp_path, _config(data_dir))
    with pytest.raises(UserError, match="noise.kind=bw, now ma"):
        train.train(_config(data_dir, "noise.kind=ma"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["noise"]["kind"] == "bw"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("train.epochs=0", "train.epochs is 0"),
        ("train.batch_size=0", "train.batch_size is 0; expected 1 to 64"),
        ("train.batch_size=66", "train.batch_size is 66; expected 1 to 64"),
        ("num_devices=3", "num_devices is 3; expected 0"),
        ("data.num_train=80", "data.num_train 80 of data.num_windows 80"),
        ("protocol=other", "protocol is 'other'"),
        ("noise.kind=hum", "noise kind 'hum'"),
        ("optim.name=lion", "optim.name is 'lion'"),
    ],
)
def test_configuration_that_cannot_be_trained_is_refused_in_one_line(data_dir, tmp_path, given, said):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        train.train(_config(data_dir, given), tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_missing_shards_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match="ralenet prepare --data-dir"):
        train.train(_config(tmp_path / "nothing"), tmp_path / "run")
