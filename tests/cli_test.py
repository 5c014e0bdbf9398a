"""The `ralenet` command: what it loads, where it sends its arguments, how it speaks of errors."""

import importlib.util
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import ralenet_jax
from ralenet_jax import cli
from ralenet_jax.errors import UserError

CHECKOUT = Path(__file__).parents[1]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=CHECKOUT)


def run(*arguments):
    return python("-m", "ralenet_jax.cli", *arguments)


def fake_command(monkeypatch, name, main):
    """Puts `main` in the place of a command's module; returns nothing."""
    module = types.ModuleType("fake")
    module.main = main
    monkeypatch.setitem(sys.modules, cli.COMMANDS[name][0], module)


@pytest.mark.parametrize(
    ("flag", "expected"), [("--version", f"ralenet {ralenet_jax.__version__}\n"), ("--help", "usage: ralenet")]
)
def test_help_and_version_start_quickly(flag, expected):
    start = time.perf_counter()
    done = run(flag)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected)
    assert seconds < 2


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_help_and_version_load_nothing_heavy(flag):
    code = (
        "import sys\nfrom ralenet_jax import cli\n"
        f"try: cli.main([{flag!r}])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(eval(done.stdout.splitlines()[-1]))
    assert "ralenet_jax" in loaded
    assert not loaded & {"jax", "flax", "numpy", "scipy", "orbax", "optax", "tensorflow_datasets", "wfdb", "data_prep"}


def test_help_names_every_command():
    assert set(cli.COMMANDS) == {"demo", "denoise", "prepare", "train", "evaluate", "export", "reproduce", "benchmark"}
    out = run("--help").stdout
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("module", sorted({module for module, _, _ in cli.COMMANDS.values()}))
def test_every_command_has_its_module(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(("typed", "nearest"), [("trian", "train"), ("eval", "evaluate"), ("prep", "prepare")])
def test_unknown_command_names_the_nearest(capsys, typed, nearest):
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"ralenet: error: unknown command '{typed}'; did you mean '{nearest}'?")
    assert captured.err.count("\n") == 1


def test_no_command_is_an_error():
    done = run()
    assert done.returncode == 2
    assert "required: COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("typed", "received"),
    [
        (["prepare", "--data-dir", "d"], ["--data-dir", "d"]),
        (["train", "--workdir=w", "--help"], ["--mode=train", "--workdir=w", "--help"]),
        (["evaluate", "--version"], ["--mode=evaluate", "--version"]),
    ],
)
def test_arguments_go_to_the_command(monkeypatch, typed, received):
    seen = []
    fake_command(monkeypatch, typed[0], lambda argv: seen.append(argv) or 7)
    assert cli.main(typed) == 7
    assert seen == [received]


def test_process_arguments_are_the_default(monkeypatch):
    seen = []
    fake_command(monkeypatch, "demo", lambda argv: seen.append(argv) or 0)
    monkeypatch.setattr(sys, "argv", ["ralenet", "demo", "--out", "o"])
    assert cli.main() == 0
    assert seen == [["--out", "o"]]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no shards in 'd'; run `ralenet prepare`"), 2, "error: no shards in 'd'; run `ralenet prepare`"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_a_user_are_one_line(monkeypatch, capsys, error, code, line):
    def fail(argv):
        raise error

    fake_command(monkeypatch, "train", fail)
    monkeypatch.setattr(cli, "_change_interrupt", lambda *_: None)  # pytest's own
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == f"ralenet: {line}\n"


@pytest.mark.parametrize(
    "ends", ["raise ImportError('by a library')", "def main(argv): os.kill(os.getpid(), signal.SIGINT)"]
)
def test_ctrl_c_is_one_line_also_while_modules_load(tmp_path, ends):
    first = "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    "
    text = f"import os, signal\n{first if ends.startswith('raise') else ''}{ends}\n"
    (tmp_path / "slow.py").write_text(text)
    code = f"import os, signal, sys; sys.path.append({str(tmp_path)!r}); from ralenet_jax import cli\n"
    code += "cli.COMMANDS['slow'] = ('slow', (), ''); code = cli.main(['slow'])\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL; sys.exit(code)"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (130, "ralenet: interrupted\n")


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(argv):
        raise ValueError("a bug, not a user's slip")

    fake_command(monkeypatch, "train", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])


def test_package_names_load_on_first_use():
    code = (
        "import sys, ralenet_jax\nassert 'jax' not in sys.modules\n"
        "assert callable(ralenet_jax.build_model) and 'jax' in sys.modules\n"
        "assert callable(ralenet_jax.torch_weights.from_state_dict)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert set(dir(ralenet_jax)) == {"Denoiser", "__version__", "build_model", "torch_weights"}
    with pytest.raises(AttributeError, match="no attribute 'buildmodel'"):
        _ = ralenet_jax.buildmodel


def test_a_refusal_does_not_wait_for_threads_that_never_end():
    code = (
        "import sys, threading\n"
        "from ralenet_jax import cli\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "sys.argv = ['ralenet', 'evaluate', '--workdir', 'nowhere']\n"
        "sys.exit(cli.main())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=CHECKOUT)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1


def test_an_interruption_does_not_wait_for_a_compilation(tmp_path):
    code = """
import sys, threading, jax
from ralenet_jax import cli, main, programs
jax.stages.Lowered.compile = lambda lowered: threading.Event().wait()
def train(config, workdir):
    programs.begin(programs.kept(jax.jit(lambda x: x + 1), jax.devices()[:1]), jax.numpy.zeros(3))
    raise KeyboardInterrupt
main.train.train = train
sys.argv = ["ralenet", "train", "--workdir", "nowhere"]
sys.exit(cli.main())
"""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    where = {"timeout": 100, "cwd": CHECKOUT, "env": environment}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **where)
    assert (ended.returncode, ended.stderr) == (130, "ralenet: interrupted\n")
