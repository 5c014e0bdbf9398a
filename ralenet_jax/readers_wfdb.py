"""Recordings in WFDB: records of one segment or several, of all formats that its library reads."""

import copy
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wfdb
from wfdb.io.header import rx_record, rx_segment, rx_signal

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import SUFFIXES, Recording, blocks, check_memory, dtype_of_digits, find_leads

_FORMATS = {"80": 8, "212": 12, "16": 16, "24": 24, "32": 32}  # that the library writes: bits of a sample
_BITS = _FORMATS | {"8": 8, "61": 16, "160": 16, "310": 32 / 3, "311": 32 / 3, "508": 0, "516": 0, "524": 0}  # 0: FLAC
_WIDE = {"8", "24", "32", "524"}  # whose samples come in 32 bits, those of the others in 16
_LONGEST_LINE = 1000  # characters; the format has 255, and the library's patterns take the square of it
_LONGEST_HEADER = 2**21  # bytes, of which each may be a line to the library
_MOST_SIGNALS, _MOST_SEGMENTS = 2**10, 2**14
_AT_ONCE = 9  # bytes that the library takes for a value besides while it reads it


def segments(header: Path) -> list[Path]:
    """The headers of the segments that a record of several names; none where the header is damaged."""
    try:
        record, lines = _parse(header)
    except ValueError:
        return []
    return [header.with_name(f"{line['seg_name']}.hea") for line in lines] if record["n_seg"] else []


