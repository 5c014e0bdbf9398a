"""The rivals that do not learn: thresholds on the wavelet coefficients and on the spectrum, in NumPy."""

import numpy as np
import pywt
import scipy.fft

from ralenet_jax.errors import UserError

_THRESHOLD = 0.04  # of the largest coefficient
_WAVELET = "db8"


def dwt(windows: np.ndarray) -> np.ndarray:
    """Denoises by soft thresholds on the detail bands of a wavelet transform (db8, symmetric extension), lead by lead.

    The transform goes as deep as the length allows. The threshold of a band is 0.04 times its largest coefficient in
    that window and lead, the largest by sign and not by magnitude; the approximation is kept.

    Args:
        windows: float32 or float64 `[B, L, C]`, in any unit.

    Returns:
        `[B, L, C]`, in the same unit and precision.

    Raises:
        UserError: for windows of another shape.
    """
    windows = _checked(windows)
    length = windows.shape[1]
    level = pywt.dwt_max_level(length, pywt.Wavelet(_WAVELET))
    approximation, *details = pywt.wavedec(windows, _WAVELET, "symmetric", level, axis=1)
    kept = []
    for band in details:
        threshold = _THRESHOLD * band.max(1, keepdims=True)
        kept.append(np.sign(band) * np.maximum(np.abs(band) - threshold, 0))
    # Of an odd length the transform gives back a sample more.
    return pywt.waverec([approximation, *kept], _WAVELET, "symmetric", axis=1)[:, :length]


def fft(windows: np.ndarray) -> np.ndarray:
    """Denoises by leaving out weak frequencies: those below 0.04 times the largest magnitude in the window's leads.

    Args:
        windows: float32 or float64 `[B, L, C]`, in any unit.

    Returns:
        `[B, L, C]`, in the same unit and precision.

    Raises:
        UserError: for windows of another shape.
    """
    windows = _checked(windows)
    spectrum = scipy.fft.rfft(windows, axis=1)
    magnitude = np.abs(spectrum)
    spectrum[magnitude < _THRESHOLD * magnitude.max((1, 2), keepdims=True)] = 0
    return scipy.fft.irfft(spectrum, windows.shape[1], axis=1)


FILTERS = {"dwt": dwt, "fft": fft}


def _checked(windows: np.ndarray) -> np.ndarray:
    windows = np.asarray(windows)
    if windows.ndim != 3 or 0 in windows.shape or not np.issubdtype(windows.dtype, np.floating):
        raise UserError(
            f"windows are {windows.dtype} {list(windows.shape)}; expected float [B, L, C], none of them empty"
        )
    return windows
