import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
import wfdb
from made_databases import write_mitdb

from configs import honest, ralenet
from data_prep import prepare
from ralenet_jax import input_pipeline, noise
from ralenet_jax.errors import UserError

# Records of the simulated mitdb under the honest protocol; 102 is paced and left out.
_HONEST = {
    "train": {"101", "106", "108", "112", "114"},
    "validation": {"109", "116"},
    "test": {"100", "103", "105"},
}
# de Chazal et al. (2004), with 202 (the person of 201) in DS1; five of DS1 validate.
_DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 202 203 205 207 208 209 215 220 223 230"
_VALIDATION = "109 116 124 205 223"


def configure(data_dir, made=ralenet, **data):
    config = made.get_config()
    config.data.update({"dir": str(data_dir), "num_windows": 200, "num_train": 160} | data)
    return config


@pytest.fixture(scope="module")
def source(data_dir):
    """The WFDB files that the shards were made from."""
    return data_dir.parent / "simulated"


@pytest.fixture(scope="module")
def honest_windows(data_dir):
    return {split: input_pipeline.read_split(configure(data_dir, honest), split) for split in _HONEST}


@pytest.fixture(scope="module")
def total(data_dir):
    return sum(split.num_examples for split in input_pipeline.open_shards(data_dir, "mitdb").info.splits.values())


def made_windows(count=10):
    """Windows whose signal tells which they are."""
    index = np.arange(count)
    signal = np.broadcast_to(index[:, None, None], (count, 4, 2)).astype(np.int16)
    gain, baseline = np.full((count, 2), 2, np.float32), np.zeros((count, 2), np.int32)
    return input_pipeline.Windows(
        signal, gain, baseline, index.astype(str), index.astype(str), (100 + index).astype("i4")
    )


def test_windows_are_the_recordings_in_millivolts(honest_windows, source):
    windows = honest_windows["test"]
    chosen = windows[np.flatnonzero(windows.record == "103")]
    record = wfdb.rdrecord(str(source / "mitdb/1.0.0/103"))
    beats = wfdb.rdann(str(source / "mitdb/1.0.0/103"), "atr")
    kept = [
        (sample, symbol)
        for sample, symbol in zip(beats.sample, beats.symbol, strict=True)
        if symbol != "+" and 128 <= sample <= record.sig_len - 128
    ]
    assert [symbol for _, symbol in kept] == chosen.symbol.tolist()
    expected = np.stack([record.p_signal[sample - 128 : sample + 128] for sample, _ in kept])
    assert chosen.millivolts().dtype == np.float32
    np.testing.assert_allclose(chosen.millivolts(), expected, rtol=1e-6, atol=1e-7)


def test_millivolts_use_each_window_s_own_gain_and_baseline():
    signal = np.array([[[1024, 100]], [[-2048, 2047]]], np.int16)
    gain, baseline = np.array([[200, 50], [100, 1]], np.float32), np.array([[1024, 0], [-1024, 1]], np.int32)
    text = np.array(["a", "b"])
    windows = input_pipeline.Windows(signal, gain, baseline, text, text, np.arange(2))
    np.testing.assert_allclose(windows.millivolts(), [[[0, 2]], [[-10.24, 2046]]], rtol=1e-6)


def test_noise_is_the_recordings_in_millivolts(data_dir, source):
    recordings = input_pipeline.read_noise(configure(data_dir))
    expected = [wfdb.rdrecord(str(source / f"nstdb/1.0.0/{name}")).p_signal for name in ("bw", "ma", "em")]
    assert noise.RECORDINGS == ("bw", "ma", "em")
    assert recordings.dtype == np.float32
    np.testing.assert_allclose(recordings, np.stack(expected), rtol=1e-6, atol=1e-7)


def test_noise_has_gains_and_baselines_and_is_cut_to_the_shortest(monkeypatch):
    gain, baseline = np.array([200, 100], np.float32), np.array([0, -50], np.int32)
    signals = {
        "bw": [[200, 50], [0, 0], [7, 7]],
        "em": [[400, 150], [-200, -150]],
        "ma": [[-400, -250], [0, 50], [9, 9]],
    }
    examples = {
        name: [{"signal": np.array(signal, np.int16), "gain": gain, "baseline": baseline}]
        for name, signal in signals.items()
    }
    info = types.SimpleNamespace(splits=examples)
    builder = types.SimpleNamespace(info=info, as_data_source=examples.get, data_path="nstdb")
    monkeypatch.setattr(input_pipeline, "open_shards", lambda data_dir, name: builder)
    expected = [[[1, 1], [0, 0.5]], [[-2, -2], [0, 1]], [[2, 2], [-1, -1]]]  # bw, ma, em
    np.testing.assert_allclose(input_pipeline.read_noise(ralenet.get_config()), expected)


