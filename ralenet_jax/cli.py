"""The `ralenet` command: finds the module of a command, loads it then and only then, and speaks for its errors."""

import argparse
import difflib
import importlib
import sys
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


def _dispatch(argv: Sequence[str]) -> int:
    command = _parser().parse_args(argv[:1]).command
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown command {command!r}; did you mean {nearest!r}? (commands: {', '.join(COMMANDS)})")
    module, arguments, _ = COMMANDS[command]
    return importlib.import_module(module).main([*arguments, *argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 good, 1 failed in work, 2 bad input (one line on stderr), 130 interrupted.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ralenet: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
