"""What was measured beside what was published: tables as JSON, Markdown and PNG."""

import importlib.resources
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ralenet_jax import provenance
from ralenet_jax.reproduce_cells import CONDITIONS, TABLES, Cell

METRICS = {"snr_db": ("SNR, dB", 2), "rmse": ("RMSE", 4)}
_POOLED = {"pooled_snr_db": ("SNR pooled over all windows, dB", 2)}
_DASH = "–"


def published() -> dict[str, Any]:
    """The published figures: {metric: {model: [{"bw@-4": figure, …}, …]}}, a dictionary for each series, and notes."""
    return json.loads((importlib.resources.files("ralenet_jax") / "published.json").read_text(encoding="utf-8"))


def collect(table: str, results: Mapping[Cell, dict[str, Any] | None], num_devices: int) -> dict[str, Any]:
    """Puts the evaluations of a table's cells together.

    Args:
        table: one of `TABLES`.
        results: the evaluation of each cell, None for one that is not done.
        num_devices: on which this is made.

    Returns:
        What `table.json` holds: "rows" ({model: {"bw@-4": {"measured", "published", "difference", "epochs", …}}}) and
        "runs", the whole evaluation of each cell by its name, with its provenance.
    """
    done = {cell: result for cell, result in results.items() if result is not None}
    rows = {}
    for model in TABLES[table].models:
        rows[model] = {}
        for kind, snr_db in CONDITIONS:
            condition = f"{kind}@{snr_db:g}"
            runs = [run for cell, run in done.items() if (cell.model, cell.kind, cell.snr_db) == (model, kind, snr_db)]
            rows[model][condition] = _entry(table, model, condition, runs)
    return {
        "table": table,
        "published": published() if table == "paper" else None,
        "rows": rows,
        "runs": {cell.name: result for cell, result in done.items()},
        "made_by": provenance.software(num_devices),
    }


def _entry(table: str, model: str, condition: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One place in the table: means over the seeds, their deviation, and how far from published they are."""
    theirs = {}
    if table == "paper":
        figures = published()
        theirs = {metric: [series[condition] for series in figures[metric].get(model, ())] for metric in METRICS}
    if not runs:
        return {"measured": None, "published": theirs}
    measured = [next(iter(run["conditions"].values()))["denoised"] for run in runs]
    means = {name: statistics.mean(each[name] for each in measured) for name in measured[0]}
    entry = {"measured": means, "published": theirs, "seeds": len(runs)}
    if len(runs) > 1:
        entry["deviation"] = {name: statistics.stdev(each[name] for each in measured) for name in measured[0]}
    entry["noisy"] = next(iter(runs[0]["conditions"].values()))["noisy"]
    epochs = {run["provenance"]["config"]["train"]["epochs"] for run in runs if "learning_curve" in run}
    entry["epochs"] = min(epochs, default=None)
    # The published SNRs of the wavelets are another measure.
    comparable = [name for name, values in theirs.items() if values and (model, name) != ("dwt", "snr_db")]
    entry["difference"] = {name: [means[name] - value for value in theirs[name]] for name in comparable}
    return entry


def markdown(table: Mapping[str, Any], wanted_epochs: int) -> str:
    """The table as Markdown: for each measure a row for each model, below it what was published and the difference."""
    names = METRICS | (_POOLED if table["table"] != "paper" else {})
    conditions = [f"{kind}@{snr_db:g}" for kind, snr_db in CONDITIONS]
    parts = [f"# {_TITLES[table['table']]}", ""]
    for metric, (title, digits) in names.items():
        parts += [f"## {title}", "", _row(["model", *headings()])]
        parts.append("|---|" + "---:|" * len(conditions))
        for model, places in table["rows"].items():
            parts.append(_row([f"**{model}**", *(_measured(places[name], metric, digits) for name in conditions)]))
            lines = {what: [_series(places[name], what, metric, digits) for name in conditions] for what in _BELOW}
            parts += [_row([f"— {what}", *cells]) for what, cells in lines.items() if set(cells) != {_DASH}]
        parts.append("")
    return "\n".join([*parts, *_notes(table, wanted_epochs)]) + "\n"


_BELOW = ("published", "difference")
_TITLES = {
    "paper": "The published table, paper protocol",
    "honest": "The table under the honest protocol",
    "twelve-lead": "Twelve leads of LUDB, paper protocol",
}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _heading(condition: str) -> str:
    kind, _, snr_db = condition.partition("@")
    return f"{kind} {snr_db}".replace("-", "−") + " dB"


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")  # adding zero takes the sign from -0


def _measured(entry: Mapping[str, Any], metric: str, digits: int) -> str:
    if entry["measured"] is None:
        return _DASH
    text = _number(entry["measured"][metric], digits)
    if "deviation" in entry:
        text += f" ± {_number(entry['deviation'][metric], digits)}"
    return text if entry["epochs"] is None else f"{text} ({entry['epochs']} ep.)"


def _series(entry: Mapping[str, Any], what: str, metric: str, digits: int) -> str:
    values = entry.get(what, {}).get(metric, ())
    return "; ".join(_number(value, digits, "+" if what == "difference" else "") for value in values) or _DASH


def _notes(table: Mapping[str, Any], wanted_epochs: int) -> list[str]:
    places = [entry for row in table["rows"].values() for entry in row.values()]
    missing = sum(entry["measured"] is None for entry in places)
    left = f"; {missing} of {len(places)} places are not measured yet" if missing else ""
    notes = [f"Means over test windows after the last epoch{left}."]
    short = sorted({entry["epochs"] for entry in places if (entry.get("epochs") or wanted_epochs) < wanted_epochs})
    if short:
        told = " or ".join(map(str, short))
        notes.append(f"Some cells were trained for {told} epochs only, the configuration says {wanted_epochs}.")
    if table["table"] == "paper":
        figures = table["published"]
        notes.append(f"Published: {figures['source']}.")
        notes.append("The filters `dwt` and `fft` are measured on the 8,000 training windows, as published for `dwt`.")
        notes += [f"`{model}`: {text}." for model, text in figures["notes"].items()]
    made = table["made_by"]
    notes.append(f"Made at {made['revision']} with jax {made['versions']['jax']} on {made['device']['kind']}.")
    return notes


def figure_rows(table: Mapping[str, Any]) -> dict[str, list[str]]:
    """The SNRs as texts for a figure: each model's row, and below it what was published and how far off it is."""
    conditions = [f"{kind}@{snr_db:g}" for kind, snr_db in CONDITIONS]
    rows = {}
    for model, places in table["rows"].items():
        rows[model] = [_measured(places[name], "snr_db", 2) for name in conditions]
        for what in _BELOW:
            cells = [_series(places[name], what, "snr_db", 2) for name in conditions]
            if set(cells) != {_DASH}:
                rows[f"{model}, {what}"] = cells
    return rows


def headings() -> list[str]:
    """The columns' titles, in the order of `CONDITIONS`."""
    return [_heading(f"{kind}@{snr_db:g}") for kind, snr_db in CONDITIONS]