def test_validation_records_are_those_of_the_protocol():
    assert input_pipeline.VALIDATION_RECORDS == tuple(_VALIDATION.split())
    assert set(input_pipeline.VALIDATION_RECORDS) < set(_DS1.split())


def test_honest_split_is_by_record(honest_windows):
    assert {split: set(windows.record) for split, windows in honest_windows.items()} == _HONEST


def test_ids_are_the_places_in_the_whole_database(honest_windows, data_dir, total):
    everything = input_pipeline.read_windows(input_pipeline.open_shards(data_dir, "mitdb"), np.arange(total))
    np.testing.assert_array_equal(everything.id, np.arange(total))
    ids = np.concatenate([windows.id for windows in honest_windows.values()])
    assert len(set(ids)) == len(ids) == np.sum(everything.record != "102")
    for windows in honest_windows.values():
        np.testing.assert_array_equal(everything.signal[windows.id], windows.signal)
        np.testing.assert_array_equal(everything.record[windows.id], windows.record)


def test_reading_many_windows_in_any_order(data_dir, total, monkeypatch):
    builder = input_pipeline.open_shards(data_dir, "mitdb")
    examples = builder.as_data_source("ds1+ds2+paced")
    monkeypatch.setattr(input_pipeline, "_READ_AT_ONCE", 7)  # several reads, the last one short
    ids = np.random.default_rng(0).permutation(total)[:30]
    windows = input_pipeline.read_windows(builder, ids)
    for place, index in enumerate(ids):
        np.testing.assert_array_equal(windows.signal[place], examples[int(index)]["signal"])
        assert windows.record[place] == examples[int(index)]["record"].decode()


def test_paper_split_is_random_disjoint_and_of_the_given_size(data_dir, total):
    config = configure(data_dir, num_windows=total, num_train=total - 100)
    train, test, validation = (input_pipeline.read_split(config, split) for split in ("train", "test", "validation"))
    assert (len(train), len(test)) == (total - 100, 100)
    assert set(train.id) | set(test.id) == set(range(total))
    np.testing.assert_array_equal(test.id, validation.id)
    assert set(train.record) >= {"100", "101", "102"}  # all records, the paced one too, on the side that trains
    assert np.any(np.diff(test.id) < 0)  # and in no order


def test_paper_split_follows_its_own_seed_alone(data_dir):
    first = input_pipeline.read_split(configure(data_dir), "test")
    other_run = configure(data_dir)
    other_run.seed, other_run.noise.seed = 5, 6
    np.testing.assert_array_equal(first.id, input_pipeline.read_split(other_run, "test").id)
    assert set(first.id) != set(input_pipeline.read_split(configure(data_dir, seed=1), "test").id)


@pytest.mark.parametrize("num_windows, num_train", [(100, 100), (100, 0), (100, -1), (1_000_000, 10), (0, 0)])
def test_impossible_paper_split_is_refused(data_dir, num_windows, num_train):
    config = configure(data_dir, num_windows=num_windows, num_train=num_train)
    with pytest.raises(UserError, match=rf"data.num_train {num_train} of data.num_windows {num_windows}; expected"):
        input_pipeline.read_split(config, "train")


def test_unknown_protocol_is_refused(data_dir):
    config = configure(data_dir)
    config.protocol = "fair"
    with pytest.raises(UserError, match="protocol is 'fair'; expected one of paper, honest"):
        input_pipeline.read_split(config, "train")


