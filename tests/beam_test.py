import importlib.util
import resource
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_databases import tree, write_lists, write_ludb, write_mitdb, write_nstdb

from data_prep import beam, prepare, shards
from data_prep.mitdb import Mitdb
from data_prep.nstdb import Nstdb
from data_prep.physionet import DATABASES, PrepareError, verify

FOLDERS = ("mitdb/1.0.0", "mitdb_recordings/1.0.0", "nstdb/1.0.0", "ludb/1.0.1")


WORKERS = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason='apache_beam is not installed; pip install "ralenet_jax[beam]"',
)


def read(directory) -> dict[str, list[dict]]:
    builder = tfds.builder_from_directory(directory)
    return {split: list(builder.as_data_source(split)) for split in builder.info.splits}


def build_on_beam(source, data_dir, options=()):
    return shards.build(Mitdb, verify(DATABASES["mitdb"], source), data_dir, beam.parse_options(options))


@needs_beam
def test_the_same_examples_as_without_beam(tmp_path, capsys):
    source = tmp_path / "source"
    write_mitdb(source, records=("101", "100", "106", "102", "103"))
    write_nstdb(source)
    write_ludb(source)
    argv = ["--source", str(source)]
    assert prepare.main([*argv, "--data-dir", str(tmp_path / "without")]) == 0
    assert prepare.main([*argv, "--data-dir", str(tmp_path / "with"), "--beam"]) == 0
    assert capsys.readouterr().err == ""
    for folder in FOLDERS:
        np.testing.assert_equal(read(tmp_path / "with" / folder), read(tmp_path / "without" / folder))
        infos = [tfds.builder_from_directory(tmp_path / way / folder).info for way in ("with", "without")]
        # The source, the digest, and what TFDS counted.
        assert dict(infos[0].metadata) == dict(infos[1].metadata)
        assert infos[0].as_proto == infos[1].as_proto
        assert infos[0].metadata["digest"] == shards.digest(tmp_path / "with" / folder)
        assert sorted(tree(tmp_path / "with" / folder)) == sorted(tree(tmp_path / "without" / folder))
    # Nothing is built again, whichever way it was built.
    assert prepare.main([*argv, "--data-dir", str(tmp_path / "with")]) == 0
    assert capsys.readouterr().out.count("there from the same source, kept") == 4


@needs_beam
def test_the_order_stays_when_a_split_fills_several_shards(tmp_path, monkeypatch):
    write_mitdb(tmp_path, records=("106", "101", "112", "108", "109"))
    monkeypatch.setattr(tfds.core.utils.shard_utils.ShardConfig, "min_shard_size", 4 << 10)  # bytes
    without, _ = shards.build(Mitdb, verify(DATABASES["mitdb"], tmp_path), tmp_path / "without")
    on_beam, _ = build_on_beam(tmp_path, tmp_path / "with")
    assert len(list(on_beam.glob("*array_record*"))) == 4
    assert shards.digest(on_beam) == shards.digest(without)
    np.testing.assert_equal(read(on_beam), read(without))


@needs_beam
@pytest.mark.parametrize("options", [(), WORKERS], ids=["here", "in worker processes"])
def test_a_record_that_cannot_be_read(tmp_path, options):
    write_mitdb(tmp_path, records=("100", "103"))
    (tmp_path / "mitdb/1.0.0/103.hea").write_text("103 2 250 2000\n")
    write_lists(tmp_path / "mitdb/1.0.0", ["100", "103"])
    told = r"^record 103 in .* cannot be read: .*2 signals, 0 lines.*; use PhysioNet's copy of mitdb 1.0.0$"
    with pytest.raises(PrepareError, match=told):
        build_on_beam(tmp_path, tmp_path / "data", options)
    assert tree(tmp_path / "data") == {}


@needs_beam
def test_a_split_without_a_window(tmp_path):
    write_mitdb(tmp_path, records=("100",), peaks={"N": 127, "V": 1873})
    with pytest.raises(PrepareError, match=r"^ds2 of mitdb 1.0.0: no window in 1 records of .*away from their ends$"):
        build_on_beam(tmp_path, tmp_path / "data")


@needs_beam
def test_a_full_disk(tmp_path):
    write_nstdb(tmp_path)
    copy = verify(DATABASES["nstdb"], tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(PrepareError, match="^cannot write the shards of nstdb 1.0.0 in .*: File too large; free"):
            shards.build(Nstdb, copy, tmp_path / "data", beam.parse_options([]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path / "data") == {}


@needs_beam
def test_a_runner_that_is_none(tmp_path, capsys):
    assert prepare.main(["--data-dir", str(tmp_path), "--beam-options=--runner=Nowhere"]) == 2
    assert "Nowhere" in capsys.readouterr().err


def test_without_beam(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert prepare.main(["--data-dir", str(tmp_path / "data"), "--source", str(tmp_path), "--beam"]) == 2
    expected = 'ralenet: error: --beam needs apache_beam; pip install "ralenet_jax[beam]"\n'
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "data").exists()


@needs_beam
@pytest.mark.slow
def test_real_databases(tmp_path, physionet):
    prepare.prepare(tmp_path / "without", source=physionet)
    prepare.prepare(tmp_path / "with", source=physionet, beam_options=[])
    for folder in FOLDERS:
        with_beam, without = (tfds.builder_from_directory(tmp_path / way / folder).info for way in ("with", "without"))
        assert dict(with_beam.metadata) == dict(without.metadata)
