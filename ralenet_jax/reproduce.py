"""The command `ralenet reproduce`: trains and evaluates what a published table consists of, and compares."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ralenet_jax import (
    checkpoint,
    evaluate,
    input_pipeline,
    reproduce_cells,
    reproduce_classify,
    reproduce_tables,
    startup,
    train,
)
from ralenet_jax.errors import UserError, writing
from ralenet_jax.reproduce_cells import TABLES, Cell

_CLASSIFY = "classify"  # made of classifiers, not of cells


def reproduce(
    table: str, workdir: str | Path, overrides: list[str] = (), only: list[str] = (), log=print
) -> dict[str, Any]:
    """Makes the cells of a table that are not done, and writes the table anew after each.

    Args:
        table: one of `reproduce_cells.TABLES`.
        workdir: below it each table has a folder, and in it each cell.
        overrides: of the configuration of all cells, such as "train.epochs=30".
        only: cells to make, as `reproduce_cells.cells` takes them; the table holds all that are done.
        log: takes lines of text.

    Returns:
        What `table.json` holds.

    Raises:
        UserError: for unknown cells, bad settings, data that is not there, another run in a cell's folder, or a full
            disk.
        Interrupted: after SIGINT or SIGTERM; the same call goes on from there.
    """
    wanted = reproduce_cells.cells(table, only)
    with writing(workdir):
        result = _written(table, workdir, overrides)
        for cell in wanted:
            config = reproduce_cells.config_of(cell, workdir, overrides)
            if reproduce_cells.result_of(cell, workdir, config) is None:
                reproduce_cells.make(cell, workdir, overrides, log)
                result = _written(table, workdir, overrides)
        _draw(table, workdir, overrides, result, log)
    log(f"written to {Path(workdir) / table}: table.json, table.md, table.png, windows.png")
    return result


def _results(table: str, workdir: str | Path, overrides: list[str]) -> dict[Cell, dict[str, Any] | None]:
    return {
        cell: reproduce_cells.result_of(cell, workdir, reproduce_cells.config_of(cell, workdir, overrides))
        for cell in reproduce_cells.cells(table)
    }


def _written(table: str, workdir: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Writes `table.json` and `table.md` from what is done."""
    config = reproduce_cells.config_of(reproduce_cells.cells(table)[-1], workdir, overrides)
    devices = len(evaluate.choose_devices(config, config.train.batch_size))
    result = reproduce_tables.collect(table, _results(table, workdir, overrides), devices)
    folder = Path(workdir) / table
    checkpoint.write_json(folder / "table.json", result)
    checkpoint.write_text(folder / "table.md", reproduce_tables.markdown(result, config.train.epochs))
    return result


def _draw(table: str, workdir: str | Path, overrides: list[str], result: Mapping[str, Any], log) -> None:
    """Draws `table.png`, with the learning curves, and `windows.png`, the same window by every model."""
    try:
        from ralenet_jax import plots
    except ImportError as error:
        log(f"no figures: {error}")
        return
    folder = Path(workdir) / table
    curves = {name: run["learning_curve"] for name, run in result["runs"].items() if run.get("learning_curve")}
    rows = reproduce_tables.figure_rows(result)
    plots.table_figure(folder / "table.png", reproduce_tables.headings(), rows, curves)
    examples = _examples(table, workdir, overrides, result)
    if examples:
        arrays = {
            name: np.concatenate([each[name] for each in examples.values()]) for name in ("noisy", "denoised", "clean")
        }
        units = next(iter(result["runs"].values()))["units"]
        plots.windows_figure(folder / "windows.png", **arrays, titles=list(examples), units=units)


