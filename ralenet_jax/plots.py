"""Figures as PNG files, drawn without a display and without pyplot's global state: example windows, learning curves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        'figures need the library matplotlib; install it with: pip install "ralenet_jax[plots]"'
    ) from error

# Of Okabe and Ito's palette, which colour-blind readers can tell apart; the widths help where there is no colour.
_NOISY = {"color": "#999999", "linewidth": 0.8, "label": "noisy"}
_CLEAN = {"color": "#E69F00", "linewidth": 3.0, "label": "clean"}
_DENOISED = {"color": "#0072B2", "linewidth": 1.2, "label": "denoised"}


def windows_figure(
    path: str | os.PathLike,
    noisy: np.ndarray,
    denoised: np.ndarray,
    clean: np.ndarray,
    sampling_rate: float = 360,
    leads: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    units: str = "mV",
) -> Path:
    """Draws windows as a PNG: a row for each window, a column for each lead, the SNR before and after above the row.

    Args:
        path: of the file; it appears whole or not at all.
        noisy: `[N, L, C]`, in `units`.
        denoised: `[N, L, C]`.
        clean: `[N, L, C]`.
        sampling_rate: Hz.
        leads: names of the C leads.
        titles: of the N windows, put in front of the SNRs.
        units: of the signals, "mV" or "z-scored".

    Returns:
        The path.

    Raises:
        ValueError: the arrays, or the numbers of names, do not fit together.
    """
    noisy, denoised, clean = (np.asarray(array) for array in (noisy, denoised, clean))
    if clean.ndim != 3 or not clean.shape == noisy.shape == denoised.shape or not clean.size:
        raise ValueError(f"noisy {noisy.shape}, denoised {denoised.shape}, clean {clean.shape}; expected one [N, L, C]")
    count, length, num_leads = clean.shape
    leads = [f"lead {number + 1}" for number in range(num_leads)] if leads is None else leads
    titles = [f"window {number + 1}" for number in range(count)] if titles is None else titles
    if (len(titles), len(leads)) != (count, num_leads):
        raise ValueError(f"{len(titles)} titles, {len(leads)} leads; expected {count} and {num_leads}")
    figure = Figure(figsize=(1 + 4.5 * num_leads, 1 + 2.2 * count), dpi=110, layout="constrained")
    panels = figure.subplots(count, num_leads, squeeze=False, sharex=True)
    time = np.arange(length) / sampling_rate
    for row, title in enumerate(titles):
        before, after = _snr_db(clean[row], noisy[row]), _snr_db(clean[row], denoised[row])
        for column, panel in enumerate(panels[row]):
            for array, style in ((noisy, _NOISY), (clean, _CLEAN), (denoised, _DENOISED)):
                panel.plot(time, array[row, :, column], **style)
            panel.set_title(leads[column], loc="right", fontsize=9, color="#555555")
            panel.grid(color="#eeeeee")
            panel.set_axisbelow(True)
        panels[row, 0].set_ylabel(units)
        text = f"{title}: " + f"SNR {before:.1f} → {after:.1f} dB".replace("-", "−")
        panels[row, 0].set_title(text, loc="left", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("time in s")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return _write(figure, path)


def learning_curve(path: str | os.PathLike, history: Sequence[Mapping[str, Any]]) -> Path:
    """Draws the validation SNR over the epochs as a PNG.

    Args:
        path: of the file; it appears whole or not at all.
        history: the lines of a run's metrics.jsonl, of which "validation/epoch" and "validation/snr_db" (dB) are drawn.

    Returns:
        The path.

    Raises:
        ValueError: no line is of a validation.
    """
    points = [(line["validation/epoch"], line["validation/snr_db"]) for line in history if "validation/epoch" in line]
    if not points:
        raise ValueError(f"no validation among {len(history)} lines of history; train for an epoch first")
    epochs, snr_db = np.array(sorted(points)).T
    figure = Figure(figsize=(6.5, 4), dpi=110, layout="constrained")
    panel = figure.subplots()
    panel.plot(epochs, snr_db, color=_DENOISED["color"], marker="o", markersize=3.5)
    best = int(np.argmax(snr_db))
    panel.plot(
        epochs[best], snr_db[best], "o", color="#D55E00", label=f"best: {snr_db[best]:.2f} dB, epoch {epochs[best]:g}"
    )
    panel.set_xlabel("epoch")
    panel.set_ylabel("validation SNR in dB")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(color="#eeeeee")
    panel.legend(loc="lower right", frameon=False)
    return _write(figure, path)


def table_figure(
    path: str | os.PathLike,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> Path:
    """Draws a table and, below it, learning curves, as a PNG.

    Args:
        path: of the file; it appears whole or not at all.
        columns: the titles of the columns.
        rows: the texts of each row by its title, one for each column: SNRs in dB.
        curves: by the name of each run its validations, {"epoch", "snr_db"} (dB); none, no curves.

    Returns:
        The path.
    """
    height = 0.6 + 0.26 * len(rows)
    figure = Figure(figsize=(3 + 1.3 * len(columns), height + (4.5 if curves else 0)), dpi=110, layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=(height, 4.5)) if curves else [figure.subplots()]
    panels[0].axis("off")
    panels[0].set_title("SNR in dB", loc="left", fontsize=10)
    texts = panels[0].table([list(row) for row in rows.values()], rowLabels=list(rows), colLabels=columns, loc="center")
    texts.auto_set_font_size(False)
    texts.set_fontsize(9)
    for cell in texts.get_celld().values():
        cell.set_edgecolor("#dddddd")
    if curves:
        lines = ("-", "--", ":", "-.")  # the ten colours come again
        for number, (name, points) in enumerate(curves.items()):
            epochs, snr_db = [point["epoch"] for point in points], [point["snr_db"] for point in points]
            panels[1].plot(epochs, snr_db, lines[number // 10 % len(lines)], linewidth=1, label=name)
        panels[1].set_xlabel("epoch")
        panels[1].set_ylabel("validation SNR in dB")
        panels[1].grid(color="#eeeeee")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right lower", fontsize=8, frameon=False)
    return _write(figure, path)


def _snr_db(clean: np.ndarray, other: np.ndarray) -> float:
    """Signal-to-noise ratio of one window over all its leads, dB."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a perfect one has inf
        return float(10 * np.log10(np.sum(clean**2) / np.sum((clean - other) ** 2)))


def _write(figure: Figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure).print_png(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