def _parse(header: Path) -> tuple[re.Match, list[re.Match]]:
    """The first line of a header, and the lines of its segments or signals, as the library understands them."""
    if header.stat().st_size > _LONGEST_HEADER:
        raise ValueError(f"a WFDB header of {header.stat().st_size} bytes; expected {_LONGEST_HEADER} at most")
    lines = [line.strip() for line in header.read_text(encoding="ascii", errors="ignore").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or max(map(len, lines)) > _LONGEST_LINE:
        raise ValueError("no line of a WFDB header" if not lines else f"a line of {max(map(len, lines))} characters")
    for name in (line.split()[0] for line in lines[1:]):
        if re.search(r"[/\\:]|^[.-]+$|^~.", name):
            raise UserError(f"{header} names the file {name!r}; expected one in its own folder; it is not read")
    record = rx_record.match(lines[0])
    pattern = rx_segment if record and record["n_seg"] else rx_signal
    found = [pattern.match(line) for line in lines[1:]]
    if record is None or None in found:
        raise ValueError(f"{lines[found.index(None) + 1 if record else 0][:40]!r} is no line of a WFDB header")
    told = int(record["n_seg"] or record["n_sig"])
    if told != len(found) or told > _MOST_SEGMENTS or int(record["n_sig"]) > _MOST_SIGNALS:
        raise ValueError(f"{record['n_sig']} signals, {len(found)} lines, {told} expected")
    return record, found


def files(header: Path) -> list[Path]:
    """The files a WFDB record is made of, before any but headers is opened.

    Raises:
        UserError: for names that lead out of its folder.
        ValueError: for more samples than the files hold: the library takes the memory for what a header claims.
    """
    record, lines = _parse(header)
    found, names = {header: None}, []  # a dictionary is a set that keeps the order
    if record["n_seg"]:
        names = [line["seg_name"] for line in lines if line["seg_name"] != "~"]
        needed = 2 * int(record["n_sig"]) * sum(int(line["seg_len"]) for line in lines)
    else:
        needed = sum(_add_signals(found, header, record, lines))
    for name in names:
        segment = _add(found, header, f"{name}.hea")
        record, lines = _parse(segment)
        if record["n_seg"]:
            raise ValueError(f"its segment {segment.name} is itself of segments")
        needed += _add_signals(found, segment, record, lines)[1]
    check_memory(header, needed, _size(found))
    return list(found)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _add(found: dict[Path, None], header: Path, name: str) -> Path:
    file = header.with_name(name)
    if not file.is_file():
        raise UserError(f"{header} names {name}, which is not beside it; put it there")
    if file in found:
        raise UserError(f"{header} names {name} a second time; mend the header")
    found[file] = None
    return file


def _add_signals(found: dict[Path, None], header: Path, record: re.Match, lines: list[re.Match]) -> tuple[int, int]:
    """Adds the signal files of a header to those found; the bytes its samples take, and those of reading them."""
    length, kept, passing = int(record["sig_len"] or -1), 0, 0
    at_once = _at_once(length, [line["fmt"] for line in lines])
    for name in dict.fromkeys(line["file_name"] for line in lines):
        told = [line for line in lines if line["file_name"] == name]
        formats, counts = {line["fmt"] for line in told}, [int(line["samps_per_frame"] or 1) for line in told]
        if name == "~" and formats == {"0"}:  # the names of a record whose segments hold various signals
            continue
        room = 8 * (_add(found, header, name).stat().st_size - int(told[0]["byte_offset"] or 0))
        if len(formats) > 1 or not formats < _BITS.keys() or 0 in counts:
            raise ValueError(f"{name} of format {', '.join(sorted(formats))}, {min(counts)} samples a frame")
        frame = sum(counts) * _BITS[told[0]["fmt"]]
        if length < 0 and frame:
            length = int(room / frame)  # as the library takes it from the first file
        if frame * length > room:
            raise ValueError(f"{length} samples, more than {name} holds")
        skew = max(int(line["skew"] or 0) for line in told)
        kept += (4 if formats < _WIDE else 2) * sum(counts) * max(length, 0)
        passing += _AT_ONCE * sum(counts) * (skew + at_once * max(length, 0))
    return kept, passing


def read(path: Path, rate: float | None) -> Recording:
    """Reads a record whose header is given; refuses names that lead out of its folder."""
    found = files(path)
    record = _read_samples(path, found)
    if not record.n_sig:
        raise UserError(f"{path} holds 0 channels; expected 1 or more")
    names = tuple(text or f"ch{index}" for index, text in enumerate(record.sig_name))
    units = tuple("" if unit in (None, "NU") else unit for unit in record.units)
    keep = {"files": found, "record": record}
    rate, leads = float(record.fs), find_leads(names, units)
    if record.d_signal is None:
        dtype = record.p_signal.dtype.type
    else:
        dtype = dtype_of_digits(np.iinfo(record.d_signal.dtype).max + max(map(abs, record.baseline)), record.adc_gain)
    return Recording(
        lambda part: _rows(record, part), record.sig_len, rate, names, units, leads, path, "wfdb", keep, dtype
    )


def _read_samples(path: Path, found: list[Path]) -> wfdb.Record:
    """Reads all samples, digital ones in as few bits as hold them, or float32 of segments with several gains."""
    name = str(path.absolute().with_suffix(""))
    lines = [line for file in found if file.suffix == ".hea" for line in _parse(file)[1]]
    formats = {line["fmt"] for line in lines if "fmt" in line.groupdict()}
    digital = {"physical": False, "return_res": 32 if formats & _WIDE else 16}
    header = wfdb.rdheader(name)
    if isinstance(header, wfdb.MultiRecord):
        # The library's own way of reading them does not come back from signals without names.
        names = [None if told == "~" else str(path.absolute().with_name(told)) for told in header.seg_name]
        header.segments = [told and wfdb.rdheader(told) for told in names]
        header.sig_name = next((segment.sig_name for segment in header.segments if segment is not None), [])
        return _join(path, header, found, {} if _differ(path, header) else digital)
    samples = None
    for part in _parts(header):
        read = wfdb.rdrecord(name, part.start, part.stop, **digital)
        if part.stop is None:
            return read
        if samples is None:
            record, samples = read, np.empty((header.sig_len, header.n_sig), read.d_signal.dtype)
        samples[part] = read.d_signal
    record.d_signal, record.sig_len = samples, header.sig_len
    return record


def _parts(header: wfdb.Record) -> Iterable[slice]:
    """What to read at once, as the library takes more while it reads than the samples do: blocks, or all."""
    at_once = not header.n_sig or _at_once(header.sig_len, header.fmt)
    return [slice(0, None)] if at_once else blocks(header.sig_len, sum(header.samps_per_frame))


def _at_once(length: int | None, formats: Sequence[str]) -> bool:
    """Whether signals cannot be read in blocks: of unknown length, or of format 8, which counts on from the start."""
    return (length or 0) < 1 or "8" in formats


def _placed(header: wfdb.MultiRecord) -> Iterator[tuple[int, wfdb.Record, list[int]]]:
    """The segments that hold samples: where each starts, its header, and the channels that its signals are."""
    start = 0
    for name, length, segment in zip(header.seg_name, header.seg_len, header.segments, strict=True):
        if segment is not None and length:  # a layout is a segment of no samples
            segment.record_name, segment.sig_len = name, length  # what counts, whatever its header says
            names = [header.sig_name.index(name) for name in segment.sig_name] if header.layout == "variable" else None
            yield start, segment, names or list(range(segment.n_sig))
        start += length


def _differ(path: Path, header: wfdb.MultiRecord) -> bool:
    """Whether no digits tell of all segments: a channel is not stored alike in them, or as 8, which has no gaps."""
    stored, units = {}, {}
    for _, segment, channels in _placed(header):
        for place, channel in enumerate(channels):
            unit = units.setdefault(channel, segment.units[place])
            if unit != segment.units[place]:
                raise UserError(
                    f"{path} gives {header.sig_name[channel] or f'ch{channel}'} in {unit} and in "
                    f"{segment.units[place]}; expected one unit in all segments: write them anew"
                )
            told = (segment.fmt[place], segment.adc_gain[place], segment.baseline[place])
            stored.setdefault(channel, set()).add(told)
    return any(len(told) > 1 or next(iter(told))[0] == "8" for told in stored.values())


def _join(path: Path, header: wfdb.MultiRecord, found: list[Path], digital: dict[str, Any]) -> wfdb.Record:
    """Reads segments one after the other: digital samples, or physical ones in float32 where none are asked for."""
    stored = {"fmt": "16", "adc_gain": 200.0, "baseline": 0, "units": "NU"}  # of a channel that no segment has
    stored = {field: [value] * header.n_sig for field, value in stored.items()}
    for _, segment, channels in _placed(header):
        for place, channel in enumerate(channels):
            for field, values in stored.items():
                values[channel] = getattr(segment, field)[place]
    length, dtype = sum(header.seg_len), np.dtype(f"i{digital['return_res'] // 8}" if digital else np.float32)
    check_memory(path, length * header.n_sig * dtype.itemsize, _size(found))
    samples, gaps = np.empty((length, header.n_sig), dtype), np.full((1, header.n_sig), np.nan)
    samples[:] = wfdb.Record(p_signal=gaps, n_sig=header.n_sig, **stored).adc() if digital else gaps
    for start, segment, channels in _placed(header):
        rows = samples[start : start + segment.sig_len]
        for part in _parts(segment):
            name = str(path.absolute().with_name(segment.record_name))
            read = wfdb.rdrecord(name, part.start, part.stop, **digital)
            rows[part, channels] = read.d_signal if digital else read.p_signal
    kept = ["record_name", "n_sig", "sig_name", "fs", "counter_freq", "base_counter", "base_time", "base_date"]
    told = {name: getattr(header, name) for name in [*kept, "comments"]}
    told |= stored if digital else {"units": stored["units"]}
    return wfdb.Record(sig_len=length, **{"d_signal" if digital else "p_signal": samples}, **told)


def _rows(record: wfdb.Record, part: slice) -> np.ndarray:
    if record.d_signal is None:
        return record.p_signal[part].astype(np.float64)
    few = copy.copy(record)
    few.d_signal = record.d_signal[part]
    return few.dac()


def write(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes header, signal file and what lies beside the record by its name: annotations, notes."""
    record = copy.copy(recording.keep["record"])
    if record.d_signal is None:
        _choose_gains(record, recording, new)
    _write_samples(record, recording, new, path)
    sources = recording.keep["files"]
    for file in recording.path.parent.iterdir():
        beside = file.stem == recording.path.stem and file.suffix.lower() not in SUFFIXES
        if beside and file not in sources and file.is_file():
            shutil.copyfile(file, path.with_suffix(file.suffix))


def _with_new(recording: Recording, new: dict[int, np.ndarray], part: slice) -> np.ndarray:
    physical = recording.rows(part)
    for channel, values in new.items():
        physical[:, channel] = values[part]
    return physical


def _choose_gains(record: wfdb.Record, recording: Recording, new: dict[int, np.ndarray]) -> None:
    """Gains and offsets with which each channel fills most of 16 bits."""
    low, high = np.full((2, record.n_sig), np.nan)
    for part in blocks(recording.length, record.n_sig):
        physical = _with_new(recording, new, part)
        low, high = np.fmin(low, np.fmin.reduce(physical)), np.fmax(high, np.fmax.reduce(physical))
    middle, half = np.nan_to_num((high + low) / 2), np.nan_to_num((high - low) / 2)
    # An offset far beyond what varies costs digits; a header holds six of a gain.
    half = np.maximum(half, np.abs(middle) * 2**-14)
    record.adc_gain = [float(f"{2**14.9 / value:.6g}") if value else 200.0 for value in half]
    record.baseline = [-round(value * gain) for value, gain in zip(middle, record.adc_gain, strict=True)]
    record.fmt = ["16"] * record.n_sig


def _write_samples(record: wfdb.Record, recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes header and signal file, of the record's own format or of one wide enough for the new values."""
    old, parts = record.d_signal, list(blocks(recording.length, record.n_sig))

    def digits(part: slice) -> tuple[np.ndarray, np.ndarray]:
        physical = _with_new(recording, new, part)
        digital = np.zeros(physical.shape, np.int64) if old is None else old[part].astype(np.int64)
        for channel in range(record.n_sig) if old is None else new:
            found = np.rint(physical[:, channel] * record.adc_gain[channel] + record.baseline[channel])
            digital[:, channel] = np.clip(np.nan_to_num(found), -(2**31) + 1, 2**31 - 1)
        return digital, np.isnan(physical)

    peak = max(int(np.abs(np.where(gaps, 0, digital)).max()) for digital, gaps in map(digits, parts))
    bits = max([peak.bit_length() + 1, *(_FORMATS.get(name, 16) for name in record.fmt)])
    chosen = next(name for name, width in _FORMATS.items() if width >= bits)
    record.fmt, record.record_name = [chosen] * record.n_sig, path.stem
    record.file_name, record.sig_name = [f"{path.stem}.dat"] * record.n_sig, list(recording.names)
    record.samps_per_frame, record.skew, record.byte_offset = [1] * record.n_sig, None, None
    for field, default in (("adc_res", bits), ("adc_zero", 0), ("block_size", 0)):
        told = getattr(record, field) or [None] * record.n_sig
        setattr(record, field, [default if value is None else value for value in told])
    record.base_counter = record.base_counter or None  # 0 is the default, which the library does not write
    sums = np.zeros(record.n_sig, np.int64)
    # The library takes up to 32 bytes a sample while it writes.
    with path.with_suffix(".dat").open("wb") as file, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for part in parts:
            record.d_signal, gaps = digits(part)
            record.d_signal[gaps] = -(2 ** (_FORMATS[chosen] - 1))  # how WFDB marks a gap
            record.wr_dat_files(write_dir=folder)
            file.write((Path(folder) / record.file_name[0]).read_bytes())
            sums += record.d_signal.sum(0)
            if part.start == 0:
                record.init_value = [int(value) for value in record.d_signal[0]]
    record.checksum = [int(value) % 65536 for value in sums]
    record.wrheader(str(path.parent), expanded=False)


def convert(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes a record of format 16."""
    units = [re.sub(r"\s", "", unit) or "NU" for unit in recording.units]
    told = [name or f"ch{i}" for i, name in enumerate(recording.names)]
    names = [name if told.count(name) == 1 else f"{name} {i}" for i, name in enumerate(told)]
    formats = ["16"] * signal.shape[1]
    wfdb.wrsamp(path.stem, recording.sampling_rate, units, names, signal, fmt=formats, write_dir=str(path.parent))
