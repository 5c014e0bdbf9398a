"""Windows and noise from the shards on disk, and batches of them as a function of the step.

All windows of mitdb fit in memory (113 MB as ADC integers), so they are read once; those of a larger database stay in
their shards and are read ahead of the training (`data.stream`). Either way what batch a step sees depends on the seed
and the step alone, so a resumed run sees the batches that an uninterrupted one does.
"""

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from ralenet_jax import noise, recordings
from ralenet_jax.errors import UserError, reason

# Records of DS1 that never train: they validate under the honest protocol.
VALIDATION_RECORDS = ("109", "116", "124", "205", "223")
# Of each database: the split that trains, the one that tests, others.
_SPLITS = {"mitdb": ("ds1", "ds2", "paced"), "ludb": ("train", "test")}
RECORDINGS = "mitdb_recordings"  # mitdb's recordings whole: windows from anywhere in them
_READ_AT_ONCE = 4096
_READERS = 4  # threads; decoding is Python's, so more would wait for each other


@dataclasses.dataclass(frozen=True)
class Windows:
    """Beat windows as they were recorded.

    Attributes:
        signal: `[N, L, C]`, ADC units (mitdb, int16) or mV (ludb, float32); the R peak is at sample L/2.
        gain: float32 `[N, C]`, units of the signal per mV.
        baseline: int32 `[N, C]`, the signal at 0 mV.
        record: str `[N]`, name of the record.
        symbol: str `[N]`, annotation of the beat; empty where the database has none.
        id: int32 `[N]`, place in `ds1+ds2+paced` or `train+test`: the same window has the same id in every run.
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

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and leads of a window."""
        return self.signal.shape[1:]

    def batch(self, index: np.ndarray, shift: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Some windows as "clean" `[n, L, C]` in mV and "id"; a beat's stays where it is, whatever the shift."""
        chosen = self[index]
        return {"clean": chosen.millivolts(), "id": chosen.id}

    def millivolts(self) -> np.ndarray:
        """The windows in mV, float32 `[N, L, C]`."""
        return (self.signal - self.baseline[:, None].astype(np.float32)) / self.gain[:, None]


@contextlib.contextmanager
def _whole(folder: str | Path) -> Iterator[None]:
    """Raises `UserError` for shards that are damaged: TFDS and array_record raise whatever their reading met."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the shards in {folder} cannot be read ({reason(error)}); run `ralenet prepare` again, "
            "which writes them anew where they are damaged"
        ) from error


def open_shards(data_dir: str | Path, name: str) -> tfds.core.DatasetBuilder:
    """Opens the newest prepared version of a database; raises `UserError` where there is none, or a damaged one."""
    versions = sorted(path.parent for path in Path(data_dir).glob(f"{name}/*/dataset_info.json"))
    if not versions:
        raise UserError(
            f"no prepared {name} below {data_dir}; run `ralenet prepare --data-dir {data_dir}`, or name the folder "
            "that has it (--data-dir)"
        )
    with _whole(versions[-1]):
        builder = tfds.builder_from_directory(versions[-1])
        if missing := {"source", "digest"} - set(builder.info.metadata):
            raise ValueError(f"metadata.json has no {min(missing)}")
        return builder


class StoredWindows:
    """Windows that stay in their shards until they are asked for, by any number of threads; only their ids are held.

    Attributes:
        shape: samples and leads of a window.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, ids: np.ndarray):
        """Those with these places in `ds1+ds2+paced` (mitdb) or `train+test` (ludb)."""
        features = builder.info.features
        self.shape = tuple(features["signal"].shape)
        self._path = builder.data_path
        with _whole(self._path):
            self._source = builder.as_data_source("+".join(split_sizes(builder)))
        self._names = [name for name in ("signal", "gain", "baseline", "record", "symbol") if name in features]
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: np.ndarray) -> Windows:
        """Reads some windows, in this order."""
        ids = self._ids[index]
        columns = {name: [] for name in self._names}
        with _whole(self._path):
            for start in range(0, len(ids), _READ_AT_ONCE):
                for example in self._source.__getitems__(ids[start : start + _READ_AT_ONCE].tolist()):
                    for name, column in columns.items():
                        column.append(example[name])
        text = {name: np.array(columns.pop(name)).astype("U") for name in ("record", "symbol") if name in columns}
        arrays = {name: np.stack(values) for name, values in columns.items()}
        of_each_lead = (len(ids), self.shape[1])
        in_millivolts = {"gain": np.ones(of_each_lead, np.float32), "baseline": np.zeros(of_each_lead, np.int32)}
        given = in_millivolts | {"symbol": np.full(len(ids), "")} | arrays | text
        return Windows(**given, id=ids.astype(np.int32))

    def batch(self, index: np.ndarray, shift: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Reads some windows as `Windows.batch` gives them."""
        return self[index].batch(np.arange(len(index)))


def read_windows(builder: tfds.core.DatasetBuilder, ids: np.ndarray) -> Windows:
    """Reads the windows with these places in `ds1+ds2+paced` (mitdb) or `train+test` (ludb), in this order."""
    return hold(StoredWindows(builder, ids))


def split_sizes(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """Windows of each split that is there, in the order of the ids."""
    splits = builder.info.splits
    return {name: splits[name].num_examples for name in _SPLITS[builder.name] if name in splits}


def _open_database(config: ConfigDict) -> tfds.core.DatasetBuilder:
    if config.data.database not in (*_SPLITS, RECORDINGS):
        there = ", ".join((*_SPLITS, RECORDINGS))
        raise UserError(f"data.database is {config.data.database!r}; expected one of {there}")
    return open_shards(config.data.dir, config.data.database)


def window_shape(config: ConfigDict) -> tuple[int, int]:
    """Samples and leads of a window."""
    if config.data.database == RECORDINGS:
        return recordings.WINDOW, 2
    return tuple(_open_database(config).info.features["signal"].shape)


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


def _validates(database: str, record: np.ndarray) -> np.ndarray:
    """Which windows, by their records, validate under the honest protocol instead of training."""
    if database == "mitdb":
        return np.isin(record, VALIDATION_RECORDS)
    return record.astype(int) % 5 == 4  # the test records' neighbours: theirs are the numbers that 5 divides


def _records(builder: tfds.core.DatasetBuilder, split: str) -> tuple[list[str], list[int]]:
    """The records of a split and the place of each one's first window.

    A record's windows lie one after another, so its end is found by doubling and halving, and few windows are read.

    Raises:
        UserError: if a record comes twice.
    """
    source = builder.as_data_source(split)
    names, starts, place = [], [], 0
    while place < len(source):
        name, length = source[place]["record"], 1
        while place + length < len(source) and source[place + length]["record"] == name:
            length *= 2
        reach = range(place + 1, min(place + length, len(source)))
        names.append(name.decode())
        starts.append(place)
        place = reach.start + bisect.bisect(reach, False, key=lambda at, name=name: source[at]["record"] != name)
    if len(set(names)) < len(names):
        raise UserError(f"the windows of a record are apart in {split} of {builder.info.full_name}; prepare it anew")
    return names, starts


def _read_recordings(config: ConfigDict, builder: tfds.core.DatasetBuilder, split: str) -> recordings.Recordings:
    if config.protocol != "honest":
        raise UserError(f"{RECORDINGS} are split by record; set protocol='honest', not {config.protocol!r}")

    def chosen(record: str) -> bool:
        return split == "test" or (record in VALIDATION_RECORDS) == (split == "validation")

    with _whole(builder.data_path):
        return recordings.read(builder, "ds2" if split == "test" else "ds1", chosen)


def _split_ids(config: ConfigDict, builder: tfds.core.DatasetBuilder, split: str) -> np.ndarray:
    """Places of the windows of a split in the whole database, int64 `[N]`; no signal is held to find them."""
    sizes, database = split_sizes(builder), config.data.database
    honest = config.protocol == "honest"
    if database == "mitdb" and not honest:
        return _random_split(config, sum(sizes.values()))[split]
    training, testing = (sizes.get(name, 0) for name in _SPLITS[database][:2])
    tests = split == "test" or (split == "validation" and not honest)
    ids = np.arange(training, training + testing) if tests else np.arange(training)
    if honest and not tests and training:
        with _whole(builder.data_path):
            names, starts = _records(builder, _SPLITS[database][0])
        chosen = _validates(database, np.array(names)) == (split == "validation")
        ids = ids[np.repeat(chosen, np.diff([*starts, training]))]
    if not len(ids):
        raise UserError(f"the {split} part of {builder.info.full_name} has no windows; prepare the whole database")
    return ids


def _open_split(config: ConfigDict) -> tfds.core.DatasetBuilder:
    builder = _open_database(config)
    if config.protocol not in noise.PROTOCOLS:
        raise UserError(f"protocol is {config.protocol!r}; expected one of {', '.join(noise.PROTOCOLS)}")
    return builder


def read_split(config: ConfigDict, split: str) -> Windows | recordings.Recordings:
    """Reads the "train", "validation" or "test" windows of the configured database and protocol.

    ludb is always split by record. Under the honest protocol a fifth of its records (number mod 5 is 4) validates
    and does not train; under the paper's the test windows validate, as with mitdb.

    Raises:
        UserError: if the shards are not there, or the configured split leaves a part empty.
    """
    builder = _open_split(config)
    if config.data.database == RECORDINGS:
        return _read_recordings(config, builder, split)
    return read_windows(builder, _split_ids(config, builder, split))


def open_split(config: ConfigDict, split: str) -> StoredWindows | recordings.Recordings:
    """The windows of `read_split`, left in their shards; whole recordings are read.

    Raises:
        UserError: like `read_split`, and for whole recordings to be streamed.
    """
    if config.data.database != RECORDINGS:
        builder = _open_split(config)
        return StoredWindows(builder, _split_ids(config, builder, split))
    if config.data.stream:
        raise UserError(f"data.stream is True, but {RECORDINGS} are held whole in memory; set data.stream=False")
    return read_split(config, split)


def hold(windows: StoredWindows | recordings.Recordings) -> Windows | recordings.Recordings:
    """Reads what `open_split` left in its shards."""
    return windows[np.arange(len(windows))] if isinstance(windows, StoredWindows) else windows


def read_noise(config: ConfigDict) -> np.ndarray:
    """The noise recordings, float32 `[3, N, C]` in mV, in the order of `noise.RECORDINGS`, cut to the shortest.

    Like the windows of `mitdb_recordings` at 180 Hz, else at 360 Hz.
    """
    builder = open_shards(config.data.dir, "nstdb")
    if missing := [name for name in noise.RECORDINGS if name not in builder.info.splits]:
        raise UserError(f"{builder.info.full_name} below {config.data.dir} has no {missing[0]}; prepare all of nstdb")
    with _whole(builder.data_path):
        examples = [builder.as_data_source(name)[0] for name in noise.RECORDINGS]
    length = min(len(example["signal"]) for example in examples)
    found = [
        (example["signal"][:length] - example["baseline"].astype(np.float32)) / example["gain"].astype(np.float32)
        for example in examples
    ]
    return np.stack([recordings.resample(one) for one in found] if config.data.database == RECORDINGS else found)


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


@functools.lru_cache(maxsize=2)  # an epoch's last batches and the next one's first are read at the same time
def _order(seed: int, epoch: int, num_windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def batch_indices(seed: int, step: int, count: int, num_windows: int, batch_size: int) -> np.ndarray:
    """Windows of `count` steps from `step` on: int64 `[count, batch_size]`, a new order in every epoch."""
    steps = num_windows // batch_size
    rows = []
    while count:
        epoch, first = divmod(step, steps)
        order = _order(seed, epoch, num_windows)
        taken = min(count, steps - first)
        rows.append(order[first * batch_size : (first + taken) * batch_size].reshape(taken, batch_size))
        step, count = step + taken, count - taken
    return np.concatenate(rows)


def host_share(indices: np.ndarray, host: int, hosts: int) -> np.ndarray:
    """What one of several hosts reads of batches `[…, B]`: its part of each, `[…, B/hosts]`, in the devices' order."""
    return indices.reshape(*indices.shape[:-1], hosts, -1)[..., host, :]


def _by_device(array: np.ndarray, axis: int, devices: int) -> np.ndarray:
    """Splits an axis over devices and puts the devices first."""
    shape = array.shape
    split = array.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(split, axis, 0))


