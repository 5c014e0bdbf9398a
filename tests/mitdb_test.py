import numpy as np
import pytest
import tensorflow_datasets as tfds
import wfdb
from made_databases import write_lists, write_mitdb

from data_prep import mitdb, shards
from data_prep.physionet import DATABASES, PrepareError, verify

DATABASE = DATABASES["mitdb"]
DIGEST = "c4f885a09ce2f365c0eb8f1b58b3ee7ae2f89af3aef658fe9881ab0fb1be064d"


def build(source, data_dir, builder_class=mitdb.Mitdb):
    directory, _ = shards.build(builder_class, verify(DATABASE, source), data_dir)
    return tfds.builder_from_directory(directory)


def test_every_record_stands_in_one_list():
    lists = (mitdb.DS1, mitdb.DS2, mitdb.PACED)
    assert [len(records) for records in lists] == [23, 21, 4]
    assert len({*mitdb.DS1, *mitdb.DS2, *mitdb.PACED}) == 48
    assert {"201", "202"} <= set(mitdb.DS1)  # one person


def test_examples_are_the_file_s_own_samples(tmp_path):
    signals = write_mitdb(tmp_path, records=("101", "100", "106", "102"))
    builder = build(tmp_path, tmp_path / "data")
    assert set(builder.info.splits) == {"ds1", "ds2", "paced"}
    examples = list(builder.as_data_source("ds1"))
    found = [(example["record"], example["sample"], example["symbol"]) for example in examples]
    # In the order of RECORDS, then of time. L and A (128, 1872) just have room; the others have none or are no beats.
    kept = [(128, b"L"), (500, b"V"), (1872, b"A")]
    assert found == [(record, *beat) for record in (b"101", b"106") for beat in kept]
    for example in examples:
        expected = signals[example["record"].decode()][example["sample"] - 128 : example["sample"] + 128]
        np.testing.assert_array_equal(example["signal"], expected, strict=True)
        assert example["leads"].tolist() == [b"MLII", b"V5"]
    (paced, *_) = builder.as_data_source("paced")
    assert paced["record"] == b"102"


def test_examples_give_wfdb_s_millivolts(tmp_path):
    write_mitdb(tmp_path, records=("100",))
    example = build(tmp_path, tmp_path / "data").as_data_source("ds2")[1]
    expected = wfdb.rdrecord(str(tmp_path / "mitdb/1.0.0/100")).p_signal[500 - 128 : 500 + 128]
    assert example["gain"].dtype == np.float32
    assert example["baseline"].dtype == np.int32
    millivolts = (example["signal"].astype(float) - example["baseline"]) / example["gain"]
    np.testing.assert_array_equal(millivolts, expected)


def test_recordings_are_whole_with_all_their_beats(tmp_path):
    signals = write_mitdb(tmp_path, records=("101", "100", "106"))
    builder = build(tmp_path, tmp_path / "data", mitdb.MitdbRecordings)
    assert builder.name == "mitdb_recordings"
    examples = {example["record"].decode(): example for example in builder.as_data_source("ds1")}
    assert list(examples) == ["101", "106"]
    for name, example in examples.items():
        np.testing.assert_array_equal(example["signal"], signals[name], strict=True)
        # Whether they have room for a window or not: N, L, V, A and / are beats, + and ~ are none.
        assert example["beats"].tolist() == [127, 128, 500, 1872, 1873]
    assert build(tmp_path, tmp_path / "data").name == "mitdb"  # beside it


def test_a_few_records_are_enough(tmp_path):
    write_mitdb(tmp_path, records=("100",))
    assert set(build(tmp_path, tmp_path / "data").info.splits) == {"ds2"}


def test_a_record_without_annotations_gives_no_windows(tmp_path):
    write_mitdb(tmp_path, records=("100", "103"))
    (tmp_path / "mitdb/1.0.0/100.atr").write_bytes(b"\0\0")
    write_lists(tmp_path / "mitdb/1.0.0", ["100", "103"])
    assert {e["record"] for e in build(tmp_path, tmp_path / "data").as_data_source("ds2")} == {b"103"}


def test_a_record_in_no_list_is_refused(tmp_path):
    write_mitdb(tmp_path, records=("100", "999"))
    with pytest.raises(PrepareError, match="records 999, which no split holds"):
        build(tmp_path, tmp_path / "data")
    assert not (tmp_path / "data/mitdb").exists()


def test_a_split_without_a_window_is_refused(tmp_path):
    write_mitdb(tmp_path, records=("100",), peaks={"N": 127, "V": 1873})
    with pytest.raises(PrepareError, match="ds2 of mitdb 1.0.0: no window in 1 records"):
        build(tmp_path, tmp_path / "data")


def test_two_real_records(tmp_path, physionet):
    source = tmp_path / "mitdb/1.0.0"
    source.mkdir(parents=True)
    for name in ("100", "114"):
        for ending in DATABASE.endings:
            (source / f"{name}{ending}").symlink_to(physionet / f"mitdb/1.0.0/{name}{ending}")
    write_lists(source, ["100", "114"])
    builder = build(tmp_path, tmp_path / "data")
    # MIT-BIH's directory counts 2,273 and 1,879 beats; the first and the last of 100 (at 77 and 649,991) lack room.
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"ds1": 1879, "ds2": 2271}
    example = builder.as_data_source("ds1")[0]
    assert example["leads"].tolist() == [b"V5", b"MLII"]  # 114 alone has them in this order


@pytest.mark.slow
def test_all_real_records(tmp_path, physionet):
    builder = build(physionet, tmp_path)
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"ds1": 53607, "ds2": 47558, "paced": 8758}  # 109,923
    assert builder.info.metadata["digest"] == DIGEST == shards.digest(tmp_path / "mitdb/1.0.0")
