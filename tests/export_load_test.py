"""Files of weights: what `export.load` reads in them, and what it refuses."""

import io
import json
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import small_model
from small_model import flat, save

from ralenet_jax import export
from ralenet_jax.errors import UserError

WEIGHTS = ("safetensors", "npz", "msgpack")


@pytest.fixture
def small():
    with small_model.known():
        yield small_model.trained()


def refused(path):
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        export.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_made_by_other_means_is_loaded(small, tmp_path, name):
    path = save(tmp_path / f"a.{name}", small.texts(), flat(small.variables))
    loaded = export.load(path)[1]
    assert jax.tree.structure(loaded) == jax.tree.structure(small.variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, small.variables)


def test_the_weights_that_come_along_need_no_check():
    path = Path(export.__file__).with_name("weights") / "blind.safetensors"
    (config, checked), (own_config, own) = export.load(path), export.load_own(path)
    assert own_config.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, own, checked)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_half_the_size_are_loaded_as_float32(small, tmp_path, name):
    halves = {key: array.astype(np.float16) for key, array in flat(small.variables).items()}
    loaded = flat(export.load(save(tmp_path / f"a.{name}", small.texts(), halves))[1])
    for key, array in halves.items():
        np.testing.assert_array_equal(loaded[key], array.astype(np.float32), strict=True)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("key", "array", "said"),
    [
        ("params/kernel", None, "'params/kernel' is missing"),
        ("batch_stats/norm/var", None, "'batch_stats/norm/var' is missing"),
        ("params/more", np.zeros(2, np.float32), "'params/more' is unknown"),
        ("opt_state/count", np.zeros((), np.int32), "'opt_state/count' is unknown"),
        ("params/kernel", np.zeros((2, 3), np.float32), "'params/kernel' is float32 [2, 3], expected float32 [2, 2]"),
        ("params/kernel", np.zeros((2, 2)), "'params/kernel' is float64 [2, 2], expected float32 [2, 2]"),
        ("params/norm/bias", np.zeros((0, 2), np.float32), "'params/norm/bias' is float32 [0, 2]"),
        ("params/norm/scale", np.array([1, np.nan], np.float32), "'params/norm/scale' is not finite"),
        ("batch_stats/norm/mean", np.array([-np.inf, 0], np.float32), "'batch_stats/norm/mean' is not finite"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(small, tmp_path, name, key, array, said):
    arrays = flat(small.variables) | {key: array}
    arrays = {key: array for key, array in arrays.items() if array is not None}
    assert said in refused(save(tmp_path / f"a.{name}", small.texts(), arrays))


def test_the_first_wrong_weight_is_the_one_named(small, tmp_path):
    wrong = {"params/norm/bias": np.zeros(3, np.float32), "batch_stats/norm/var": np.full(2, np.nan, np.float32)}
    message = refused(save(tmp_path / "a.npz", small.texts(), flat(small.variables) | wrong))
    assert "'batch_stats/norm/var'" in message and "bias" not in message
    assert "does not hold model 'small'" in message


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("config", None, "no 'config' text"),
        ("window", None, "no 'window' text"),
        ("config", "{", "damaged"),
        ("config", "[" * 100_000, "damaged"),
        ("config", "[1]", "not of this version"),
        ("config", '{"nois": 3}', "not of this version"),
        ("config", '{"seed": {"a": 1}}', "not of this version"),
        ("config", '{"model.name": "small"}', "not of this version"),
        ("config", f'{{"noise": {{"snr_db": {"9" * 400}}}}}', "not of this version"),
        ("config", '{"seed": null}', "not of this version"),
        ("config", '{"seed": true}', "not of this version"),
        ("window", "[0, 2]", "tells of windows [0, 2]"),
        ("window", "[1099511627776, 2]", "tells of windows"),
        ("window", "[true, 2]", "tells of windows"),
        ("window", '{"samples": 3}', "tells of windows"),
        ("window", "[32, 3]", "windows [32, 3], which its model does not take"),  # its kernel takes two leads
    ],
)
def test_texts_that_tell_nothing_are_refused(small, tmp_path, name, text, value, said):
    texts = small.texts() | {text: value}
    texts = {key: value for key, value in texts.items() if value is not None}
    assert said in refused(save(tmp_path / f"a.{name}", texts, flat(small.variables)))