def _examples(table: str, workdir: str | Path, overrides: list[str], result) -> dict[str, dict[str, np.ndarray]]:
    """One test window, noisy, clean and denoised by every model of the condition that most models are there for."""
    done = [
        cell
        for cell in reproduce_cells.cells(table)
        # A figure outlives its weights: they take room, and may be deleted.
        if cell.name in result["runs"] and (not cell.learns or checkpoint.is_saved(cell.folder(workdir)))
    ]
    conditions = [(cell.kind, cell.snr_db) for cell in done]
    if not done:
        return {}
    chosen = max(conditions, key=conditions.count)
    cells = {cell.model: cell for cell in done if (cell.kind, cell.snr_db) == chosen}
    return {
        model: evaluate.example_windows(
            reproduce_cells.config_of(cell, workdir, overrides), cell.folder(workdir), count=1
        )
        for model, cell in cells.items()
    }


def list_cells(table: str, workdir: str | Path, overrides: list[str] = (), only: list[str] = (), log=print) -> None:
    """Tells the state of each cell, and how long what is missing will take on this device."""
    wanted = reproduce_cells.cells(table, only)
    windows = len(input_pipeline.read_split(reproduce_cells.config_of(wanted[-1], workdir, overrides), "train"))
    total = 0.0
    for cell in wanted:
        config = reproduce_cells.config_of(cell, workdir, overrides)
        seconds = reproduce_cells.seconds_left(cell, workdir, config, windows)
        to_go = f"{_duration(seconds)} to go" if seconds else ""
        log(f"{cell.name:<24} {reproduce_cells.state_of(cell, workdir, config):<24} {to_go}".rstrip())
        total += seconds
    log(f"{_duration(total)} of training to go in all")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ralenet reproduce",
        description="Train and evaluate what a published table consists of; write measured, published and difference.",
        epilog="Further options: --config.KEY=VALUE for any key of the configuration, for all cells. The same call "
        "again goes on where this one stopped; what is done is not done again.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--table", default="paper", choices=(*TABLES, _CLASSIFY), help="what to reproduce (%(default)s)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="CELL", help="such as ralenet:bw:-4, or unet")
    parser.add_argument("--list", action="store_true", help="tell the cells, their state and the time they take")
    parser.add_argument("--check", action="store_true", help="is it the same when run twice? PASS, FAIL or SKIP a line")
    parser.add_argument("--parity", metavar="DIR", help="with --check: numbers of the published models, NAME.npz")
    parser.add_argument("--source", metavar="DIR", help="with --check: the databases, to build the shards anew")
    parser.add_argument("--workdir", default="runs/reproduce", help="folder for runs and tables (%(default)s)")
    parser.add_argument("--data-dir", help="folder that `ralenet prepare` wrote (default: data)")
    parser.add_argument("--epochs", type=int, help="epochs of each training, instead of the configured ones")
    return parser


def _run(argv: list[str]) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = []
    for text in rest:
        if not text.startswith("--config."):
            parser.error(f"unknown argument {text!r}; see ralenet reproduce --help")
        overrides.append(text.removeprefix("--config."))
    if arguments.data_dir:
        overrides.append(f"data.dir={arguments.data_dir!r}")
    if arguments.epochs is not None:
        overrides.append(f"train.epochs={arguments.epochs}")
    startup.start_jax()
    if arguments.table == _CLASSIFY:
        if arguments.check or arguments.list or arguments.only:
            parser.error("--table classify takes no --check, --list or --only: it has no cells of its own")
        reproduce_classify.reproduce(arguments.workdir, overrides)
        return 0
    if arguments.check:
        from ralenet_jax import determinism  # and with it the preparation of data

        lines = determinism.check(TABLES[arguments.table].config, overrides, arguments.parity, arguments.source)
        return int(any(line.state == determinism.FAIL for line in lines))
    do = list_cells if arguments.list else reproduce
    do(arguments.table, arguments.workdir, overrides, arguments.only)
    return 0


def main(argv: list[str]) -> int:
    """Runs the command; the exit code: 0, 1 for a failed training or check, 2 for bad input, 130 or 143 interrupted."""
    try:
        return _run(argv)
    except UserError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except train.NonFiniteLoss as error:
        print(f"ralenet: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"ralenet: {stop or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", 2)
