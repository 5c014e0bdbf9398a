"""A recording as `readers` gives it, what its name tells of its format, and which of its channels are ECG.

The modules of the formats have `read(path, rate)`, whose rate counts where the file has none; `write(recording, new,
path)`, which keeps what the recording's file held besides the channels that are new, {channel: samples `[L]`}; and
`convert(recording, signal, path)` for a recording that came in another format, with all its channels.

A recording holds its samples as the file does, often of 12 or 16 bits, and makes float64 of them block by block.
"""

import contextlib
import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ralenet_jax.errors import UserError

SUFFIXES = {
    **{".hea": "wfdb", ".dat": "wfdb", ".edf": "edf", ".bdf": "bdf", ".csv": "csv", ".tsv": "csv", ".txt": "csv"},
    **{".npy": "npy", ".npz": "npz", ".wav": "wav"},
}
_DIGITS, _EXPONENT = 20, 100  # bits: four less than float32 has; and powers of 2 that leave room for them
_BLOCK = 2**18  # values worked on at once
_SPARE = 2**28  # bytes of memory that reading may take beside four times the file
_LARGEST_DIRECTORY = 2**20  # bytes, of an archive
_VOLTS = {"", "v", "mv", "uv", "µv", "μv", "nv", "adu", "nu"}
_NO_LEAD = re.compile(
    r"resp|abp|\bart|\bbp\b|pleth|ppg|sp?o2|co2|cvp|\bpap|icp|emg|eog|eeg|flow|thora|abdom|temp|pulse|\bhr\b|accel|"
    r"annotation|marker|trigger|\bevent|status|sound|snore|body|position|^(fpz?|af|f|c|t|p|o)(z|\d)-[a-z]+(z|\d)$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording.

    Attributes:
        rows: slice of samples → float64 `[n, channels]` in physical units; NaN where there is a gap.
        length: samples, L.
        sampling_rate: Hz.
        names: of the channels.
        units: of the channels, "" where the format does not tell.
        leads: the channels that are ECG, as far as name and unit tell; may be none.
        path: of the file, for WFDB of the header.
        format: "wfdb", "edf", "bdf", "csv", "npy", "npz" or "wav".
        keep: what `write` of the format's module needs besides.
        dtype: float32 where it tells every digit of the file from the next, to take half of the memory.
    """

    rows: Callable[[slice], np.ndarray]
    length: int
    sampling_rate: float
    names: tuple[str, ...]
    units: tuple[str, ...]
    leads: tuple[int, ...]
    path: Path
    format: str
    keep: Any
    dtype: type[np.floating] = np.float64

    @property
    def signal(self) -> np.ndarray:
        """`[L, channels]`, in physical units, float64; NaN where there is a gap. Made anew each time."""
        return self.channels(range(len(self.names)))

    def channels(self, chosen: Sequence[int], dtype: type[np.floating] = np.float64) -> np.ndarray:
        """Some channels of `signal`, `[L, chosen]`."""
        signal = np.empty((self.length, len(chosen)), dtype)
        with np.errstate(all="ignore"):
            for part in blocks(self.length, len(self.names)):
                signal[part] = self.rows(part)[:, chosen]
        return signal


def blocks(length: int, width: int) -> Iterator[slice]:
    """The parts, of even lengths but for the last, in which an array `[length, width]` is worked on."""
    step = max(_BLOCK // max(width, 1) // 2, 1) * 2
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def dtype_of_digits(largest: float, gains: Iterable[float]) -> type[np.floating]:
    """`Recording.dtype` of samples that are integers of this size at most, times or over a gain."""
    near = all(2.0**-_EXPONENT < abs(gain) < 2.0**_EXPONENT for gain in gains)
    return np.float32 if largest < 2**_DIGITS and near else np.float64


def find_leads(names: Sequence[str], units: Sequence[str]) -> tuple[int, ...]:
    """The channels that are ECG, as far as name and unit tell; may be none."""
    pairs = enumerate(zip(names, units, strict=True))
    return tuple(index for index, (name, unit) in pairs if unit.lower() in _VOLTS and not _NO_LEAD.search(name))


def check_memory(path: Path, needed: float, size: int) -> None:
    """Refuses a recording for which so many bytes of memory would be needed, of files of so many bytes."""
    if needed > 4 * size + _SPARE:
        raise UserError(
            f"{path} would take {needed / 1e6:,.0f} MB of memory; expected four times its {size / 1e6:,.1f} MB and "
            f"{_SPARE / 1e6:,.0f} at most; check it, or store it unpacked: as NPY, or WFDB of format 16"
        )


class _Careful(io.BufferedReader):
    """A file that is read in small parts."""

    def read(self, size=-1, /):
        if size is not None and size > _LARGEST_DIRECTORY:
            raise ValueError(f"an archive with a directory of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive to read; raises `ValueError` for a directory that would take ten times its size in memory."""
    with _Careful(io.FileIO(path)) as file, zipfile.ZipFile(file) as members:
        yield members
