"""Evaluation of a trained run: all measures, for every condition, over every window of a split."""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ralenet_jax import augment, checkpoint, input_pipeline, noise, optim, programs, provenance, steps, writer
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError, writing

RESULT = "evaluation.json"
_COLUMNS = ("snr_db", "snr_improvement_db", "pooled_snr_db", "rmse", "prd", "ssd", "mad", "cosine")
_HEART_COLUMNS = ("qrs_amplitude_error", "st_level_error")


def choose_devices(config: ConfigDict, *batch_sizes: int) -> list[jax.Device]:
    """The devices to run on; over several processes as many of each, process after process.

    Raises:
        UserError: if there are fewer than asked for, or a batch is empty or cannot be split evenly over them.
    """
    processes = jax.process_count()
    own = [[device for device in jax.devices() if device.process_index == number] for number in range(processes)]
    there = processes * min(map(len, own))
    if not 0 <= config.num_devices <= there:
        raise UserError(f"num_devices is {config.num_devices}; expected 0 (all) to {there}, the devices here")
    if config.eval.batch_size < 1:
        raise UserError(f"eval.batch_size is {config.eval.batch_size}; expected 1 or more")
    # All that share the batches evenly: a machine of 6 or 12 cores trains batches of 32 too.
    numbers = range(processes, there + 1, processes)
    even = [number for number in numbers if not any(size % number for size in batch_sizes)]
    wanted = config.num_devices or (even[-1] if even else processes)
    if wanted not in even:
        sizes = " and ".join(map(str, batch_sizes))
        over = f" over {processes} processes" if processes > 1 else ""
        raise UserError(
            f"a batch of {sizes} windows does not divide by {wanted} devices{over}; change it or num_devices"
        )
    return [device for devices in own for device in devices[: wanted // processes]]


def build_eval_step(config: ConfigDict, model: Any, devices: list[jax.Device]) -> Callable:
    """`steps.build_eval_step`, its programs kept for the next start."""
    eval_step = steps.build_eval_step(model, config.protocol, devices)
    return programs.kept(eval_step, devices, repr(model), config.protocol)


def noise_source(config: ConfigDict, recordings: np.ndarray, split: str, kinds: str, low: float, high: float | None):
    """The noise of a split under a condition: what `steps` takes. Its key comes from `noise.seed`."""
    span = input_pipeline.noise_span(config, split, recordings.shape[1])
    chosen = noise.condition(kinds, low, high, span)
    if config.data.database == input_pipeline.RECORDINGS:
        recordings, chosen = augment.unit_noise(recordings, chosen)
    return steps.NoiseSource(recordings, chosen, jax.random.key(config.noise.seed))


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means over windows from their sums, and the SNR pooled over all windows (averages of dB flatter)."""
    count = sums["count"]
    means = {name: sums[name] / count for name in (*_COLUMNS, *_HEART_COLUMNS) if name in sums}
    pooled = 10 * math.log10(max(sums["signal_energy"], 1e-20) / max(sums["error_energy"], 1e-20))
    return means | {"pooled_snr_db": pooled, "windows": int(count)}


def evaluate_windows(
    eval_step: Callable, variables: Any, batches: Iterable[dict[str, np.ndarray]], source: steps.NoiseSource
) -> dict[str, dict[str, float]]:
    """Runs an evaluation step over batches: {"denoised": means, "noisy": means}. Sums are kept in float64."""
    totals: dict[str, dict[str, float]] = {"denoised": {}, "noisy": {}}
    for batch in batches:
        # Fetched before the next dispatch: an unbounded queue over several CPU devices can abort in a collective.
        for row, sums in jax.device_get(eval_step(variables, batch, source)).items():
            for name, value in sums.items():
                totals[row][name] = totals[row].get(name, 0.0) + float(value)
    return {row: summarise(sums) for row, sums in totals.items()}


def restore_state(
    config: ConfigDict,
    workdir: str | Path,
    devices: list[jax.Device],
    which: str,
    shape: tuple[int, int] | None = None,
):
    """The model and its trained state on `devices`, from the "last" or "best" checkpoint or that of a step.

    `shape` is that of a window (samples, leads); by default the one of the configured data.

    Raises:
        UserError: if there is no such checkpoint.
    """
    model = train_state.model_from_config(config, steps.AXIS)
    # Evaluation needs no optimiser, but the checkpoint holds its state, whose shapes do not depend on the total.
    optimizer = optim.build_optimizer(config, 1, model)
    with checkpoint.Checkpointer(workdir, read_only=True) as saved:
        steps_by_name = {"last": saved.latest_step, "best": saved.best_step}
        if which not in steps_by_name and not which.isdecimal():
            raise UserError(f"checkpoint {which!r}; expected last, best or the number of a step")
        step = steps_by_name[which] if which in steps_by_name else int(which)
        if which == "best" and step is None:
            raise UserError(f"no checkpoint in {saved.directory} was validated; use the last, or train on")
        shape = shape or input_pipeline.window_shape(config)
        # Shapes are enough: the values are in the checkpoint.
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=steps.replicated(devices)),
            jax.eval_shape(lambda: train_state.create_state(model, optimizer, config.seed, shape)),
        )
        return model, saved.restore(target, step)


def _conditions(config: ConfigDict) -> list[tuple[str, float, float | None]]:
    kinds = noise.parse_kinds(config.eval.kinds) if config.eval.kinds else (config.noise.kind,)
    if not all(type(snr) in (int, float) for snr in config.eval.snr_db):
        raise UserError(f"eval.snr_db is {tuple(config.eval.snr_db)}; expected numbers, in dB")
    if config.eval.snr_db:
        return [(kind, float(snr), None) for kind in kinds for snr in config.eval.snr_db]
    return [(kind, config.noise.snr_db, config.noise.snr_db_high) for kind in kinds]


def _name(kinds: str, low: float, high: float | None) -> str:
    return f"{kinds}@{low:g}" if high is None else f"{kinds}@{low:g}..{high:g}"


def evaluate(
    config: ConfigDict,
    workdir: str | Path,
    which: str = "last",
    split: str = "test",
    records: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a trained run on a split ("test" or "validation") and writes `evaluation.json` into its work directory.

    Args:
        config: the run's configuration, `eval.*` as wanted now.
        workdir: the run's work directory.
        which: the "last" checkpoint, the "best" by validation SNR, or the number of a step.
        split: "test" or "validation".
        records: folder of the WFDB recordings that the windows are from; given, R peaks are also detected in the whole
            recordings, clean, noisy and denoised (mitdb under the honest protocol only).
        log: takes lines of text.

    Returns:
        What the file holds: "conditions" ({"bw@-4": {"denoised": {…}, "noisy": {…}}}), "heartbeats" (None without
        `records`), "learning_curve", "checkpoint" (its step), "provenance" and more.

    Raises:
        UserError: for a missing run, checkpoint or shard set, or an unknown condition.
    """
    conditions = _conditions(config)
    if records is not None:
        _check_recordings(config, conditions, records)
    devices = choose_devices(config)
    model, state = restore_state(config, workdir, devices, which)
    windows = input_pipeline.read_split(config, split)
    log(f"evaluating step {int(state.step)} of {workdir} on {len(windows):,} {split} windows, {len(devices)} device(s)")
    eval_step = build_eval_step(config, model, devices)
    result = _measure(config, eval_step, state.variables, windows, split, devices) | {
        "checkpoint": int(state.step),
        "parameters": train_state.count_parameters(state.params),
        "trainable_parameters": train_state.count_trainable(model, state.params),
        "heartbeats": None,
        "learning_curve": learning_curve(workdir),
        "trained_from": checkpoint.read_starts(workdir),
    }
    log(format_table(result))
    if records is not None:
        names = sorted(set(windows.record.tolist()))
        result["heartbeats"] = _heartbeats(config, model, state, split, records, names, conditions, log)
    _write(result, workdir, log)
    return result


def evaluate_weights(
    config: ConfigDict,
    variables: dict[str, Any],
    workdir: str | Path,
    split: str = "test",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates weights that were exported, as `export.load` gives them with their configuration; as `evaluate` does.

    Args:
        config, variables: of the model.
        workdir: where `evaluation.json` goes.
        split: "test" or "validation".
        log: takes lines of text.

    Raises:
        UserError: for a missing shard set, or an unknown condition.
    """
    devices = choose_devices(config)
    model = train_state.model_from_config(config, steps.AXIS)
    windows = input_pipeline.read_split(config, split)
    log(f"evaluating {config.model.name} on {len(windows):,} {split} windows, {len(devices)} device(s)")
    eval_step = build_eval_step(config, model, devices)
    result = _measure(config, eval_step, steps.replicate(variables, devices), windows, split, devices)
    log(format_table(result))
    _write(result, workdir, log)
    return result


def evaluate_filter(
    config: ConfigDict, workdir: str | Path, split: str = "test", log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Evaluates a filter as `evaluate` does a model: the same windows, noise, measures and file.

    Args:
        config: its `model.name` is one of `filters.FILTERS`.
        workdir: where `evaluation.json` goes.
        split: "train", "validation" or "test".
        log: takes lines of text.

    Raises:
        UserError: for a missing shard set, or an unknown condition.
    """
    from ralenet_jax import filters  # as SciPy below: a training has no use for it

    devices = choose_devices(config)[:1]
    windows = input_pipeline.read_split(config, split)
    apply = filters.FILTERS[config.model.name]
    log(f"evaluating {config.model.name} on {len(windows):,} {split} windows")
    mix = jax.jit(functools.partial(steps.denoise_step, _Nothing, config.protocol))
    measure = jax.jit(steps.measure)

    def eval_step(variables, batch, source):
        batch = {name: array[0] for name, array in batch.items()}  # of the one device
        mixed = jax.device_get(mix(variables, batch, source))
        return measure(mixed["clean"], mixed["noisy"], apply(mixed["noisy"]), batch["mask"])

    result = _measure(config, eval_step, {}, windows, split, devices)
    log(format_table(result))
    _write(result, workdir, log)
    return result


class _Nothing:
    """Stands for a model that gives back what it gets."""

    @staticmethod
    def apply(_, noisy):
        return noisy


def _measure(config, eval_step, variables, windows, split, devices) -> dict[str, Any]:
    """What every evaluation holds: its conditions with their measures, and where they came from."""
    recordings = steps.replicate(input_pipeline.read_noise(config), devices)
    results = {}
    for condition in _conditions(config):
        batches = input_pipeline.eval_batches(windows, config.eval.batch_size, len(devices))
        source = noise_source(config, recordings, split, *condition)
        results[_name(*condition)] = evaluate_windows(eval_step, variables, batches, source)
    return {
        "conditions": results,
        "split": split,
        "units": "z-scored" if config.protocol == "paper" else "mV",
        "provenance": provenance.describe(config, len(devices)),
    }


def _write(result: dict[str, Any], workdir: str | Path, log: Callable[[str], None]) -> None:
    with writing(workdir):
        checkpoint.write_json(Path(workdir) / RESULT, result)
    log(f"written to {Path(workdir) / RESULT}")


def learning_curve(workdir: str | Path) -> list[dict[str, float]]:
    """The validations of the run in `workdir`: step, epoch, SNR in dB and RMSE of each."""
    names = ("epoch", "snr_db", "rmse")
    lines = [line for line in writer.read_history(workdir) if "validation/epoch" in line]
    return [{"step": line["step"]} | {name: line[f"validation/{name}"] for name in names} for line in lines]


def _check_recordings(config: ConfigDict, conditions: list[tuple], records: str | Path) -> None:
    if not Path(records).is_dir():
        raise UserError(f"--records {records} is no folder; name the one with the .hea, .dat and .atr files")
    if config.data.database != "mitdb":
        raise UserError(f"--records needs a run on mitdb, this one is on {config.data.database}; leave it out")
    if config.protocol != "honest":
        raise UserError(f"--records needs a run of the honest protocol, this one is {config.protocol!r}; leave it out")
    if any("," in kinds or high is not None for kinds, _, high in conditions):
        raise UserError("whole recordings take one kind of noise and one SNR at a time; set eval.kinds and eval.snr_db")


def _heartbeats(config, model, state, split, records, names, conditions, log) -> dict[str, dict[str, float]]:
    """R-peak F1 of whole recordings, `heartbeats.evaluate_recordings` with this model and this split's noise."""
    from ralenet_jax import heartbeats  # with SciPy's signal processing and wfdb half of what a start imports

    recordings = input_pipeline.read_noise(config)
    start, end = input_pipeline.noise_span(config, split, recordings.shape[1])
    apply = jax.jit(model.apply)
    variables = jax.device_get(state.variables)
    found = heartbeats.evaluate_recordings(
        lambda noisy: np.asarray(apply(variables, noisy)),
        records,
        names,
        recordings[:, start:end],
        [(kind, snr_db) for kind, snr_db, _ in conditions],
        input_pipeline.window_shape(config)[0],
        log,
    )
    for name, scores in found.items():
        parts = ", ".join(f"{part} {scores[part]:.4f}" for part in ("clean", "noisy", "denoised"))
        log(f"{name}: R-peak F1 within 150 ms: {parts} ({scores['recordings']} whole recordings)")
    return found


def format_table(result: dict[str, Any]) -> str:
    """The measures as text: for each condition the noisy input's row and the denoised output's."""
    columns = (*_COLUMNS, *_HEART_COLUMNS)
    rows = [("condition", "", *(name.removesuffix("_error") for name in columns))]
    for name, parts in result["conditions"].items():
        rows += [(name, part, *(_rounded(parts[part][column]) for column in columns)) for part in ("noisy", "denoised")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + f"\n(means over windows; amplitudes in {result['units']} units, prd in percent)"


def _rounded(value: float) -> str:
    # Rounding leaves 1e-8 dB where there is none; adding zero takes the sign from -0.
    return f"{round(value, 6) + 0.0:.4g}"


def example_windows(
    config: ConfigDict, workdir: str | Path, count: int = 3, which: str = "last"
) -> dict[str, np.ndarray]:
    """A few test windows, evenly chosen: "clean", "noisy", "denoised", each `[count, L, C]` in the metrics' units.

    For a filter, which `config.model.name` may name, nothing is read from the work directory.

    Raises:
        UserError: for a missing run, checkpoint or shard set.
    """
    from ralenet_jax import filters

    devices = choose_devices(config)[:1]
    if config.model.name in filters.FILTERS:
        model, variables = _Nothing, {}
    else:
        model, state = restore_state(config, workdir, devices, which)
        variables = state.variables
    windows = input_pipeline.read_split(config, "test")
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    source = noise_source(config, input_pipeline.read_noise(config), "test", *_conditions(config)[0])
    step = jax.jit(functools.partial(steps.denoise_step, model, config.protocol))
    examples = jax.device_get(step(variables, {"clean": chosen.millivolts(), "id": chosen.id}, source))
    if model is _Nothing:
        examples["denoised"] = filters.FILTERS[config.model.name](examples["noisy"])
    return examples
