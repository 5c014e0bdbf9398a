"""Recordings of ECG in and out, for the command `ralenet denoise`: WFDB, EDF, BDF, CSV, NPY, NPZ and WAV.

What is written keeps all of the recording but the samples that were changed: header, other channels, annotations, type
of number, delimiter. Nothing is fetched and nothing in a file is run.
"""

import contextlib
import dataclasses
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from ralenet_jax import readers_arrays, readers_csv, readers_edf, readers_wfdb
from ralenet_jax.errors import UserError, printable, reason
from ralenet_jax.readers_recording import SUFFIXES, Recording, blocks

_DENOISED = "_denoised"  # in the name of what is written beside a recording


def find(paths: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """What `read` takes among files, WFDB records and folders (with all below them), sorted, each once.

    Of what lies in a folder, the segments of a WFDB record are not listed by themselves, nor is text that is no table
    of numbers, nor what an earlier run wrote: its stem ends in _denoised, or it lies in `out`, a folder below that one.

    Raises:
        UserError: if a path is not there or not readable, or a folder holds no recording.
    """
    found = set()
    for path in map(Path, paths):
        with _user_errors(f"cannot read {path}", "name a file, a WFDB record or a folder"):
            found |= _find_below(path, out) if path.is_dir() else {_resolve(path)}
    return sorted(found)


def _find_below(path: Path, out: str | Path | None) -> set[Path]:
    inside = {file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.suffix.lower() != ".dat"}
    hidden = {file for file in inside if any(part.startswith(".") for part in file.relative_to(path).parts)}
    inside = {file for file in inside - hidden if file.is_file()}
    inside -= {part for file in inside if file.suffix == ".hea" for part in readers_wfdb.segments(file)}
    inside = {file for file in inside if SUFFIXES[file.suffix.lower()] != "csv" or readers_csv.is_table(file)}
    inside = {file for file in inside if not file.stem.endswith(_DENOISED)}
    if out is not None and path.resolve() in Path(out).resolve().parents:
        inside = {file for file in inside if not file.resolve().is_relative_to(Path(out).resolve())}
    if not inside:
        ends = ", ".join(SUFFIXES)
        raise UserError(f"{path} holds no recording; expected files that end in {ends}, but not in {_DENOISED}")
    return inside


def _resolve(path: Path) -> Path:
    """The file to read for a path that a user gave; of a WFDB record, its header."""
    suffix = path.suffix.lower()
    header = path.with_suffix(".hea") if suffix == ".dat" else path.parent / f"{path.name}.hea"
    if suffix in SUFFIXES and suffix != ".dat" and path.is_file():
        return path
    if path.name and header.is_file():
        return header
    if suffix == ".dat" and path.is_file():
        raise UserError(f"{path} has no header {header.name} beside it; a WFDB record needs both")
    if path.exists():
        what = "a folder" if path.is_dir() else "of no format that is read"
        raise UserError(f"{path} is {what}; expected a file that ends in {', '.join(SUFFIXES)}")
    raise UserError(f"{path} is not there; name a file, a WFDB record or a folder")


def read(path: str | Path, sampling_rate: float | None = None) -> Recording:
    """Reads a recording.

    Args:
        path: a file, or a WFDB record with or without suffix. Signals of WFDB with several samples a frame come as the
            mean of each frame; of EDF and BDF, the signals that share the rate of the ECG leads are channels.
        sampling_rate: Hz, where the format has none; before the time column of a CSV.

    Raises:
        UserError: if it is not there, damaged, without a rate, or holds no signal.
    """
    if sampling_rate is not None and not (math.isfinite(sampling_rate) and sampling_rate > 0):
        raise UserError(f"sampling rate {sampling_rate}; expected a number of Hz above 0")
    with _user_errors(f"cannot read {path}", "it is damaged or of another format; check or export it anew"):
        path = _resolve(Path(path))
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; check or export it anew")
        recording = _READERS[SUFFIXES[path.suffix.lower()]](path, sampling_rate)
        names, units = (tuple(map(printable, texts)) for texts in (recording.names, recording.units))
        recording = dataclasses.replace(recording, names=names, units=units)
        _check_samples(recording)
    rate = recording.sampling_rate
    if rate == 0 and recording.format in ("csv", "npy", "npz"):
        raise UserError(f"{path} does not tell its sampling rate; pass --rate with a number of Hz")
    if not (math.isfinite(rate) and rate > 0):
        raise UserError(f"{path} tells of {rate:g} Hz; expected a number above 0; mend it")
    if sampling_rate and abs(rate - sampling_rate) > 1e-3 * rate:
        raise UserError(f"{path} tells of {rate:g} Hz, not {sampling_rate:g}; leave out --rate")
    return recording


def _check_samples(recording: Recording) -> None:
    path, length, channels = recording.path, recording.length, len(recording.names)
    if channels == 0 or length < 2:
        raise UserError(f"{path} holds {channels} channels of {length} samples; expected 1 of 2 or more")
    has_samples = False
    for part in blocks(length, channels):
        rows = recording.rows(part)
        if np.isinf(rows).any():
            raise UserError(f"{path} holds infinite values; check it")
        has_samples |= not np.isnan(rows).all()
    if not has_samples:
        raise UserError(f"{path} holds nothing but gaps; check it")


@contextlib.contextmanager
def _user_errors(failed: str, advice: str) -> Iterator[None]:
    """Whatever a library raises or warns of becomes one line for the user."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "Chunk .* not understood", wavfile.WavFileWarning)
            yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{failed}: {error.strerror or error}") from error
    # Each library has errors of its own for each kind of damage.
    except Exception as error:
        raise UserError(f"{failed} ({reason(error)}); {advice}") from error


def choose_leads(recording: Recording, text: str) -> tuple[int, ...]:
    """The channels of "II,V1" or "0,2": by name, whatever its case, or else by index from 0.

    Raises:
        UserError: if there is no such channel, naming those there are.
    """
    lower, chosen = [name.lower() for name in recording.names], []
    for word in (part.strip() for part in text.split(",")):
        if word.lower() in lower:
            chosen.append(lower.index(word.lower()))
        elif word.isdecimal() and int(word) < len(lower):
            chosen.append(int(word))
        else:
            there = ", ".join(f"{index} {name}" for index, name in enumerate(recording.names))
            raise UserError(f"--leads {text}: no channel {word!r} in {recording.path}; expected some of {there}")
    return tuple(dict.fromkeys(chosen))


def output_path(recording: Recording, out: str | Path | None, several: bool) -> Path:
    """Where the denoised recording goes.

    Args:
        out: None for beside it, with "_denoised" in the name; a folder for the same name in it; else the file itself,
            of the format that its suffix tells.
        several: recordings are written, so `out` is a folder, there or not yet.

    Raises:
        UserError: if that is the recording itself, or of a format that is not written.
    """
    source = recording.path
    if out is None:
        path = source.with_name(f"{source.stem}{_DENOISED}{source.suffix}")
    elif several or Path(out).is_dir() or str(out).endswith(os.sep):
        path = Path(out) / source.name
    else:
        path = Path(out)
    if _kind(recording, path) == "wfdb":
        path = path.with_suffix(".hea")
    _refuse_input(recording, [path])
    return path


def _kind(recording: Recording, path: Path) -> str:
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is of no format that is written; expected a name that ends in {', '.join(SUFFIXES)}")
    return SUFFIXES[path.suffix.lower()] if path.suffix else recording.format


def _refuse_input(recording: Recording, targets: Sequence[Path]) -> None:
    sources = recording.keep["files"] if recording.format == "wfdb" else [recording.path]
    for target in targets:
        if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
            raise UserError(f"{target} is the recording that was read; name another output")


def write(recording: Recording, signal: np.ndarray, path: str | Path, leads: Sequence[int] | None = None) -> list[Path]:
    """Writes a recording with other samples; channels that equal those of the recording are kept digit by digit.

    Values that the file's type of number cannot hold are clipped, or the type is widened (WFDB).

    Args:
        signal: `[L, leads]`, in the recording's units.
        path: its suffix tells the format; without one, the recording's own.
        leads: the channels that `signal` has; all by default.

    Returns:
        The files that were written, each of them whole or not at all; of WFDB the header comes last.

    Raises:
        UserError: if the file cannot be written; nothing is left.
    """
    path, signal = Path(path), np.asarray(signal)
    leads = list(range(len(recording.names)) if leads is None else leads)
    if signal.shape != (recording.length, len(leads)):
        raise ValueError(f"signal of shape {signal.shape}; expected {(recording.length, len(leads))}")
    kind = _kind(recording, path)
    path = path.with_suffix(".hea") if kind == "wfdb" else path
    moved = []
    with _user_errors(f"cannot write {path}", "name another output or format"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=path.parent) as folder:
            if kind == recording.format:
                _WRITERS[kind](recording, _changed(recording, signal, leads), Path(folder) / path.name)
            else:
                whole = recording.signal
                whole[:, leads] = signal
                _CONVERTERS[kind](recording, whole, Path(folder) / path.name)
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            targets = [path.with_name(file.name) for file in files]
            _refuse_input(recording, targets)
            try:
                for file, target in zip(files, targets, strict=True):
                    file.replace(target)
                    moved.append(target)
            except BaseException:
                for target in moved:
                    target.unlink(missing_ok=True)
                raise
    return moved


def _changed(recording: Recording, signal: np.ndarray, leads: Sequence[int]) -> dict[int, np.ndarray]:
    """The channels whose samples are not those of the recording."""
    changed = np.zeros(len(leads), bool)
    for part in blocks(recording.length, len(recording.names)):
        old, new = recording.rows(part)[:, leads].astype(signal.dtype), signal[part]
        changed |= ((old != new) & ~(np.isnan(old) & np.isnan(new))).any(0)
    return {lead: signal[:, place] for place, lead in enumerate(leads) if changed[place]}


_READERS = {
    **{"wfdb": readers_wfdb.read, "edf": readers_edf.read, "bdf": readers_edf.read, "csv": readers_csv.read},
    **{"npy": readers_arrays.read_npy, "npz": readers_arrays.read_npz, "wav": readers_arrays.read_wav},
}
_WRITERS = {
    **{"wfdb": readers_wfdb.write, "edf": readers_edf.write, "bdf": readers_edf.write, "csv": readers_csv.write},
    **{"npy": readers_arrays.write_npy, "npz": readers_arrays.write_npz, "wav": readers_arrays.write_wav},
}
_CONVERTERS = {
    **{
        "wfdb": readers_wfdb.convert,
        "edf": readers_edf.convert,
        "bdf": readers_edf.convert,
        "csv": readers_csv.convert,
    },
    **{"npy": readers_arrays.convert_npy, "npz": readers_arrays.convert_npz, "wav": readers_arrays.convert_wav},
}
