"""Heartbeats found in whole noisy recordings, before and after denoising: for the heart, not the signal.

A recording is cleaned in overlapping windows: one centred on every R peak that the detector finds in the noisy signal,
as the model was trained, and more between them. R peaks are detected on the first lead by wfdb's XQRS and compared with
the annotations by wfdb's comparator.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import signal
from wfdb import processing
from wfdb.io.annotation import is_qrs

from ralenet_jax import noise, readers, readers_annotations
from ralenet_jax.errors import UserError

TOLERANCE_S = 0.150  # a detected R peak this near to an annotated one is right (ANSI/AAMI EC57)
_LARGEST_HOP = 128  # samples between the centres of two windows
_BATCH = 256
_TINY = 1e-12


def read_recording(folder: str | Path, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Reads a WFDB recording: leads `[N, C]` in mV, samples of the annotated beats `[beats]`, sampling rate in Hz.

    Raises:
        UserError: if it is not there or not readable.
    """
    path = Path(folder) / name
    try:
        recording = readers.read(path.with_name(f"{path.name}.hea"))
        found = readers_annotations.read(path.with_name(f"{path.name}.atr"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"recording {path} is not readable ({error}); name a folder with .hea, .dat and .atr"
        ) from error
    beats = found.sample[np.isin(found.code, np.flatnonzero(is_qrs))]
    return recording.signal.astype(np.float32), beats, recording.sampling_rate


def add_noise(clean: np.ndarray, recordings: np.ndarray, kind: str, snr_db: float) -> tuple[np.ndarray, np.ndarray]:
    """A noisy recording with one noise scale for all of it: clean and noisy `[N, C]` in mV, both centred per lead.

    Args:
        clean: `[N, C]`, mV.
        recordings: the part of the noise that may be used, `[3, M, C]` in mV; laid end to end where it is shorter.
        kind: of noise, as in `noise.KINDS`.
        snr_db: mean(clean²) over mean(noise²), dB.
    """
    clean = clean - clean.mean(0)
    added = np.tensordot(np.array(noise.KINDS[kind], np.float32), recordings, 1)
    added = np.tile(added, (math.ceil(len(clean) / len(added)), 1))[: len(clean)]
    added = added - added.mean(0)
    wanted = np.mean(np.square(clean)) / 10 ** (snr_db / 10)
    return clean, clean + added * np.sqrt(wanted / max(np.mean(np.square(added)), _TINY))


def window_starts(peaks: np.ndarray, length: int, width: int) -> np.ndarray:
    """First samples of windows that cover a recording: one centred on each peak with room, others evenly between."""
    half = width // 2
    inside = peaks[(peaks > half) & (peaks < length - half)]
    anchors = [half, *np.unique(inside).tolist(), length - half]
    between = [np.linspace(a, b, math.ceil((b - a) / _LARGEST_HOP), endpoint=False) for a, b in pairwise(anchors)]
    return np.unique(np.concatenate([*between, anchors[-1:]]).astype(int)) - half


def clean_recording(
    denoise: Callable[[np.ndarray], np.ndarray], noisy: np.ndarray, peaks: np.ndarray, width: int
) -> np.ndarray:
    """Denoises a recording `[N, C]` window by window, cross-fading; the windows' mean levels are not restored.

    Args:
        denoise: windows `[256, width, C]`, normalised as under the honest protocol, → the same shape.
        noisy: `[N, C]`, mV, N at least `width`.
        peaks: samples of R peaks that are known or guessed.
        width: samples of a window.
    """
    starts = window_starts(peaks, len(noisy), width)
    fade = signal.windows.hann(width + 2)[1:-1, None]
    total, weight = np.zeros(noisy.shape), np.zeros((len(noisy), 1))
    for first in range(0, len(starts), _BATCH):
        chosen = starts[first : first + _BATCH]
        windows = noisy[np.resize(chosen, _BATCH)[:, None] + np.arange(width)]
        windows = windows - windows.mean(1, keepdims=True)
        scale = np.sqrt(np.maximum(np.mean(np.square(windows), (1, 2), keepdims=True), _TINY))
        cleaned = denoise((windows / scale).astype(np.float32)) * scale
        for start, window in zip(chosen, cleaned, strict=False):
            total[start : start + width] += window * fade
            weight[start : start + width] += fade
    return total / weight


def detect(lead: np.ndarray, rate: float) -> np.ndarray:
    """R peaks that XQRS finds in a lead `[N]`: samples."""
    return processing.xqrs_detect(lead, fs=rate, verbose=False)


def count_matches(beats: np.ndarray, detected: np.ndarray, rate: float) -> np.ndarray:
    """Beats that were found, annotated beats, detected beats: `[3]`, to be summed over recordings."""
    if not len(beats) or not len(detected):
        return np.array([0, len(beats), len(detected)])
    tolerance = round(TOLERANCE_S * rate)
    return np.array([processing.compare_annotations(beats, detected, tolerance).tp, len(beats), len(detected)])


def f1(matches: np.ndarray) -> float:
    """F1 of R-peak detection from `count_matches`."""
    return float(2 * matches[0] / max(matches[1] + matches[2], 1))


def evaluate_recordings(
    denoise: Callable[[np.ndarray], np.ndarray],
    folder: str | Path,
    names: Sequence[str],
    recordings: np.ndarray,
    conditions: Sequence[tuple[str, float]],
    width: int,
    log: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """R-peak F1 on the clean, the noisy and the denoised recordings, for each (kind, SNR in dB).

    Returns:
        {"bw@-4": {"clean": F1, "noisy": F1, "denoised": F1, "recordings": count}}.

    Raises:
        UserError: for a recording that is not readable.
    """
    totals = {condition: np.zeros((3, 3), int) for condition in conditions}
    for number, name in enumerate(names, 1):
        leads, beats, rate = read_recording(folder, name)
        in_clean = count_matches(beats, detect(leads[:, 0], rate), rate)
        for kind, snr_db in conditions:
            _, noisy = add_noise(leads, recordings, kind, snr_db)
            peaks = detect(noisy[:, 0], rate)
            denoised = clean_recording(denoise, noisy, peaks, width)
            found = [count_matches(beats, samples, rate) for samples in (peaks, detect(denoised[:, 0], rate))]
            totals[kind, snr_db] += np.stack([in_clean, *found])
        log(f"recording {name} ({number}/{len(names)}): R peaks compared")
    return {
        f"{kind}@{snr_db:g}": {
            **{part: f1(matches) for part, matches in zip(("clean", "noisy", "denoised"), total, strict=True)},
            "recordings": len(names),
        }
        for (kind, snr_db), total in totals.items()
    }
