"""The whole way on made-up data, in a few minutes: simulate, prepare, train, evaluate, draw."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import demo as demo_config
from data_prep import physionet, prepare
from ralenet_jax import checkpoint, evaluate, startup, train, writer
from ralenet_jax.errors import UserError

_NEXT = """
The same on real recordings, in three commands (the first downloads 124 MB from PhysioNet):

  ralenet prepare --data-dir data
  ralenet train --data-dir data --workdir runs/bw
  ralenet evaluate --workdir runs/bw

The README tells what can be configured and what the published figures are."""


def demo(workdir: str | Path, seed: int = 0) -> dict[str, Any]:
    """Simulates databases, prepares them, trains on them, evaluates and draws, telling what it does on standard output.

    A second call with the same arguments goes on where the first stopped, and keeps what is finished.

    Args:
        workdir: everything is written below it: `simulated`, `data`, `run`, `denoised.png`, `learning_curve.png`.
        seed: of the simulation, the initial weights and the noise.

    Returns:
        The result of the evaluation, as `evaluate.evaluate` gives it.

    Raises:
        UserError: an extra is not installed, or the folder holds a run with another seed.
        PrepareError: the folders of the data hold other things or cannot be written.
    """
    simulate, plots = _extras()
    workdir = Path(workdir)
    run = workdir / "run"
    config = _config(workdir, seed)
    checkpoint.claim(run, config)  # before anything of another seed is replaced
    with _Step(1, "simulating ECG and noise recordings: made-up hearts, PhysioNet's file layout"):
        source = simulate.write(workdir / "simulated", seed)
        print(f"recordings in {source}")
    with _Step(2, "preparing: recordings are checked and cut into windows of 256 samples around each heartbeat"):
        prepare.prepare(workdir / "data", source=source)
    figures = {name: workdir / f"{name}.png" for name in ("learning_curve", "denoised")}
    if figures["denoised"].exists() and (run / evaluate.RESULT).exists():  # the figure is the last thing made
        result = json.loads((run / evaluate.RESULT).read_text(encoding="utf-8"))
        print(f"[3-5/5] trained, evaluated and drawn before; delete {workdir} to start anew")
        print(_meaning(result, figures))
        return result
    with _Step(3, "training RA-LENet to give back the clean window from a noisy one"):
        startup.start_jax()
        train.train(config, run)
    with _Step(4, "evaluating on heartbeats of patients, and on noise, that it has not seen"):
        result = evaluate.evaluate(config, run)
    with _Step(5, "drawing the learning curve and a few test windows"):
        plots.learning_curve(figures["learning_curve"], writer.read_history(run))
        config.eval.kinds = config.noise.kind
        plots.windows_figure(figures["denoised"], **evaluate.example_windows(config, run), units=result["units"])
    print(_meaning(result, figures))
    return result


class _Step:
    """Says what begins, and how long it took."""

    def __init__(self, number: int, text: str):
        self._title = f"[{number}/5] {text}"

    def __enter__(self):
        print(self._title, flush=True)
        self._started = time.monotonic()

    def __exit__(self, error, *_):
        if error is None:
            print(f"({time.monotonic() - self._started:.0f} s)\n", flush=True)


def _extras() -> tuple[Any, Any]:
    """The two modules that need libraries of the extra, before minutes are spent on what comes ahead of them."""
    try:
        from data_prep import simulate
        from ralenet_jax import plots
    except ImportError as error:
        raise UserError(str(error)) from error
    return simulate, plots


def _config(workdir: Path, seed: int) -> ConfigDict:
    config = demo_config.get_config()
    config.seed = seed
    config.data.dir = str(workdir / "data")
    return config


def _meaning(result: dict[str, Any], figures: dict[str, Path]) -> str:
    """What came out, in words."""
    lines = [
        "What came out: the signal-to-noise ratio (SNR) of the input and of the output, mean over "
        f"{next(iter(result['conditions'].values()))['noisy']['windows']:,} test windows.",
        "At 0 dB the noise is as strong as the heartbeat; each 10 dB more is a tenth of the noise.",
        "",
    ]
    for name, parts in result["conditions"].items():
        kind = name.partition("@")[0]
        before, after = (parts[row]["snr_db"] for row in ("noisy", "denoised"))
        lines.append(f"  {_NOISES.get(kind, kind):<17} {before:4.1f} dB → {after:4.1f} dB")
    lines += [
        "",
        f"How it looks: {figures['denoised']} (noisy, denoised, clean)",
        f"How it learned: {figures['learning_curve']}",
        "",
        "This shows that the software works; the hearts are simulated, real recordings are another matter.",
    ]
    return "\n".join(lines)


_NOISES = {"bw": "baseline wander", "ma": "muscle noise", "em": "electrode motion", "emb": "all three at once"}


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; expected a whole number from 0 on")
    return int(text)


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code: 0, 2 for bad input, 1 for a failed training, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(
        prog="ralenet demo",
        description="Simulate ECG databases, prepare them, train and evaluate an RA-LENet, draw: offline, in minutes.",
        epilog="The same call again goes on where this one stopped.",
    )
    parser.add_argument("--workdir", default="ralenet_demo", help="folder for all that is written (%(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the simulation and the training (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        demo(arguments.workdir, arguments.seed)
    except (UserError, physionet.PrepareError) as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename or arguments.workdir}: {error.strerror or error}"
        print(f"ralenet: error: cannot write {reason}; free space or choose another --workdir", file=sys.stderr)
        return 2
    except train.NonFiniteLoss as error:
        print(f"ralenet: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("ralenet: interrupted; the same call goes on from there", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)
    print(_NEXT)
    return 0
