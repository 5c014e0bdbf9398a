"""Recordings in EDF and EDF+, without interruptions."""

import collections
import decimal
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import edfio
import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import Recording, find_leads


def read(path: Path, rate: float | None) -> Recording:
    """Reads the signals that share the rate of the ECG leads."""
    _check_size(path)
    edf = edfio.read_edf(path, lazy_load_data=False, header_encoding="latin-1")
    if not _is_continuous(edf):
        raise UserError(f"{path} is an EDF+D file with interruptions; export it as EDF+C, or its parts one by one")
    rates = [signal.sampling_frequency for signal in edf.signals]
    leads = find_leads(edf.labels, [signal.physical_dimension for signal in edf.signals])
    counts = collections.Counter(rates[index] for index in leads or range(len(rates)))
    if not counts:
        raise UserError(f"{path} holds 0 channels; expected 1 or more")
    chosen = max(counts, key=lambda rate: (counts[rate], rate))
    places = [index for index, rate in enumerate(rates) if rate == chosen]
    signals = [edf.signals[index] for index in places]
    names, units = zip(*((signal.label, signal.physical_dimension) for signal in signals), strict=True)
    values = np.stack([signal.data for signal in signals], 1)
    if abs(chosen - round(chosen)) < 1e-6 * chosen:  # the header has 8 characters for the duration of a data record
        chosen = round(chosen)
    keep = {"edf": edf, "places": places}
    return Recording(values, float(chosen), names, units, find_leads(names, units), path, "edf", keep)


def _check_size(path: Path) -> None:
    """Refuses a header that tells of more or less than there is, before anything is made of it."""
    with path.open("rb") as file:
        head = file.read(256)
        channels = int(head[252:256])
        fields = file.read(256 * max(channels, 0))
    counts = [int(fields[start : start + 8]) for start in range(216 * channels, 224 * channels, 8)]
    told, begin = 2 * sum(counts) * int(head[236:244]), 256 * (channels + 1)
    if min(counts, default=1) < 1 or int(head[184:192]) != begin or begin + told != path.stat().st_size:
        raise ValueError(f"its header does not fit {path.stat().st_size} bytes")


def _is_continuous(edf: edfio.Edf) -> bool:
    """Whether each data record begins where the one before ends, as the first annotation of each tells."""
    annotations = next(iter(edf._annotation_signals), None)
    if annotations is None:
        return True
    onsets = [re.match(rb"[+-]\d+(\.\d*)?(?=\x14)", record) for record in _data_records(annotations)]
    if None in onsets:
        raise ValueError("a data record without its time")
    times = [decimal.Decimal(onset[0].decode()) for onset in onsets]
    duration = decimal.Decimal(edf._data_record_duration.decode().strip())
    return all(after == before + duration for before, after in itertools.pairwise(times))


def _data_records(annotations: edfio.EdfSignal) -> Iterator[bytes]:
    data, width = annotations.digital.tobytes(), 2 * annotations.samples_per_data_record
    return (data[start : start + width] for start in range(0, len(data), width))


def write(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes the file again, with other samples of the channels that changed."""
    edf = recording.keep["edf"].copy()
    for channel in changed:
        one = edf.signals[recording.keep["places"][channel]]
        low, high = one.digital_range
        gain = (one.physical_max - one.physical_min) / (high - low)
        values = np.rint((signal[:, channel] - one.physical_min) / gain + low)
        there = ~np.isnan(values)
        one.digital[there] = np.clip(values[there], min(low, high), max(low, high)).astype(np.int16)
    edf.write(path)


def convert(recording: Recording, signal: np.ndarray, changed: list[int], path: Path) -> None:
    """Writes an EDF in which each channel uses all digital values; refuses gaps."""
    if np.isnan(signal).any():
        raise UserError(f"{path}: EDF has no gaps, but {recording.path} does; name an output of another format")
    block, duration = _data_record(*signal.shape, recording.sampling_rate)
    described = zip(signal.T, recording.names, recording.units, strict=True)
    signals = [
        edfio.EdfSignal(values, block, label=_ascii(name)[:16], physical_dimension=_ascii(unit)[:8])
        for values, name, unit in described
    ]
    data = bytearray(edfio.Edf(signals, data_record_duration=1).to_bytes())
    data[244:252] = duration.ljust(8).encode()
    path.write_bytes(data)


def _data_record(length: int, channels: int, rate: float) -> tuple[int, str]:
    """Samples of a data record, of which the length is a multiple, and its duration in s as 8 characters tell it.

    The largest that takes no more than the 61,440 bytes that EDF recommends, if its duration can be told.
    """
    told = []
    for count in (count for count in range(1, length + 1) if length % count == 0):
        text = f"{count / rate:.6f}"[:8].rstrip("0").rstrip(".")
        wrong = abs(float(text) * rate / count - 1)
        told.append((wrong > 1e-7, 2 * count * channels > 61_440, wrong if wrong > 1e-7 else -count, count, text))
    return min(told)[3:]


def _ascii(text: str) -> str:
    return re.sub(r"[µμ]", "u", text).encode("ascii", "replace").decode()
