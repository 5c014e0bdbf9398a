"""Several processes on the loopback, with gloo between them: real runs of the command, and what stands around them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ralenet_jax import benchmark_parts, checkpoint, evaluate, hosts, input_pipeline
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config, saved_config
from ralenet_jax.writer import read_history

_ROOT = Path(__file__).resolve().parents[1]
_BOUND = 120  # seconds in which a process notices that another one is gone
# Eight steps an epoch, in dispatches of two. The U-Net compiles fast and has BatchNorm, which is over all devices.
# Plain gradients: Adam makes much of rounding.
_SMALL = [
    "model.name=unet",
    "optim.name=sgd",
    "noise.fresh=True",
    "data.num_windows=80",
    "data.num_train=64",
    "train.batch_size=8",
    "train.steps_per_dispatch=2",
    "train.epochs=5",
]


class _Run:
    """The command in some processes with some CPU devices each; `err` and `out` read what one of them said."""

    def __init__(self, folder, data_dir, workdir, processes, devices, *overrides, slurm=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder, self.processes = folder, []
        folder.mkdir()
        base = [sys.executable, "-m", "ralenet_jax.main", f"--workdir={workdir}", f"--data-dir={data_dir}"]
        for number in range(processes):
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "NPROC": "2"}
            settings = [*_SMALL, *overrides]
            if slurm:
                environment |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(processes)}
                environment |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
                environment["JAX_COORDINATOR_PORT"] = str(port)
                settings.append("distributed.auto=True")
            elif processes > 1:
                where = {"coordinator": f"127.0.0.1:{port}", "num_processes": processes, "process_id": number}
                settings += [f"distributed.{key}={value}" for key, value in where.items()]
            command = [*base, *(f"--config.{text.format(number=number)}" for text in settings)]
            with (folder / f"{number}.out").open("w") as out, (folder / f"{number}.err").open("w") as err:
                self.processes.append(subprocess.Popen(command, cwd=_ROOT, stdout=out, stderr=err, env=environment))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def out(self, number=0):
        return (self._folder / f"{number}.out").read_text()

    def err(self, number=0):
        return (self._folder / f"{number}.err").read_text()

    def wait_for(self, text):
        while text not in self.out():
            assert self.processes[0].poll() is None, self.err()
            time.sleep(0.05)

    def codes(self, timeout=580):
        return [process.wait(timeout) for process in self.processes]


def _final_state(workdir):
    devices = jax.devices()[:1]
    return jax.device_get(evaluate.restore_state(saved_config(workdir), workdir, devices, "last")[1])


def _assert_same_result(workdir, other):
    one, two = _final_state(workdir), _final_state(other)
    assert int(one.step) == int(two.step) == 40
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _validations(workdir):
    lines = [line for line in read_history(workdir) if "validation/snr_db" in line]
    return [line["step"] for line in lines], [line["validation/snr_db"] for line in lines]


@pytest.fixture(scope="module")
def one_by_four(data_dir, tmp_path_factory):
    """The run in one process with four devices: its work directory."""
    folder = tmp_path_factory.mktemp("one")
    with _Run(folder / "said", data_dir, folder / "run", 1, 4) as run:
        assert run.codes() == [0], run.err()
    return folder / "run"


def test_two_processes_train_as_one_does_and_the_first_alone_writes(data_dir, one_by_four, tmp_path):
    with _Run(tmp_path / "said", data_dir, tmp_path / "run", 2, 2) as run:
        assert run.codes() == [0, 0], run.err(0) + run.err(1)
        assert "4 cpu device(s)" in run.out(0) and "trained: step 40" in run.out(0)
        # Gloo writes there too, its threads amid each other's lines.
        assert not re.search("starting|step|epoch|trained", run.out(1))
    _assert_same_result(one_by_four, tmp_path / "run")
    (steps, snr), (steps_of_one, snr_of_one) = _validations(tmp_path / "run"), _validations(one_by_four)
    assert steps == steps_of_one == [8 * epoch for epoch in range(1, 6)]
    np.testing.assert_allclose(snr, snr_of_one, atol=1e-4)
    assert [start["device"]["count"] for start in checkpoint.read_starts(tmp_path / "run")] == [4]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert "127.0.0.1" not in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.slow
def test_four_processes_train_as_one_does_also_after_one_died(data_dir, one_by_four, tmp_path):
    workdir = tmp_path / "run"
    with _Run(tmp_path / "a", data_dir, workdir, 4, 2, "distributed.timeout_s=30") as run:
        run.wait_for("epoch 2:")
        run.processes[2].kill()
        for number in (0, 1, 3):
            assert run.processes[number].wait(_BOUND) == hosts.LOST, run.err(number)
            assert "lost the others" in run.err(number).splitlines()[-1]
    with _Run(tmp_path / "b", data_dir, workdir, 4, 2) as run:
        assert run.codes() == [0] * 4, "".join(map(run.err, range(4)))
        assert "resuming at step" in run.out()
    _assert_same_result(one_by_four, workdir)
    assert _validations(workdir)[0] == [8 * epoch for epoch in range(1, 6)]


def test_streamed_told_to_stop_then_killed_it_goes_on_in_any_number_of_processes(data_dir, one_by_four, tmp_path):
    workdir = tmp_path / "run"
    with _Run(tmp_path / "a", data_dir, workdir, 2, 2, "data.stream=True") as run:
        run.wait_for("epoch 1:")
        # Meanwhile nobody else gets in.
        with pytest.raises(UserError, match="another run is under way"), checkpoint.locked(workdir):
            pass
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [143, 143], run.err(0) + run.err(1)
        assert all("saved; the same command goes on" in run.err(number) for number in (0, 1))
    stopped = _final_state(workdir).step
    assert 8 <= stopped < 40
    # In a cluster that tells who is who; there a process dies without a word.
    with _Run(
        tmp_path / "b", data_dir, workdir, 2, 2, "data.stream=True", "distributed.timeout_s=30", slurm=True
    ) as run:
        run.wait_for(f"step {stopped + 2}/")
        killed = time.monotonic()
        run.processes[1].kill()
        assert run.processes[0].wait(_BOUND) == hosts.LOST, run.err()
        assert time.monotonic() - killed < _BOUND
        last = run.err().splitlines()[-1]
        assert last.startswith("ralenet: stopped: process 0 of 2 lost the others") and "Traceback" not in run.err()
    with _Run(tmp_path / "c", data_dir, workdir, 1, 4, "data.stream=True") as run:
        assert run.codes() == [0], run.err()
        assert "resuming at step" in run.out()
    _assert_same_result(one_by_four, workdir)
    assert _validations(workdir)[0] == [8 * epoch for epoch in range(1, 6)]


def test_what_is_refused_on_one_process_is_refused_on_all(data_dir, tmp_path):
    with _Run(tmp_path / "said", data_dir, tmp_path / "run", 2, 1, "seed={number}") as run:
        assert run.codes() == [2, 2]
        for number in (0, 1):
            assert "error: process 1 of 2 differs from process 0: it has another configuration" in run.err(number)
    assert not (tmp_path / "run").exists()


def test_workdir_in_use_is_refused_on_all_processes(data_dir, tmp_path):
    workdir = tmp_path / "run"
    with checkpoint.locked(workdir), _Run(tmp_path / "said", data_dir, workdir, 2, 1) as run:
        assert run.codes() == [2, 2]
        assert f"error: another run is under way in {workdir}; wait for its end" in run.err(0)
        assert "error: process 0 of 2 was refused; its own message tells why" in run.err(1)
    assert not (workdir / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_process_that_freezes_ends_the_others(data_dir, tmp_path, victim):
    with _Run(
        tmp_path / "said", data_dir, tmp_path / "run", 2, 2, "distributed.timeout_s=20", "train.epochs=500"
    ) as run:
        run.wait_for("epoch 1:")
        run.processes[victim].send_signal(signal.SIGSTOP)
        # By the watch, or gloo gives up first.
        assert run.processes[1 - victim].wait(_BOUND) == hosts.LOST
        assert "lost the others" in run.err(1 - victim).splitlines()[-1]


@contextlib.contextmanager
def _three_connected(code):
    """Three processes that have found each other and do what `code` says, which knows its `number`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
