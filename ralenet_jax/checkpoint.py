"""What a run leaves in its work directory to go on from: its configuration, and Orbax checkpoints by step.

Kept are the newest checkpoint (to resume from) and the best by validation SNR (to use). All that knows Orbax is here.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from configs import ralenet as default_config
from ralenet_jax.errors import UserError, reason, writing

STARTS = "starts.json"
_METRIC, _DIGEST, _POSITION = "snr_db", "digest", "input_position"
# What may differ between a run and its continuation: where data lies, what it runs on, how long, how it is tested.
# A base is read before the first step and never again.
_MAY_CHANGE = (
    "data.dir",
    "data.stream",
    "model.base",
    "num_devices",
    "distributed.",
    "train.epochs",
    "train.eval_every",
    "train.checkpoint_every",
    "eval.",
)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text so that the file is either the old one or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with the keys joined: {"a": {"b": 1}} → {"a.b": 1}."""
    joined = {}
    for key, value in tree.items():
        joined |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return joined


def read_config(workdir: str | Path) -> ConfigDict:
    """The locked configuration of the run in `workdir`; raises `UserError` where there is none."""
    path = _config_path(workdir)
    try:
        return ConfigDict(dict(json.loads(path.read_text()))).lock()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {workdir} (no config.json); name the --workdir of a training run") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); restore it, or start in a new --workdir") from None


def typed_config(settings: Any, source: str | Path) -> ConfigDict:
    """The locked configuration with these settings, read from JSON in `source`, and the default one's types.

    Raises:
        UserError: for settings of another version.
    """
    config = default_config.get_config()  # JSON tells neither a tuple nor what may stand in place of None
    default = flat(config.to_dict())
    try:
        config.update(settings)
        for key, value in flat(config.to_dict()).items():  # it takes None for anything, and True for a number
            was = default[key]
            if was is not None and (value is None or isinstance(value, bool) != isinstance(was, bool)):
                raise TypeError(f"{key} is {value}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        told = reason(ValueError(*error.args[:1])).partition(". ")[0]  # KeyError would add quotes
        raise UserError(f"the configuration in {source} is not of this version ({told}); make it anew") from error
    return config


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """What the run in `workdir` was started and resumed with: a step and a provenance each; none where nothing is."""
    path = Path(workdir) / STARTS
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}); delete it to go on without") from error


def is_saved(workdir: str | Path) -> bool:
    """Whether there is a checkpoint in `workdir` to resume from; nothing is written to find out."""
    return bool(ocp.utils.checkpoint_steps(_directory(workdir)))


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two configurations are not of the same run: (key, theirs, mine) for each such key, None where it lacks.

    What an older one does not have is as in the default configuration.
    """
    default = flat(json.loads(default_config.get_config().to_json()))
    theirs, mine = default | flat(theirs), default | flat(mine)
    keys = [key for key in sorted(theirs.keys() | mine.keys()) if not key.startswith(_MAY_CHANGE)]
    return [(key, theirs.get(key), mine.get(key)) for key in keys if theirs.get(key) != mine.get(key)]


@contextlib.contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`; the system takes the lock back however this process ends.

    Raises:
        UserError: if another run is in there.
    """
    path = Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is under way in {workdir}; wait for its end or stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            print(f"no locks in {workdir} ({error.strerror}): take care that only one run is there", file=sys.stderr)
        yield


def claim(workdir: str | Path, config: ConfigDict) -> None:
    """Makes `workdir` this run's, or checks that the run there has the same configuration.

    Raises:
        UserError: if another configuration was started there, naming the first difference.
    """
    path = _config_path(workdir)
    mine, default = (json.loads(each.to_json()) for each in (config, default_config.get_config()))
    mine["distributed"] = default["distributed"]  # the given one is of this start alone
    if path.exists():
        for key, found, given in differences(json.loads(read_config(workdir).to_json()), mine):
            raise UserError(
                f"{workdir} holds a run with {key}={found}, now {given} was given; "
                "use its configuration to resume it, or another --workdir"
            )
    try:
        write_json(path, mine)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --workdir") from error


def is_claimed(workdir: str | Path) -> bool:
    """Whether `workdir` is a run's."""
    return _config_path(workdir).exists()


def _config_path(workdir: str | Path) -> Path:
    return Path(workdir) / "config.json"


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """As `writing`, whatever Orbax makes of a refusal; that another process is gone is not one."""
    try:
        with writing(folder, Exception):
            yield
    except UserError as error:
        if jax.process_count() > 1 and isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            raise error.__cause__ from None
        raise


def _score(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def _digest(state: Any, metrics: dict[str, float] | None) -> str:
    """SHA-256 of what a checkpoint holds. Orbax itself would take a changed byte of an array for a number."""
    found = hashlib.sha256(json.dumps(metrics).encode())
    for leaf in map(np.asarray, jax.tree.leaves(state)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return found.hexdigest()


class Checkpointer:
    """Checkpoints of the run in `workdir`. A context manager: leaving it waits for what is being written.

    With `read_only` nothing is changed there: a training may be under way, or the folder not be ours.

    Raises:
        UserError: if they cannot be read or written.
    """

    def __init__(self, workdir: str | Path, read_only: bool = False):
        for name in ("absl", "asyncio"):  # Orbax's threads speak through them; what failed is raised too
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policies = [
            preservation_policy.LatestN(1),
            preservation_policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_score,  # without it the metrics are not written, and a resumed run does not know its best
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self.directory = _directory(workdir)
        with writing(self.directory):
            try:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
                self.best_step  # noqa: B018 (it reads all measures)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"a metrics/metrics in {self.directory} cannot be read ({reason(error)}); delete the checkpoint "
                    "that it is of, or start in a new --workdir"
                ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_):
        with _saving(self.directory):
            self._manager.close()

    def save(self, state: Any, snr_db: float | None, input_position: dict[str, Any] | None = None) -> None:
        """Saves the state under its step, with the validation SNR in dB if it was measured there.

        All processes call it and have the whole state; the first one writes it, from memory of its own: on devices
        Orbax would have it cut into a part for each, array by array.

        Streamed input has a position, in JSON's types and the same on all processes; it lies beside the state.
        """
        state = jax.device_get(state)
        metrics = None if snr_db is None else {_METRIC: snr_db}
        step = int(state.step)
        custom = {_DIGEST: _digest(state, metrics)}
        if input_position is not None:
            custom[_POSITION] = input_position
        with _saving(self.directory):
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, custom_metadata=custom)

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with _saving(self.directory):
            self._manager.wait_until_finished()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the best validation SNR."""
        scored = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        return max((step for step in scored if scored[step]), key=lambda step: scored[step][_METRIC], default=None)

    @property
    def input_position(self) -> dict[str, Any] | None:
        """Position of the input that was saved with the newest checkpoint; None where its input was in memory."""
        return self._manager.metadata(self.latest_step).custom_metadata.get(_POSITION)

    def restore(self, target: Any, step: int | None = None) -> Any:
        """Restores a state like `target` (structure, shapes, placement) from `step`, by default the newest.

        Raises:
            UserError: if there is no such checkpoint or it does not fit the target.
        """
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            steps = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self.directory} (there: {steps}); train first")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            saved = (self._manager.metadata(step).custom_metadata or {}).get(_DIGEST)  # an older one has none
            if saved not in (None, _digest(state, self._manager.metrics(step))):
                raise ValueError("it is not what was saved")
            return state
        except Exception as error:
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} cannot be read "
                f"({reason(error)}); delete that folder to go on from an older one, "
                "or start in a new --workdir"
            ) from error