@pytest.mark.parametrize("model", [{"name": "smal"}, {"name": None}, {"name": "ralenet", "local_enhancement": "all"}])
def test_a_model_that_nobody_knows_is_refused(small, tmp_path, model):
    texts = small.texts() | {"config": json.dumps({"model": model})}
    with pytest.raises(UserError, match="^[^\n]+$"):
        export.load(save(tmp_path / "a.npz", texts, flat(small.variables)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_files_are_refused(small, tmp_path, name):
    path = save(tmp_path / f"a.{name}", small.texts(), flat(small.variables))
    whole = path.read_bytes()
    cut = [whole[: len(whole) * part // 10] for part in range(10)]
    for content in (*cut, whole[:-1], whole[1:], b"\0" * 100, pickle.dumps({"params": 1})):
        path.write_bytes(content)
        refused(path)


def test_what_is_told_does_not_steer_the_terminal_and_is_short(small, tmp_path):
    path = save(tmp_path / "a.npz", small.texts(), flat(small.variables))
    path.write_bytes(path.read_bytes().replace(b"params/kernel.npy", b"params/\x1b[2Jxx.npy", 1))
    assert refused(path).isprintable()
    message = refused(save(tmp_path / "b.npz", small.texts() | {"config": json.dumps({"x" * 9999: 1})}, {}))
    assert len(message) < 500


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_files_and_folders_are_told(tmp_path, name):
    assert "No such file" in refused(tmp_path / f"a.{name}")
    (tmp_path / f"b.{name}").mkdir()
    refused(tmp_path / f"b.{name}")


@pytest.mark.parametrize("name", ["a.pkl", "a.onnx", "a.stablehlo", "a"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"1")
    assert ".safetensors, .npz, .msgpack" in refused(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["data_offsets"].__setitem__(1, entry["data_offsets"][1] + 4),
        lambda entry: entry["data_offsets"].__setitem__(1, 2**62),
        lambda entry: entry.update(data_offsets=[0, 0]),
        lambda entry: entry.update(shape=[2**62, 4]),
        lambda entry: entry.update(shape=[3, 2]),
        lambda entry: entry.update(shape=[-2, -2]),
        lambda entry: entry.update(dtype="F64"),
        lambda entry: entry.update(dtype="O"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(small, tmp_path, change):
    path = save(tmp_path / "a.safetensors", small.texts(), flat(small.variables))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header["params/kernel"])
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    refused(path)


@pytest.mark.parametrize("length", [2**63, 10**6, 3])
def test_a_safetensors_header_of_another_length_is_refused(small, tmp_path, length):
    path = save(tmp_path / "a.safetensors", small.texts(), flat(small.variables))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(path)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(small, tmp_path):
    mark = tmp_path / "was unpickled"
    payload = np.array([Payload(mark)], object)
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it would work
    mark.unlink()
    np.savez(tmp_path / "a.npz", **flat(small.variables) | {"params/kernel": payload}, **small.texts())
    assert "allow_pickle" in refused(tmp_path / "a.npz")
    for name in WEIGHTS:
        (tmp_path / f"b.{name}").write_bytes(pickle.dumps(Payload(mark)))
        refused(tmp_path / f"b.{name}")
    assert not mark.exists()


def npz_member(shape):
    """A member that claims a shape and holds nothing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_an_npz_that_would_fill_the_memory_is_refused(small, tmp_path):
    arrays = flat(small.variables) | {"params/kernel": np.zeros(10**6, np.float32)}
    np.savez_compressed(tmp_path / "a.npz", **arrays, **small.texts())
    assert "more than its size" in refused(tmp_path / "a.npz")
    save(tmp_path / "b.npz", small.texts(), {})
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as file:
        file.writestr("params/kernel.npy", npz_member((2**50, 2)))
    refused(tmp_path / "b.npz")


@pytest.mark.parametrize("name", ["safetensors", "npz"])
def test_weights_beyond_number_are_refused(small, tmp_path, name):
    arrays = {f"params/{number}": np.zeros(0, np.float32) for number in range(5000)}
    assert re.search("500[0-9] weights", refused(save(tmp_path / f"a.{name}", small.texts(), arrays)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_texts_that_would_fill_the_memory_are_refused(small, tmp_path, name):
    texts = small.texts() | {"config": f"[{'{},' * 400_000}0]"}
    assert "a text of more than" in refused(save(tmp_path / f"a.{name}", texts, flat(small.variables)))


def test_an_npz_with_a_huge_directory_is_refused(small, tmp_path):
    arrays = {f"params/{number:0>400}": np.zeros(0, np.float32) for number in range(3000)}
    assert "a directory of 1" in refused(save(tmp_path / "a.npz", small.texts(), arrays))


MANY = struct.pack(">I", 2**18)
HOSTILE = {  # bytes that would take up to 60 times as many in memory
    "empty lists": b"\xdd" + MANY + b"\x90" * 2**18,
    "numbers": b"\xdd" + MANY + b"\x01" * 2**18,
    "lists of empty lists": b"\xdc\x01\xff" + (b"\xdc\x01\xff" + b"\x90" * 511) * 511,
    "lists of empty maps": b"\xdc\x01\xff" + (b"\xdc\x01\xff" + b"\x80" * 511) * 511,
    "a shape": b"\xc9" + struct.pack(">IB", 2**18 + 6, 1) + b"\x93\xdd" + MANY + b"\x90" * 2**18,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_msgpack_of_many_parts_is_refused_before_they_are_made(tmp_path, name):
    (tmp_path / "a.msgpack").write_bytes(HOSTILE[name])
    tracemalloc.start()
    told = refused(tmp_path / "a.msgpack")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(r"exceeds max|more than \d+ parts", told)
    assert peak < 4 * len(HOSTILE[name])


def test_a_msgpack_of_other_things_is_refused(small, tmp_path):
    path = tmp_path / "a.msgpack"
    for tree in (
        [1, 2],
        {"params": 3} | small.texts(),
        {"params": {1: np.zeros(2)}} | small.texts(),
        {"params": {"kernel": "text"}} | small.texts(),
        small.variables | small.texts() | {"config": 3},
    ):
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
        refused(path)
