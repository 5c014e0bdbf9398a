"""The demo: a real small run of it, what it prints, its second call, and every way it can end."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest

from configs import demo as demo_config
from data_prep import physionet, prepare, simulate
from ralenet_jax import cli, demo, evaluate, main, train
from ralenet_jax.errors import UserError

CHECKOUT = Path(__file__).parents[1]


def short_config(get_config=demo_config.get_config):
    config = get_config()
    config.train.epochs = 1
    config.train.steps_per_dispatch = 1
    config.eval.kinds = "ma,emb"
    return config


@pytest.fixture(scope="module")
def small():
    """Half a minute of each record, one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_MITDB", dict.fromkeys(("101", "106", "109", "100", "102"), 0.4))
        patch.setattr(simulate, "_NSTDB_MINUTES", 1)
        patch.setattr(simulate, "_LUDB", ("1", "5"))
        patch.setattr(demo_config, "get_config", short_config)
        yield


@pytest.fixture(scope="module")
def workdir(small, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo") / "work"
    assert demo.main(["--workdir", str(workdir), "--seed", "3"]) == 0
    return workdir


@pytest.fixture
def stubs(monkeypatch):
    """Everything that takes time, replaced; returns the names of what was called, in order."""
    calls = []

    def stub(module, name, result=None):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or result)

    stub(simulate, "write", Path("simulated"))
    stub(prepare, "prepare")
    stub(train, "train", {"step": 1})
    means = {"snr_db": 0.0, "windows": 1}
    stub(evaluate, "evaluate", {"conditions": {"bw@0": {"noisy": means, "denoised": means}}, "units": "mV"})
    stub(evaluate, "example_windows", {})
    stub(demo._extras()[1], "learning_curve")
    stub(demo._extras()[1], "windows_figure")
    return calls


def test_it_leaves_what_it_promises(workdir):
    assert {path.name for path in workdir.iterdir()} == {
        *("simulated", "data", "run", "denoised.png", "learning_curve.png")
    }
    assert physionet.verify(physionet.DATABASES["mitdb"], workdir / "simulated").records[0] == "100"
    result = json.loads((workdir / "run/evaluation.json").read_text())
    assert result["conditions"].keys() == {"ma@0", "emb@0"}
    config = result["provenance"]["config"]
    assert (config["seed"], config["protocol"]) == (3, "honest")
    for name in ("denoised.png", "learning_curve.png"):
        assert matplotlib.image.imread(workdir / name).std() > 0.01


def test_a_second_call_keeps_what_is_finished_and_tells_what_came_out(workdir, small, monkeypatch, capsys):
    for module, name in ((train, "train"), (evaluate, "evaluate"), (simulate, "_write_mitdb")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("done again"))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.png")}
    assert demo.main(["--workdir", str(workdir), "--seed", "3"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*.png")}
    out = capsys.readouterr().out
    conditions = json.loads((workdir / "run/evaluation.json").read_text())["conditions"]
    for name, words in (("ma@0", "muscle noise"), ("emb@0", "all three at once")):
        noisy, denoised = (f"{conditions[name][row]['snr_db']:.1f}" for row in ("noisy", "denoised"))
        assert re.search(rf"{words} +{noisy} dB → +{denoised} dB\n", out)
    assert f"{conditions['ma@0']['noisy']['windows']} test windows" in out
    assert str(workdir / "denoised.png") in out


def test_what_to_try_next_exists(workdir, small, capsys):
    demo.main(["--workdir", str(workdir), "--seed", "3"])
    commands = re.findall(r"^  ralenet (\w+) (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [command for command, _ in commands] == ["prepare", "train", "evaluate"]
    for command, arguments in commands[1:]:
        assert cli.COMMANDS[command][0] == "ralenet_jax.main"
        parsed, rest = main._arguments([f"--mode={command}", *arguments.split()])
        assert parsed.workdir == "runs/bw"
        assert rest in ([], ["data.dir='data'"])


def test_another_seed_in_the_same_folder_is_refused_before_anything_is_replaced(workdir, small, capsys):
    marker = (workdir / "simulated" / simulate.MARKER).read_bytes()
    assert demo.main(["--workdir", str(workdir), "--seed", "4"]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"ralenet: error: .* holds a run with seed=3, now 4 was given; .*--workdir\n", captured.err)
    assert captured.out == ""
    assert (workdir / "simulated" / simulate.MARKER).read_bytes() == marker


def test_the_steps_are_told_in_their_order(stubs, tmp_path, capsys):
    assert demo.main(["--workdir", str(tmp_path)]) == 0
    assert stubs == [*("write", "prepare", "train", "evaluate", "learning_curve", "example_windows", "windows_figure")]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{number}/5]" for number in range(1, 6)]
    assert "recordings in simulated" in lines


def test_an_interrupted_demo_goes_on(stubs, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise train.Interrupted(signal.SIGTERM, "stopped at step 7")

        patch.setattr(train, "train", interrupted)
        assert demo.main(["--workdir", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "ralenet: interrupted; the same call goes on from there\n"
    assert stubs == ["write", "prepare"]
    assert demo.main(["--workdir", str(tmp_path)]) == 0
    assert "train" in stubs


@pytest.mark.parametrize(
    ("name", "error", "code", "message"),
    [
        ("write", physionet.PrepareError("the folder is full"), 2, "error: the folder is full"),
        ("evaluate", UserError("no noise"), 2, "error: no noise"),
        ("train", train.NonFiniteLoss("the loss is nan at step 3"), 1, "stopped: the loss is nan at step 3"),
        (
            "train",
            OSError(28, "No space left", "x.png"),
            2,
            "error: cannot write x.png: No space left; free space or choose another --workdir",
        ),
        ("train", KeyboardInterrupt(), 130, "interrupted; the same call goes on from there"),
    ],
)
def test_what_goes_wrong_is_one_line(stubs, monkeypatch, tmp_path, capsys, name, error, code, message):
    def fail(*_):
        raise error

    module = {"write": simulate, "evaluate": evaluate, "train": train}[name]
    monkeypatch.setattr(module, name, fail)
    assert demo.main(["--workdir", str(tmp_path)]) == code
    assert capsys.readouterr().err == f"ralenet: {message}\n"


def test_a_file_in_the_place_of_the_folder_is_refused(stubs, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert demo.main(["--workdir", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"ralenet: error: cannot write .*: Not a directory; .*--workdir\n", capsys.readouterr().err)
    assert stubs == []


@pytest.mark.parametrize("seed", ["-1", "1.5", "x"])
def test_a_seed_is_a_whole_number(seed, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main([f"--seed={seed}"])
    assert stop.value.code == 2
    assert f"'{seed}' is no seed; expected a whole number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["neurokit2", "matplotlib.figure"])
def test_a_missing_extra_is_told_first(library, tmp_path):
    code = f"import sys; sys.modules[{library!r}] = None\nfrom ralenet_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--workdir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r'ralenet: error: .*: pip install "ralenet_jax\[(demo|plots)\]"\n', done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_demo_is_quick_and_learns(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-m", "ralenet_jax.cli", "demo", "--workdir", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 180  # four minutes from pip install on
    conditions = json.loads((tmp_path / "demo/run/evaluation.json").read_text())["conditions"]
    for name, rows in conditions.items():
        assert rows["denoised"]["snr_db"] > rows["noisy"]["snr_db"] + 4, name
