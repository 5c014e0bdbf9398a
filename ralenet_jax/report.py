"""One denoised recording to look at: a self-contained HTML page that zooms (its template is report.html), or a PNG."""

import base64
import html
import importlib.resources
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ralenet_jax.errors import UserError

_GAP = -32768  # int16 of a sample that is missing
_BUDGET = 18e6  # bytes of embedded traces; the page has to stay under 20 MB
_SPAN_SECONDS = 10  # of a heart rate, and of a figure
_FIGURE_LEADS = 12
# Of Okabe and Ito's palette, as in plots.py; report.html has the same ones.
_BEFORE = {"color": "#999999", "linewidth": 0.9, "label": "before"}
_AFTER = {"color": "#0072B2", "linewidth": 1.2, "label": "after"}
_REMOVED = {"color": "#D55E00", "linewidth": 0.9, "label": "removed"}


def write(
    path: str | os.PathLike,
    *,
    title: str,
    sampling_rate: float,
    names: Sequence[str],
    units: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    beats: np.ndarray,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page: it asks for nothing from outside and opens from a disk, with `#t=60,70` at 60 to 70 s.

    What fits into 18 MB (78 minutes of 2 leads at 360 Hz) is embedded whole, as int16 of 1/65534 of a trace's range;
    of more, the lowest and highest value of each bin of samples, and the page says so.

    Args:
        path: of the file; it appears whole or not at all.
        title: the recording's name.
        sampling_rate: Hz.
        names: of the leads.
        units: of the leads, "mV".
        before: `[L, leads]`; NaN, or infinite, is a gap.
        after: `[L, leads]`.
        beats: `[n]`, samples.
        notes: lines of text, shown below the header.

    Returns:
        The path.

    Raises:
        UserError: the arrays do not fit together, or the file cannot be written.
    """
    before, after, beats = _checked(sampling_rate, names, units, before, after, beats)
    figures = summary(before, after, sampling_rate, beats)
    length, num_leads = before.shape
    # Two traces of int16; or three with two values for each bin, for what was removed does not follow from the bins.
    # Base64 makes 4 bytes of 3.
    fits = length * num_leads * 2 * 2 * 4 / 3 <= _BUDGET
    per_bin = 1 if fits else int(np.ceil(length * num_leads * 3 * 2 * 2 * 4 / 3 / _BUDGET))
    if per_bin > 1:
        bins = f"the lowest and highest value of each {per_bin} samples ({per_bin / sampling_rate:.2g} s)"
        notes = [*notes, f"Long recording: drawn as {bins}; the figures on this page are of every sample."]
    leads = [
        {"name": name, "unit": unit, "traces": _traces(before[:, number], after[:, number], per_bin)}
        for number, (name, unit) in enumerate(zip(names, units, strict=True))
    ]
    data = {"rate": float(sampling_rate), "length": length, "per_bin": per_bin, "leads": leads}
    data["beats"] = _base64(beats, "<i4")
    parts = {
        "title": html.escape(title),
        "facts": _facts(sampling_rate, length, names, units, figures),
        "notes": "".join(f"<li>{html.escape(line)}</li>" for line in notes),
        "leads": "".join(map(_section, range(num_leads), names, units, figures["leads"])),
        # `<` could end the script element
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    template = (importlib.resources.files("ralenet_jax") / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one go: a title may hold a mark
    return _write(path, lambda temporary: temporary.write_bytes(page.encode("utf-8", "backslashreplace")))


def summary(before: np.ndarray, after: np.ndarray, sampling_rate: float, beats: np.ndarray) -> dict[str, Any]:
    """The figures of the page's header.

    Args:
        before: `[L, leads]`; NaN, or infinite, is a gap.
        after: `[L, leads]`.
        sampling_rate: Hz.
        beats: `[n]`, samples.

    Returns:
        {"leads": [{"snr_before_db", "removed_rms"}, …], "heart_rate_bpm": {"mean", "min", "max"} or None, "beats": n}.
        The SNR is an estimate: power of `after`, centred, over power of `before - after`, dB; None where one of them is
        0. The RMS is in the lead's unit, None without samples. The lowest and highest rate are of spans of 10 s; None
        instead of rates with fewer than two beats without a gap between them.
    """
    leads = []
    with np.errstate(invalid="ignore"):
        difference = before - after
    for denoised, removed in zip(after.T, difference.T, strict=True):
        there = np.isfinite(removed)
        power, noise = (np.var(denoised[there]), np.mean(removed[there] ** 2)) if there.any() else (0.0, None)
        leads.append(
            {
                "snr_before_db": float(10 * np.log10(power / noise)) if power and noise else None,
                "removed_rms": None if noise is None else float(np.sqrt(noise)),
            }
        )
    gaps = np.cumsum(~np.isfinite(after).any(axis=1))
    return {"leads": leads, "heart_rate_bpm": _heart_rate(beats, gaps, sampling_rate), "beats": len(beats)}


def figure(
    path: str | os.PathLike,
    *,
    title: str,
    sampling_rate: float,
    names: Sequence[str],
    units: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    beats: np.ndarray,
    notes: Sequence[str] = (),
) -> Path:
    """Draws the 10 s with the most removed noise as a PNG, of 12 leads at most; arguments and result as of `write`.

    Raises:
        UserError: the arrays do not fit together, the file cannot be written, or matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('figures need the library matplotlib; pip install "ralenet_jax[plots]"') from error
    before, after, beats = _checked(sampling_rate, names, units, before, after, beats)
    shown = min(len(names), _FIGURE_LEADS)
    start, stop = _noisiest(before - after, int(np.ceil(_SPAN_SECONDS * sampling_rate)))
    time = np.arange(start, stop) / sampling_rate
    beats = beats[(beats >= start) & (beats < stop)]
    drawing = Figure(figsize=(15, 1.4 + (2.6 if shown <= 3 else 1.5) * shown), dpi=110, layout="constrained")
    panels = drawing.subplots(shown, 2, squeeze=False, sharex=True, sharey="row")
    for lead, (left, right) in enumerate(panels):
        old, new = before[start:stop, lead], after[start:stop, lead]
        left.plot(time, old, **_BEFORE)
        left.plot(time, new, **_AFTER)
        left.plot(beats / sampling_rate, after[beats, lead], "v", color="black", markersize=3.5, label="beats")
        right.plot(time, old - new, **_REMOVED)
        left.set_ylabel(f"{_plain(names[lead])}\n{_plain(units[lead])}")
        for panel in (left, right):
            panel.grid(color="#eeeeee")
            panel.set_axisbelow(True)
            panel.margins(x=0)
    for panel in panels[-1]:
        panel.set_xlabel("time in s")
    of_leads = "" if shown == len(names) else f", {shown} of {len(names)} leads"
    text = f"{_plain(title)}: the {len(time) / sampling_rate:.3g} s with the most removed noise{of_leads}"
    drawing.suptitle(f"{text}; research software, not a medical device", fontsize=11)
    entries = [sum(lists, []) for lists in zip(*(p.get_legend_handles_labels() for p in panels[0]), strict=True)]
    drawing.legend(*entries, loc="outside lower center", ncols=4, frameon=False)
    return _write(path, lambda temporary: FigureCanvasAgg(drawing).print_png(temporary))


def _checked(sampling_rate, names, units, before, after, beats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays, with one kind of gap (NaN); UserError if they do not fit together."""
    before, after, beats = (np.asarray(array) for array in (before, after, beats))
    if before.ndim != 2 or before.shape != after.shape or not before.size:
        raise UserError(f"before {before.shape}, after {after.shape}; expected one [L, leads], not empty")
    if (len(names), len(units)) != (before.shape[1],) * 2:
        raise UserError(f"{len(names)} names, {len(units)} units; expected one each for {before.shape[1]} leads")
    if not 0 < sampling_rate < np.inf:
        raise UserError(f"sampling rate {sampling_rate}; expected Hz, above 0")
    beats = beats if beats.size else np.zeros(0, int)
    if beats.ndim != 1 or beats.dtype.kind not in "iu" or ((beats < 0) | (beats >= len(before))).any():
        raise UserError(f"beats {beats.dtype}{list(beats.shape)}; expected [n] samples from 0 to {len(before) - 1}")
    before, after = (np.where(np.isfinite(array), array, np.nan) for array in (before, after))
    return before, after, np.sort(beats)


def _heart_rate(beats: np.ndarray, gaps: np.ndarray, sampling_rate: float) -> dict[str, float] | None:
    """Beats per minute of the intervals without a gap; `gaps` is the running count of missing samples."""
    beats = np.unique(np.asarray(beats, int))
    whole = gaps[beats[1:]] == gaps[beats[:-1]]
    intervals, ends = np.diff(beats)[whole] / sampling_rate, beats[1:][whole] / sampling_rate
    if not len(intervals):
        return None
    spans = (ends // _SPAN_SECONDS).astype(int)  # an interval belongs to the span it ends in: a pause is never lost
    counts, seconds = np.bincount(spans), np.bincount(spans, weights=intervals)
    mean = float(60 * len(intervals) / intervals.sum())
    enough = counts >= 2  # one premature beat is not a rate
    rates = 60 * counts[enough] / seconds[enough] if enough.any() else np.array([mean])
    return {"mean": mean, "min": float(rates.min()), "max": float(rates.max())}


def _noisiest(removed: np.ndarray, length: int) -> tuple[int, int]:
    """Start and stop of the `length` samples with the most power in `removed`, `[L, leads]`; each lead counts alike."""
    power = np.nan_to_num(removed**2)
    means = power.mean(axis=0)
    total = np.concatenate([[0.0], np.cumsum((power / np.where(means > 0, means, 1)).sum(axis=1))])
    length = min(length, len(removed))
    start = int(np.argmax(total[length:] - total[:-length]))
    return start, start + length


def _traces(before: np.ndarray, after: np.ndarray, per_bin: int) -> dict[str, dict[str, Any]]:
    """What the page draws of one lead: `before` and `after`, `[L]`; or bins of them and of what was removed."""
    if per_bin == 1:
        return {"before": _quantised(before), "after": _quantised(after)}
    traces = {"before": before, "after": after, "removed": before - after}
    return {name: _quantised(_bins(trace, per_bin)) for name, trace in traces.items()}


def _bins(trace: np.ndarray, per_bin: int) -> np.ndarray:
    """`[2 · bins]`: lowest and highest of each bin in turn, NaN where all of it is missing."""
    padded = np.pad(trace, (0, -len(trace) % per_bin), constant_values=np.nan).reshape(-1, per_bin)
    with np.errstate(invalid="ignore"):
        return np.stack([np.fmin.reduce(padded, axis=1), np.fmax.reduce(padded, axis=1)], axis=1).ravel()


def _quantised(trace: np.ndarray) -> dict[str, Any]:
    """`trace = offset + step · int16`, to half a step; missing samples are -32768."""
    there = np.isfinite(trace)
    low, high = (float(trace[there].min()), float(trace[there].max())) if there.any() else (0.0, 0.0)
    offset, step = (low + high) / 2, (high - low) / 65534 or 1.0
    levels = np.clip(np.rint((np.where(there, trace, offset) - offset) / step), -32767, 32767)
    return {"offset": offset, "step": step, "data": _base64(np.where(there, levels, _GAP), "<i2")}


def _base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")


def _facts(sampling_rate: float, length: int, names: Sequence[str], units: Sequence[str], figures: dict) -> str:
    """The header's list."""
    rate = figures["heart_rate_bpm"]
    facts = {
        "Sampling rate": f"{sampling_rate:g} Hz",
        "Duration": f"{_clock(length / sampling_rate)} (h:min:s)",
        "Leads": ", ".join(names),
        "Units": ", ".join(dict.fromkeys(units)),
        "Beats": f"{figures['beats']} detected",
        "Heart rate": "not known: too few beats"
        if rate is None
        else f"{rate['mean']:.0f} bpm on average; over spans of 10 s {rate['min']:.0f}–{rate['max']:.0f} bpm",
    }
    return "".join(f"<div><dt>{term}</dt><dd>{html.escape(fact)}</dd></div>" for term, fact in facts.items())


def _section(number: int, name: str, unit: str, figures: dict[str, float | None]) -> str:
    """One lead's place on the page; the script draws into it."""
    snr, rms = figures["snr_before_db"], figures["removed_rms"]
    told = "SNR before not known" if snr is None else f"SNR before ≈ {snr:.1f} dB".replace("-", "−")
    told += ", removed not known" if rms is None else f", removed {rms:.3g} {unit} RMS"
    name, unit = html.escape(name), html.escape(unit)
    return (
        f'<section><h2>{name}</h2><p class="figures">{html.escape(told)}</p>'
        f'<p class="readout" id="readout{number}"></p>'
        f'<canvas id="lead{number}" role="img" aria-label="{name}: before, after and removed, in {unit}, over time">'
        "</canvas></section>\n"
    )


def _clock(seconds: float) -> str:
    """Time as h:min:s."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _write(path: str | os.PathLike, fill: Callable[[Path], Any]) -> Path:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); name another file") from error
    return path