def train_block(windows, indices: np.ndarray, devices: int, seed: int = 0, epoch: int = 0) -> dict[str, np.ndarray]:
    """Clean windows of K steps of an epoch: `indices` `[K, B]` → "clean" `[devices, K, B/devices, L, C]` in mV, "id".

    Those of recordings begin elsewhere in every epoch, and tell their R peaks and level too.
    """
    shift = np.random.default_rng([seed, epoch, 1]).integers(0, windows.shape[0], len(windows))[indices.ravel()]
    batch = windows.batch(indices.ravel(), shift)
    return {
        name: _by_device(array.reshape(*indices.shape, *array.shape[1:]), 1, devices) for name, array in batch.items()
    }


class BatchStream:
    """The batches of a training, read ahead from the shards by grain's threads while the devices compute.

    A position is an optimiser step and nothing of one host's, so it holds for any number of hosts and devices.
    """

    def __init__(
        self,
        windows: StoredWindows,
        seed: int,
        batch_size: int,
        total_steps: int,
        ahead: int,
        host: int = 0,
        hosts: int = 1,
    ):
        """Of `total_steps` steps, so many `ahead`; of several hosts each reads its share of every batch alone."""
        import grain  # takes a while, and only streams need it

        def read(step: int) -> dict[str, np.ndarray]:
            indices = batch_indices(seed, step, 1, len(windows), batch_size)
            return windows.batch(host_share(indices, host, hosts)[0])

        options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=max(ahead, _READERS))
        self._iterator = iter(grain.MapDataset.range(total_steps).map(read).to_iter_dataset(options))

    @property
    def position(self) -> dict[str, Any]:
        """Where the next block begins, in JSON's types."""
        return self._iterator.get_state()

    def go_to(self, position: dict[str, Any] | int) -> None:
        """Goes on from a position that was saved, or from a step."""
        self._iterator.set_state({"next_index": position} if isinstance(position, int) else position)

    def block(self, count: int, length: int, devices: int) -> dict[str, np.ndarray]:
        """The next `count` steps as `train_block` gives them, filled up to `length` steps with the first of them."""
        taken = [next(self._iterator) for _ in range(count)]
        taken += taken[:1] * (length - count)
        return {name: _by_device(np.stack([step[name] for step in taken]), 1, devices) for name in taken[0]}


def eval_batches(
    windows, batch_size: int, devices: int, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """All windows once, in order; the last batch is padded, "mask" is 0 there. Arrays are `[devices, B/devices, …]`.

    Over several hosts, `devices` are those of all, and each gets the arrays of its own.
    """
    batch_size = math.ceil(min(batch_size, len(windows)) / devices) * devices
    for start in range(0, len(windows), batch_size):
        index = host_share(np.arange(start, start + batch_size), host, hosts)
        mask = (index < len(windows)).astype(np.float32)
        batch = windows.batch(np.minimum(index, len(windows) - 1)) | {"mask": mask}
        yield {name: _by_device(array, 0, devices // hosts) for name, array in batch.items()}
