"""Examples → array_record shards on disk: what the TFDS builders share, and the digest of what they wrote."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from data_prep import beam, physionet

STAGING = ".incomplete"  # below the data folder; a shard set leaves it whole or not at all


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over a verified copy of one database: the order of RECORDS is the order of the examples.

    A database gives the class attributes and the two methods that raise here. What is written can be read without
    this class (`tfds.builder_from_directory`). `info.metadata` holds `source` ("mitdb 1.0.0"), `checksums` of the
    source files, `revision` of the builder and `digest` of the examples.
    """

    DATABASE: physionet.Database
    FEATURES: dict
    DESCRIPTION: str
    CITATION: str
    REVISION = 1  # raised when the same source is to give other examples: older shards are then built anew

    def __init__(self, copy: physionet.Copy, data_dir: Path, on_beam: bool = False):
        self.copy = copy
        self.on_beam = on_beam
        super().__init__(data_dir=data_dir, file_format="array_record")

    def __reduce__(self):
        """Goes to Beam's workers as what it was made from: TFDS would hand its own arguments to `__init__`."""
        return type(self), (self.copy, self._data_dir_root, self.on_beam)

    def split_records(self) -> dict[str, list[str]]:
        """Assigns the copy's records to splits, {split: names}."""
        raise NotImplementedError

    def read_examples(self, record: str) -> Iterable[dict]:
        """Reads one record's examples, in order of time."""
        raise NotImplementedError

    def provenance(self) -> dict:
        """Tells where the examples come from; the same provenance gives the same examples."""
        return {"source": str(self.DATABASE), "checksums": self.copy.checksums, "revision": self.REVISION}

    def _info(self) -> tfds.core.DatasetInfo:
        info = tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(self.FEATURES),
            homepage=f"https://physionet.org/content/{self.DATABASE.folder}/",
            citation=self.CITATION,
            license="ODC-By 1.0",
            metadata=tfds.core.MetadataDict(self.provenance()),
            disable_shuffling=True,  # with integer keys: the order they are yielded in
        )
        info.initialize_from_bucket = lambda: None  # TFDS's bucket has nothing of ours; it leaves a temporary folder
        return info

    def _split_generators(self, dl_manager) -> dict:
        splits = {split: records for split, records in sorted(self.split_records().items()) if records}
        if self.on_beam:  # where nobody sees the examples in order; `build` reads them back for the digest
            return {split: beam.examples(self._read_keyed, records) for split, records in splits.items()}
        self._digest = Digest()
        return {split: self._generate_examples(split, records) for split, records in splits.items()}

    def _read_keyed(self, numbered: tuple[int, str]) -> Iterator[tuple[int, dict]]:
        """Reads a record (its number in the split, its name); the keys put examples in order of record, then time."""
        number, record = numbered
        for index, example in enumerate(self.read_examples(record)):
            yield (number << 32) + index, example

    def _generate_examples(self, split: str, records: list[str]) -> Iterator[tuple[int, dict]]:
        is_empty = True
        self._digest.add_split(split)
        for numbered in enumerate(records):
            for key, example in self._read_keyed(numbered):
                is_empty = False
                self._digest.add_example(example)
                yield key, example
        if is_empty:  # TFDS cannot write an empty split
            raise self.empty_split(split)
        # TFDS runs the splits one after the other, in our order, and saves the metadata after the last.
        self.info.metadata["digest"] = self._digest.hexdigest()

    def empty_split(self, split: str) -> physionet.PrepareError:
        """Tells of a split without an example."""
        return physionet.PrepareError(
            f"{split} of {self.DATABASE}: no window in {len(self.split_records()[split])} records of "
            f"{self.copy.folder}; use records with annotated beats away from their ends"
        )


