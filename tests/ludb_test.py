import numpy as np
import pytest
import tensorflow_datasets as tfds
import wfdb
from made_databases import write_lists, write_ludb

from data_prep import ludb, shards
from data_prep.physionet import DATABASES, PrepareError, verify

DATABASE = DATABASES["ludb"]
DIGEST = "d65fc7965b09f00be19d37513e058738ec93574e53197400185fe80e6386fc0d"


def build(source, data_dir):
    directory, _ = shards.build(ludb.Ludb, verify(DATABASE, source), data_dir)
    return tfds.builder_from_directory(directory)


def test_offset_and_drift_come_through_to_the_very_ends():
    times = np.arange(5000) / 500
    signal = np.stack([np.full(5000, -3.0), 2 + 0.5 * times], axis=1)
    found = ludb.resample(signal)
    assert found.dtype == np.float32
    times = np.arange(3600) / 360
    np.testing.assert_allclose(found, np.stack([np.full(3600, -3.0), 2 + 0.5 * times], axis=1), rtol=2e-4)


@pytest.mark.parametrize("frequency", [1.0, 10.0, 40.0])
def test_a_sine_is_resampled_in_time(frequency):
    signal = 1.5 + np.sin(2 * np.pi * frequency * np.arange(5000) / 500)[:, None]
    expected = 1.5 + np.sin(2 * np.pi * frequency * np.arange(3600) / 360)
    found = ludb.resample(signal)[:, 0]
    np.testing.assert_allclose(found[30:-30], expected[30:-30], atol=3e-3)


def test_a_peak_stays_at_its_peak():
    for peak in (1000, 1001, 1013, 2487):
        pulse = np.exp(-0.5 * ((np.arange(5000) - peak) / 6) ** 2)[:, None]
        assert ludb.resample(pulse)[:, 0].argmax() == ludb.resample_peaks(np.array([peak]))[0]


def test_peaks_are_rounded_to_the_nearest_sample():
    peaks = np.arange(5000)
    np.testing.assert_array_equal(ludb.resample_peaks(peaks), np.floor(peaks * 0.72 + 0.5))


def test_windows_and_splits(tmp_path):
    signals = write_ludb(tmp_path)
    builder = build(tmp_path, tmp_path / "data")
    found = {
        split: [(example["record"], example["sample"]) for example in builder.as_data_source(split)]
        for split in ("train", "test")
    }
    # 2,777 samples become 2,000. Of the peaks 177, 178, 1000, 2600 at 127.44, 128.16, 720, 1872 the first has no room.
    assert found["train"] == [(number, peak) for number in (b"1", b"12") for peak in (128, 720, 1872)]
    assert found["test"] == [(number, peak) for number in (b"5", b"10") for peak in (128, 720, 1872)]
    example = builder.as_data_source("test")[1]
    resampled = ludb.resample((signals["5"] - np.arange(12)) / 1000)
    np.testing.assert_array_equal(example["signal"], resampled[720 - 128 : 720 + 128], strict=True)
    assert [lead.decode() for lead in example["leads"]] == "i ii iii avr avl avf v1 v2 v3 v4 v5 v6".split()


def test_a_record_without_annotations_gives_no_windows(tmp_path):
    write_ludb(tmp_path, numbers=("1", "2"))
    (tmp_path / "ludb/1.0.1/data/1.ii").write_bytes(b"\0\0")
    write_lists(tmp_path / "ludb/1.0.1", ["data/1", "data/2"])
    assert {e["record"] for e in build(tmp_path, tmp_path / "data").as_data_source("train")} == {b"2"}


def test_gaps_are_refused(tmp_path):
    signals = write_ludb(tmp_path, numbers=("1",))
    folder = tmp_path / "ludb/1.0.1"
    signals["1"][40, 3] = -32768  # WFDB's "no sample"
    signals["1"].tofile(folder / "data/1.dat")
    write_lists(folder, ["data/1"])
    with pytest.raises(PrepareError, match="record data/1 in .* has gaps"):
        build(tmp_path, tmp_path / "data")


def test_a_record_without_a_number_is_refused(tmp_path):
    write_ludb(tmp_path, numbers=("1",))
    folder = tmp_path / "ludb/1.0.1"
    for ending in DATABASE.endings:
        (folder / f"data/x{ending}").write_bytes(b"")
    write_lists(folder, ["data/1", "data/x"])
    with pytest.raises(PrepareError, match="record 'data/x', expected numbers"):
        build(tmp_path, tmp_path / "data")


def test_real_records(tmp_path, physionet):
    builder = build(physionet, tmp_path)
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"train": 1462, "test": 369}
    assert sum(counts.values()) == 1831
    test, train = ({example["record"] for example in builder.as_data_source(split)} for split in ("test", "train"))
    assert test == {str(number).encode() for number in range(5, 201, 5)}
    assert not test & train
    steps = [1 / max(wfdb.rdheader(str(physionet / f"ludb/1.0.1/data/{n}")).adc_gain) for n in range(1, 201)]
    assert min(steps) / 10 > ludb.QUANTUM_MV
    assert builder.info.metadata["digest"] == DIGEST == shards.digest(tmp_path / "ludb/1.0.1")
