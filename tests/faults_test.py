"""What life does to real `ralenet` processes: kills, full disks, damaged files, jumping clocks, a second run.

Each time a command goes on to the very result of one that nothing disturbed, or tells why not in one line (exit 2).
A normal run kills one training while it writes a checkpoint; `-m slow` does all of it, RALENET_FAULTS_KILLS kills
(by default 50), prints what came of each fault (-s) and writes it to the file that RALENET_FAULTS_RESULT names.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import reproduce_test
from made_databases import tree
from prepare_test import FOLDERS

from data_prep import shards
from ralenet_jax import checkpoint, evaluate, main, provenance, writer
from ralenet_jax.errors import UserError

KILLS = int(os.environ.get("RALENET_FAULTS_KILLS", 50))
BOUND_S = 600  # after which a command hangs
EPOCHS = 6
# Eight steps an epoch, in two dispatches; as the tests of `reproduce`, so that one compilation serves both.
SMALL = [*reproduce_test.SMALL, f"train.epochs={EPOCHS}"]
CELL = "paper/unet_bw_-4"  # the cell of `reproduce` that is the same training
IN_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]  # where mounts are ours alone, root or not


class Life:
    """The commands on small data, what they give when nothing disturbs them, and what came of each fault."""

    def __init__(self, data_dir: Path, folder: Path):
        self.data, self.source, self.folder = data_dir, data_dir.parent / "simulated", folder
        self.outcomes = collections.defaultdict(collections.Counter)
        self.whole, self.seconds, self.processes = {}, {}, []

    def arguments(self, command: str, workdir: Path, *more: str) -> list[str]:
        run = ["--workdir", workdir, "--data-dir", self.data, *(f"--config.{text}" for text in SMALL)]
        own = {
            "train": [*run, "--config.model.name=unet"],
            "reproduce": [*run, "--only=unet:bw:-4"],
            "prepare": ["--data-dir", workdir, "--source", self.source],
            "evaluate": ["--workdir", workdir],
        }
        return [sys.executable, "-um", "ralenet_jax.cli", command, *map(str, own[command]), *more]

    def start(self, command: str, workdir: Path, *more: str, before=(), **environment: str) -> subprocess.Popen:
        given = os.environ | {"NPROC": "2", "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        argv = [*before, *self.arguments(command, workdir, *more)]
        self.processes.append(subprocess.Popen(argv, cwd=reproduce_test.ROOT, env=given, **pipes))
        return self.processes[-1]

    def run(self, *given, **named) -> tuple[int, str, str]:
        return finish(self.start(*given, **named))

    def result(self, command: str, workdir: Path):
        """All that the command is to leave behind, as numbers or digests of them."""
        if command == "prepare":
            assert not (workdir / shards.STAGING).exists()
            return [shards.digest(workdir / name) for name in FOLDERS]
        run = workdir / CELL if command == "reproduce" else workdir
        validations = [line for line in writer.read_history(run) if "validation/snr_db" in line]
        steps = [line["step"] for line in validations]
        assert checkpoint.read_starts(run)[0]["step"] == 0 and steps == list(range(8, 8 * EPOCHS + 1, 8))
        return *state_of(run), validations, done_cells(workdir)

    def expected(self, command: str):
        """The result of a command that nothing disturbed; how long it took is in `seconds`."""
        if command not in self.whole:
            began, workdir = time.monotonic(), self.folder / command
            assert self.run(command, workdir)[0] == 0
            self.seconds[command] = time.monotonic() - began
            self.whole[command] = self.result(command, workdir)
        return self.whole[command]

    def judge(self, fault: str, ended: tuple[int, str, str], command: str, workdir: Path) -> bool:
        """Whether a command ended in the result of an undisturbed one; else it must have refused in one line."""
        code, _, err = ended
        assert code in (0, 2) and "Traceback" not in err, (fault, code, err)
        one_line = err.startswith("ralenet: error: ") and err.count("\n") == 1 and len(err) < 900
        assert one_line if code else self.result(command, workdir) == self.expected(command), (fault, err)
        self.outcomes[fault]["refused in one line" if code else "ended in the same bits"] += 1
        return code == 0

    def goes_on(self, fault: str, command: str, workdir: Path) -> None:
        """The command, given (again), ends well."""
        ended = self.run(command, workdir)
        assert self.judge(fault, ended, command, workdir), (fault, ended)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=BOUND_S)
    finally:
        process.kill()  # one that hangs
    return process.returncode, out, err


def state_of(run: Path) -> tuple[int, str]:
    state = evaluate.restore_state(main.saved_config(run), run, jax.devices()[:2], "last")[1]
    content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
    return int(state.step), hashlib.sha256(content).hexdigest()


def done_cells(workdir: Path) -> dict:
    """What the table of a reproduction holds of each cell that it calls done."""
    path = workdir / "paper/table.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    return {name: (run["checkpoint"], run["conditions"]) for name, run in runs.items()}


@pytest.fixture(scope="module")
def life(data_dir, tmp_path_factory):
    life = Life(data_dir, tmp_path_factory.mktemp("whole"))
    yield life
    for process in life.processes:
        process.kill()
    for fault, outcomes in life.outcomes.items():
        print(f"\n{fault}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), end="")
    if path := os.environ.get("RALENET_FAULTS_RESULT"):
        made_by = {"command": "pytest -m slow tests/faults_test.py"} | provenance.software(2)
        checkpoint.write_json(Path(path), made_by | {"faults": life.outcomes})


def reached(process: subprocess.Popen, workdir: Path, kind: str, what: str, delay: float = 0) -> bool:
    """Waits for a line of output, a file or a library, and then; tells whether the process is still there."""
    if kind == "line":
        any(line.startswith(what) for line in process.stdout)
    there = {"file": lambda: any(workdir.glob(what)), "library": lambda: what in maps.read_text()}.get(kind)
    maps = Path(f"/proc/{process.pid}/maps")
    while there and process.poll() is None and not there():
        time.sleep(0.0005)
    time.sleep(delay)
    return process.poll() is None


def moments(life: Life, command: str, rng: random.Random) -> list[tuple[str, str, str, float]]:
    """Moments of one command, one after the other: a name, and what `reached` takes."""
    long = life.seconds[command]
    start = ("start", "library", "numpy", rng.uniform(0, 0.7 * long))
    if command == "prepare":
        return [start, ("building", "file", f"{shards.STAGING}/*", rng.uniform(0, 0.2 * long))]
    first, second = sorted(rng.sample(range(1, EPOCHS + 1), 2))
    folder = f"{CELL}/checkpoints" if command == "reproduce" else "checkpoints"
    step = ("steps, validation", "line", f"epoch {first}:", rng.uniform(0, 0.3))
    writes = [("save", "file", f"{folder}/{8 * epoch}.orbax*", rng.uniform(0, 0.05)) for epoch in (first, second)]
    after = ("evaluation, table", "line", "trained:", rng.uniform(0, 0.3 * long))
    return [start, rng.choice([step, writes[0]]), after if command == "reproduce" else writes[1]]


def kill(life: Life, command: str, kills: int, folder: Path, rng: random.Random, choose=moments) -> None:
    """Kills a command so many times, up to three times in one work directory, and lets it go on."""
    whole, killed, count = life.expected(command), 0, 0
    while killed < kills:
        workdir, here, count = folder / f"{command}{count}", [], count + 1
        assert count < 3 * kills + 3, "the moments are never reached"
        for name, *moment in choose(life, command, rng)[: kills - killed]:
            with life.start(command, workdir) as process:
                reached(process, workdir, *moment)
                process.kill()
            if process.returncode == 0:  # the moment never came
                continue
            assert done_cells(workdir) in ({}, whole[-1]), name
            if name != "start" and any(workdir.rglob("*.orbax-checkpoint-tmp")):
                name = "while a checkpoint is written"
            here.append(f"SIGKILL, {command}, {name}")
        life.goes_on(here[0] if here else f"undisturbed, {command}", command, workdir)
        for fault in here[1:]:
            life.outcomes[fault]["ended in the same bits"] += 1
        killed += len(here)
        shutil.rmtree(workdir)


def test_killed_while_it_writes_a_checkpoint(life, tmp_path):
    moment = ("save", "file", "checkpoints/16.orbax*", 0.01)
    kill(life, "train", 1, tmp_path, random.Random(), lambda *_: [moment])


@pytest.mark.slow
@pytest.mark.parametrize(("command", "share"), [("train", 0.6), ("prepare", 0.2), ("reproduce", 0.2)])
def test_killed_at_random_moments(life, tmp_path, command, share):
    kill(life, command, round(KILLS * share), tmp_path, random.Random(command))


@pytest.fixture
def mounts():
    try:
        subprocess.run([*IN_NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mounts in a namespace of one's own: {error}")


def of_each_command(test):
    return pytest.mark.slow(pytest.mark.parametrize("command", ["train", "prepare", "reproduce"])(test))


@of_each_command
def test_full_disk(life, mounts, tmp_path, command):
    # In the order in which things are written: settings, logs, a checkpoint, another one beside it.
    for size in (8, 400, 2000) if command == "prepare" else (4, 12, 40, 150, 400):
        disk, saved = tmp_path / f"disk{size}", tmp_path / f"saved{size}"
        disk.mkdir()
        script = (
            f'mount -t tmpfs -o size={size}k none {disk}; code=0; "$@" || code=$?; cp -r {disk} {saved}; exit $code'
        )
        ended = life.run(command, disk, before=[*IN_NAMESPACE, script, "sh"])
        assert not life.judge(f"full disk, {command}", ended, command, saved), f"{size} KiB are enough"
        assert "No space left on device" in ended[2]
        if command != "prepare":  # the good checkpoint is still there, and no other
            with checkpoint.Checkpointer(saved / CELL if command == "reproduce" else saved, read_only=True) as left:
                assert left.latest_step == (8 if size == 400 else None)
        life.goes_on(f"full disk, {command}, then freed", command, saved)


@pytest.mark.slow
def test_read_only_folders(life, mounts, tmp_path):
    def bind(folder):
        return [*IN_NAMESPACE, f'mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}; exec "$@"', "sh"]

    ended = life.run("train", tmp_path / "run", before=bind(life.data))
    assert life.judge("data directory read-only, train", ended, "train", tmp_path / "run")
    ended = life.run("prepare", life.data, before=bind(life.data))
    assert not life.judge("data directory read-only, prepare", ended, "prepare", life.data)
    for command in ("train", "evaluate"):
        ended = life.run(command, tmp_path / "run", before=bind(tmp_path / "run"))
        assert not life.judge(f"work directory read-only, {command}", ended, command, tmp_path / "run")


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.unlink()
    if how != "missing":
        path.write_bytes(content if how == "byte flipped" else content[:place])


@pytest.fixture(scope="module")
def half(life):
    """A work directory with the first two epochs trained."""
    assert life.run("train", life.folder / "half", "--config.train.epochs=2")[0] == 0
    return life.folder / "half"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["byte flipped", "truncated"])
def test_damaged_checkpoint(life, half, tmp_path, how):
    rng, fault, newest, run = random.Random(how), f"checkpoint, {how}", "checkpoints/16", tmp_path / "run"
    files = sorted(path.relative_to(half) for path in (half / newest).rglob("*") if path.is_file())
    arrays = max(files, key=lambda name: (half / name).stat().st_size)
    sound = state_of(half)
    for number in range(100):
        shutil.copytree(half, run)
        damage(run / (arrays if number % 2 else rng.choice(files)), how, rng)
        before = tree(run / newest)
        if number < 5:
            assert life.judge(fault, life.run("train", run), "train", run) or tree(run / newest) == before
        else:
            try:
                outcome = "read as it was saved"
                assert state_of(run) == sound
            except UserError:
                outcome = "refused when read"
            life.outcomes[fault][outcome] += 1
        shutil.rmtree(run)
    shutil.copytree(half, run)
    shutil.rmtree(run / newest)  # as a refusal tells
    life.goes_on(f"checkpoint, {how}, then deleted", "train", run)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["byte flipped", "truncated", "missing"])
def test_damaged_shard(life, half, tmp_path, how):
    rng = random.Random(how)
    for name in ("mitdb/1.0.0/mitdb-ds1", "nstdb/1.0.0/nstdb-bw", "mitdb/1.0.0/features"):
        folder = tmp_path / Path(name).name
        copy, run = shutil.copytree(life.data, folder / "data"), shutil.copytree(half, folder / "run")
        damage(next(copy.glob(f"{name}*")), how, rng)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(life, "data", copy)
            well = life.judge(f"shard, {how}", life.run("train", run), "train", run)
        assert well or tree(run / "checkpoints") == tree(half / "checkpoints")
        life.goes_on(f"shard, {how}, then prepared again", "prepare", copy)


@of_each_command
def test_two_at_once(life, tmp_path, command):
    """The second is refused. An evaluation meanwhile leaves alone what the training is writing."""
    workdir, locks = tmp_path / "run", {"prepare": ".prepare.lock", "reproduce": f"{CELL}/config.json"}
    first = life.start(command, workdir)
    assert reached(first, workdir, "file", locks.get(command, "config.json"))
    first.send_signal(signal.SIGSTOP)
    assert not life.judge(f"two at once, {command}, the second", life.run(command, workdir), command, workdir)
    first.send_signal(signal.SIGCONT)
    if command == "train" and reached(first, workdir, "file", "checkpoints/16.orbax*"):
        first.send_signal(signal.SIGSTOP)
        written = tree(workdir / "checkpoints")
        code, _, err = life.run("evaluate", workdir)
        assert code in (0, 2) and "Traceback" not in err and tree(workdir / "checkpoints") == written
        first.send_signal(signal.SIGCONT)
    assert life.judge(f"two at once, {command}, the first", finish(first), command, workdir)


@of_each_command
def test_clock_jumps(life, tmp_path, command):
    """By hours and years, back and forth, every two seconds; and all files are of a day to come."""
    lines = ["import time", "real, steps = time.time, [0, 1e5, -1e4, 1e8, -1e9, 3600]"]
    lines.append("time.time = lambda: real() + steps[int(time.monotonic() / 2) % len(steps)]")
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    workdir, clock = tmp_path / "run", {"PYTHONPATH": str(tmp_path)}
    process = life.start(command, workdir, **clock)
    if command != "prepare" and reached(process, workdir, "line", "epoch 3:"):
        process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code in (0, 2, 143) and "Traceback" not in err, err
    for path in [workdir, *workdir.rglob("*")]:
        os.utime(path, (4e9, 4e9))
    # Where it jumps far while Orbax waits for a save, that counts as lost.
    if not life.judge(f"clock jumps, {command}", life.run(command, workdir, **clock), command, workdir):
        life.goes_on(f"clock jumps, {command}, then right", command, workdir)


@of_each_command
def test_interrupted_twice(life, tmp_path, command):
    life.expected(command)
    rng = random.Random(command)
    for number in range(6):
        workdir = tmp_path / str(number)
        process = life.start(command, workdir)
        name, *moment = rng.choice(moments(life, command, rng))
        alive = reached(process, workdir, *moment)
        for pause in (rng.uniform(0, 0.4), 0):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            time.sleep(pause)
        code, _, err = finish(process)
        assert code in (0, 130, -signal.SIGINT) and "Traceback" not in err and err.count("\n") <= 1, (name, moment, err)
        life.goes_on(f"SIGINT twice, {command}, {name}" if alive else "undisturbed", command, workdir)
