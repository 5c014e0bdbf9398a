"""Lobachevsky University Database: 12-lead windows around annotated R peaks, at the sampling rate of mitdb."""

from collections.abc import Iterator

import numpy as np
import scipy.signal
import tensorflow_datasets as tfds

from data_prep import physionet, shards, windows

UP, DOWN = 18, 25  # 500 Hz → 360 Hz
QUANTUM_MV = 2.0**-17  # 8 nV, less than a tenth of the finest ADC step in the database (94 nV)


def resample(signal: np.ndarray) -> np.ndarray:
    """Resamples 500 Hz → 360 Hz with SciPy's polyphase filter (Kaiser window, zero phase).

    Beyond the ends the signal goes on along the straight line through its first and last sample (`padtype="line"`): an
    offset or a drift comes through to the very ends, to within 2e-4 of itself, where zeros beyond them would turn the
    offset into a step that rings. Output sample k is at k / 360 s; 5,000 samples become 3,600.

    Values are rounded to 2^-17 mV, so that the last bits, which differ between builds of SciPy, do not change the
    digest; float32 holds the result exactly up to 128 mV.

    Args:
        signal: mV, float64 [L, C] at 500 Hz.

    Returns:
        mV, float32 [ceil(L·18/25), C] at 360 Hz.
    """
    resampled = scipy.signal.resample_poly(signal, UP, DOWN, axis=0, padtype="line")
    return (np.rint(resampled / QUANTUM_MV) * QUANTUM_MV).astype(np.float32)


def resample_peaks(peaks: np.ndarray) -> np.ndarray:
    """Moves peaks from 500 Hz to the nearest sample at 360 Hz: int [N] → int [N] (25ths of a sample are never ties)."""
    return (peaks * UP + DOWN // 2) // DOWN


class Ludb(shards.Builder):
    """Writes splits `train` and `test` (records whose number 5 divides), so no person is in both.

    `signal` float32 [256, 12], mV at 360 Hz, has the R peak at sample 128; `sample` is its place in the resampled
    record. Peaks are the symbols N of lead ii's annotation. A window that would leave the record's 3,600 samples is
    dropped, not padded; one that reaches an end has the edge treatment of `resample` in its outermost samples.
    """

    DATABASE = physionet.DATABASES["ludb"]
    VERSION = tfds.core.Version(DATABASE.version)
    DESCRIPTION = "Windows of 256 samples (12 leads, mV, resampled to 360 Hz) with an annotated R peak at sample 128."
    CITATION = (
        "Kalyakulina A et al. LUDB: a new open-access validation tool for electrocardiogram delineation algorithms. "
        "IEEE Access 8:186181-186190 (2020)."
    )
    FEATURES = {
        "signal": tfds.features.Tensor(shape=(windows.WIDTH, 12), dtype=np.float32, encoding="bytes"),
        "record": tfds.features.Text(),
        "sample": tfds.features.Scalar(np.int32),
        "leads": tfds.features.Tensor(shape=(12,), dtype=np.str_),
    }

    def split_records(self) -> dict[str, list[str]]:
        """Assigns records by number."""
        splits = {"train": [], "test": []}
        for record in self.copy.records:
            number = _number(record)
            if not number.isdecimal():
                raise physionet.PrepareError(
                    f"{self.DATABASE} in {self.copy.folder} has a record {record!r}, expected numbers such as "
                    "'data/1', which set its split; use PhysioNet's records"
                )
            splits["test" if int(number) % 5 == 0 else "train"].append(record)
        return splits

    def read_examples(self, record: str) -> Iterator[dict]:
        """Reads the windows of one record, one per R peak that has room."""
        header = physionet.read_record(self.copy, record, physical=True)
        annotation = physionet.read_annotation(self.copy, record)
        if not np.isfinite(header.p_signal).all():  # the filter would spread a gap over its neighbours
            raise physionet.PrepareError(f"record {record} in {self.copy.folder} has gaps; use PhysioNet's copy")
        signal = resample(header.p_signal)
        peaks = resample_peaks(annotation.sample[np.array(annotation.symbol, dtype=str) == "N"])
        peaks = peaks[windows.has_room(peaks, len(signal))]
        for window, peak in zip(windows.cut(signal, peaks), peaks, strict=True):
            yield {
                "signal": window,
                "record": _number(record),
                "sample": int(peak),
                "leads": header.sig_name,
            }


def _number(record: str) -> str:
    return record.rpartition("/")[2]
