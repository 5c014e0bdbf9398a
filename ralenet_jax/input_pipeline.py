"""Windows and noise from the shards on disk, and batches of them as a function of the step.

All windows of mitdb fit in memory (113 MB as ADC integers), so they are read once; what batch a step sees depends on
the seed and the step alone, so a resumed run sees the batches that an uninterrupted one does.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from ralenet_jax import noise
from ralenet_jax.errors import UserError

# Records of DS1 that never train: they validate under the honest protocol.
VALIDATION_RECORDS = ("109", "116", "124", "205", "223")
_SPLITS = ("ds1", "ds2", "paced")
_READ_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Windows:
    """Beat windows as they were recorded.

    Attributes:
        signal: int16 `[N, L, C]`, ADC units; the R peak is at sample L/2.
        gain: float32 `[N, C]`, ADC units per mV.
        baseline: int32 `[N, C]`, ADC units at 0 mV.
        record: str `[N]`, name of the record.
        symbol: str `[N]`, annotation of the beat.
        id: int32 `[N]`, place in `ds1+ds2+paced`: the same window has the same id in every run.
    """

    signal: np.ndarray
    gain: np.ndarray
    baseline: np.ndarray
    record: np.ndarray
    symbol: np.ndarray
    id: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    def __getitem__(self, index: np.ndarray) -> "Windows":
        return Windows(**{field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)})

    def millivolts(self) -> np.ndarray:
        """The windows in mV, float32 `[N, L, C]`."""
        return (self.signal - self.baseline[:, None].astype(np.float32)) / self.gain[:, None]


def open_shards(data_dir: str | Path, name: str) -> tfds.core.DatasetBuilder:
    """Opens the newest prepared version of a database; raises `UserError` where there is none."""
    versions = sorted(path.parent for path in Path(data_dir).glob(f"{name}/*/dataset_info.json"))
    if not versions:
        raise UserError(
            f"no prepared {name} below {data_dir}; run `ralenet prepare --data-dir {data_dir}`, or name the folder "
            "that has it (--data-dir)"
        )
    return tfds.builder_from_directory(versions[-1])


def read_windows(builder: tfds.core.DatasetBuilder, ids: np.ndarray) -> Windows:
    """Reads the windows with these places in `ds1+ds2+paced`, in this order."""
    source = builder.as_data_source("+".join(split_sizes(builder)))
    names = ("signal", "gain", "baseline", "record", "symbol")
    columns = {name: [] for name in names}
    for start in range(0, len(ids), _READ_AT_ONCE):
        for example in source.__getitems__(ids[start : start + _READ_AT_ONCE].tolist()):
            for name in names:
                columns[name].append(example[name])
    text = {name: np.array(columns.pop(name)).astype("U") for name in ("record", "symbol")}
    arrays = {name: np.stack(values) for name, values in columns.items()}
    return Windows(**arrays, **text, id=ids.astype(np.int32))


def split_sizes(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Windows of each split that is there, in the order of the ids."""
    return {name: builder.info.splits[name].num_examples for name in _SPLITS if name in builder.info.splits}


def window_shape(config: ConfigDict) -> tuple[int, int]:
    """Samples and leads of a window."""
    return tuple(open_shards(config.data.dir, "mitdb").info.features["signal"].shape)


def _random_split(config: ConfigDict, total: int) -> dict[str, np.ndarray]:
    wanted, training = config.data.num_windows, config.data.num_train
    if not 0 < training < wanted <= total:
        raise UserError(
            f"data.num_train {training} of data.num_windows {wanted}; expected 0 < num_train < num_windows <= {total}, "
            "the windows that are there"
        )
    drawn = np.random.default_rng(config.data.seed).choice(total, wanted, replace=False)
    # The paper has no validation set of its own; its figure is that of the last epoch, so nothing is chosen on it.
    return {"train": drawn[:training], "validation": drawn[training:], "test": drawn[training:]}


