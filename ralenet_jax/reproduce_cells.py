"""The cells of a table: a model trained, or a filter applied, under one condition; their state, and how they are made.

A cell has a work directory of its own, which is an ordinary run: it resumes where it stopped, and `ralenet evaluate`
takes it. It counts as done when its evaluation is of the last step of the configured training, and not before.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ralenet_jax import benchmark_parts, checkpoint, evaluate, filters, main, provenance, train, writer
from ralenet_jax.errors import UserError

CONDITIONS = (("bw", -4), ("ma", -4), ("em", -4), ("emb", -4), ("emb", -2), ("emb", 0), ("emb", 2), ("emb", 4))
_MODELS = ("dwt", "fft", "unet", "danet", "acdae", "ralenet_nra", "ralenet_mlp", "ralenet")
_BASE = "ralenet"  # of the 12-lead model: the two-lead model of the same cell


@dataclasses.dataclass(frozen=True)
class Table:
    """A table's rows, the configuration its cells overlay, and the seeds that each cell is trained with."""

    config: str
    models: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


TABLES = {
    "paper": Table("ralenet", _MODELS),
    "honest": Table("honest", _MODELS, (0, 1, 2)),
    "twelve-lead": Table("twelve_lead", ("ralenet_12lead",)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training, or one filter's evaluation: `table` names its entry in `TABLES`, `snr_db` is in dB."""

    table: str
    model: str
    kind: str
    snr_db: float
    seed: int

    @property
    def learns(self) -> bool:
        """Whether there is something to train."""
        return self.model not in filters.FILTERS

    @property
    def name(self) -> str:
        """As `--only` takes it: "ralenet:bw:-4", with the seed where there are several."""
        return ":".join(self._parts())

    def folder(self, workdir: str | Path) -> Path:
        """Its work directory below that of the reproduction."""
        return Path(workdir) / self.table / "_".join(self._parts())

    def _parts(self) -> list[str]:
        several = self.learns and len(TABLES[self.table].seeds) > 1
        return [self.model, self.kind, f"{self.snr_db:g}", *([f"{self.seed}"] if several else [])]


def cells(table: str, only: Iterable[str] = ()) -> list[Cell]:
    """The cells of a table, in the order they are made, or those that `only` names.

    Args:
        table: one of `TABLES`.
        only: names such as "ralenet:bw:-4", or their beginnings, such as "unet" or "ralenet:emb".

    Raises:
        UserError: for a name that fits no cell.
    """
    rows = TABLES[table]
    found = [
        Cell(table, model, kind, snr_db, seed)
        for model, (kind, snr_db), seed in itertools.product(rows.models, CONDITIONS, rows.seeds)
        # A filter draws nothing: one seed is all.
        if seed == rows.seeds[0] or model not in filters.FILTERS
    ]
    only = list(only)
    for wanted in only:
        if not any(_named(cell, wanted) for cell in found):
            raise UserError(
                f"--only {wanted} fits no cell of the table {table!r}; give MODEL:KIND:SNR, such as "
                f"{found[-1].name}, or its beginning (models: {', '.join(rows.models)})"
            )
    return [cell for cell in found if not only or any(_named(cell, wanted) for wanted in only)]


def _named(cell: Cell, wanted: str) -> bool:
    parts = wanted.split(":")
    return cell.name.split(":")[: len(parts)] == parts


def config_of(cell: Cell, workdir: str | Path, overrides: list[str]) -> ConfigDict:
    """The configuration of a cell: its table's, the cell's own keys, then `overrides` ("train.epochs=30")."""
    own = [
        f"model.name={cell.model}",
        f"noise.kind={cell.kind}",
        f"noise.snr_db={float(cell.snr_db)}",
        f"seed={cell.seed}",
    ]
    if cell.table == "twelve-lead":
        own.append(f"model.base={str(_base(cell).folder(workdir))!r}")
    return main.load_config(TABLES[cell.table].config, [*own, *overrides])


def _base(cell: Cell) -> Cell:
    return dataclasses.replace(cell, table="paper", model=_BASE)


def result_of(cell: Cell, workdir: str | Path, config: ConfigDict) -> dict[str, Any] | None:
    """The evaluation of a cell that is done, None for one that is not.

    A longer training than asked for counts. A work directory of another configuration is not this cell's: to make the
    cell there will fail, telling the difference.
    """
    result = _read(cell.folder(workdir) / evaluate.RESULT)
    settings = result.get("provenance", {}).get("config")
    if settings is None or checkpoint.differences(settings, json.loads(config.to_json())):
        return None
    if not cell.learns:
        return result
    curve = result["learning_curve"] or [{"step": None, "epoch": None}]
    last_epoch = settings["train"]["epochs"]
    trained = curve[-1] | {"checkpoint": result["checkpoint"]}
    whole = trained["epoch"] == last_epoch >= config.train.epochs and trained["step"] == trained["checkpoint"]
    return result if whole else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def state_of(cell: Cell, workdir: str | Path, config: ConfigDict) -> str:
    """In words: "done, 100 epochs", "in epoch 17 of 100", "not begun"."""
    result = result_of(cell, workdir, config)
    if result is not None:
        return f"done, {result['provenance']['config']['train']['epochs']} epochs" if cell.learns else "done"
    curve = evaluate.learning_curve(cell.folder(workdir))
    if not curve:
        return "not begun"
    return f"after epoch {curve[-1]['epoch']:g} of {config.train.epochs}"


def seconds_left(cell: Cell, workdir: str | Path, config: ConfigDict, windows: int) -> float:
    """How long the training of a cell that is not done will still take on this device.

    Args:
        cell, workdir, config: as for `result_of`.
        windows: that train in an epoch.
    """
    if not cell.learns or result_of(cell, workdir, config) is not None:
        return 0.0
    curve = evaluate.learning_curve(cell.folder(workdir))
    epochs = config.train.epochs - (curve[-1]["epoch"] if curve else 0)
    return max(epochs, 0) * windows / _windows_per_second(cell.model, str(workdir), config)


def _windows_per_second(model: str, workdir: str, config: ConfigDict) -> float:
    """How fast a model trains: as the cells trained on these devices told, or else as it is measured now."""
    here = provenance.device(len(evaluate.choose_devices(config, config.train.batch_size)))
    rates = [
        line["train/windows_per_s"]
        for table in TABLES
        for path in Path(workdir, table).glob("*/config.json")
        if _read(path).get("model", {}).get("name") == model
        and all(start["device"] == here for start in checkpoint.read_starts(path.parent))
        for line in writer.read_history(path.parent)
        if "train/windows_per_s" in line
    ]
    return statistics.median(rates) if rates else _measured(model, config.train.batch_size, config.num_devices)


@functools.cache
def _measured(model: str, batch_size: int, num_devices: int) -> float:
    # What the 12-lead model adds to the one it is built on takes next to no time.
    name = _BASE if model == "ralenet_12lead" else model
    settings = [f"model.name={name}", f"train.batch_size={batch_size}", f"num_devices={num_devices}"]
    config = main.load_config("ralenet", settings)
    devices = evaluate.choose_devices(config, batch_size)
    training = benchmark_parts.Training(config, devices, benchmark_parts.LENGTH)
    return benchmark_parts.windows_per_second(training, seconds=3)


def make(cell: Cell, workdir: str | Path, overrides: list[str], log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and evaluates a cell that is not done; gives its evaluation.

    Raises:
        UserError: for data that is not there, or a work directory that holds another run.
        NonFiniteLoss: as `train.train`.
        Interrupted: as `train.train`; what was trained is saved.
    """
    if cell.table == "twelve-lead":
        make(_base(cell), workdir, [text for text in overrides if text.startswith(_SHARED)], log)
    config = config_of(cell, workdir, overrides)
    result = result_of(cell, workdir, config)
    if result is not None:
        return result
    folder = cell.folder(workdir)
    log(f"\n{cell.table} {cell.name} ({state_of(cell, workdir, config)})")
    if not cell.learns:
        # The published row of the wavelets was taken on the windows that train; on a filter that makes no difference
        # but the number of windows.
        split = "train" if config.protocol == "paper" else "test"
        return evaluate.evaluate_filter(config, folder, split, log)
    train.train(config, folder)
    return evaluate.evaluate(config, folder, log=log)


# Of the overrides of a 12-lead cell, those that also hold for the model it is built on.
_SHARED = ("data.dir", "num_devices", "train.epochs", "train.steps_per_dispatch")
