import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_databases import write_nstdb

from data_prep import nstdb, shards
from data_prep.physionet import DATABASES, PrepareError, verify

DIGEST = "781cae8bdd6060d38dd6a19e1e26c7d4bbcfb9d15864389ff79dba7ea8a32ad8"


def build(source, data_dir):
    copy = verify(DATABASES["nstdb"], source)
    directory, _ = shards.build(nstdb.Nstdb, copy, data_dir)
    return tfds.builder_from_directory(directory)


def test_recordings_are_kept_whole(tmp_path):
    signals = write_nstdb(tmp_path)
    builder = build(tmp_path, tmp_path / "data")
    assert set(builder.info.splits) == {"bw", "em", "ma"}
    for record, signal in signals.items():
        (example,) = builder.as_data_source(record)
        np.testing.assert_array_equal(example["signal"], signal, strict=True)
        assert example["record"].decode() == record
        assert example["gain"].tolist() == [200, 200]
        assert example["baseline"].tolist() == [0, 0]


def test_the_ecg_records_with_noise_are_not_read(tmp_path):
    write_nstdb(tmp_path, records=("bw", "ma"), others=("118e00", "119e_6"))  # no files for these, so no reading
    assert set(build(tmp_path, tmp_path / "data").info.splits) == {"bw", "ma"}


def test_a_copy_without_any_noise_is_refused(tmp_path):
    write_nstdb(tmp_path, records=())
    with pytest.raises(PrepareError, match=r"names 1 records, none of those read \(bw, em, ma\)"):
        build(tmp_path, tmp_path / "data")


def test_real_recordings(tmp_path, physionet):
    builder = build(physionet, tmp_path)
    for split in ("bw", "em", "ma"):
        (example,) = builder.as_data_source(split)
        assert example["signal"].shape == (650000, 2)
    assert builder.info.metadata["digest"] == DIGEST == shards.digest(tmp_path / "nstdb/1.0.0")
