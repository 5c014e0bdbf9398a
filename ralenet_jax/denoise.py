"""One signal in, one signal out: a trained denoiser for recordings of any length, rate and number of leads."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ralenet_jax import augment, input_pipeline, programs, steps, streaming
from ralenet_jax.errors import UserError
from ralenet_jax.gate import Gate

_WEIGHTS = "weights/blind.safetensors"
_BLOCK_S = 120  # a block's windows, at most, unless a batch is more
_LEVEL_S = 1800  # a lead has one level for so long
_IN_FLIGHT = 2  # blocks: one on the devices while the next is prepared
_CPU_BATCH, _BATCH = 32, 256  # windows for a device at a time


class Denoiser:
    """Cleans ECGs: `Denoiser.from_pretrained()(signal, sampling_rate)`.

    Leads go through the model in pairs, the last of an odd number as a pair with itself. What the model removes is
    subtracted from the signal, so it comes out with its own level. Missing samples stay missing, and flat or saturated
    stretches (`streaming.no_signal`) as they are.

    The gate (`gate.Gate`) does no harm: of what the model would remove nothing goes from a clean lead.

    Args:
        model: Linen; `apply(variables, x, r_peak, r_mask=...)` denoises windows float32 `[B, window, 2]` whose rms
            is 1, with R peaks int32 and bool `[B, 4]`.
        variables: its weights.
        sampling_rate: Hz that it was trained on.
        window: samples of its windows.
        gate: whether clean windows are left alone.
        devices: to run on; all by default.

    Raises:
        UserError: if the model does not take such windows, or was trained at another rate than 360 Hz.
    """

    def __init__(
        self,
        model,
        variables: Any,
        *,
        sampling_rate: float = streaming.RATE,
        window: int = 256,
        gate: bool = True,
        devices: Sequence[jax.Device] | None = None,
    ):
        if sampling_rate != streaming.RATE:
            raise UserError(f"the model's sampling rate is {sampling_rate!r}; expected {streaming.RATE:g} Hz")
        self._devices = list(jax.devices() if devices is None else devices)
        self._model, self._variables, self._window, self._gate = model, variables, window, gate
        on_cpu = self._devices[0].platform == "cpu"
        self._runner = _Runner(model, variables, self._devices, _CPU_BATCH if on_cpu else _BATCH)
        # What has run before is known to go together; to find out takes half a second and more.
        if not self._runner.is_known(window):
            _check_model(model, variables, window)

    @classmethod
    def from_pretrained(cls, **options) -> "Denoiser":
        """With the weights that come with the package; raises `UserError` if this installation lacks them."""
        from ralenet_jax import export  # it imports what training needs

        with resources.as_file(resources.files("ralenet_jax").joinpath(_WEIGHTS)) as path:
            if not path.is_file():
                raise UserError(f"this installation has no {_WEIGHTS}; name a --workdir or a file of weights")
            return cls._of(*export.load_own(path), path, options)

    @classmethod
    def from_file(cls, path: str | Path, **options) -> "Denoiser":
        """With weights that `ralenet export` wrote as safetensors, npz or msgpack.

        Raises:
            UserError: for another file, and for a model that was not trained on windows of whole recordings.
        """
        from ralenet_jax import export

        return cls._of(*export.load(path), path, options)

    @classmethod
    def _of(cls, config, variables: Any, path: str | Path, options: dict[str, Any]) -> "Denoiser":
        from ralenet_jax import state

        _check_training(config, path)
        return cls(state.model_from_config(config, steps.AXIS), variables, **options)

    @classmethod
    def from_checkpoint(cls, workdir: str | Path, which: str = "best", **options) -> "Denoiser":
        """With the "best" or "last" checkpoint of a run, or that of a step.

        Raises:
            UserError: if there is none, and for a model that was not trained on windows of whole recordings.
        """
        from ralenet_jax import checkpoint, evaluate

        config = checkpoint.typed_config(checkpoint.read_config(workdir).to_dict(), workdir)
        _check_training(config, workdir)
        window = options.get("window", 256)
        model, state = evaluate.restore_state(config, workdir, jax.devices()[:1], which, (window, 2))
        return cls(model, jax.device_get(state.variables), **options)

    def __call__(
        self,
        signal: np.ndarray,
        sampling_rate: float,
        r_peaks: np.ndarray | None = None,
        report: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Denoises a recording.

        Args:
            signal: `[L]` or `[L, leads]`, numbers in any unit, L from 2; NaN or infinite where samples are missing.
            sampling_rate: 50 to 5000 Hz.
            r_peaks: `[n]`, samples of R peaks that are known; None to detect them.
            report: is told now and then how many samples more are done, as `tqdm.update` takes it.

        Returns:
            The same shape and unit, float32 for float32 and float64 for any other; NaN where samples are missing.

        Raises:
            UserError: for a signal, a rate or R peaks of another kind, or a lead without any samples.
        """
        given, grid = np.asarray(signal), streaming.build_grid(sampling_rate, self._window)
        _check_signal(given)
        leads = given[:, None] if given.ndim == 1 else given
        peaks = None if r_peaks is None else _checked_peaks(r_peaks, grid, len(leads))
        recording = _Recording(leads, grid)
        cleaned = np.empty(leads.shape, np.float32 if leads.dtype == np.float32 else np.float64)
        removed, start, windows = streaming.Removed(grid, leads.shape[1]), 0, 0
        blocks = recording.blocks(self._runner.size, peaks)
        for values in self._remove(self._runner, blocks, self._build_gate(grid), grid.used):
            removed.add(values)
            windows += len(values)
            stop = min(grid.final(windows), len(leads))
            taken = removed.take(start, stop, recording.highs(start, stop))
            cleaned[start:stop] = recording.without(taken, start, stop)
            if report is not None:
                report(stop - start)
            start = stop
        return cleaned.reshape(given.shape)

    def find_r_peaks(self, signal: np.ndarray, sampling_rate: float) -> np.ndarray:
        """R peaks of a recording as `__call__` detects them, in the same kind of signal: samples `[n]`, ascending.

        Raises:
            UserError: as `__call__`.
        """
        given, grid = np.asarray(signal), streaming.build_grid(sampling_rate, self._window)
        _check_signal(given)
        leads = given[:, None] if given.ndim == 1 else given
        samples = np.rint(_Recording(leads, grid).peaks() * (grid.down / grid.up)).astype(np.int64)
        return np.unique(samples.clip(0, len(leads) - 1))

    def stream(self, sampling_rate: float, leads: int, level=None, r_peaks=None) -> streaming.Stream:
        """A `streaming.Stream` of so many leads: the same cleaning of a signal as it comes, within a second.

        Args:
            sampling_rate: 50 to 5000 Hz.
            leads: how many.
            level: about which the leads lie, `[leads]` or a number; None to follow the signal.
            r_peaks: `[n]`, samples of all R peaks, counted from the stream's first sample; None to detect them.

        Raises:
            UserError: for a rate, a number of leads, levels or R peaks of another kind.
        """
        grid = streaming.build_grid(sampling_rate, self._window)
        if not isinstance(leads, int | np.integer) or leads < 1:
            raise UserError(f"leads is {leads!r}; expected 1 or more")
        level = None if level is None else _checked_level(level, leads)
        r_peaks = None if r_peaks is None else _checked_peaks(r_peaks, grid)
        # As small as a window of all leads: each is waited for.
        runner = _Runner(self._model, self._variables, self._devices[:1], (leads + 1) // 2)

        gate = self._build_gate(grid)

        def remove(*block):
            return np.concatenate(list(self._remove(runner, [block], gate, grid.used)))

        return streaming.Stream(remove, grid, leads, level, r_peaks)

    def _build_gate(self, grid: streaming.Grid) -> Gate | None:
        return Gate(grid) if self._gate else None

    def _remove(self, runner: "_Runner", blocks: Iterable[tuple], gate: Gate | None, used: int) -> Iterator[np.ndarray]:
        """Windows `[W, window, C]` → what `streaming.Removed` takes; blocks come with their R peaks."""
        waiting: collections.deque = collections.deque()
        for windows, r_peak, r_mask in blocks:
            noisy, scale = augment.standardise(windows)
            pairs = _pairs(noisy)
            count = len(pairs) // len(windows)
            sent = runner.send(pairs, np.repeat(r_peak, count, 0), np.repeat(r_mask, count, 0))
            waiting.append((windows, scale, r_peak, r_mask, sent))
            if len(waiting) == _IN_FLIGHT:
                yield self._removed(*waiting.popleft(), gate)[:, -used:]
        while waiting:
            yield self._removed(*waiting.popleft(), gate)[:, -used:]

    @staticmethod
    def _removed(
        windows: np.ndarray, scale: np.ndarray, r_peak: np.ndarray, r_mask: np.ndarray, sent: list, gate: Gate | None
    ) -> np.ndarray:
        count, length, leads = windows.shape
        beats = _leads(_Runner.receive(sent, count * ((leads + 1) // 2)), leads) * scale
        removed, of_rest = windows - beats, np.ones((count, 1, leads), np.float32)
        if gate is not None:
            drift = augment.wander(removed)
            removed, of_rest = gate(beats, drift, removed - drift, streaming.around_peaks(r_peak, r_mask, length))
        return np.concatenate([removed, np.broadcast_to(of_rest, removed.shape)], 2)


def _pairs(windows: np.ndarray) -> np.ndarray:
    """Windows `[W, L, C]` → pairs of leads `[W·pairs, L, 2]`."""
    length, leads = windows.shape[1:]
    pairs = np.minimum(np.arange(leads + leads % 2), leads - 1).reshape(-1, 2)
    return windows[:, :, pairs].transpose(0, 2, 1, 3).reshape(-1, length, 2)


def _leads(pairs: np.ndarray, leads: int) -> np.ndarray:
    """The way back, `[W·pairs, L, 2]` → `[W, L, C]`; of a lead that was given twice the mean."""
    length, count = pairs.shape[1], (leads + 1) // 2
    windows = pairs.reshape(-1, count, length, 2).transpose(0, 2, 1, 3).reshape(-1, length, 2 * count)
    if leads % 2:
        windows[:, :, leads - 1] = windows[:, :, leads - 1 :].mean(2)
    return windows[:, :, :leads]


class _Runner:
    """The model on devices, in batches of one size, so that it is compiled once."""

    def __init__(self, model, variables: Any, devices: Sequence[jax.Device], batch: int):
        self._apply = steps.build_denoiser(model, devices)
        # What a model of someone else's computes may have changed since.
        if type(model).__module__.partition(".")[0] == __package__:
            self._apply = programs.kept(self._apply, devices, repr(model))
        self._variables = steps.replicate(variables, devices)
        self._shape = (len(devices), batch)
        self.size = len(devices) * batch

    def is_known(self, window: int) -> bool:
        """Whether its program for windows of so many samples is kept."""
        shapes = ((window, 2), np.float32), ((streaming.MOST_PEAKS,), np.int32), ((streaming.MOST_PEAKS,), bool)
        given = [jax.ShapeDtypeStruct((*self._shape, *shape), dtype) for shape, dtype in shapes]
        return programs.is_known(self._apply, self._variables, *given)

    def send(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Starts work on windows `[N, L, 2]`, R peaks and mask; the last batch is filled up."""
        sent = []
        for first in range(0, len(arrays[0]), self.size):
            chosen = [array[first : first + self.size] for array in arrays]
            filled = [np.pad(part, [(0, self.size - len(part))] + [(0, 0)] * (part.ndim - 1)) for part in chosen]
            sent.append(self._apply(self._variables, *(part.reshape(*self._shape, *part.shape[1:]) for part in filled)))
        return sent

    @staticmethod
    def receive(sent: list[jax.Array], count: int) -> np.ndarray:
        """Waits for the denoised windows `[N, L, 2]`."""
        batches = [np.asarray(batch) for batch in sent]
        return np.concatenate([batch.reshape(-1, *batch.shape[2:]) for batch in batches])[:count]


@dataclasses.dataclass(frozen=True)
class _Gaps:
    """Where a lead's samples are missing: first samples, and first samples after, ascending."""

    start: np.ndarray
    stop: np.ndarray

    def bridged(self, lead: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Samples start to stop, those missing on a line between the samples before and after the gap."""
        values = lead[start:stop].astype(np.float64)
        here = slice(np.searchsorted(self.stop, start, "right"), np.searchsorted(self.start, stop))
        if here.start == here.stop:
            return values
        there = np.flatnonzero(np.isfinite(values)) + start
        # A gap may begin before, or end after.
        ends = np.array([self.start[here.start] - 1, self.stop[here.stop - 1]])
        ends = ends[((ends < start) | (ends >= stop)) & (ends >= 0) & (ends < len(lead))]
        position = np.sort(np.concatenate([there, ends]))
        return np.interp(np.arange(start, stop), position, lead[position].astype(np.float64))


class _Recording:
    """A recording on its way into the model, a block at a time, and out of it.

    Args:
        leads: `[L, C]`.
        grid: of its samples.
    """

    def __init__(self, leads: np.ndarray, grid: streaming.Grid):
        self._leads, self._grid = leads, grid
        self._block = max(int(_BLOCK_S * grid.rate), 1)
        self._gaps = [self._find_gaps(lead) for lead in leads.T]
        self._extremes = streaming.Extremes.none(leads.shape[1])
        for start in range(0, len(leads), self._block):
            self._extremes.widen(self._rows(max(start - 1, 0), start + self._block))
        span = int(_LEVEL_S * grid.rate)
        starts = range(0, max(len(leads) - span // 2, 1), span)  # the last one takes what is left
        stops = [*starts[1:], len(leads)]
        self._middles = [(start + stop) / 2 for start, stop in zip(starts, stops, strict=True)]
        self._levels = [[_median(lead[a:b]) for a, b in zip(starts, stops, strict=True)] for lead in leads.T]
        self._origin = np.array([np.nanmedian(levels) for levels in self._levels])  # float32 is exact near it

    def _rows(self, start: int, stop: int) -> np.ndarray:
        rows = self._leads[start:stop].astype(np.float64)
        return np.where(np.isfinite(rows), rows, np.nan)

    def _find_gaps(self, lead: np.ndarray) -> _Gaps:
        starts, stops = [], []
        for first in range(0, len(lead), self._block):
            missing = ~np.isfinite(lead[first : first + self._block])
            edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(np.int8))) + first
            starts.append(edges[::2])
            stops.append(edges[1::2])
        start, stop = np.concatenate(starts), np.concatenate(stops)
        if (stop - start).sum() == len(lead):
            raise UserError("a lead has no samples, all are NaN or infinite; leave it out")
        apart = start[1:] != stop[:-1]  # a gap goes on into the next block
        return _Gaps(start[np.append(True, apart)[: len(start)]], stop[np.append(apart, True)[: len(stop)]])

    def blocks(self, size: int, peaks: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All windows `[W, window, C]` and their R peaks, in blocks that fill batches of `size`."""
        grid, leads = self._grid, self._leads.shape[1]
        total = grid.windows(len(self._leads))
        at_once = size * max(int(_BLOCK_S * streaming.RATE / grid.hop) // size, 1)
        beside = streaming.REACH if peaks is None else 0
        for first in range(0, total, at_once):
            start = grid.start(np.arange(first, min(first + at_once, total)))
            begin, end = start[0] - beside, start[-1] + grid.window + beside
            begin -= begin % streaming.STRIDE
            model = self._model_samples(begin, end)
            found = streaming.detect_peaks(model) + begin if peaks is None else peaks
            windows = np.lib.stride_tricks.sliding_window_view(model, grid.window, 0)[start - begin].transpose(0, 2, 1)
            middle = (start + grid.window / 2) * (grid.down / grid.up)
            level = np.stack([self._level(lead, middle) for lead in range(leads)], 1) - self._origin
            windows = windows - level[:, None].astype(np.float32)
            yield windows, *streaming.peaks_of_windows(found, start, grid.window)

    def peaks(self) -> np.ndarray:
        """All R peaks, model samples."""
        grid, found = self._grid, [np.zeros(0, np.int64)]
        size = math.ceil(_BLOCK_S * streaming.RATE / streaming.STRIDE) * streaming.STRIDE
        total = math.ceil(len(self._leads) * grid.up / grid.down)
        for first in range(0, total, size):
            begin = first - math.ceil(streaming.REACH / streaming.STRIDE) * streaming.STRIDE
            peaks = streaming.detect_peaks(self._model_samples(begin, first + size + streaming.REACH)) + begin
            found.append(peaks[(peaks >= first) & (peaks < min(first + size, total))])
        return np.concatenate(found)

    def _level(self, lead: int, sample: np.ndarray) -> np.ndarray:
        levels = np.array(self._levels[lead])
        known = np.isfinite(levels)
        return np.interp(sample, np.array(self._middles)[known], levels[known])

    def _model_samples(self, start: int, stop: int) -> np.ndarray:
        first, last = self._grid.span(start, stop)
        index = streaming.reflected(np.arange(first, last), len(self._leads), self._grid.known(0))
        low, high = index.min(), index.max() + 1
        return self._grid.to_model(self._bridged(low, high)[index - low], first, start, stop)

    def _bridged(self, start: int, stop: int) -> np.ndarray:
        bridged = [gaps.bridged(lead, start, stop) for gaps, lead in zip(self._gaps, self._leads.T, strict=True)]
        return (np.stack(bridged, 1) - self._origin).astype(np.float32)

    def highs(self, start: int, stop: int) -> np.ndarray | float:
        """What the model does not see of samples start to stop, `[n, C]`."""
        return streaming.highs(self._bridged, start, stop, self._grid, len(self._leads))

    def without(self, removed: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Samples start to stop less what was removed from them; NaN where missing, as they are where no signal is."""
        beside = streaming.flat_samples(self._grid.rate)
        begin = max(start - beside, 0)
        rows = self._rows(begin, stop + beside)
        kept = streaming.no_signal(rows, self._extremes, self._grid.rate)[start - begin : stop - begin]
        rows = rows[start - begin : stop - begin]
        return np.where(kept, rows, rows - removed)


def _median(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(np.median(there)) if len(there) else np.nan


def _check_training(config, where: str | Path) -> None:
    """Windows of whole recordings come as the denoiser makes them; a model of others would do harm."""
    if config.data.database != input_pipeline.RECORDINGS:
        raise UserError(
            f"{where}: the model was trained on {config.data.database}; expected one trained as configs/blind.py has "
            f"it, on {input_pipeline.RECORDINGS}"
        )


def _check_signal(signal: np.ndarray) -> None:
    if signal.dtype.kind not in "iuf":
        raise UserError(f"the signal is {signal.dtype}; expected real numbers")
    if signal.ndim not in (1, 2) or 0 in signal.shape:
        raise UserError(f"the signal is {list(signal.shape)}; expected [samples] or [samples, leads], none of them 0")
    if len(signal) < 2:
        raise UserError("the signal is one sample; expected 2 or more, as [samples] or [samples, leads]")
    if signal.ndim == 2 and signal.shape[1] > len(signal):
        raise UserError(f"the signal is {list(signal.shape)}; expected [samples, leads]; transpose it")


def _checked_peaks(r_peaks, grid: streaming.Grid, length: int | None = None) -> np.ndarray:
    """R peaks `[n]` in samples of a signal of this length, if it is known → ascending model samples."""
    peaks = np.asarray(r_peaks)
    if peaks.ndim != 1 or (peaks.size and not np.issubdtype(peaks.dtype, np.integer)):
        raise UserError(f"r_peaks is {peaks.dtype} {list(peaks.shape)}; expected samples as integers [n]")
    peaks = np.unique(peaks.astype(np.int64))
    outside = peaks[(peaks < 0) | (peaks >= (np.inf if length is None else length))]
    if len(outside):
        raise UserError(
            f"r_peaks has {outside[0]}; expected 0 to {'the last sample' if length is None else length - 1}"
        )
    return np.rint(peaks * (grid.up / grid.down)).astype(np.int64)


def _checked_level(level, leads: int) -> np.ndarray:
    try:
        checked = np.broadcast_to(np.asarray(level, np.float64), (leads,))
    except (TypeError, ValueError):
        checked = np.array(np.nan)
    if not np.isfinite(checked).all():
        raise UserError(f"level is {level!r}; expected a number, or one for each of {leads} leads")
    return checked


def _check_model(model, variables: Any, window: int) -> None:
    windows = jax.ShapeDtypeStruct((1, window, 2), np.float32)
    peaks = [jax.ShapeDtypeStruct((1, streaming.MOST_PEAKS), dtype) for dtype in (np.int32, bool)]
    try:
        found = jax.eval_shape(lambda *x: model.apply(variables, x[0], x[1], r_mask=x[2]), windows, *peaks)
    # What a model cannot take shows where its layers meet.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"the model does not take windows of {window} samples and 2 leads ({reason})") from error
    if found.shape != windows.shape:
        raise UserError(f"the model makes {list(found.shape)} of {list(windows.shape)}; expected the same shape")
