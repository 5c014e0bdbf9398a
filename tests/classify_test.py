"""The beat classifier on the simulated database: which beats, what it sees, what it learns, how it is counted."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import ralenet
from ralenet_jax import classify, evaluate, input_pipeline, noise
from ralenet_jax.errors import UserError
from ralenet_jax.models.resnet import ResNet

_DS1 = {"101", "106", "108", "109", "112", "114", "116"}  # of the simulated records
_DS2 = {"100", "103", "105"}
_EPOCHS = 12  # running statistics want some dozens of steps


@pytest.fixture(scope="module")
def parts(data_dir):
    """Split → (train, test) windows."""
    return {split: classify.select_beats(data_dir, split, 0) for split in classify.SPLITS}


@pytest.fixture(scope="module")
def everything(data_dir):
    builder = input_pipeline.open_shards(data_dir, "mitdb")
    total = sum(split.num_examples for split in builder.info.splits.values())
    return input_pipeline.read_windows(builder, np.arange(total))


@pytest.fixture(scope="module")
def trained(parts):
    """Variables, history and lines of text of a short training by record."""
    lines = []
    return (*classify.train_classifier(parts["records"][0], 0, _EPOCHS, lines.append), lines)


@pytest.fixture(scope="module")
def recordings(data_dir):
    return input_pipeline.read_noise(configure(data_dir))


@pytest.fixture(scope="module")
def source(data_dir, recordings):
    return evaluate.noise_source(configure(data_dir), recordings, "test", "emb", -4.0, None)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Three for the test beats, of which the last is filled up."""
    monkeypatch.setattr(classify, "_EVAL_BATCH_SIZE", 20)


def configure(data_dir):
    config = ralenet.get_config()
    config.data.dir = str(data_dir)
    return config


def count(windows, symbol):
    return int(np.sum(windows.symbol == symbol))


def seen(variables, windows, source=None):
    """What a denoiser is given, `[N, L, C]`."""
    batches = []
    classify.score(variables, windows, source, lambda noisy: batches.append(noisy) or noisy)
    return np.concatenate(batches)[: len(windows)]


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_random_split_is_balanced_and_takes_every_ventricular_beat(parts, everything):
    train, test = parts["random"]
    ventricular = count(everything, "V")
    assert count(train, "V") + count(test, "V") == count(train, "N") + count(test, "N") == ventricular > 100
    assert len(train) == 2 * ventricular * 8 // 10 and len(test) == 2 * ventricular - len(train)
    assert len(set(train.id.tolist()) | set(test.id.tolist())) == 2 * ventricular
    # Both parts hold both classes and, which is why this split flatters, the same patients.
    assert min(count(part, symbol) for part in (train, test) for symbol in "NV") > 15
    assert set(train.record) >= _DS1 | _DS2


def test_split_by_record_is_balanced_and_leaks_no_patient(parts, everything):
    for windows, records in zip(parts["records"], (_DS1, _DS2), strict=True):
        assert set(windows.record) <= records
        of_records = everything[np.isin(everything.record, sorted(records))]
        assert count(windows, "N") == count(windows, "V") == count(of_records, "V") > 20
        assert len(set(windows.id.tolist())) == len(windows) == 2 * count(of_records, "V")


def test_parts_by_record_end_where_the_splits_do(data_dir, everything, monkeypatch):
    borders = [np.flatnonzero(np.isin(everything.record, sorted(part)))[[0, -1]] for part in (_DS1, _DS2)]
    symbol = np.where(np.isin(everything.id, borders), "V", "N")
    monkeypatch.setattr(input_pipeline, "read_windows", lambda *_: dataclasses.replace(everything, symbol=symbol))
    for windows, border in zip(classify.select_beats(data_dir, "records", 0), borders, strict=True):
        assert set(windows.id[windows.symbol == "V"]) == set(border)


@pytest.mark.parametrize("split", classify.SPLITS)
def test_seed_decides_which_beats(data_dir, parts, split):
    again, other = (classify.select_beats(data_dir, split, seed) for seed in (0, 1))
    for part, same, different in zip(parts[split], again, other, strict=True):
        np.testing.assert_array_equal(part.id, same.id)
        assert set(part.id.tolist()) != set(different.id.tolist())


def test_what_cannot_be_split_is_refused(data_dir, tmp_path, monkeypatch, everything):
    with pytest.raises(UserError, match="'patients'; expected one of random, records"):
        classify.select_beats(data_dir, "patients", 0)
    with pytest.raises(UserError, match="no prepared mitdb"):
        classify.select_beats(tmp_path, "random", 0)
    in_test = np.isin(everything.record, sorted(_DS2))
    without = dataclasses.replace(everything, symbol=np.where(in_test, "N", everything.symbol))
    monkeypatch.setattr(input_pipeline, "read_windows", lambda builder, ids: without)
    with pytest.raises(UserError, match=f"{in_test.sum()} normal and 0 ventricular"):
        classify.select_beats(data_dir, "records", 0)


def test_clean_windows_are_z_scored_over_both_leads(parts, trained):
    windows = parts["records"][1]
    x = windows.millivolts().astype(np.float64)
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    np.testing.assert_allclose(seen(trained[0], windows), x, atol=1e-4)


