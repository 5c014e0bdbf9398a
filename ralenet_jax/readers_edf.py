"""Recordings in EDF and EDF+, without interruptions."""

import collections
import re
from pathlib import Path

import edfio
import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import Recording, find_leads


def read(path: Path, rate: float | None) -> Recording:
    """Reads the signals that share the rate of the ECG leads."""
    edf = edfio.read_edf(path, lazy_load_data=False, header_encoding="latin-1")
    if not edf.is_continuous:
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
