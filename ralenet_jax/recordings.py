"""Whole recordings as training data: windows from anywhere in them, with the R peaks that are there."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from ralenet_jax.errors import UserError

WINDOW = 256  # samples, as in the beat windows
MOST_PEAKS = 4  # told of a window
_BESIDE = 16  # samples outside a window from where an R peak still has a part in it


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Recordings laid end to end, cut into cells of `WINDOW` samples; a window begins anywhere in its cell.

    Attributes:
        signal: float32 `[N, C]` in mV, each recording centred per lead.
        peaks: int64 `[beats]`, samples of the annotated R peaks in `signal`.
        start: int64 `[cells]`, first sample of each cell; the next `2·WINDOW − 1` samples are of the same recording.
        level: float32 `[cells]`, rms of the cell's recording over all leads, mV.
    """

    signal: np.ndarray
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
            "clean" float32 `[n, WINDOW, C]`, "id" int32 (its first sample), "level" `[n]`, and as many R peaks as are
            in reach, `MOST_PEAKS` at most: "r_peak" int32 and "r_mask" bool `[n, MOST_PEAKS]`.
        """
        start = self.start[index] if shift is None else self.start[index] + shift
        first = np.searchsorted(self.peaks, start - _BESIDE)
        place = first[:, None] + np.arange(MOST_PEAKS)
        there = place < len(self.peaks)
        r_peak = self.peaks[np.minimum(place, len(self.peaks) - 1)] - start[:, None]
        there &= r_peak < WINDOW + _BESIDE
        return {
            "clean": self.signal[start[:, None] + np.arange(WINDOW)],
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
    signals, peaks, starts, levels, offset = [], [], [], [], 0
    for example in builder.as_data_source(split) if split in builder.info.splits else ():
        if not chosen(example["record"].decode()):
            continue
        signal = (example["signal"] - example["baseline"].astype(np.float32)) / example["gain"].astype(np.float32)
        signal -= signal.mean(0)
        cells = np.arange(len(signal) // WINDOW - 1) * WINDOW
        signals.append(signal)
        peaks.append(example["beats"] + offset)
        starts.append(cells + offset)
        levels.append(np.full(len(cells), np.sqrt(np.mean(np.square(signal))), np.float32))
        offset += len(signal)
    if not any(map(len, starts)):
        raise UserError(f"{split} of {builder.info.full_name} has none of the recordings; prepare the whole database")
    return Recordings(*map(np.concatenate, (signals, peaks, starts, levels)))