def test_noisy_windows_are_the_papers_with_noise_by_window_id(parts, trained, recordings, source):
    windows = parts["records"][1]
    keys = jax.vmap(lambda identity: jax.random.fold_in(jax.random.key(0), identity))(windows.id)
    condition = noise.condition("emb", -4.0, None, (0, recordings.shape[1]))
    expected = jax.jit(noise.mix, static_argnums=0)("paper", recordings, condition, windows.millivolts(), keys)
    found = seen(trained[0], windows, source)
    np.testing.assert_allclose(found, expected.noisy, atol=1e-4)
    ratio = 10 * np.log10(np.mean(np.square(expected.clean)) / np.mean(np.square(found - expected.clean)))
    assert ratio == pytest.approx(-4, abs=1e-3)
    # A window keeps its noise, whatever stands beside it.
    np.testing.assert_allclose(seen(trained[0], windows[::-1], source), found[::-1], atol=1e-5)


def test_training_tells_beats_of_new_patients_apart(parts, trained, source):
    variables, history, lines = trained
    assert [line["epoch"] for line in history] == list(range(1, _EPOCHS + 1))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and history[-1]["accuracy"] > 0.95
    assert len(lines) == _EPOCHS and lines[-1].startswith(f"epoch {_EPOCHS}/{_EPOCHS}: loss {history[-1]['loss']:.4f}")
    test = parts["records"][1]
    clean = classify.score(variables, test)
    assert clean["f1"] > 0.9 and clean["accuracy"] > 0.9
    # What a denoiser gives counts, not what it was given: the clean windows in place of the noisy ones.
    assert classify.score(variables, test, source)["accuracy"] < clean["accuracy"]
    batches = iter(np.array_split(seen(variables, test), [20, 40]))
    given = classify.score(variables, test, source, lambda noisy: np.resize(next(batches), noisy.shape))
    assert given == clean


def test_the_same_seed_gives_the_same_bits(parts, trained):
    runs = [classify.train_classifier(parts["records"][0], seed, 2, lambda line: None) for seed in (0, 0, 1)]
    assert equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] == trained[1][:2]
    assert not np.array_equal(*(run[0]["params"]["stem"]["kernel"] for run in runs[1:]))


def test_fewer_beats_than_a_batch_are_refused(parts):
    with pytest.raises(UserError, match="31 beats to train on; expected 32"):
        classify.train_classifier(parts["records"][0][np.arange(31)], 0)


def test_every_window_is_counted_once(parts, trained, source):
    test = parts["records"][1]
    assert 40 < len(test) < 60
    logits = jax.jit(ResNet().apply)(trained[0], seen(trained[0], test, source))
    expected = classify.measures(np.argmax(logits, 1), (test.symbol == "V").astype(int))
    assert classify.score(trained[0], test, source) == expected
    shapes = []
    assert classify.score(trained[0], test, source, lambda x: shapes.append(x.shape) or x) == expected
    assert shapes == [(20, 256, 2)] * 3


@pytest.mark.parametrize(
    ("denoise", "told"),
    [(lambda x: x[:, :128], "expected the same shape"), (lambda x: np.full_like(x, np.nan), "not finite")],
)
def test_what_no_denoiser_may_give_is_refused(parts, trained, denoise, told):
    with pytest.raises(ValueError, match=told):
        classify.score(trained[0], parts["records"][1], denoise=denoise)


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),
    [
        # 3 of 5 ventricular beats found, 1 of 5 normal ones taken for one: 7/10, 3/4, 3/5, 2·3/(2·3 + 1 + 2).
        ([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1] * 5 + [0] * 5, (0.7, 0.75, 0.6, 2 / 3, 3, 1, 2, 4)),
        ([0, 0, 0, 0], [1, 1, 0, 0], (0.5, 0, 0, 0, 0, 0, 2, 2)),  # ventricular never predicted
        ([1, 1, 0], [0, 0, 0], (1 / 3, 0, 0, 0, 0, 2, 0, 1)),  # none there
        ([1, 1], [1, 1], (1, 1, 1, 1, 2, 0, 0, 0)),
        ([0, 0], [0, 0], (1, 0, 0, 0, 0, 0, 0, 2)),
    ],
)
def test_measures_by_hand(predicted, actual, expected):
    found = classify.measures(np.array(predicted), np.array(actual))
    names = ("accuracy", "precision", "recall", "f1")
    counts = ("true_positive", "false_positive", "false_negative", "true_negative")
    assert found == pytest.approx(dict(zip((*names, *counts), expected, strict=True)))


def test_measures_of_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected one \[N\] of both"):
        classify.measures(np.zeros((3, 1), int), np.zeros(3, int))


def test_a_classifier_is_saved_and_loaded_bit_by_bit(trained, tmp_path):
    path = tmp_path / "new" / "classifier.npz"
    for _ in range(2):  # the second time over the first
        classify.save_classifier(path, trained[0])
    assert [entry.name for entry in path.parent.iterdir()] == ["classifier.npz"]
    loaded = classify.load_classifier(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(trained[0]) and equal(loaded, trained[0])


@pytest.mark.parametrize(("owner", "name"), [(np, "savez"), (Path, "replace")])
def test_a_failed_save_leaves_the_old_file_whole(trained, tmp_path, monkeypatch, owner, name):
    path = tmp_path / "classifier.npz"
    classify.save_classifier(path, trained[0])
    before = path.read_bytes()

    def fail(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(UserError, match="No space left on device; free space"):
        classify.save_classifier(path, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_that_hold_no_classifier_are_refused(trained, tmp_path):
    path = tmp_path / "classifier.npz"
    with pytest.raises(UserError, match="cannot be read"):
        classify.load_classifier(path)
    classify.save_classifier(path, trained[0])
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            classify.load_classifier(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(UserError, match="does not hold the weights"):
        classify.load_classifier(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="cannot be read"):
        classify.load_classifier(tmp_path / "array.npy")