import sys, time
from ralenet_jax import errors, hosts, main
number = int(sys.argv[1])
given = dict(coordinator="127.0.0.1:{port}", num_processes=3, process_id=number, timeout_s=6)
hosts.connect(main.load_config("ralenet", [f"distributed.{{key}}={{value}}" for key, value in given.items()]))
print("connected", flush=True)
{code}
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    where = {"cwd": _ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(3):
            process = subprocess.Popen([sys.executable, "-c", code, str(number)], **pipes, **where)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout.readline() == "connected\n"
        yield processes


_SILENT = "process {} gave no sign of life for 6 seconds"


@pytest.mark.parametrize(
    ("told", "victim", "reason"),
    [
        (signal.SIGKILL, 2, _SILENT.format(2)),
        (signal.SIGSTOP, 0, _SILENT.format(0)),
        (signal.SIGKILL, 0, "process 0 is gone"),
    ],
)
def test_a_lost_process_ends_all_with_a_line_where_nothing_computes(told, victim, reason):
    with _three_connected(f"time.sleep({_BOUND})") as processes:
        processes[victim].send_signal(told)
        for number in {0, 1, 2} - {victim}:
            said = processes[number].communicate(timeout=_BOUND / 2)[1].splitlines()[-1]
            assert f"process {number} of 3 lost the others ({reason}); the same command" in said
            assert processes[number].returncode == hosts.LOST


def test_what_is_refused_on_one_process_amid_the_work_ends_all():
    code = f"""
with hosts.bound_together():
    if number == 1:
        raise errors.UserError("no space")
    time.sleep({_BOUND})
"""
    with _three_connected(code) as processes:
        ended = [process.communicate(timeout=_BOUND / 2)[1].splitlines()[-1] for process in processes]
        assert [process.returncode for process in processes] == [hosts.LOST, 2, hosts.LOST]
    assert ended[1] == "ralenet: error: no space"
    for number in (0, 2):
        assert f"{number} of 3 lost the others (process 1 was refused; its own message tells why)" in ended[number]


def test_lock_is_free_again_however_its_owner_ended(tmp_path):
    code = f"""
import sys
from ralenet_jax import checkpoint
with checkpoint.locked({str(tmp_path)!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=_ROOT, text=True, **pipes) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"under way in {tmp_path}; wait"), checkpoint.locked(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with checkpoint.locked(tmp_path):
            pass


def test_shares_of_the_hosts_are_the_batch():
    windows, indices = benchmark_parts.made_up_windows(10, 4), np.array([[3, 1, 0, 2], [2, 0, 1, 3]])
    whole = input_pipeline.train_block(windows, indices, 4)
    parts = [input_pipeline.train_block(windows, input_pipeline.host_share(indices, n, 2), 2) for n in (0, 1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    batches = zip(*(input_pipeline.eval_batches(windows, 4, 4, n, 2) for n in (0, 1)), strict=True)
    for whole, parts in zip(input_pipeline.eval_batches(windows, 4, 4), batches, strict=True):
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_processes_that_cannot_find_each_other_are_refused():
    named = ["distributed.coordinator=h:1", "distributed.num_processes=2", "distributed.process_id=2"]
    cases = {
        ("distributed.process_id=0",): "coordinator is None, num_processes None and process_id 0; give all three",
        ("distributed.auto=True", "distributed.timeout_s=0"): "timeout_s is 0",
        ("distributed.auto=True",): "distributed.auto=True: the processes did not come together",
        tuple(named): "process 2 of 2, process 0 at h:1: the processes did not come together",
    }
    alone = ("distributed.coordinator=localhost:1", "distributed.num_processes=2", "distributed.process_id=1")
    # In a process of its own: JAX may be told of others only before its first use.
    code = f"""
from ralenet_jax import errors, hosts, main
for given in {list(cases)}:
    try:
        hosts.connect(main.load_config("ralenet", given))
    except errors.UserError as error:
        print(error)
hosts.connect(main.load_config("ralenet", [*{alone}, "distributed.start_timeout_s=1"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr
    assert done.returncode == hosts.LOST
    said = "ralenet: stopped: process 1 of 2, process 0 at localhost:1: not all came within 1 s; the same command"
    assert done.stderr.splitlines()[-1].startswith(said)
    assert all(said in line for said, line in zip(cases.values(), lines, strict=True))


def test_one_process_needs_nobody():
    hosts.connect(load_config("ralenet"))
    hosts.wait(1)
    hosts.require_same("text", "never raised")
    assert hosts.is_first() and hosts.gather(7).tolist() == [7]
    assert hosts.together(lambda: json.dumps(1), 1) == "1"
