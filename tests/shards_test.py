import hashlib
import importlib.util
import json
import resource
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_databases import tree, write_ludb, write_mitdb, write_nstdb

from data_prep import shards
from data_prep.ludb import Ludb
from data_prep.mitdb import Mitdb
from data_prep.nstdb import Nstdb
from data_prep.physionet import DATABASES, PrepareError, verify

BUILDERS = {"mitdb": Mitdb, "nstdb": Nstdb, "ludb": Ludb}


def build(source, data_dir, name="mitdb"):
    return shards.build(BUILDERS[name], verify(DATABASES[name], source), data_dir)


def read(directory) -> dict[str, list[dict]]:
    builder = tfds.builder_from_directory(directory)
    return {split: list(builder.as_data_source(split)) for split in builder.info.splits}


def test_the_digest_is_what_its_description_says():
    found = shards.Digest()
    found.add_split("ds1")
    found.add_example({"signal": np.array([[1, -2]], np.int16), "record": "é", "sample": 7, "leads": ["I", "II"]})
    found.add_example({"gain": np.array([0.5], np.float32)})
    text = "split ds1\nleads text (2,)\nI\nII\nrecord text ()\né\nsample int64 ()\n".encode()
    text += struct.pack("<q", 7) + b"signal int16 (1, 2)\n" + struct.pack("<hh", 1, -2)
    text += b"gain float32 (1,)\n" + struct.pack("<f", 0.5)
    assert found.hexdigest() == hashlib.sha256(text).hexdigest()


def test_the_digest_is_the_same_for_what_tfds_takes_and_returns():
    given, returned, big_endian = shards.Digest(), shards.Digest(), shards.Digest()
    given.add_example({"symbol": "N", "sample": np.int32(5), "signal": np.arange(6, dtype=np.int16).reshape(3, 2)})
    returned.add_example({"signal": np.arange(6, dtype=np.int16).reshape(3, 2), "sample": 5, "symbol": b"N"})
    big_endian.add_example({"signal": np.arange(6, dtype=">i2").reshape(3, 2), "sample": 5, "symbol": "N"})
    assert given.hexdigest() == returned.hexdigest() == big_endian.hexdigest()


@pytest.mark.parametrize(("name", "write"), [("mitdb", write_mitdb), ("nstdb", write_nstdb), ("ludb", write_ludb)])
def test_building_again_gives_the_same_examples_in_the_same_order(tmp_path, name, write):
    write(tmp_path)
    directories = []
    for place in ("first", "second"):
        directory, is_new = build(tmp_path, tmp_path / place, name)
        assert is_new
        assert directory == tmp_path / place / DATABASES[name].folder
        assert list((tmp_path / place).iterdir()) == [directory.parent]  # nothing else is left
        directories.append(directory)
    first, second = (read(directory) for directory in directories)
    np.testing.assert_equal(first, second)
    digests = {json.loads((directory / "metadata.json").read_text())["digest"] for directory in directories}
    assert digests == {shards.digest(directory) for directory in directories}
    assert len(digests) == 1


def test_shards_name_their_source(tmp_path):
    write_ludb(tmp_path, numbers=("1",))
    directory, _ = build(tmp_path, tmp_path / "data", "ludb")
    metadata = tfds.builder_from_directory(directory).info.metadata
    assert metadata["source"] == "ludb 1.0.1"
    files = tree(tmp_path / "ludb/1.0.1")
    read_files = ("RECORDS", "data/1.hea", "data/1.dat", "data/1.ii")
    assert metadata["checksums"] == {name: hashlib.sha256(files[name]).hexdigest() for name in read_files}


def test_the_order_of_examples_counts(tmp_path):
    write_mitdb(tmp_path / "a", records=("100", "103"))
    write_mitdb(tmp_path / "b", records=("103", "100"))
    first, _ = build(tmp_path / "a", tmp_path / "data_a")
    second, _ = build(tmp_path / "b", tmp_path / "data_b")
    assert shards.digest(first) != shards.digest(second)