@pytest.mark.parametrize("length", [650_000, 129_600, 1001])
def test_honest_noise_is_split_in_time(length):
    config = honest.get_config()
    spans = {split: input_pipeline.noise_span(config, split, length) for split in _HONEST}
    assert spans["train"] == spans["validation"] == (0, length // 2)
    assert spans["test"] == (length // 2, length)


def test_paper_noise_is_whole():
    spans = {input_pipeline.noise_span(ralenet.get_config(), split, 650_000) for split in _HONEST}
    assert spans == {(0, 650_000)}


def test_no_sample_of_noise_both_trains_and_tests(data_dir):
    # Poison what the other side may use: not a single NaN may come through.
    config = configure(data_dir, honest)
    recordings = input_pipeline.read_noise(config)[:, :1024]
    clean = np.random.default_rng(0).standard_normal((256, 256, 2), np.float32)
    mix = jax.jit(functools.partial(noise.mix, "honest"))
    keys = noise.window_keys(jax.random.key(0), np.arange(256, dtype=np.int32), None)
    for split, other in (("train", slice(512, None)), ("validation", slice(512, None)), ("test", slice(0, 512))):
        poisoned = recordings.copy()
        poisoned[:, other] = np.nan
        condition = noise.condition("emb", 0.0, None, input_pipeline.noise_span(config, split, 1024))
        assert np.isfinite(mix(poisoned, condition, clean, keys).noisy).all()


def test_missing_shards_tell_how_to_make_them(tmp_path):
    for read in (lambda config: input_pipeline.read_split(config, "train"), input_pipeline.read_noise):
        with pytest.raises(UserError, match=rf"no prepared .* below {tmp_path}; run `ralenet prepare"):
            read(configure(tmp_path))


def write_shards(tmp_path, *records):
    """A mitdb of a few records, three windows each."""
    source = tmp_path / "source"
    write_mitdb(source, records)
    prepare.prepare(tmp_path, source=source, databases=("mitdb",), report=lambda line: None)


def test_a_database_of_a_few_records_serves_as_far_as_it_goes(tmp_path):
    write_shards(tmp_path, "100", "103")
    config = configure(tmp_path, honest)
    assert set(input_pipeline.read_split(config, "test").record) == {"100", "103"}
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"the {split} part of mitdb.* has no windows; prepare the whole database"):
            input_pipeline.read_split(config, split)
    windows = input_pipeline.read_split(configure(tmp_path, num_windows=5, num_train=3), "train")
    assert len(windows) == 3


def test_honest_protocol_needs_both_sides(tmp_path):
    write_shards(tmp_path, "101", "102")
    config = configure(tmp_path, honest)
    assert set(input_pipeline.read_split(config, "train").record) == {"101"}
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=f"the {split} part .* has no windows"):
            input_pipeline.read_split(config, split)


_LUDB = {  # of the simulated records 1 to 5: 5 tests, and 4 validates where there is a validation of its own
    "paper": {"train": {"1", "2", "3", "4"}, "validation": {"5"}, "test": {"5"}},
    "honest": {"train": {"1", "2", "3"}, "validation": {"4"}, "test": {"5"}},
}


@pytest.mark.parametrize("made", [ralenet, honest])
def test_ludb_is_split_by_record(data_dir, made):
    config = configure(data_dir, made, database="ludb", num_windows=0)  # which concerns mitdb alone
    found = {split: input_pipeline.read_split(config, split) for split in ("train", "validation", "test")}
    assert {split: set(windows.record) for split, windows in found.items()} == _LUDB[config.protocol]
    builder = input_pipeline.open_shards(data_dir, "ludb")
    examples = builder.as_data_source("train+test")  # ids are the places in it
    for windows in found.values():
        for place in (0, len(windows) - 1):
            example = examples[int(windows.id[place])]
            np.testing.assert_array_equal(windows.signal[place], example["signal"])
            assert windows.record[place] == example["record"].decode()
    total = sum(split.num_examples for split in builder.info.splits.values())
    ids = np.concatenate([found["train"].id, found["test"].id] + [found["validation"].id] * (made is honest))
    assert sorted(ids) == list(range(total))


def test_ludb_windows_are_millivolts_as_they_are(data_dir):
    config = configure(data_dir, database="ludb")
    windows = input_pipeline.read_split(config, "test")
    assert windows.signal.shape == (len(windows), *input_pipeline.window_shape(config)) == (len(windows), 256, 12)
    assert windows.millivolts().dtype == np.float32
    np.testing.assert_array_equal(windows.millivolts(), windows.signal)
    assert set(windows.symbol) == {""}
    block = input_pipeline.train_block(windows, np.array([[3, 1], [2, 0]]), 2)
    np.testing.assert_array_equal(block["clean"][1, :, 0], windows.signal[[1, 0]])


