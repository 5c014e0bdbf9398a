"""Whole recordings as training data: windows from anywhere in them, with the R peaks that are there."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from ralenet_jax import augment
from ralenet_jax.errors import UserError

MITDB_RATE = 360.0  # Hz, and nstdb's

WINDOW = augment.WINDOW
MOST_PEAKS = 4  # told of a window
_BESIDE = 16  # samples outside a window from where an R peak still has a part in it
_DRIFT_HZ = 0.4  # what is slower is a recording's own drift


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Recordings laid end to end, cut into cells of `WINDOW` samples; a window begins anywhere in its cell.

    Attributes:
        signal: float32 `[N, C]` in mV, each recording centred per lead, 180 samples in a second.
        drift: float32 `[N, C]`, what of it is slower than 0.4 Hz (second-order Butterworth, forwards and back).
        peaks: int64 `[beats]`, samples of the annotated R peaks in `signal`.
        start: int64 `[cells]`, first sample of each cell; the next `2·WINDOW − 1` samples are of the same recording.
        level: float32 `[cells]`, rms of the cell's recording over all leads, mV.
    """

    signal: np.ndarray
    drift: np.ndarray
    peaks: np.ndarray
    start: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and leads of a window."""
        return WINDOW, self.signal.shape[1]

    def batch(self, index: np.ndarray, shift: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Windows of these cells `[n]`, begun `shift` (0 to `WINDOW` − 1) samples after the cell, by default none.

        Returns:
            "clean" and "drift" float32 `[n, WINDOW, C]`, "id" int32 (its first sample), "level" `[n]`, and as many R
            peaks as are in reach, `MOST_PEAKS` at most: "r_peak" int32 and "r_mask" bool `[n, MOST_PEAKS]`.
        """
        start = self.start[index] if shift is None else self.start[index] + shift
        first = np.searchsorted(self.peaks, start - _BESIDE)
        place = first[:, None] + np.arange(MOST_PEAKS)
        there = place < len(self.peaks)
        r_peak = self.peaks[np.minimum(place, len(self.peaks) - 1)] - start[:, None]
        there &= r_peak < WINDOW + _BESIDE
        inside = start[:, None] + np.arange(WINDOW)
        return {
            "clean": self.signal[inside],
            "drift": self.drift[inside],
            "id": start.astype(np.int32),
            "level": self.level[index],
            "r_peak": np.where(there, r_peak, 0).astype(np.int32),
            "r_mask": there,
        }


def read(builder: tfds.core.DatasetBuilder, split: str, chosen: Callable[[str], bool]) -> Recordings:
    """Reads the recordings of a split whose names are chosen.

    Raises:
        UserError: if there are none, or none long enough.
    """
    from scipy.signal import butter, sosfiltfilt  # half of what a start imports

    lowpass = butter(2, _DRIFT_HZ, fs=augment.RATE, output="sos")
    signals, drifts, peaks, starts, levels, offset = [], [], [], [], [], 0
    for example in builder.as_data_source(split) if split in builder.info.splits else ():
        if not chosen(example["record"].decode()):
            continue
        signal = (example["signal"] - example["baseline"].astype(np.float32)) / example["gain"].astype(np.float32)
        signal = resample(signal - signal.mean(0))
        cells = np.arange(len(signal) // WINDOW - 1) * WINDOW
        signals.append(signal)
        drifts.append(sosfiltfilt(lowpass, signal, axis=0).astype(np.float32))
        peaks.append(np.rint(example["beats"] * (augment.RATE / MITDB_RATE)).astype(np.int64) + offset)
        starts.append(cells + offset)
        levels.append(np.full(len(cells), np.sqrt(np.mean(np.square(signal))), np.float32))
        offset += len(signal)
    if not any(map(len, starts)):
        raise UserError(f"{split} of {builder.info.full_name} has none of the recordings; prepare the whole database")
    return Recordings(*map(np.concatenate, (signals, drifts, peaks, starts, levels)))


def resample(signal: np.ndarray) -> np.ndarray:
    """A recording of mitdb or nstdb `[N, C]`, 360 Hz, at the windows' rate, as a denoiser resamples it: `[N/2, C]`."""
    from ralenet_jax import streaming  # which imports SciPy's too

    grid, length = streaming.build_grid(MITDB_RATE, WINDOW), len(signal)
    stop = math.ceil(length * grid.up / grid.down)
    first, last = grid.span(0, stop)
    return grid.to_model(signal[streaming.reflected(np.arange(first, last), length)], first, 0, stop)
