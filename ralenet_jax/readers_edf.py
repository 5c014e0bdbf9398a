"""Recordings in EDF and EDF+, and in BDF and BDF+, which have 24 bits; without interruptions.

Other formats are turned into these by edfio. To read a BDF file it takes ten times its size, so that is done here.
"""

import collections
import dataclasses
import decimal
import itertools
import re
from pathlib import Path

import edfio
import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import SUFFIXES, Recording, blocks, dtype_of_digits, find_leads

_WIDTHS = {"edf": 2, "bdf": 3}  # bytes of a sample
_FIELDS = {  # of the signals' header: characters for each signal
    **{"label": 16, "transducer": 80, "unit": 8, "physical_min": 8, "physical_max": 8, "digital_min": 8},
    **{"digital_max": 8, "filters": 80, "count": 8, "reserved": 32},
}


@dataclasses.dataclass(frozen=True)
class _Signal:
    """A signal: what the header tells of it, as text, and its samples, uint8 `[data records, samples, bytes]`."""

    header: dict[str, str]
    samples: np.ndarray

    def scale(self) -> tuple[int, int, float, float]:
        """Least and greatest digital value; gain and offset: a physical value is (digital + offset) · gain."""
        low, high = int(self.header["digital_min"]), int(self.header["digital_max"])
        least, most = float(self.header["physical_min"]), float(self.header["physical_max"])
        gain = (most - least) / (high - low)
        return low, high, gain, most / gain - high

    def places(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Data record, and place in it, of a part of the samples."""
        return np.divmod(np.arange(part.start, part.stop), self.samples.shape[1])

    def digital(self, part: slice) -> np.ndarray:
        """Digital values of a part of the samples, int32 `[n]`."""
        width = self.samples.shape[2]
        wide = np.zeros((part.stop - part.start, 4), np.uint8)
        wide[:, 4 - width :] = self.samples[self.places(part)]
        return wide.view("<i4")[:, 0] >> 8 * (4 - width)


def _open(data: np.ndarray, width: int) -> tuple[str, list[_Signal]]:
    """The duration of a data record in s, and the signals, of a file's bytes with so many of them for a sample.

    Refuses a header that tells of more or less than there is.
    """
    head = data[:256].tobytes().decode("latin-1")
    channels = int(head[252:256])
    begin, place = 256 * (channels + 1), 256
    text, headers = data[:begin].tobytes().decode("latin-1"), [{} for _ in range(channels)]
    for name, size in _FIELDS.items():
        for header in headers:
            header[name] = text[place : place + size].rstrip()
            place += size
    counts = [int(header["count"]) for header in headers]
    told = width * sum(counts) * int(head[236:244])
    if min(counts, default=0) < 1 or int(head[184:192]) != begin or told < 1 or begin + told != len(data):
        raise ValueError(f"its header does not fit {len(data)} bytes")
    records = data[begin:].reshape(-1, width * sum(counts))
    stops = itertools.accumulate(width * count for count in counts)
    found = (records[:, stop - width * count : stop] for stop, count in zip(stops, counts, strict=True))
    samples = [one.reshape(len(records), -1, width) for one in found]  # views
    return head[244:252], [_Signal(*pair) for pair in zip(headers, samples, strict=True)]


def read(path: Path, rate: float | None) -> Recording:
    """Reads the signals that share the rate of the ECG leads."""
    kind = SUFFIXES[path.suffix.lower()]
    data = np.fromfile(path, np.uint8)
    duration, signals = _open(data, _WIDTHS[kind])
    is_notes = [signal.header["label"] == f"{kind.upper()} Annotations" for signal in signals]
    if any(is_notes) and not _is_continuous(signals[is_notes.index(True)].samples, decimal.Decimal(duration.strip())):
        told = f"{kind.upper()}+D file with interruptions"
        raise UserError(f"{path}: {told}; export it as {kind.upper()}+C, or its parts one by one")
    rates = {
        index: signal.samples.shape[1] / float(duration) for index, signal in enumerate(signals) if not is_notes[index]
    }
    labels, units = ([signals[index].header[name] for index in rates] for name in ("label", "unit"))
    leads = find_leads(labels, units)
    counts = collections.Counter(rate for place, rate in enumerate(rates.values()) if place in leads or not leads)
    if not counts:
        raise UserError(f"{path} holds 0 channels; expected 1 or more")
    chosen = max(counts, key=lambda rate: (counts[rate], rate))
    places = [index for index in rates if rates[index] == chosen]
    kept = [signals[place] for place in places]
    names, units = (tuple(signal.header[name] for signal in kept) for name in ("label", "unit"))
    scales = [signal.scale()[2:] for signal in kept]

    def rows(part: slice) -> np.ndarray:
        scaled = zip(kept, scales, strict=True)
        return np.stack([(signal.digital(part) + offset) * gain for signal, (gain, offset) in scaled], 1)

    if abs(chosen - round(chosen)) < 1e-6 * chosen:  # the header has 8 characters for the duration of a data record
        chosen = round(chosen)
    length, leads = kept[0].samples.shape[0] * kept[0].samples.shape[1], find_leads(names, units)
    gains, offsets = zip(*scales, strict=True)
    dtype = dtype_of_digits(2 ** (8 * _WIDTHS[kind] - 1) + max(map(abs, offsets)), gains)
    return Recording(rows, length, float(chosen), names, units, leads, path, kind, (data, places), dtype)


def _is_continuous(notes: np.ndarray, duration: decimal.Decimal) -> bool:
    """Whether each data record begins where the one before ends, as the first annotation of each tells."""
    times = (_onset(record.tobytes()) for record in notes)
    return all(after == before + duration for before, after in itertools.pairwise(times))


def _onset(notes: bytes) -> decimal.Decimal:
    found = re.match(rb"[+-]\d+(\.\d*)?(?=\x14)", notes)
    if found is None:
        raise ValueError("a data record without its time")
    return decimal.Decimal(found[0].decode())


def write(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes the file again, with other samples of the channels that are new."""
    data, places = recording.keep
    data = data.copy()
    _, signals = _open(data, _WIDTHS[recording.format])
    for channel, values in new.items():
        signal = signals[places[channel]]
        low, high, gain, offset = signal.scale()
        for part in blocks(recording.length, 1):
            found = np.clip(np.rint(values[part].astype(np.float64) / gain - offset), min(low, high), max(low, high))
            digital = np.where(np.isnan(found), signal.digital(part), found).astype("<i4")
            signal.samples[signal.places(part)] = digital.view(np.uint8).reshape(-1, 4)[:, : signal.samples.shape[2]]
    data.tofile(path)


def convert(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes a file in which each channel uses all digital values; refuses gaps."""
    if np.isnan(signal).any():
        raise UserError(
            f"{path}: EDF and BDF have no gaps, but {recording.path} does; name an output of another format"
        )
    is_bdf = path.suffix.lower() == ".bdf"
    make, make_signal = (edfio.Bdf, edfio.BdfSignal) if is_bdf else (edfio.Edf, edfio.EdfSignal)
    block, duration = _data_record(*signal.shape, recording.sampling_rate)
    described = zip(signal.T, recording.names, recording.units, strict=True)
    signals = [
        make_signal(values, block, label=_ascii(name)[:16], physical_dimension=_ascii(unit)[:8])
        for values, name, unit in described
    ]
    data = bytearray(make(signals, data_record_duration=1).to_bytes())
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
