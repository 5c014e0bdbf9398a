"""The table of the downstream classifier: are denoised beats still told apart?

For each split of the beats a classifier is trained on clean windows and scored on clean, noisy and denoised ones at
emb, -4 dB, by every denoiser whose cell of the paper's table is done.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ralenet_jax import checkpoint, classify, evaluate, filters, input_pipeline, provenance, reproduce_cells
from ralenet_jax.reproduce_cells import Cell

_MEASURES = ("accuracy", "precision", "recall", "f1")
_TITLES = {
    "random": "Beats split at random, 80 % to train (as published)",
    "records": "Split by record: trained on DS1, tested on DS2",
}


def reproduce(workdir: str | Path, overrides: list[str], log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains the classifiers that are not there yet, scores, and writes `table.json` and `table.md`.

    Args:
        workdir: of the reproduction; its table "paper" has the denoisers.
        overrides: of the configuration of the paper's cells.
        log: takes lines of text.

    Returns:
        What `table.json` holds: "splits" ({split: {"clean", "noisy", each denoiser: measures, None if not done}}).

    Raises:
        UserError: for data that is not there, or a damaged classifier.
    """
    cells = [cell for cell in reproduce_cells.cells("paper") if (cell.kind, cell.snr_db) == ("emb", -4)]
    config = reproduce_cells.config_of(cells[-1], workdir, overrides)
    folder = Path(workdir) / "classify"
    recordings = input_pipeline.read_noise(config)
    source = evaluate.noise_source(config, recordings, "test", config.noise.kind, config.noise.snr_db, None)
    splits, beats = {}, {}
    for split in classify.SPLITS:
        training, test = classify.select_beats(config.data.dir, split, config.seed)
        variables = _classifier(folder / f"classifier_{split}.npz", training, config.seed, log)
        rows = {"clean": classify.score(variables, test), "noisy": classify.score(variables, test, source)}
        for cell in cells:
            denoise = _denoiser(cell, workdir, reproduce_cells.config_of(cell, workdir, overrides))
            rows[cell.model] = denoise and classify.score(variables, test, source, denoise)
        splits[split], beats[split] = rows, {"train": len(training), "test": len(test)}
        for name, row in rows.items():
            log(f"{split} {name}: " + ("not done" if row is None else f"F1 {row['f1']:.4f}"))
    result = {
        "table": "classify",
        "splits": splits,
        "beats": beats,
        "denoisers": {cell.name: _state(cell, workdir, overrides) for cell in cells},
        "provenance": provenance.describe(config, 1),
    }
    checkpoint.write_json(folder / "table.json", result)
    checkpoint.write_text(folder / "table.md", markdown(result))
    log(f"written to {folder}: table.json, table.md")
    return result


def _state(cell: Cell, workdir: str | Path, overrides: list[str]) -> str:
    return reproduce_cells.state_of(cell, workdir, reproduce_cells.config_of(cell, workdir, overrides))


def _classifier(path: Path, training: input_pipeline.Windows, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    if path.exists():
        return classify.load_classifier(path)
    log(f"training {path.stem} on {len(training):,} beats")
    variables, _ = classify.train_classifier(training, seed, log=log)
    classify.save_classifier(path, variables)
    return variables


def _denoiser(cell: Cell, workdir: str | Path, config: ConfigDict) -> Callable[[np.ndarray], np.ndarray] | None:
    """The cell's denoiser `[B, L, C]` → the same shape; None for a cell that is not done."""
    if not cell.learns:
        return filters.FILTERS[cell.model]
    if reproduce_cells.result_of(cell, workdir, config) is None:
        return None
    model, state = evaluate.restore_state(config, cell.folder(workdir), jax.devices()[:1], "last")
    apply = jax.jit(model.apply)
    return lambda windows: np.asarray(apply(state.variables, windows))


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["# Normal against ventricular beats, emb −4 dB (positive: ventricular)", ""]
    for split, rows in table["splits"].items():
        beats = table["beats"][split]
        lines += [f"## {_TITLES[split]}: {beats['train']:,} beats train, {beats['test']:,} test", ""]
        lines += ["| windows | " + " | ".join(_MEASURES) + " |", "|---|" + "---:|" * len(_MEASURES)]
        for name, row in rows.items():
            figures = ["–" if row is None else f"{row[measure]:.4f}" for measure in _MEASURES]
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
        lines.append("")
    states = "; ".join(f"`{name}` {state}" for name, state in table["denoisers"].items())
    lines += [
        "The denoisers are those of the paper's table, which have seen windows of all records, tested ones included: "
        f"{states}. The classifier is trained on clean windows, one seed.",
        "",
    ]
    return "\n".join(lines)