def test_unknown_database_is_refused(data_dir):
    config = configure(data_dir, database="ptbxl")
    for read in (lambda: input_pipeline.read_split(config, "train"), lambda: input_pipeline.window_shape(config)):
        with pytest.raises(UserError, match="data.database is 'ptbxl'; expected one of mitdb, ludb"):
            read()


def test_missing_noise_recording_is_named(data_dir, tmp_path):
    shutil.copytree(data_dir / "nstdb", tmp_path / "nstdb")
    info = tmp_path / "nstdb/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"name": "ma"', '"name": "xx"'))
    with pytest.raises(UserError, match="ma"):
        input_pipeline.read_noise(configure(tmp_path))


@pytest.mark.parametrize("damaged", ["nstdb-em.array_record-00000-of-00001", "features.json", "metadata.json"])
def test_damaged_shards_are_a_user_s_error(data_dir, tmp_path, damaged):
    folder = shutil.copytree(data_dir / "nstdb", tmp_path / "nstdb") / "1.0.0"
    for content in ((folder / damaged).read_bytes()[:500], None):
        (folder / damaged).unlink() if content is None else (folder / damaged).write_bytes(content)
        with pytest.raises(
            UserError, match=f"^the shards in {folder} cannot be read .*; run `ralenet prepare` again, "
        ):
            input_pipeline.read_noise(configure(tmp_path))


def test_window_shape_is_read_from_the_shards(data_dir):
    assert input_pipeline.window_shape(configure(data_dir)) == (256, 2)


@pytest.mark.parametrize("num_windows, batch_size", [(12, 4), (13, 4), (5, 5)])
def test_an_epoch_takes_each_window_once_at_most(num_windows, batch_size):
    steps = num_windows // batch_size
    epochs = [
        input_pipeline.batch_indices(0, epoch * steps, steps, num_windows, batch_size).ravel() for epoch in range(8)
    ]
    for order in epochs:
        assert len(set(order)) == len(order) == steps * batch_size
        assert set(order) <= set(range(num_windows))
    assert len({tuple(order) for order in epochs}) == 8
    assert set(np.concatenate(epochs)) == set(range(num_windows))  # none is left out for ever


def test_batches_depend_on_seed_and_step_alone():
    whole = input_pipeline.batch_indices(3, 0, 23, 50, 8)  # 6 steps an epoch
    assert whole.shape == (23, 8)
    for step, count in ((0, 1), (5, 2), (6, 6), (4, 15), (22, 1)):
        part = input_pipeline.batch_indices(3, step, count, 50, 8)
        np.testing.assert_array_equal(part, whole[step : step + count])
    assert not np.array_equal(whole, input_pipeline.batch_indices(4, 0, 23, 50, 8))


@pytest.mark.parametrize("batch_size", [0, -1, 101])
def test_impossible_batch_size_is_refused(batch_size):
    config = ralenet.get_config()
    config.train.batch_size = batch_size
    with pytest.raises(UserError, match=f"train.batch_size is {batch_size}; expected 1 to 100"):
        input_pipeline.steps_per_epoch(config, 100)


