"""Records → windows around R peaks, in NumPy alone."""

import numpy as np

WIDTH = 256  # samples of a window; at 360 Hz about 0.71 s
HALF = WIDTH // 2  # the R peak stands at this sample of its window

# What wfdb's `is_qrs` calls a beat, among them the unclassifiable (Q), the unclassified (?) and the flutter wave (!).
BEAT_SYMBOLS = frozenset("NLRBaAJSVrFejnE/fQ?!")


def is_beat(symbols) -> np.ndarray:
    """Tells beats from the other annotations (rhythm changes, noise, waves): str [N] → bool [N]."""
    return np.array([symbol in BEAT_SYMBOLS for symbol in symbols], dtype=bool)


def has_room(peaks: np.ndarray, length: int) -> np.ndarray:
    """Tells the peaks whose window [peak - 128, peak + 128) lies inside a record of `length` samples.

    Args:
        peaks: int [N], samples.
        length: of the record, samples.

    Returns:
        bool [N].
    """
    return (peaks >= HALF) & (peaks <= length - HALF)


def cut(signal: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Cuts one window per peak, [peak - 128, peak + 128).

    Args:
        signal: [L, C], a whole record.
        peaks: int [N], samples, each with room (`has_room`).

    Returns:
        [N, 256, C] of the signal's dtype.

    Raises:
        ValueError: a peak has no room; negative indices would wrap to the record's other end in silence.
    """
    if not has_room(peaks, len(signal)).all():
        raise ValueError(f"windows of {WIDTH} samples need peaks in [{HALF}, {len(signal) - HALF}], got {peaks}")
    return signal[peaks[:, None] + np.arange(-HALF, HALF)]
