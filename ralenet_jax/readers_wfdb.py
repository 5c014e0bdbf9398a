"""Recordings in WFDB: records of one segment or several, of all formats that its library reads."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import wfdb

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import SUFFIXES, Recording, find_leads

_FORMATS = {"80": 8, "212": 12, "16": 16, "24": 24, "32": 32}  # that the library writes: bits of a sample


def segments(header: Path) -> list[Path]:
    """The headers of the segments that a record of several names."""
    lines = _header_lines(header)
    return [header.with_name(f"{line.split()[0]}.hea") for line in lines[1:]] if _is_multi(lines) else []


def _header_lines(header: Path) -> list[str]:
    lines = header.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _is_multi(lines: list[str]) -> bool:
    return bool(lines) and "/" in lines[0].split()[0]


def _files(header: Path) -> list[Path]:
    """The files a WFDB record is made of; refuses names that lead out of its folder before any is opened."""
    found, waiting = [], [header]
    while waiting:
        current = waiting.pop()
        lines = _header_lines(current)
        suffix = ".hea" if _is_multi(lines) else ""
        found.append(current)
        for name in sorted({line.split()[0] for line in lines[1:]} - {"~"}):
            if re.search(r"[/\\:]|^[.-]+$|^~", name):
                raise UserError(f"{current} names the file {name!r}; expected one in its own folder; it is not read")
            file = current.with_name(name + suffix)
            if not file.is_file():
                raise UserError(f"{current} names {file.name}, which is not beside it; put it there")
            if file in found:
                raise UserError(f"{current} names {file.name} a second time; mend the header")
            (waiting if suffix else found).append(file)
    return found


def read(path: Path, rate: float | None) -> Recording:
    """Reads a record whose header is given; refuses names that lead out of its folder."""
    files = _files(path)
    name = str(path.absolute().with_suffix(""))
    try:
        record = wfdb.rdrecord(name, physical=False)
    except Exception as error:
        if "cannot be converted to single segment" not in str(error):
            raise
        record = wfdb.rdrecord(name)  # segments of several gains
    if not record.n_sig:
        raise UserError(f"{path} holds 0 channels; expected 1 or more")
    signal = record.p_signal if record.d_signal is None else record.dac()
    names = [text or f"ch{index}" for index, text in enumerate(record.sig_name)]
    units = ["" if unit in (None, "NU") else unit for unit in record.units]
    keep = {"files": files, "record": record}
    leads = find_leads(names, units)
    return Recording(signal, float(record.fs), tuple(names), tuple(units), leads, path, "wfdb", keep)


def write(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes header, signal file and what lies beside the record by its name: annotations, notes."""
    record = copy.copy(recording.keep["record"])
    if record.d_signal is None:
        convert(recording, signal, changed, path)
    else:
        gaps, record.p_signal = np.isnan(signal), signal.copy()
        digital = record.d_signal.copy()
        for channel in changed:
            values = np.rint(signal[:, channel] * record.adc_gain[channel] + record.baseline[channel])
            digital[:, channel] = np.clip(np.nan_to_num(values), -(2**31) + 1, 2**31 - 1)
        peak = int(np.abs(np.where(gaps, 0, digital)).max())
        bits = max([peak.bit_length() + 1, *(_FORMATS.get(name, 16) for name in record.fmt)])
        chosen = next(name for name, width in _FORMATS.items() if width >= bits)
        record.fmt = [chosen] * record.n_sig
        digital[gaps] = -(2 ** (_FORMATS[chosen] - 1))  # how WFDB marks a gap
        record.d_signal, record.p_signal, record.record_name = digital, None, path.stem
        record.file_name = [f"{path.stem}.dat"] * record.n_sig
        record.sig_name, record.sig_len = list(recording.names), len(digital)
        for field, default in (("adc_res", bits), ("adc_zero", 0), ("block_size", 0)):
            told = getattr(record, field) or [None] * record.n_sig
            setattr(record, field, [default if value is None else value for value in told])
        record.samps_per_frame, record.skew, record.byte_offset = [1] * record.n_sig, None, None
        record.init_value, record.checksum = [int(value) for value in digital[0]], record.calc_checksum()
        record.wrsamp(write_dir=str(path.parent))
    sources = recording.keep["files"]
    for file in recording.path.parent.iterdir():
        beside = file.stem == recording.path.stem and file.suffix.lower() not in SUFFIXES
        if beside and file not in sources and file.is_file():
            shutil.copyfile(file, path.with_suffix(file.suffix))


def convert(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes a record of format 16."""
    units = [re.sub(r"\s", "", unit) or "NU" for unit in recording.units]
    names = [name if recording.names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(recording.names)]
    formats = ["16"] * signal.shape[1]
    wfdb.wrsamp(path.stem, recording.sampling_rate, units, names, signal, fmt=formats, write_dir=str(path.parent))
