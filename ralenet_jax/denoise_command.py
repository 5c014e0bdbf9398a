"""The command `ralenet denoise`: recordings in, cleaned recordings out, in the format they came in."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ralenet_jax import readers, startup
from ralenet_jax.errors import UserError

_SECONDS_UNTIL_BAR, _SECONDS_BETWEEN_LINES = 2, 10


def denoise_file(denoiser, path: Path, out: str | None, several: bool, options: argparse.Namespace) -> list[Path]:
    """Denoises one recording; gives the files that were written, none if they are to be left where they are there.

    Args:
        denoiser: a `denoise.Denoiser`.
        path: as `readers.find` gives it.
        out, several: as for `readers.output_path`.
        options: `rate`, `leads`, `resume`, `plot` and `report` of the command.

    Raises:
        UserError: for a recording that cannot be read, cleaned or written.
    """
    recording = readers.read(path, options.rate)
    leads = readers.choose_leads(recording, options.leads) if options.leads else recording.leads
    if not leads:
        there = ", ".join(recording.names)
        raise UserError(f"{path} has no channel that looks like an ECG lead (there: {there}); choose with --leads")
    target = readers.output_path(recording, out, several)
    plot, page = (
        _beside(path, several, wanted, suffix) for wanted, suffix in ((options.plot, ".png"), (options.report, ".html"))
    )
    if options.resume and all(file is None or file.is_file() for file in (target, plot, page)):
        return []
    before = recording.channels(leads, recording.dtype)
    there = np.isfinite(before).any(0)
    if not there.any():
        raise UserError(f"{path} holds no samples in {', '.join(recording.names[lead] for lead in leads)}")
    if not there.all():  # a lead without a single sample is left as it is
        leads, before = [lead for lead, has_samples in zip(leads, there, strict=True) if has_samples], before[:, there]
    with _Progress(path, len(before), recording.sampling_rate) as progress:
        after = denoiser(before, recording.sampling_rate, report=progress.update)
    written = readers.write(recording, after, target, leads)
    return written + _show(denoiser, recording, leads, before, after, plot, page)


class _Progress:
    """Of a long recording: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, path: Path, length: int, rate: float):
        self._path, self._minutes, self._per_minute = path, length / rate / 60, rate * 60
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._minutes,
            desc=path.name,
            unit="min",
            delay=_SECONDS_UNTIL_BAR,
            leave=False,
            disable=not is_terminal,
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]",
        )
        self._done, self._told = 0.0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, samples: int) -> None:
        """So many samples more are done."""
        self._bar.update(samples / self._per_minute)
        self._done += samples / self._per_minute
        if self._bar.disable and time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            print(f"{self._path}: {self._done:.0f} of {self._minutes:.0f} minutes", file=sys.stderr, flush=True)
            self._told = time.monotonic()


def _beside(path: Path, several: bool, wanted: str | None, suffix: str) -> Path | None:
    """Where the plot or the page of a recording goes, if one is wanted; of several recordings each into that folder."""
    if not wanted:
        return None
    return Path(wanted) / f"{path.stem}{suffix}" if several else Path(wanted)


def _show(denoiser, recording, leads: Sequence[int], before, after, plot: Path | None, page: Path | None) -> list[Path]:
    """Writes the plot and the page that were asked for."""
    if plot is None and page is None:
        return []
    from ralenet_jax import report

    shown: dict[str, Any] = {
        "title": recording.path.stem,
        "sampling_rate": recording.sampling_rate,
        "names": [recording.names[lead] for lead in leads],
        "units": [recording.units[lead] for lead in leads],
        "before": before,
        "after": after,
        "beats": denoiser.find_r_peaks(after, recording.sampling_rate),
    }
    return [write(path, **shown) for path, write in ((plot, report.figure), (page, report.write)) if path is not None]


def _denoiser(options: argparse.Namespace):
    from ralenet_jax.denoise import Denoiser

    gate = {"gate": not options.no_gate}
    if options.model is None:
        return Denoiser.from_pretrained(**gate)
    if Path(options.model).is_dir():
        return Denoiser.from_checkpoint(options.model, options.checkpoint, **gate)
    return Denoiser.from_file(options.model, **gate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ralenet denoise",
        usage="ralenet denoise IN [OUT] [options]  or  ralenet denoise IN IN ... [--out FOLDER] [options]",
        description="Clean ECG recordings: WFDB, EDF/BDF, CSV/TSV, NPY/NPZ or WAV, of any rate from 50 to 5000 Hz, any "
        "length and any number of leads. What is no ECG lead stays as it is. Not a medical device.",
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files, WFDB records, or folders of them")
    parser.add_argument(
        "--out",
        help="file or folder to write, as OUT (default: beside IN, with _denoised in its name)",
    )
    parser.add_argument("--rate", type=float, help="sampling rate, Hz, where the file does not tell")
    parser.add_argument("--leads", help="channels to clean, by name or number: II,V1 (default: all ECG leads)")
    parser.add_argument("--model", help="work directory or exported weights (default: the ones that come along)")
    parser.add_argument("--checkpoint", default="best", help="of a work directory: best, last or a step (%(default)s)")
    parser.add_argument("--no-gate", action="store_true", help="clean windows too that seem to be clean")
    parser.add_argument("--resume", action="store_true", help="leave alone what an earlier call has written")
    parser.add_argument("--plot", metavar="PNG", help="draw the ten noisiest seconds (a folder for several recordings)")
    parser.add_argument("--report", metavar="HTML", help="page to look at the whole (a folder for several recordings)")
    return parser


def _run(options: argparse.Namespace) -> int:
    if len(options.inputs) == 2 and options.out is None and not _is_there(options.inputs[1]):
        options.out = options.inputs.pop()
    paths = readers.find(options.inputs, options.out)
    several = len(paths) > 1 or any(Path(name).is_dir() for name in options.inputs)
    _check_targets(paths, options, several)
    startup.start_jax()
    denoiser = _denoiser(options)
    failed = []
    for path in tqdm(paths, unit="recording", disable=len(paths) == 1 or not sys.stderr.isatty()):
        try:
            written = denoise_file(denoiser, path, options.out, several, options)
            tqdm.write(f"{path}: {', '.join(map(str, written)) or 'done already'}")
        except UserError as error:
            if not several:
                raise
            failed.append(f"{path}: {error}")
    for line in failed:
        print(f"ralenet: error: {line}", file=sys.stderr)
    if failed:
        print(f"ralenet: {len(failed)} of {len(paths)} recordings failed", file=sys.stderr)
    return int(bool(failed))


def _is_there(name: str) -> bool:
    return Path(name).exists() or Path(f"{name}.hea").exists()


def _check_targets(paths: Sequence[Path], options: argparse.Namespace, several: bool) -> None:
    """Of several recordings none may overwrite another's output."""
    names = [path.name for path in paths]
    twice = [name for name in names if names.count(name) > 1]
    if several and twice and (options.out or options.plot or options.report):
        raise UserError(f"two recordings are called {twice[0]}; clean their folders one after the other")
    for option, target in (("--out", options.out), ("--plot", options.plot), ("--report", options.report)):
        if several and target and Path(target).is_file():
            raise UserError(f"{option} {target} is a file; name a folder for {len(paths)} recordings")


def main(argv: list[str]) -> int:
    """Runs the command; the exit code: 0, 1 if some of several recordings failed, 2 for bad input, 130 interrupted."""
    try:
        return _run(_parser().parse_args(argv))
    except UserError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        text = "ralenet: interrupted; recordings written so far are whole, and the same with --resume leaves them alone"
        print(text, file=sys.stderr)
        return 130