def test_a_finished_set_is_kept_and_a_changed_source_replaces_it(tmp_path):
    write_mitdb(tmp_path)
    directory, _ = build(tmp_path, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert build(tmp_path, tmp_path / "data") == (directory, False)
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    digest = shards.digest(directory)
    write_mitdb(tmp_path, seed=1)
    assert build(tmp_path, tmp_path / "data") == (directory, True)
    assert shards.digest(directory) != digest
    assert json.loads((directory / "metadata.json").read_text())["digest"] == shards.digest(directory)


def test_another_revision_of_the_builder_builds_anew(tmp_path, monkeypatch):
    write_mitdb(tmp_path)
    build(tmp_path, tmp_path / "data")
    monkeypatch.setattr(Mitdb, "REVISION", 2)
    assert build(tmp_path, tmp_path / "data")[1]


@pytest.mark.parametrize(
    "damage",
    [
        "shard gone",
        "shard cut",
        "byte flipped",
        "no metadata",
        "empty metadata",
        "empty info",
        "broken info",
        "no features",
    ],
)
def test_a_damaged_set_is_built_anew(tmp_path, damage):
    write_mitdb(tmp_path, records=("100",))
    directory, _ = build(tmp_path, tmp_path / "data")
    expected = shards.digest(directory)
    match damage:
        case "shard gone":
            next(directory.glob("*array_record*")).unlink()
        case "shard cut":
            path = next(directory.glob("*array_record*"))
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "byte flipped":
            path = next(directory.glob("*array_record*"))
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
        case "no metadata":
            (directory / "metadata.json").unlink()
        case "empty metadata":
            (directory / "metadata.json").write_text("")
        case "empty info":
            (directory / "dataset_info.json").write_text("")
        case "broken info":
            (directory / "dataset_info.json").write_text('{"splits": 3}')
        case "no features":
            (directory / "features.json").unlink()
    assert build(tmp_path, tmp_path / "data") == (directory, True)
    assert shards.digest(directory) == expected


@pytest.mark.parametrize("has_older", [False, True])
def test_an_interrupted_build_leaves_no_half_set(tmp_path, monkeypatch, has_older):
    write_mitdb(tmp_path)
    directory = tmp_path / "data/mitdb/1.0.0"
    if has_older:
        build(tmp_path, tmp_path / "data")
        write_mitdb(tmp_path, seed=1)
    older = tree(tmp_path / "data") if has_older else {}
    whole = Mitdb.read_examples

    def interrupted(self, record):
        if record == "102":  # ds1 and ds2 are written by then
            raise KeyboardInterrupt
        return whole(self, record)

    monkeypatch.setattr(Mitdb, "read_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, tmp_path / "data")
    assert tree(tmp_path / "data") == older
    assert directory.exists() == has_older
    monkeypatch.undo()
    assert build(tmp_path, tmp_path / "data") == (directory, True)


def test_what_a_killed_build_left_is_swept(tmp_path):
    write_mitdb(tmp_path)
    (tmp_path / "data/.incomplete/mitdb/incomplete.ABC_1.0.0").mkdir(parents=True)
    (tmp_path / "data/.incomplete/mitdb/incomplete.ABC_1.0.0/mitdb-ds1.array_record").write_text("half")
    directory, _ = build(tmp_path, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [directory.parent]


def test_a_full_disk(tmp_path):
    """The system refuses to let files grow, as it does on a full disk, with another errno."""
    write_nstdb(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(PrepareError) as caught:
            build(tmp_path, tmp_path / "data", "nstdb")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(
        f"cannot write the shards of nstdb 1.0.0 in {tmp_path / 'data'}: File too large;"
    )
    assert tree(tmp_path / "data") == {}
    assert build(tmp_path, tmp_path / "data", "nstdb")[1]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow makes it possible")
def test_a_split_too_large_without_beam(tmp_path, monkeypatch):
    write_nstdb(tmp_path)
    monkeypatch.setattr(tfds.core.shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    with pytest.raises(PrepareError, match=r"^a split of nstdb 1.0.0 is beyond 1,000 bytes.*\[beam\].* --beam$"):
        build(tmp_path, tmp_path / "data", "nstdb")
    assert tree(tmp_path / "data") == {}


def test_no_tensorflow(tmp_path):
    write_mitdb(tmp_path)
    build(tmp_path, tmp_path / "data")
    assert "tensorflow" not in sys.modules
