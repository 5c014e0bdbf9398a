"""Are denoised beats still told apart? A classifier, normal against ventricular, trained on clean windows.

It is scored on windows that are clean, noisy, or denoised by any function. Windows are normalised as under the paper's
protocol; ventricular is the positive class.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ralenet_jax import input_pipeline, noise, steps
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.input_pipeline import Windows
from ralenet_jax.models.resnet import ResNet

SYMBOLS = ("N", "V")  # classes 0 and 1
SPLITS = ("random", "records")
EPOCHS = 20
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3
_EVAL_BATCH_SIZE = 256
_LEADS = 2
_MODEL = ResNet()
_OPTIMIZER = optax.flatten(optax.adam(_LEARNING_RATE))


def select_beats(data_dir: str | Path, split: str, seed: int) -> tuple[Windows, Windows]:
    """Draws the beats that train and those that test: as many normal as ventricular ones, and no others.

    Args:
        data_dir: folder with the prepared shards.
        split: "random", as published: balanced over all records, then 80 % and 20 % of the beats at random, so that
            patients stand in both; or "records": DS1 trains and DS2 tests, each balanced.
        seed: of the draws.

    Raises:
        UserError: for an unknown split, or where a part has no beat of a class.
    """
    if split not in SPLITS:
        raise UserError(f"split of the beats is {split!r}; expected one of {', '.join(SPLITS)}")
    builder = input_pipeline.open_shards(data_dir, "mitdb")
    sizes = input_pipeline.split_sizes(builder)
    windows = input_pipeline.read_windows(builder, np.arange(sum(sizes.values())))
    generator = np.random.default_rng(seed)
    if split == "random":
        beats = _balanced(windows, generator)
        order, training = generator.permutation(len(beats)), len(beats) * 4 // 5
        return beats[order[:training]], beats[order[training:]]
    ends = np.cumsum([sizes.get("ds1", 0), sizes.get("ds2", 0)])
    part = np.searchsorted(ends, windows.id, side="right")  # ids are places in ds1+ds2+paced
    return _balanced(windows[part == 0], generator), _balanced(windows[part == 1], generator)


def _balanced(windows: Windows, generator: np.random.Generator) -> Windows:
    """All beats of the rarer class and as many of the other."""
    of_class = [np.flatnonzero(windows.symbol == symbol) for symbol in SYMBOLS]
    count = min(map(len, of_class))
    if not count:
        raise UserError(
            f"{len(of_class[0])} normal and {len(of_class[1])} ventricular beats (N, V); expected some of both to "
            "train and to test on: prepare the whole of mitdb"
        )
    return windows[np.concatenate([generator.choice(index, count, replace=False) for index in of_class])]


def labels(windows: Windows) -> np.ndarray:
    """Classes of windows that are N or V: int32 `[N]`, 1 is ventricular."""
    return (windows.symbol == SYMBOLS[1]).astype(np.int32)


def _silence(windows: Windows) -> steps.NoiseSource:
    """The source of no noise: with it windows are normalised, and stay clean."""
    length, leads = windows.signal.shape[1:]
    recordings = np.zeros((len(noise.RECORDINGS), length, leads), np.float32)
    return steps.NoiseSource(recordings, noise.condition("none", 0.0, None, (0, length)), jax.random.key(0))


@jax.jit
def _noisy(source: steps.NoiseSource, clean: jax.Array, window_id: jax.Array) -> jax.Array:
    """Noisy windows `[B, L, C]`, normalised, from clean ones in mV: a window has its noise by its id."""
    keys = noise.window_keys(source.key, window_id, None)
    return noise.mix("paper", source.recordings, source.condition, clean, keys).noisy


@functools.partial(jax.jit, donate_argnums=0)
def _train_epoch(state: train_state.TrainState, windows: jax.Array, classes: jax.Array, order: jax.Array):
    """Trains on windows `[N, L, C]` with classes `[N]` in the order `[steps, B]`; gives loss and accuracy `[steps]`."""

    def train_step(state, index):
        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = _MODEL.apply(variables, windows[index], train=True, mutable=["batch_stats"])
            loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes[index]))
            return loss, (jnp.mean(jnp.argmax(logits, 1) == classes[index]), updates["batch_stats"])

        (loss, (accuracy, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = _OPTIMIZER.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        return state, (loss, accuracy)

    return jax.lax.scan(train_step, state, order)


def train_classifier(
    windows: Windows, seed: int, epochs: int = EPOCHS, log: Callable[[str], None] = print
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Trains a `ResNet` on clean windows: cross-entropy, Adam, whole batches of 32 in a new order in every epoch.

    Args:
        windows: N and V beats, as from `select_beats`.
        seed: of the initial weights and the order; the same seed gives the same bits on the same machine.
        epochs: how often each window is seen.
        log: takes lines of text.

    Returns:
        The variables, and {"epoch", "loss", "accuracy"} of every epoch, over its batches as they trained.

    Raises:
        UserError: for less than a batch of windows.
    """
    per_epoch = len(windows) // _BATCH_SIZE
    if not per_epoch:
        raise UserError(f"{len(windows)} beats to train on; expected {_BATCH_SIZE} or more: prepare the whole of mitdb")
    state = train_state.create_state(_MODEL, _OPTIMIZER, seed, windows.signal.shape[1:])
    inputs, classes = _noisy(_silence(windows), windows.millivolts(), windows.id), jnp.asarray(labels(windows))
    history = []
    for epoch in range(1, epochs + 1):
        begin = time.monotonic()
        first = (epoch - 1) * per_epoch
        order = input_pipeline.batch_indices(seed, first, per_epoch, len(windows), _BATCH_SIZE)
        state, scalars = _train_epoch(state, inputs, classes, order.astype(np.int32))
        loss, accuracy = (float(np.mean(scalar)) for scalar in scalars)
        history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
        rate = order.size / (time.monotonic() - begin)
        log(f"epoch {epoch}/{epochs}: loss {loss:.4f}, accuracy {accuracy:.4f}, {rate:.0f} windows/s")
    return jax.device_get(state.variables), history