class Digest:
    """SHA-256 over the content of examples in order, whatever bytes hold them on disk.

    It takes, for each split in alphabetical order, the line "split NAME"; for each of its examples in order, for each
    feature in alphabetical order, the line "FEATURE DTYPE SHAPE" (NumPy's, "int16 (256, 2)", or "text (2,)"; a whole
    number alone is "int64 ()") and then the values: numbers little-endian in C order, texts in UTF-8 with a line feed
    after each. Lines end in a line feed.
    """

    def __init__(self):
        self._hash = hashlib.sha256()

    def add_split(self, split: str) -> None:
        """Begins the next split."""
        self._hash.update(f"split {split}\n".encode())

    def add_example(self, example: Mapping) -> None:
        """Adds one example: {feature: number, array or text}, as TFDS takes or returns it."""
        for name in sorted(example):
            value = np.asarray(example[name])
            if value.ndim == 0 and value.dtype.kind in "iu":  # TFDS returns a Python integer, whatever it was given
                value = value.astype(np.int64)
            if value.dtype.kind in "OSU":  # TFDS takes str and returns bytes
                texts = [text.encode() if isinstance(text, str) else text for text in value.ravel().tolist()]
                self._hash.update(f"{name} text {value.shape}\n".encode() + b"".join(text + b"\n" for text in texts))
            else:
                self._hash.update(f"{name} {value.dtype.name} {value.shape}\n".encode())
                self._hash.update(value.astype(value.dtype.newbyteorder("<"), order="C", copy=False).tobytes())

    def hexdigest(self) -> str:
        """Digest of all that was added so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def digest(directory: Path) -> str:
    """Computes the digest of a shard set from the examples on disk; equals `info.metadata["digest"]` if all is well."""
    builder = tfds.builder_from_directory(directory)
    result = Digest()
    for split in sorted(builder.info.splits):
        result.add_split(split)
        for example in builder.as_data_source(split):
            result.add_example(example)
    return result.hexdigest()


def is_current(builder: Builder, directory: Path) -> bool:
    """Tells whether a finished shard set in `directory` came from the builder's very source and is undamaged."""
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        same_source = {key: metadata.get(key) for key in builder.provenance()} == builder.provenance()
        return same_source and digest(directory) == metadata["digest"]
    except Exception:  # nothing there, or whatever reading a damaged set met
        return False


def build(
    builder_class: type[Builder], copy: physionet.Copy, data_dir: Path, pipeline: beam.Options | None = None
) -> tuple[Path, bool]:
    """Writes the shards of a database to `data_dir/NAME/VERSION` unless they are there.

    An older set stays until the new one is whole.

    Args:
        builder_class: for the database.
        copy: its verified source.
        data_dir: parent of all shard sets.
        pipeline: how Apache Beam cuts the records; None: this process does. The examples are the same in the same
            order; a split that fills several shards may be divided among them otherwise.

    Returns:
        the shard set's folder, and whether it was written (False: it was there, from the same source).

    Raises:
        PrepareError: a record cannot be used, a split is too large, or the shards cannot be written.
    """
    on_beam = pipeline is not None
    folder = Path(builder_class.name, str(builder_class.VERSION))
    directory = data_dir / folder
    staging = data_dir / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)  # a killed call may have left one
        builder = builder_class(copy, staging, on_beam)
        if is_current(builder, directory):
            return directory, False
        with _quiet_tfds(), beam.workers_errors(builder.empty_split):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=pipeline))
        if on_beam:
            builder.info.metadata["digest"] = digest(staging / folder)
            builder.info.write_to_directory(staging / folder)
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        (staging / folder).rename(directory)
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        # Of more TFDS sorts the examples in files, with TensorFlow.
        raise physionet.PrepareError(
            f"a split of {copy.database} is beyond {shuffle.MAX_MEM_BUFFER_SIZE:,} bytes, the most that is written "
            'without Apache Beam; pip install "ralenet_jax[beam]" and call again with --beam'
        ) from error
    except (OSError, RuntimeError) as error:
        # array_record tells what the system refused in a RuntimeError, "…: write() failed: No space left on device; …",
        # Beam the OSError of a worker, "…: [Errno 28] No space left on device: …".
        told = re.search(r"(?:\(\) failed: |\[Errno \d+\] )([^:;\n]+)", str(error))
        refused = getattr(error, "strerror", None) or (told and told[1])
        if not refused:
            raise
        raise physionet.PrepareError(
            f"cannot write the shards of {copy.database} in {data_dir}: {refused}; "
            "free space or choose another --data-dir, then call again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory, True


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from telling of downloads it does not make, and its bars out of log files."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