def read_split(config: ConfigDict, split: str) -> Windows:
    """Reads the "train", "validation" or "test" windows of the configured protocol.

    Raises:
        UserError: if the shards are not there, or the configured split leaves a part empty.
    """
    builder = open_shards(config.data.dir, "mitdb")
    sizes = split_sizes(builder)
    if config.protocol == "paper":
        return read_windows(builder, _random_split(config, sum(sizes.values()))[split])
    if config.protocol != "honest":
        raise UserError(f"protocol is {config.protocol!r}; expected one of {', '.join(noise.PROTOCOLS)}")
    training = sizes.get("ds1", 0)
    ids = np.arange(training, training + sizes.get("ds2", 0)) if split == "test" else np.arange(training)
    windows = read_windows(builder, ids) if len(ids) else None
    if windows and split != "test":
        windows = windows[np.isin(windows.record, VALIDATION_RECORDS) == (split == "validation")]
    if not windows:
        raise UserError(f"the {split} part of {builder.info.full_name} has no windows; prepare the whole database")
    return windows


def read_noise(config: ConfigDict) -> np.ndarray:
    """The noise recordings, float32 `[3, N, C]` in mV, in the order of `noise.RECORDINGS`, cut to the shortest."""
    builder = open_shards(config.data.dir, "nstdb")
    if missing := [name for name in noise.RECORDINGS if name not in builder.info.splits]:
        raise UserError(f"{builder.info.full_name} below {config.data.dir} has no {missing[0]}; prepare all of nstdb")
    examples = [builder.as_data_source(name)[0] for name in noise.RECORDINGS]
    length = min(len(example["signal"]) for example in examples)
    return np.stack(
        [
            (example["signal"][:length] - example["baseline"].astype(np.float32)) / example["gain"].astype(np.float32)
            for example in examples
        ]
    )


def noise_span(config: ConfigDict, split: str, length: int) -> tuple[int, int]:
    """First sample and end of the noise that a split may use, of `length` samples: whole, or split in time."""
    if config.protocol == "paper":
        return 0, length
    return (length // 2, length) if split == "test" else (0, length // 2)


def steps_per_epoch(config: ConfigDict, num_windows: int) -> int:
    """Whole batches in an epoch; raises `UserError` where there is none."""
    batch = config.train.batch_size
    if not 0 < batch <= num_windows:
        raise UserError(f"train.batch_size is {batch}; expected 1 to {num_windows}, the windows that train")
    return num_windows // batch


def batch_indices(seed: int, step: int, count: int, num_windows: int, batch_size: int) -> np.ndarray:
    """Windows of `count` steps from `step` on: int64 `[count, batch_size]`, a new order in every epoch."""
    steps = num_windows // batch_size
    rows = []
    while count:
        epoch, first = divmod(step, steps)
        order = np.random.default_rng([seed, epoch]).permutation(num_windows)
        taken = min(count, steps - first)
        rows.append(order[first * batch_size : (first + taken) * batch_size].reshape(taken, batch_size))
        step, count = step + taken, count - taken
    return np.concatenate(rows)


def _by_device(array: np.ndarray, axis: int, devices: int) -> np.ndarray:
    """Splits an axis over devices and puts the devices first."""
    shape = array.shape
    split = array.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(split, axis, 0))


def train_block(windows: Windows, indices: np.ndarray, devices: int) -> dict[str, np.ndarray]:
    """Clean windows of K steps: `indices` `[K, B]` → "clean" `[devices, K, B/devices, L, C]` in mV and "id"."""
    chosen = windows[indices.ravel()]
    clean = chosen.millivolts().reshape(*indices.shape, *windows.signal.shape[1:])
    return {"clean": _by_device(clean, 1, devices), "id": _by_device(chosen.id.reshape(indices.shape), 1, devices)}


def eval_batches(windows: Windows, batch_size: int, devices: int) -> Iterator[dict[str, np.ndarray]]:
    """All windows once, in order; the last batch is padded, "mask" is 0 there. Arrays are `[devices, B/devices, …]`."""
    batch_size = math.ceil(min(batch_size, len(windows)) / devices) * devices
    for start in range(0, len(windows), batch_size):
        index = np.arange(start, start + batch_size)
        mask = (index < len(windows)).astype(np.float32)
        chosen = windows[np.minimum(index, len(windows) - 1)]
        batch = {"clean": chosen.millivolts(), "id": chosen.id, "mask": mask}
        yield {name: _by_device(array, 0, devices) for name, array in batch.items()}