_logits = jax.jit(_MODEL.apply)


def score(
    variables: dict[str, Any],
    windows: Windows,
    source: steps.NoiseSource | None = None,
    denoise: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, float]:
    """Scores a trained classifier on every window, `measures` of its predictions.

    Args:
        variables: as from `train_classifier`.
        windows: N and V beats, as from `select_beats`.
        source: noise, fixed for each window by its id; None leaves the windows clean.
        denoise: `[B, L, C]` → the same shape, what the classifier sees instead of the noisy windows; B is constant, the
            last batch is filled up.

    Raises:
        ValueError: if `denoise` gives another shape, or something that is not finite.
    """
    source = jax.device_put(_silence(windows) if source is None else source)
    predicted = []
    for batch in input_pipeline.eval_batches(windows, _EVAL_BATCH_SIZE, 1):
        inputs = np.asarray(_noisy(source, batch["clean"][0], batch["id"][0]))
        if denoise is not None:
            inputs = _denoised(denoise, inputs)
        logits = np.asarray(_logits(variables, inputs))
        predicted.append(logits.argmax(1)[batch["mask"][0] > 0])
    return measures(np.concatenate(predicted), labels(windows))


def _denoised(denoise: Callable[[np.ndarray], np.ndarray], noisy: np.ndarray) -> np.ndarray:
    denoised = np.asarray(denoise(noisy), np.float32)
    if denoised.shape != noisy.shape:
        raise ValueError(f"the denoiser made {denoised.shape} of windows {noisy.shape}; expected the same shape")
    # Compiled for CPUs, the last ReLU and the mean behind it make 0 of NaN: the logits would look like any others.
    if not np.isfinite(denoised).all():
        raise ValueError("the denoiser made windows that are not finite")
    return denoised


def measures(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall and F1 (0 where nothing could be right) and the counts behind them.

    Args:
        predicted, actual: int `[N]`, 0 normal and 1 ventricular, which is the positive class.
    """
    if predicted.shape != actual.shape or predicted.ndim != 1:
        raise ValueError(f"predictions {predicted.shape} of classes {actual.shape}; expected one [N] of both")
    true_positive, false_positive, false_negative, true_negative = (
        int(np.sum((predicted == says) & (actual == was))) for says, was in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    return {
        "accuracy": (true_positive + true_negative) / max(len(actual), 1),
        "precision": true_positive / max(true_positive + false_positive, 1),
        "recall": true_positive / max(true_positive + false_negative, 1),
        "f1": 2 * true_positive / max(2 * true_positive + false_positive + false_negative, 1),
        "true_positive": true_positive,
        "false_positive": false_positive,
        "false_negative": false_negative,
        "true_negative": true_negative,
    }


def _template() -> dict[str, Any]:
    """Shapes of the variables; the length of a window is in none of them."""
    return jax.eval_shape(_MODEL.init, jax.random.key(0), jnp.zeros((1, 1, _LEADS)))


def _by_path(variables: dict[str, Any]) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def save_classifier(path: str | Path, variables: dict[str, Any]) -> None:
    """Writes the variables as an .npz file, which is either the old one or whole; `UserError` where that fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, **_by_path(variables))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error


def load_classifier(path: str | Path) -> dict[str, Any]:
    """Reads what `save_classifier` wrote; raises `UserError` where it is not there, or something else is."""
    template = _template()
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            arrays = dict(saved.items())
    except Exception as error:  # NumPy has a dozen for a file that is cut or no .npz
        raise UserError(f"classifier {path} cannot be read ({error}); train it again") from error
    expected = {name: leaf.shape for name, leaf in _by_path(template).items()}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise UserError(f"{path} does not hold the weights of this classifier; train it again")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])
