"""Trains or evaluates the run that a configuration describes.

`python -m ralenet_jax.main --config=configs/ralenet.py --workdir=DIR --config.noise.kind=ma` trains, and
`python -m ralenet_jax.main --mode=evaluate --workdir=DIR` evaluates what was trained.
"""

import argparse
import ast
import difflib
import functools
import importlib.resources
import operator
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

from ml_collections import ConfigDict

from ralenet_jax import checkpoint, evaluate, hosts, startup, train
from ralenet_jax.errors import UserError, reason
from ralenet_jax.train import Interrupted, NonFiniteLoss

_LONGEST = 80  # characters of what the user typed that a message repeats


def _config_file(name: str) -> Path:
    """The file of a configuration given as a path or as the name of one that comes with the package."""
    if os.path.isfile(name):  # unlike Path's, it takes any text
        return Path(name)
    files = importlib.resources.files("configs").iterdir()
    packaged = {path.name.removesuffix(".py"): path for path in files if path.name.endswith(".py")}
    del packaged["__init__"]
    if name not in packaged:
        there = ", ".join(sorted(packaged))
        raise UserError(f"no configuration {_short(name)}; give a file with get_config(), or one of {there}")
    return Path(str(packaged[name]))


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def load_config(name: str, overrides: list[str] = ()) -> ConfigDict:
    """Loads a configuration by path or packaged name and applies overrides such as `noise.kind=ma`.

    Raises:
        UserError: for an unknown file or key (naming the nearest), a file that fails, or a value of the wrong type.
    """
    path = _config_file(name)
    try:
        module = runpy.run_path(str(path))
        config = module["get_config"]() if "get_config" in module else None
    # It is the user's own program.
    except Exception as error:
        raise UserError(f"{path}{_line(error, str(path))}: {type(error).__name__}: {reason(error)}; mend it") from error
    if not isinstance(config, ConfigDict):
        told = (
            f"has a get_config() that gives {type(config).__name__}"
            if "get_config" in module
            else "has no get_config()"
        )
        raise UserError(f"{path} {told}; see configs/ralenet.py for what a configuration file holds")
    return override(config.lock(), overrides)


def _line(error: Exception, path: str) -> str:
    """The line of a file where an error came from, as far as it is known."""
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        numbers.append(error.lineno)
    return f", line {numbers[-1]}" if numbers else ""


def saved_config(workdir: str, overrides: list[str] = ()) -> ConfigDict:
    """The configuration of the run in `workdir` with overrides applied.

    Raises:
        UserError: as `load_config`, or for a folder without a run of this version.
    """
    settings = checkpoint.read_config(workdir).to_dict()
    return override(checkpoint.typed_config(settings, workdir), overrides)


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        is_section = isinstance(config[key], ConfigDict)
        keys += _keys(config[key], f"{prefix}{key}.") if is_section else [prefix + key]
    return keys


def override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    """Sets keys from `section.key=value`; a value is a Python literal or else text. Raises `UserError`."""
    known = _keys(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if key not in known:
            nearest = difflib.get_close_matches(key[:_LONGEST], known, 1, 0.0)[0]
            raise UserError(f"unknown configuration key {_short(key)}; the nearest known one is {nearest!r}")
        if not equals:
            raise UserError(f"configuration key {key!r} has no value; write --config.{key}=VALUE")
        *sections, leaf = key.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        expected = section.get_type(leaf)
        try:
            parsed = _parse(value)
            # ConfigDict would take None for anything, and True for a number.
            if (parsed is None and not _may_be_none(key)) or (isinstance(parsed, bool) and expected is not bool):
                raise TypeError
            section[leaf] = parsed
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{key}={_short(value)} is not of the expected type {expected.__name__}") from error
    return config


def _may_be_none(key: str) -> bool:
    default = load_config("ralenet")
    return key in _keys(default) and functools.reduce(operator.getitem, key.split("."), default) is None


def _parse(value: str):
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what only looks like Python
            return ast.literal_eval(value)
    # The last two for what is nested too deeply.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _parser(mode: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"ralenet {mode}",
        allow_abbrev=False,
        epilog="--config.KEY=VALUE sets any key of the configuration, for example --config.noise.kind=ma.",
        description="Train a denoiser, or resume its training." if mode == "train" else "Evaluate a trained denoiser.",
    )
    parser.add_argument("--mode", choices=("train", "evaluate"), default=mode, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", required=True, help="folder of the run: configuration, checkpoints, results")
    parser.add_argument("--data-dir", help="folder of the shards (the same as --config.data.dir)")
    if mode == "train":
        parser.add_argument("--config", default="ralenet", help="file or name of the configuration (default: ralenet)")
    else:
        parser.add_argument("--checkpoint", default="last", help="last, best or the number of a step (default: last)")
        parser.add_argument("--weights", help="a file of `ralenet export` in place of the run's checkpoints")
        parser.add_argument("--split", default="test", choices=("test", "validation"), help="windows to evaluate on")
        parser.add_argument("--records", help="folder of the WFDB recordings: detect R peaks in whole ones too (slow)")
    return parser


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode", choices=("train", "evaluate"), default="train")
    mode = first.parse_known_args(argv)[0].mode
    parser = _parser(mode)
    arguments, rest = parser.parse_known_args(argv)
    prefix = "--config."
    for text in rest:
        if not text.startswith(prefix):
            parser.error(f"unknown argument {text!r}; see ralenet {mode} --help")
    overrides = [text.removeprefix(prefix) for text in rest]
    if arguments.data_dir:
        overrides.append(f"data.dir={arguments.data_dir!r}")
    return arguments, overrides


def _run(argv: list[str]) -> None:
    arguments, overrides = _arguments(argv)
    startup.start_jax()
    if arguments.mode == "train":
        config = load_config(arguments.config, overrides)
        hosts.connect(config)
        train.train(config, arguments.workdir)
    elif arguments.weights:
        from ralenet_jax import export  # what it imports is not for a quick start

        if arguments.records:
            raise UserError("--records needs a run's checkpoint; leave it or --weights out")
        config, variables = export.load(arguments.weights)
        evaluate.evaluate_weights(override(config, overrides), variables, arguments.workdir, arguments.split)
    else:
        config = saved_config(arguments.workdir, overrides)
        evaluate.evaluate(config, arguments.workdir, arguments.checkpoint, arguments.split, arguments.records)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code.

    0, 2 for bad input, 1 for a failed training, 130 or 143 interrupted; 3 (`hosts.LOST`) if other processes are gone.
    """
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"ralenet: stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"ralenet: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("ralenet: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
