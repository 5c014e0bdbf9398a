"""Denoising window by window: what whole recordings and streams share, and the stream.

The model works on windows of its own samples, 180 in a second, of which sample 0 is the signal's first. Of each window
its last samples are used, as many as keep a stream's latency below a second; the others let the model see what came
before. What is used of window w begins at sample w·hop − fade; it is faded into the next window's, and the weights of
all sum to 1.
Only what the model removes is brought back to the signal's rate and subtracted, so a signal from which nothing is
removed comes out as it went in. Above 90 Hz, which the model does not see, a heartbeat has next to nothing: what is
there goes to the part that is removed of the noise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from scipy import ndimage, signal

from ralenet_jax import augment
from ralenet_jax.errors import UserError

RATE = augment.RATE  # Hz, of the model's samples
MOST_PEAKS = 4  # told of a window, as in training
_BESIDE = 16  # model samples outside a window from where an R peak still has a part in it
_LATENCY_S = 0.99  # what is used of a window, and the filter twice
_CROSSINGS, _LONGEST_S = 10, 0.11  # half the anti-alias filter: zero crossings, and seconds at most
_SLOWEST, _FASTEST = 50, 5000  # Hz
_FLAT_S = 0.2  # an unchanging stretch this long is no signal
# At the extreme value, and smallest steps to it from beside, for the top to be cut off.
_RAIL_SAMPLES, _RAIL_STEPS = 3, 4
_HISTORY_S = 8  # what a stream remembers to find R peaks and its level

# The detector: a band where QRS complexes are and T waves are not, its energy over the width of a complex, and how much
# of the height usual around it makes a peak.
_BAND = signal.firwin(37, (8, 20), pass_zero=False, fs=RATE).astype(np.float32)
_COMPLEX, _APART, _BESIDE_TOP = 21, 36, 8  # samples: width, least distance, from the energy's top to the R peak
STRIDE, _AROUND = 18, 61  # samples between looks at the height, looks of which the middle one is usual
_SHARE = 0.45
_NEAR_S = 0.03
REACH = 720  # samples beyond those asked about that can change whether there is a peak


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the model's samples lie among a signal's: model sample j at signal sample j·down/up; and the windows.

    Attributes:
        rate: of the signal, Hz.
        up, down: the model's rate over the signal's, within a part in a hundred thousand.
        window: samples of a window.
    """

    rate: float
    up: int
    down: int
    window: int

    @property
    def used(self) -> int:
        """How many of the last model samples of a window are used."""
        return min(self.window, int((_LATENCY_S - 2 * self.half / self.up / self.rate) * RATE))

    @property
    def fade(self) -> int:
        """Model samples that two windows share, of those used."""
        return self.used // 5

    @property
    def hop(self) -> int:
        """Model samples between the starts of two windows."""
        return self.used - self.fade

    @functools.cached_property
    def taps(self) -> np.ndarray:
        """The linear-phase low-pass filter between the two rates, at `rate·up`, with a gain of 1."""
        if self.up == self.down:
            return np.ones(1, np.float32)
        widest = max(self.up, self.down)
        half = min(_CROSSINGS * widest, int(_LONGEST_S * self.rate * self.up))
        return signal.firwin(2 * half + 1, 1 / widest, window=("kaiser", 5.0)).astype(np.float32)

    @property
    def half(self) -> int:
        """Half the filter, in samples at `rate·up`."""
        return len(self.taps) // 2

    @functools.cached_property
    def treble(self) -> np.ndarray:
        """The filter, at the signal's rate, for what is lost on the way to the model's rate and back."""
        half = self.half // self.up if self.up < self.down else 0
        if not half:
            return np.zeros(1)
        low = signal.firwin(2 * half + 1, RATE / self.rate, window=("kaiser", 5.0))
        both_ways = np.convolve(low, low)
        return signal.unit_impulse(len(both_ways), "mid") - both_ways

    def start(self, number: int | np.ndarray) -> int | np.ndarray:
        """First model sample of a window."""
        return number * self.hop - self.fade - (self.window - self.used)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The signal's samples that model samples start to stop are made of; they may lie outside the signal."""
        return -((self.half - start * self.down) // self.up), ((stop - 1) * self.down + self.half) // self.up + 1

    def known(self, number: int) -> int:
        """How many of the signal's samples have come when a window is whole."""
        return self.span(0, self.start(number) + self.window)[1]

    def final(self, windows: int) -> int:
        """How many of the signal's samples are final after so many windows."""
        begun = windows * self.hop - self.fade  # from there on another window has a part
        return max((begun * self.down - self.half - 1) // self.up + 1, 0)

    def windows(self, length: int) -> int:
        """How many windows make so many of the signal's samples final."""
        return -(-(((length - 1) * self.up + self.half) // self.down + 1 + self.fade) // self.hop)

    def to_model(self, values: np.ndarray, first: int, start: int, stop: int) -> np.ndarray:
        """Model samples start to stop of a signal `[n, C]` whose sample `first` is the first of the values."""
        return _resample(values, first, start, stop, self.up, self.down, self.taps)

    def to_signal(self, values: np.ndarray, first: int, start: int, stop: int) -> np.ndarray:
        """The signal's samples start to stop from model samples `[n, C]`, the first of which is sample `first`."""
        begin = max(-((self.half - start * self.up) // self.down), first)
        end = ((stop - 1) * self.up + self.half) // self.down + 1
        chosen = values[begin - first : end - first]
        return _resample(chosen, begin, start, stop, self.down, self.up, self.taps)


def highs(values: Callable, start: int, stop: int, grid: Grid, length: int) -> np.ndarray | float:
    """What is above the model's rate in a signal's samples start to stop, `[n, C]`.

    Args:
        values: (first, end) → the signal's samples between them `[n, C]`, without gaps.
        start, stop: samples.
        grid: of the signal.
        length: of the signal.
    """
    half = len(grid.treble) // 2
    if not half or start >= stop:
        return 0.0
    index = reflected(np.arange(start - half, stop + half), length, grid.known(0))
    first = index.min()
    return signal.oaconvolve(values(first, index.max() + 1)[index - first], grid.treble[:, None], "valid", axes=0)


def build_grid(sampling_rate: float, window: int) -> Grid:
    """The grid of a signal; raises `UserError` for a sampling rate that is none or not from 50 to 5000 Hz."""
    try:
        rate = float(sampling_rate)
    except (TypeError, ValueError):
        rate = math.nan
    if not _SLOWEST <= rate <= _FASTEST:
        raise UserError(f"the sampling rate is {sampling_rate!r}; expected {_SLOWEST} to {_FASTEST} Hz")
    ratio = Fraction(RATE / rate).limit_denominator(1000)
    return Grid(rate, ratio.numerator, ratio.denominator, window)


def _resample(values, first, start, stop, up, down, taps) -> np.ndarray:
    """Samples start to stop at up/down times the rate. Every one is the same whatever others are asked for."""
    if up == down:
        return values[start - first : stop - first]
    # The filter is moved to where its taps meet the samples asked for.
    offset = first * up - len(taps) // 2
    moved = np.concatenate([np.zeros(offset % down, np.float32), taps * np.float32(up)])
    begin = start - offset // down
    return signal.upfirdn(moved, values, up, down, axis=0)[begin:][: stop - start]


def reflected(index: np.ndarray, length: int, first: int | None = None) -> np.ndarray:
    """Samples of a signal of this length that stand for samples outside it: it is mirrored at both ends.

    At the beginning no more of it than its `first` samples, which a stream knows then.
    """
    period = np.where(index < 0, max(2 * (min(first or length, length) - 1), 1), max(2 * (length - 1), 1))
    index = index % period
    return np.minimum(index, period - index) if length > 1 else index


class Removed:
    """What the model removes, laid together from what is used of windows, and brought to the signal's rate.

    With it goes how much of what the model does not see is to be removed, in as many channels more.
    """

    def __init__(self, grid: Grid, leads: int):
        rise = np.sin(np.pi / 2 * (np.arange(grid.fade) + 0.5) / grid.fade).astype(np.float32)[:, None] ** 2
        self._grid, self._rise = grid, rise
        self._first = -grid.fade
        self._values = np.zeros((0, 2 * leads), np.float32)
        self._tail = np.zeros((grid.fade, 2 * leads), np.float32)

    def add(self, windows: np.ndarray) -> None:
        """Takes what is used of the next windows, and the parts, `[W, used, 2·C]`."""
        grid, rise = self._grid, self._rise
        bodies, tails = windows[:, : grid.hop].copy(), windows[:, grid.hop :] * rise[::-1]
        bodies[:, : grid.fade] *= rise  # the first window's lies before the signal
        bodies[:, : grid.fade] += np.concatenate([self._tail[None], tails[:-1]])
        self._tail = tails[-1]
        self._values = np.concatenate([self._values, bodies.reshape(-1, windows.shape[2])])

    def take(self, start: int, stop: int, treble: np.ndarray | float) -> np.ndarray:
        """The signal's samples start to stop, `[n, C]`; those before stop cannot be asked for again.

        `treble` is what the model does not see of them, `[n, C]`.
        """
        leads = self._values.shape[1] // 2
        if start >= stop:
            return np.zeros((0, leads), np.float32)
        taken = self._grid.to_signal(self._values, self._first, start, stop)
        old = max((stop * self._grid.up - self._grid.half) // self._grid.down - self._first, 0)
        self._values, self._first = self._values[old:], self._first + old
        return taken[:, :leads] + taken[:, leads:] * treble


def detect_peaks(leads: np.ndarray) -> np.ndarray:
    """R peaks in model samples `[N, C]` of any unit: int64 samples.

    After Pan and Tompkins (DOI 10.1109/TBME.1985.325532), with all leads' energy summed, thresholds from the seconds
    before and after, and no state: what is more than `REACH` samples away makes no difference, if blocks begin at
    multiples of `STRIDE`.
    """
    power = np.square(ndimage.convolve1d(np.asarray(leads, np.float32), _BAND, axis=0)).sum(1)
    height = np.sqrt(np.maximum(ndimage.uniform_filter1d(power, _COMPLEX), 0))
    usual = ndimage.median_filter(ndimage.maximum_filter1d(height, int(RATE))[::STRIDE], _AROUND, mode="nearest")
    top = np.flatnonzero(height == ndimage.maximum_filter1d(height, 2 * _APART + 1))
    top = top[height[top] > _SHARE * usual[top // STRIDE]]
    near = np.clip(top[:, None] + np.arange(-_BESIDE_TOP, _BESIDE_TOP + 1), 0, len(power) - 1)
    return np.unique(near[np.arange(len(top)), power[near].argmax(1)])


def peaks_of_windows(peaks: np.ndarray, start: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """R peaks, told as in training: those in each window or a little beside it.

    Args:
        peaks: model samples, ascending.
        start: `[W]`, first model sample of each window.
        window: samples of a window.

    Returns:
        int32 `[W, MOST_PEAKS]`, samples in the window, and bool of the same shape: which of them count.
    """
    padded = np.append(peaks, np.full(MOST_PEAKS, np.iinfo(np.int64).max))
    r_peak = padded[np.searchsorted(peaks, start - _BESIDE)[:, None] + np.arange(MOST_PEAKS)]
    there = r_peak < start[:, None] + window + _BESIDE
    return np.where(there, r_peak - start[:, None], 0).astype(np.int32), there


def around_peaks(r_peak: np.ndarray, r_mask: np.ndarray, length: int) -> np.ndarray:
    """How near an R peak each sample of windows is: 1 up to 30 ms from it, falling to 0 at 60 ms.

    Args:
        r_peak, r_mask: as `peaks_of_windows` gives them.
        length: samples of a window.

    Returns:
        float32 `[W, length, 1]`.
    """
    away = np.arange(int(2 * _NEAR_S * RATE) + 2) / RATE
    near = (1 + np.cos(np.pi * np.clip(away / _NEAR_S - 1, 0, 1))) / 2
    there = np.where(r_mask, r_peak, -length - len(near)).astype(np.int32)
    samples = np.abs(np.arange(length, dtype=np.int32) - there[:, :, None]).min(1)
    return near.astype(np.float32)[np.minimum(samples, len(near) - 1)][:, :, None]


@dataclasses.dataclass
class Extremes:
    """Least and greatest value of each lead `[C]`, and the smallest step between two samples."""

    low: np.ndarray
    high: np.ndarray
    step: np.ndarray

    @classmethod
    def none(cls, leads: int) -> "Extremes":
        """Those of no samples."""
        return cls(*np.full((3, leads), np.inf) * np.array([[1.0], [-1.0], [1.0]]))

    def widen(self, rows: np.ndarray) -> None:
        """Takes samples `[n, C]` in account, NaN where they are missing."""
        columns = np.ascontiguousarray(rows.T)  # reductions over rows take ten times as long
        steps = np.abs(np.diff(columns))
        self.low = np.fmin(self.low, np.fmin.reduce(columns, 1, initial=np.inf))
        self.high = np.fmax(self.high, np.fmax.reduce(columns, 1, initial=-np.inf))
        self.step = np.fmin(self.step, np.fmin.reduce(np.where(steps > 0, steps, np.inf), 1, initial=np.inf))


def flat_samples(rate: float) -> int:
    """Samples of an unchanging stretch that is no signal."""
    return max(round(_FLAT_S * rate), _RAIL_SAMPLES)


def no_signal(rows: np.ndarray, extremes: Extremes, rate: float) -> np.ndarray:
    """Where leads `[n, C]` (NaN where missing) are flat or saturated: bool `[n, C]`.

    Flat is the same value for 0.2 s or longer. Saturated is the extreme value of the lead in 3 samples or more, come to
    or left by more than 4 of the lead's smallest steps: a wave's rounded top in coarse steps is no saturation.
    """
    mask = np.zeros(rows.shape, bool)
    for lead, values in enumerate(rows.T):
        same = values[1:] == values[:-1]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        start, stop = edges[::2], edges[1::2] + 1
        beside = values[np.maximum(start - 1, 0)], values[np.minimum(stop, len(values) - 1)]
        steep = np.fmax(*(np.abs(values[start] - other) for other in beside)) > _RAIL_STEPS * extremes.step[lead]
        extreme = (values[start] == extremes.low[lead]) | (values[start] == extremes.high[lead])
        chosen = (stop - start >= flat_samples(rate)) | (extreme & steep & (stop - start >= _RAIL_SAMPLES))
        for first, last in zip(start[chosen], stop[chosen], strict=True):
            mask[first:last, lead] = True
    return mask


class Stream:
    """Denoises a signal as it comes; `push` gives back what is final, `flush` the rest: as many samples as went in.

    It works on the windows that `Denoiser` works on, with what is known when a window is whole: R peaks from the
    seconds before its end, the level as their median, a gap still open held at its last value. How the signal is cut
    into chunks makes no difference.

    Args:
        remove: windows `[W, window, C]`, R peaks and mask `[W, MOST_PEAKS]` → what `Removed` takes.
        grid: of the signal.
        leads: C.
        level: float64 `[C]`, about which the leads lie; None to follow the median.
        r_peaks: model samples of all R peaks, ascending; None to detect them.

    Attributes:
        latency: seconds that a sample waits at most until it is final, just below 1 with windows of 256 samples.
    """

    def __init__(
        self,
        remove: Callable,
        grid: Grid,
        leads: int,
        level: np.ndarray | None = None,
        r_peaks: np.ndarray | None = None,
    ):
        self._remove, self._grid, self._leads = remove, grid, leads
        self._level, self._peaks = level, r_peaks
        self._flat = flat_samples(grid.rate)
        self._removed = Removed(grid, leads)
        self._extremes = Extremes.none(leads)
        self._origin = np.full(leads, np.nan) if level is None else self._level  # float32 is exact near it
        self._rows, self._first = np.zeros((0, leads)), 0  # as they came, NaN where missing
        self._bridged = np.zeros((0, leads), np.float32)  # beside the rows, as far as windows needed them
        self._model, self._model_first = np.zeros((0, leads), np.float32), grid.start(0)
        self._windows = self._emitted = 0
        self._coming, self._received = [], 0
        self._dtype, self._ended = np.float64, False

    @property
    def latency(self) -> float:
        """See the class."""
        grid = self._grid
        filtered = ((grid.used - 1) * grid.down + 2 * grid.half) / grid.up
        return max(filtered, grid.hop * grid.down / grid.up + self._flat) / grid.rate

    def push(self, chunk: np.ndarray) -> np.ndarray:
        """Takes the next samples `[n, C]`, or `[n]` of one lead; gives those that became final, `[m, C]`, m from 0.

        Raises:
            UserError: for a chunk of another shape or no real numbers, and after `flush`.
        """
        if self._ended:
            raise UserError("the stream was flushed; begin another one")
        chunk = np.asarray(chunk)
        rows = chunk[:, None] if chunk.ndim == 1 else chunk
        if rows.ndim != 2 or rows.shape[1] != self._leads or rows.dtype.kind not in "iuf":
            raise UserError(f"the chunk is {chunk.dtype} {list(chunk.shape)}; expected numbers [n, {self._leads}]")
        self._dtype = np.float32 if rows.dtype == np.float32 else np.float64
        self._coming.append(np.where(np.isfinite(rows), rows, np.nan))
        self._received += len(rows)
        ready = self._windows
        while self._grid.known(ready) <= self._received:
            ready += 1
        return self._advance(ready, None)

    def flush(self) -> np.ndarray:
        """Ends the stream; gives the samples that are left, `[m, C]`."""
        self._ended = True
        return self._advance(self._grid.windows(self._received) if self._received else 0, self._received)

    def _advance(self, windows: int, length: int | None) -> np.ndarray:
        cleaned = [np.zeros((0, self._leads))]
        if self._windows < windows:
            self._rows, self._coming = np.concatenate([self._rows, *self._coming]), []
        while self._windows < windows:
            # As many as a minute's: their windows stand in memory.
            steps = [self._step(n, length) for n in range(self._windows, min(self._windows + 128, windows))]
            self._windows += len(steps)
            windows_and_peaks, samples = zip(*steps, strict=True)
            self._removed.add(self._remove(*map(np.stack, zip(*windows_and_peaks, strict=True))))
            rows, kept, treble = map(np.concatenate, zip(*samples, strict=True))
            taken = self._removed.take(self._emitted - len(rows), self._emitted, treble)
            cleaned.append(np.where(kept, rows, rows - taken))
        return np.concatenate(cleaned).astype(self._dtype)

    def _step(self, number: int, length: int | None) -> tuple[tuple, tuple]:
        """Prepares a window from what is known when it is whole; all is known of a signal that has ended.

        Returns:
            What the model takes: window, R peaks and mask; and the samples that then are final, from `_final`.
        """
        grid = self._grid
        known = grid.known(number) if length is None else length
        self._bridge(known)
        done, stop = self._model_first + len(self._model), grid.start(number) + grid.window
        begin, end = grid.span(done, stop)
        index = reflected(np.arange(begin, end), known, grid.known(0)) - self._first
        new = grid.to_model(self._bridged[index], begin, done, stop)
        self._model = np.concatenate([self._model, new])[-int(_HISTORY_S * RATE) :]
        self._model_first = stop - len(self._model)
        found = self._peaks
        if found is None:
            found = detect_peaks(self._model) + self._model_first
        level = np.median(self._model, 0) if self._level is None else np.float32(0)
        told = peaks_of_windows(found, np.array([grid.start(number)]), grid.window)
        return (self._model[-grid.window :] - level, told[0][0], told[1][0]), self._final(number, known, length)

    def _bridge(self, known: int) -> None:
        """Fills what is missing up to sample `known`, and centres it."""
        start = self._first + len(self._bridged)
        if start >= known:
            return
        rows = self._rows[len(self._bridged) : known - self._first]
        self._extremes.widen(self._rows[max(len(self._bridged) - 1, 0) : known - self._first])
        bridged = np.zeros(rows.shape, np.float32)
        for lead, values in enumerate(rows.T):
            there = np.flatnonzero(np.isfinite(values))
            if np.isnan(self._origin[lead]) and len(there):
                self._origin[lead] = np.median(values[there])
            position, height = there, values[there] - self._origin[lead]
            if start:
                position, height = np.append(-1, position), np.append(self._bridged[-1, lead], height)
            if len(position):
                bridged[:, lead] = np.interp(np.arange(len(values)), position, height)
        self._bridged = np.concatenate([self._bridged, bridged])

    def _final(self, number: int, known: int, length: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples that a window makes final, which of them stay as they are, and what the model does not see.

        Forgets what is not needed.
        """
        start, stop = self._emitted, self._grid.final(number + 1)
        # Up to there a flat stretch is known for one.
        stop = max(min(stop, known - self._flat), start) if length is None else min(stop, length)
        seen = max(start - self._flat, self._first)
        rows = self._rows[seen - self._first : known - self._first]
        kept = no_signal(rows, self._extremes, self._grid.rate)[start - seen : stop - seen]
        rows = rows[start - seen : stop - seen]
        treble = highs(
            lambda first, end: self._bridged[first - self._first : end - self._first], start, stop, self._grid, known
        )
        self._emitted = stop
        old = max(min(known, stop) - round(2 * self._grid.rate) - self._first, 0)
        self._rows, self._bridged, self._first = self._rows[old:], self._bridged[old:], self._first + old
        return rows, kept, np.broadcast_to(treble, rows.shape)