def test_steps_of_an_epoch_are_whole_batches():
    assert input_pipeline.steps_per_epoch(ralenet.get_config(), 8000) == 250
    assert input_pipeline.steps_per_epoch(ralenet.get_config(), 8031) == 250


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_training_block_shares_each_step_among_the_devices(devices):
    windows = made_windows()
    indices = np.array([[3, 1, 4, 0], [5, 9, 2, 6], [8, 7, 1, 3]])
    block = input_pipeline.train_block(windows, indices, devices)
    assert block["clean"].shape == (devices, 3, 4 // devices, 4, 2)
    assert block["clean"].dtype == np.float32 and block["id"].dtype == np.int32
    for step in range(3):
        np.testing.assert_array_equal(block["id"][:, step].ravel(), 100 + indices[step])
        np.testing.assert_array_equal(block["clean"][:, step, :, 0, 0].ravel(), indices[step] / 2)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_evaluation_takes_every_window_once_and_marks_the_padding(batch_size, devices):
    batches = list(input_pipeline.eval_batches(made_windows(), batch_size, devices))
    seen = []
    for batch in batches:
        assert batch["clean"].shape == batches[0]["clean"].shape  # one compilation serves all
        assert batch["clean"].shape[0] == devices
        real = batch["mask"].ravel() > 0
        seen += batch["id"].ravel()[real].tolist()
        np.testing.assert_array_equal(
            batch["clean"].reshape(-1, 4, 2)[real, 0, 0], (batch["id"].ravel()[real] - 100) / 2
        )
        assert set(batch["mask"].ravel()) <= {0.0, 1.0}
    assert seen == [100 + i for i in range(10)]


@pytest.mark.parametrize(("made", "database"), [(ralenet, "mitdb"), (honest, "mitdb"), (honest, "ludb")])
def test_streamed_windows_are_those_in_memory(data_dir, made, database):
    config = configure(data_dir, made, database=database)
    windows = input_pipeline.read_split(config, "train")
    config.data.stream = True
    stored = input_pipeline.open_split(config, "train")
    assert (len(stored), stored.shape) == (len(windows), windows.shape)
    steps = len(windows) // 8
    indices = input_pipeline.batch_indices(3, steps - 2, 5, len(windows), 8)  # over the end of an epoch
    for host in (0, 1):
        stream = input_pipeline.BatchStream(stored, 3, 8, 2 * steps, 4, host, 2)
        stream.go_to(steps - 2)
        block = stream.block(5, 7, 2)
        expected = input_pipeline.train_block(windows, input_pipeline.host_share(indices, host, 2), 2)
        for name, array in expected.items():
            np.testing.assert_array_equal(block[name][:, :5], array, strict=True)
            assert block[name].shape[1] == 7
    batches = (input_pipeline.eval_batches(each, 100, 2) for each in (stored, windows))
    for batch, expected in zip(*batches, strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(batch[name], array, strict=True)


def test_position_of_a_stream_is_the_step_for_any_number_of_hosts(data_dir):
    config = configure(data_dir)
    config.data.stream = True
    stored = input_pipeline.open_split(config, "train")
    streams = [input_pipeline.BatchStream(stored, 0, 8, 40, 3, host, 2) for host in (0, 1)]
    for stream in streams:
        stream.block(5, 5, 1)
    positions = [json.loads(json.dumps(stream.position)) for stream in streams]
    assert positions[0] == positions[1]
    parts = [stream.block(2, 2, 1)["id"] for stream in streams]
    for position in (positions[0], 5):
        whole = input_pipeline.BatchStream(stored, 0, 8, 40, 3)
        whole.go_to(position)
        np.testing.assert_array_equal(whole.block(2, 2, 2)["id"], np.concatenate(parts))


def test_opening_a_split_to_be_streamed_reads_none_of_its_windows(data_dir, monkeypatch):
    monkeypatch.setattr(input_pipeline.StoredWindows, "__getitem__", lambda *_: pytest.fail("was read"))
    config = configure(data_dir, honest)
    config.data.stream = True
    for split in ("train", "validation"):
        assert len(input_pipeline.open_split(config, split))


class Examples(list):
    """A data source of records' names that counts what is read."""

    read = 0

    def __getitem__(self, place):
        self.read += 1
        return {"record": super().__getitem__(place).encode()}


def built_of(names):
    examples = Examples(names)
    info = types.SimpleNamespace(full_name="mitdb/1.0.0")
    return examples, types.SimpleNamespace(as_data_source=lambda split: examples, info=info)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (2, 3, 1), (5, 1, 8, 2), (64, 3), (63, 65)])
def test_records_of_a_split_are_found(lengths):
    names = [chr(ord("a") + number) for number in range(len(lengths))]
    _, builder = built_of(np.repeat(names, lengths).tolist())
    assert input_pipeline._records(builder, "ds1") == (names, [sum(lengths[:number]) for number in range(len(names))])


def test_records_of_a_split_are_found_by_reading_few_windows():
    examples, builder = built_of(["a"] * 100_000 + ["b"] * 200_000)
    assert input_pipeline._records(builder, "ds1") == (["a", "b"], [0, 100_000])
    assert examples.read < 100


def test_windows_of_a_record_that_are_apart_are_refused():
    with pytest.raises(UserError, match="of a record are apart in ds1 of mitdb/1.0.0; prepare it anew"):
        input_pipeline._records(built_of(["a", "b", "a"])[1], "ds1")
