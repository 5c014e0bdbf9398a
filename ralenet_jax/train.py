"""The training loop: blocks of steps, validation, checkpoints, until the last epoch or an interruption."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ralenet_jax import base_model, checkpoint, evaluate, hosts, input_pipeline, optim, programs, provenance, steps
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError, writing
from ralenet_jax.writer import Silent, Writer

_SECONDS_BETWEEN_LINES = 10.0


class Interrupted(KeyboardInterrupt):
    """The run was told to stop; it has saved. `signal` is what told it."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signal = signum


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; nothing of that was saved."""


class _Stop:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between dispatches; a second SIGINT ends it."""

    def __enter__(self):
        self.signal = None
        self._previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread: then signals are not ours
            pass
        return self

    def _note(self, number, _):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            # None: one that is not Python's, such as JAX's own between several processes; it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Progress:
    """A bar on a terminal, a plain line now and then elsewhere; of several processes only the first one speaks."""

    def __init__(self, step: int, total: int, epoch_steps: int, batch_size: int):
        silent = not (sys.stderr.isatty() and hosts.is_first())
        self._bar = tqdm(initial=step, total=total, unit="step", disable=silent, dynamic_ncols=True)
        self._total, self._epoch_steps, self._batch_size = total, epoch_steps, batch_size
        self._since, self._from = time.monotonic(), step
        self._told = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def line(self, text: str) -> None:
        if not hosts.is_first():
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def update(self, step: int, loss: float, snr_db: float) -> float | None:
        """Tells where the training is; gives the rate in windows a second when it told."""
        elapsed = time.monotonic() - self._since
        rate = (step - self._from) * self._batch_size / max(elapsed, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, SNR {snr_db:.2f} dB, {rate:.0f} windows/s", refresh=False)
            self._bar.update(step - self._bar.n)
        # The first line comes at once: until then there is a compilation to wait for, which is in no rate.
        first, self._told = not self._told, True
        if not first and elapsed < _SECONDS_BETWEEN_LINES and step < self._total:
            return None
        if self._bar.disable:
            where = f"step {step}/{self._total} (epoch {step / self._epoch_steps:.1f})"
            rate_text = "" if first else f", {rate:.0f} windows/s"
            self.line(f"{where}: loss {loss:.4f}, SNR {snr_db:.2f} dB{rate_text}")
        self.pause(step)
        return None if first else rate

    def pause(self, step: int) -> None:
        """Takes what came since out of the rate."""
        self._since, self._from = time.monotonic(), step


def _even_part(number: int, limit: int) -> int:
    """The length of the parts when `number` is cut into as few as `limit` allows, of lengths as even as can be."""
    return math.ceil(number / math.ceil(number / limit))


class _Run:
    """What a run is made of: data, noise, compiled steps, and the state that changes."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.batch_size = config.train.batch_size
        self.devices = evaluate.choose_devices(config, self.batch_size)
        self.patience = config.distributed.start_timeout_s
        self.host, self.hosts = jax.process_index(), jax.process_count()
        self.train_windows = input_pipeline.open_split(config, "train")
        self.epoch_steps = input_pipeline.steps_per_epoch(config, len(self.train_windows))
        self.total_steps = self.epoch_steps * config.train.epochs
        self.block_steps = _even_part(self.epoch_steps, config.train.steps_per_dispatch)
        self.stream: input_pipeline.BatchStream | None = None
        if config.data.stream:
            batches = (self.train_windows, config.seed, self.batch_size, self.total_steps)
            # One block: it is read while the devices work on the one before.
            self.stream = input_pipeline.BatchStream(*batches, self.block_steps, self.host, self.hosts)
        self._ahead: tuple[int, Any] = -1, None  # the step of the block read ahead, and what was read
        condition = (config.noise.kind, config.noise.snr_db, config.noise.snr_db_high)
        recordings = steps.replicate(input_pipeline.read_noise(config), self.devices)
        self.train_noise = evaluate.noise_source(config, recordings, "train", *condition)
        self.validation_noise = evaluate.noise_source(config, recordings, "validation", *condition)
        self.model = model = train_state.model_from_config(config, steps.AXIS)
        if config.model.base is not None and not hasattr(model, "FROZEN"):
            raise UserError(f"model.base is set, but {config.model.name} is not built around a trained model; unset it")
        self.base: dict[str, Any] | None = None  # where the frozen part came from, if it came in this start
        optimizer = optim.build_optimizer(config, self.total_steps, model)
        self.key = jax.random.key(config.seed)
        shape = self.train_windows.shape
        create = train_state.build_create(model, optimizer, config.seed, shape)
        made_of = repr(model), config.optim.to_json(), f"{config.seed} {shape}"
        create = programs.kept(create, jax.local_devices()[:1], *made_of)
        block = steps.build_train_block(model, optimizer, config.protocol, config.noise.fresh, self.devices)
        end = self.total_steps if config.optim.schedule != "constant" else None  # where the learning rate is to end
        made_of = repr(model), config.protocol, config.optim.to_json(), f"fresh {config.noise.fresh}, end {end}"
        self._block = programs.kept(block, self.devices, *made_of)
        self._eval_step = evaluate.build_eval_step(config, model, self.devices)
        self.validation_windows = input_pipeline.open_split(config, "validation")
        if self.stream is None:  # what is streamed stays on disk for validations too: they read it in order
            self.state = programs.shapes(create)
            programs.begin(self._block, *self._train_arguments(0)[1])
            # This and the initial values come while it is compiled.
            self.train_windows = input_pipeline.hold(self.train_windows)
            self.validation_windows = input_pipeline.hold(self.validation_windows)
        self.state = steps.replicate(create(), self.devices)

    def take_base(self) -> None:
        """Puts the trained model that `model.base` names into a fresh state, if the model is built around one."""
        if not hasattr(self.model, "FROZEN"):
            return
        shape = (self.train_windows.shape[0], self.model.BASE_LEADS)
        variables, self.base = base_model.read(self.config, shape, self.devices)
        parts = {name: values | {self.model.FROZEN: variables[name]} for name, values in self.state.variables.items()}
        self.state = self.state.replace(**parts)

    def train_block(self, step: int) -> dict[str, np.ndarray]:
        """Trains from `step` for one block, or to the end of the epoch; gives its scalars, each `[steps]`.

        The first block of all is one step, so that after the compilation something is soon seen.
        """
        count, arguments = self._train_arguments(step)
        self.state, scalars = self._block(*arguments)
        if self.stream is None and step + count < self.total_steps:
            self._ahead = step + count, self._read_block(step + count)  # while the devices compute
        # Fetched before the next dispatch: an unbounded queue over several CPU devices can abort in a collective.
        return {name: values[:count] for name, values in jax.device_get(scalars).items()}

    def _train_arguments(self, step: int) -> tuple[int, tuple]:
        at, read = self._ahead
        count, block = read if at == step else self._read_block(step)
        return count, (self.state, block, np.int32(count), self.train_noise, self.key)

    def _read_block(self, step: int) -> tuple[int, dict[str, np.ndarray]]:
        """The steps from `step` that one dispatch trains, and their windows."""
        limit = self.block_steps if step else 1
        count = min(limit, self.epoch_steps - step % self.epoch_steps)
        own = len(self.devices) // self.hosts
        # A shorter block is filled up, so that one compiled program serves all; what fills it is not trained on.
        if self.stream is not None:
            return count, self.stream.block(count, self.block_steps, own)
        seed, windows = self.config.seed, self.train_windows
        indices = input_pipeline.batch_indices(seed, step, count, len(windows), self.batch_size)
        indices = input_pipeline.host_share(indices, self.host, self.hosts)
        indices = np.pad(indices, ((0, self.block_steps - count), (0, 0)))
        return count, input_pipeline.train_block(windows, indices, own, seed, step // self.epoch_steps)

    def validate(self) -> dict[str, float]:
        """Measures on the validation windows."""
        batches, source = self._validation_batches(), self.validation_noise
        return evaluate.evaluate_windows(self._eval_step, self.state.variables, batches, source)["denoised"]

    def _validation_batches(self) -> Iterator[dict[str, np.ndarray]]:
        size, where = self.config.eval.batch_size, (len(self.devices), self.host, self.hosts)
        return input_pipeline.eval_batches(self.validation_windows, size, *where)

    def compile_together(self, step: int) -> None:
        """Over several processes, compiles before the first computation: some find their programs ready, others not."""
        if self.hosts > 1:
            self._block.lower(*self._train_arguments(step)[1]).compile()
            if self.stream is not None:
                self.stream.go_to(step)  # that block is still to be trained on
            batch = next(self._validation_batches())
            self._eval_step.lower(self.state.variables, batch, self.validation_noise).compile()
            hosts.wait(self.patience)


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, the run in `workdir` until its last epoch.

    Writes config.json, starts.json (what it was started and resumed with), metrics.jsonl, TensorBoard events and Orbax
    checkpoints there.

    Over several processes (`hosts.connect`) all call it with the same configuration and one work directory.

    Returns:
        {"step": last step, "validation": its measures, or None if the run was finished before}.

    Raises:
        UserError: for a configuration or data that cannot be trained, a work directory of another run or in use, a
            checkpoint that is damaged, or a full disk.
        NonFiniteLoss: with the step and the last good checkpoint.
        Interrupted: after SIGINT or SIGTERM, the state being saved.
    """
    _check(config)
    run = hosts.together(lambda: _Run(config), config.distributed.start_timeout_s)
    with writing(workdir), _claimed(run, workdir), checkpoint.Checkpointer(workdir) as saved, _Stop() as stop:
        step = saved.latest_step or 0
        hosts.require_same(str(step), f"it sees other checkpoints in {workdir}; all need one that they share")
        if step:
            run.state = saved.restore(run.state)
            if run.stream is not None and step < run.total_steps:
                run.stream.go_to(saved.input_position or step)
        if step < run.total_steps and hosts.is_first():
            _note_start(run, workdir, step)
        bar = _Progress(step, run.total_steps, run.epoch_steps, run.batch_size)
        log = Writer(workdir, step) if hosts.is_first() else Silent()
        with log as writer, bar as progress, hosts.bound_together(), writing(workdir):
            progress.line(_greeting(run, workdir, step))
            if step < run.total_steps:
                run.compile_together(step)
            return _loop(run, saved, stop, writer, progress, step)


@contextlib.contextmanager
def _claimed(run: _Run, workdir: str | Path) -> Iterator[None]:
    """Makes `workdir` this run's and keeps others out of it: the first process does, the others see that it did."""
    if run.hosts > 1:
        made_of = provenance.describe(run.config, len(run.devices))
        same = json.dumps([made_of["config"], made_of["data"]])
        hosts.require_same(same, "it has another configuration or other data; give the same to all")
    if not checkpoint.is_saved(workdir):
        run.take_base()  # before anything is written: there may be none
    with contextlib.ExitStack() as stack:
        hosts.together(lambda: hosts.is_first() and stack.enter_context(checkpoint.locked(workdir)), run.patience)
        hosts.together(lambda: hosts.is_first() and checkpoint.claim(workdir, run.config), run.patience)
        hosts.together(lambda: _check_shared(workdir), run.patience)
        yield


def _check_shared(workdir: str | Path) -> None:
    if not checkpoint.is_claimed(workdir):
        raise UserError(f"{workdir} is not the folder that process 0 writes to; give all one --workdir that they share")


def _note_start(run: _Run, workdir: str | Path, step: int) -> None:
    window = input_pipeline.window_shape(run.config)
    start = {"step": step, "window": window} | provenance.describe(run.config, len(run.devices))
    if run.base is not None:
        start["base"] = run.base
    checkpoint.write_json(Path(workdir) / checkpoint.STARTS, [*checkpoint.read_starts(workdir), start])


def _check(config: ConfigDict) -> None:
    for key in ("epochs", "steps_per_dispatch", "eval_every", "checkpoint_every"):
        if config.train[key] < 1:
            raise UserError(f"train.{key} is {config.train[key]}; expected 1 or more")
    if min(config.seed, config.data.seed) < 0:
        raise UserError(f"seed is {config.seed} and data.seed {config.data.seed}; expected 0 or more")


def _greeting(run: _Run, workdir: str | Path, step: int) -> str:
    count = f"{train_state.count_parameters(run.state.params):,} parameters"
    if hasattr(run.model, "FROZEN"):
        count = f"{train_state.count_trainable(run.model, run.state.params):,} of {count} train"
    how = f"resuming at step {step}" if step else "starting"
    return (
        f"{how}: {run.config.model.name} ({count}) on {len(run.train_windows):,} windows, "
        f"{len(run.validation_windows):,} to validate, {run.total_steps:,} steps, {len(run.devices)} "
        f"{run.devices[0].platform} device(s), in {workdir}"
    )


def _loop(run: _Run, saved, stop: _Stop, writer: Writer, progress: _Progress, step: int) -> dict[str, Any]:
    validation = None
    while step < run.total_steps:
        scalars = run.train_block(step)
        _check_finite(scalars["loss"], step, saved)
        step += len(scalars["loss"])
        loss, snr_db = float(np.mean(scalars["loss"])), float(np.mean(scalars["snr_db"]))
        rate = progress.update(step, loss, snr_db)
        if rate is not None:
            writer.write(step, "train", {"loss": loss, "snr_db": snr_db, "windows_per_s": rate})
        validation = _end_of_epoch(run, saved, writer, progress, step) or validation
        # Asked after every dispatch, so that all processes stop at the same step.
        if told := int(hosts.gather(stop.signal or 0).max()):
            if saved.latest_step != step:
                _save(run, saved, step, None)
            saved.wait()
            raise Interrupted(told, f"stopped at step {step}, saved; the same command goes on from there")
    saved.wait()
    progress.line(f"trained: step {step}, checkpoints in {saved.directory}")
    return {"step": step, "validation": validation}


def _end_of_epoch(run: _Run, saved, writer: Writer, progress: _Progress, step: int) -> dict[str, float] | None:
    """Validates and saves where an epoch ends and the configuration says so; the last step always."""
    epoch, within = divmod(step, run.epoch_steps)
    if within:
        return None
    validation, last = None, step == run.total_steps
    if last or epoch % run.config.train.eval_every == 0:
        validation = run.validate()
        writer.write(step, "validation", {"epoch": epoch} | validation)
        progress.line(f"epoch {epoch}: validation SNR {validation['snr_db']:.3f} dB, RMSE {validation['rmse']:.4f}")
    if last or epoch % run.config.train.checkpoint_every == 0:
        _save(run, saved, step, validation and validation["snr_db"])
    progress.pause(step)
    return validation


def _save(run: _Run, saved, step: int, snr_db: float | None) -> None:
    """Saves the state, unless the last update spoiled it: the loss would tell of that only a step later."""
    state = jax.device_get(run.state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables)):
        raise NonFiniteLoss(_non_finite("a parameter is not finite", step, saved))
    saved.save(state, snr_db, run.stream and run.stream.position)


def _check_finite(losses: np.ndarray, first_step: int, saved) -> None:
    if np.all(np.isfinite(losses)):
        return
    bad = first_step + int(np.argmin(np.isfinite(losses)))
    raise NonFiniteLoss(_non_finite(f"the loss is {losses[bad - first_step]}", bad, saved))


def _non_finite(what: str, step: int, saved) -> str:
    good = saved.latest_step
    kept = "no checkpoint yet" if good is None else f"the last good checkpoint is of step {good} in {saved.directory}"
    return f"{what} at step {step}; {kept}; try a lower optim.learning_rate"
