"""The `ralenet` command: finds the module of a command, loads it then and only then, and speaks for its errors."""

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from ralenet_jax import __version__
from ralenet_jax.errors import UserError

# Command: (module with `main(argv) -> int`, arguments put in front, what it does).
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "demo": ("ralenet_jax.demo", (), "simulate, prepare, train, evaluate and draw, in a few minutes"),
    "prepare": ("data_prep.prepare", (), "fetch and check the databases, write them as shards"),
    "train": ("ralenet_jax.main", ("--mode=train",), "train a model, or resume in the same workdir"),
    "evaluate": ("ralenet_jax.main", ("--mode=evaluate",), "all metrics of a trained model"),
    "denoise": ("ralenet_jax.denoise_command", (), "clean recordings: WFDB, EDF, CSV, NPY, WAV"),
    "export": ("ralenet_jax.export", (), "a trained model as a file for JAX, NumPy, PyTorch, XLA or ONNX"),
    "reproduce": ("ralenet_jax.reproduce", (), "the published table: train, evaluate, compare"),
    "benchmark": ("ralenet_jax.benchmark", (), "windows per second, trained and denoised"),
}


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<11} {text}" for name, (_, _, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ralenet",
        usage="ralenet [-h] [--version] COMMAND ...",
        description="RA-LENet in JAX: ECG denoising.",
        epilog=f"commands:\n{commands}\n\n`ralenet COMMAND --help` tells more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ralenet {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="what to do; everything after it goes to the command")
    return parser


def _leave(*_) -> None:
    """Ends while modules load: there is nothing to save, and libraries would make an ImportError of Ctrl-C."""
    os.write(2, b"ralenet: interrupted\n")
    os._exit(130)


def _change_interrupt(old, new) -> None:
    """Changes what Ctrl-C does, if that is ours to say: in the main thread, and where no caller has settled it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)


def _dispatch(argv: Sequence[str]) -> int:
    command = _parser().parse_args(argv[:1]).command
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown command {command!r}; did you mean {nearest!r}? (commands: {', '.join(COMMANDS)})")
    module, arguments, _ = COMMANDS[command]
    _change_interrupt(signal.default_int_handler, _leave)
    try:
        loaded = importlib.import_module(module)
    finally:
        _change_interrupt(_leave, signal.default_int_handler)
    return loaded.main([*arguments, *argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 good, 1 failed in work, 2 bad input (one line on stderr), 130 interrupted.
    """
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("ralenet: interrupted", file=sys.stderr)
        code = 130
    if code == 130:  # all is done: another Ctrl-C need not be told where in Python's own ending it came
        _change_interrupt(signal.default_int_handler, signal.SIG_DFL)
    left = [thread.name for thread in threading.enumerate() if not (thread.daemon or thread is threading.main_thread())]
    only_compile = all(name.startswith("ralenet_compile") for name in left)  # `programs.begin`
    if argv is None and left and (code == 2 or (code == 130 and only_compile)):
        # Python would wait for them: ten seconds for a program that nobody wants any more, and for ever for Orbax's
        # where the clock was set back while they saved.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
