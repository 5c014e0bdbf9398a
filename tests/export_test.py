"""Exported files: what others read in them, what our reader refuses, and that nothing wrong or half-written is left."""

import functools
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from ralenet_jax import checkpoint, cli, evaluate, export, models, train
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config
from ralenet_jax.models import initializers
from ralenet_jax.models.batch_norm import BatchNorm

CHECKOUT = Path(__file__).resolve().parents[1]
WEIGHTS = ("safetensors", "npz", "msgpack")


def flat(variables):
    return flax.traverse_util.flatten_dict(variables, sep="/")


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The work directory of a model trained for an epoch of eight steps."""
    workdir = tmp_path_factory.mktemp("run")
    small = ["data.num_windows=80", "data.num_train=64", "train.batch_size=8", "train.steps_per_dispatch=2"]
    train.train(load_config("ralenet", [f"data.dir={str(data_dir)!r}", *small, "train.epochs=1"]), workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(run):
    return export.restore(checkpoint.typed_config(checkpoint.read_config(run).to_dict(), run), run)


@pytest.fixture(scope="module")
def variables(trained, run):
    """The weights of the run, not by way of the module under test."""
    return jax.device_get(evaluate.restore_state(trained.config, run, jax.devices()[:1], "last")[1].variables)


@pytest.fixture(scope="module")
def denoised(variables):
    """Windows, and what the trained model makes of them."""
    windows = np.random.default_rng(5).standard_normal((3, 256, 2), np.float32)
    return windows, np.asarray(jax.jit(models.build_model("ralenet").apply)(variables, windows))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The file of a format, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def written(name):
        path = folder / f"{name}{export.FORMATS[name].suffix}"
        assert export.write(trained, name, path) <= 1e-5
        return path

    return written


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_loaded_is_what_was_trained(exported, variables, run, name):
    config, loaded = export.load(exported(name))
    expected = json.loads((run / "config.json").read_text())
    expected["data"]["dir"] = "data"  # where the data lay is not told
    assert json.loads(config.to_json()) == expected
    assert config.is_locked and config.eval.snr_db == ()
    assert loaded.keys() == {"params", "batch_stats"}
    assert flat(loaded).keys() == flat(variables).keys()
    for key, array in flat(loaded).items():
        np.testing.assert_array_equal(array, flat(variables)[key], strict=True)


def by_their_library(name, path):
    """Texts and arrays of a file, read without our code."""
    if name == "safetensors":
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    if name == "npz":
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
        return {key: content.pop(key).item() for key in ("config", "window", "provenance")}, content
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    return {key: tree.pop(key) for key in ("config", "window", "provenance")}, flat(tree)


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_programs_find_weights_configuration_and_origin(exported, variables, data_dir, name):
    texts, arrays = by_their_library(name, exported(name))
    assert arrays["params/stem/kernel"].shape == (3, 2, 8)  # the stem: 2 leads to 8 channels, width 3
    np.testing.assert_array_equal(arrays["batch_stats/stem_norm/var"], variables["batch_stats"]["stem_norm"]["var"])
    assert sum(array.size for key, array in arrays.items() if key.startswith("params/")) == 1_087_282
    config, origin = json.loads(texts["config"]), json.loads(texts["provenance"])
    assert config["model"]["name"] == "ralenet" and config["train"]["batch_size"] == 8
    assert json.loads(texts["window"]) == [256, 2]
    assert (origin["checkpoint"], [start["step"] for start in origin["trained_from"]]) == (8, [0])
    assert origin["versions"]["jax"] == jax.__version__
    metadata = json.loads((data_dir / "mitdb/1.0.0/metadata.json").read_text())
    assert origin["data"]["mitdb"]["digest"] == metadata["digest"]


@pytest.mark.parametrize("name", [*WEIGHTS, "torch", "stablehlo"])
def test_no_file_names_a_folder_of_this_machine(exported, data_dir, run, name):
    content = exported(name).read_bytes()
    assert len(content) > 4_300_000  # 1,087,282 float32
    for folder in (CHECKOUT, data_dir, run, Path(jax.__file__).parent):
        assert str(folder).encode() not in content


_WITHOUT_US = """
import sys
import jax, jax.export, numpy as np
path, windows, out = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
np.save(out, exported.call(np.load(windows)))
assert not {name.partition(".")[0] for name in sys.modules} & {"ralenet_jax", "configs", "flax"}
print(*sorted(exported.platforms), exported.in_avals[0].shape[1:])
"""


def test_stablehlo_runs_with_jax_alone_at_any_batch(exported, denoised, tmp_path):
    windows, expected = denoised  # 3, where the command has compared with 5
    np.save(tmp_path / "windows.npy", windows)
    arguments = [exported("stablehlo"), tmp_path / "windows.npy", tmp_path / "out.npy"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cpu cuda tpu (256, 2)\n"
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=1e-5)


def test_torch_file_has_the_published_keys_and_shapes(exported, shared):
    published = np.load(shared / "parity" / "ralenet.npz")
    prefix = "state_dict/"
    expected = {key.removeprefix(prefix): published[key].shape for key in published.files if key.startswith(prefix)}
    weights = safetensors.numpy.load_file(exported("torch"))
    assert {key: array.shape for key, array in weights.items()} == expected
    with safetensors.safe_open(exported("torch"), framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["config"])["model"]["name"] == "ralenet"


_IN_TORCH = """
import sys
import numpy as np, safetensors.torch, torch
peer, path, windows, out = sys.argv[1:]
sys.path.insert(0, peer)
from torch_ralenet import RALENet
model = RALENet().eval()
model.load_state_dict(safetensors.torch.load_file(path), strict=True)
with torch.no_grad():
    np.save(out, model(torch.from_numpy(np.load(windows)).transpose(1, 2)).transpose(1, 2).numpy())
"""


def test_published_model_in_torch_computes_the_same(exported, denoised, shared, tmp_path):
    here = sys.executable if importlib.util.find_spec("torch") else None
    python = os.environ.get("RALENET_TORCH_PYTHON", here)
    if python is None:
        pytest.skip("no PyTorch here; set RALENET_TORCH_PYTHON to a Python that has torch, numpy and safetensors")
    windows, expected = denoised
    np.save(tmp_path / "windows.npy", windows)
    arguments = [shared / "peer", exported("torch"), tmp_path / "windows.npy", tmp_path / "out.npy"]
    done = subprocess.run([python, "-B", "-c", _IN_TORCH, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=1e-5)


def test_command_writes_below_the_run_and_tells_the_difference(run, data_dir, tmp_path, capsys):
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["dir"] = "no longer there"
    checkpoint.write_json(tmp_path / "config.json", settings)
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    command = ["export", "--workdir", str(tmp_path), "--format", "torch"]
    assert cli.main(command) == 2
    assert "ralenet prepare" in capsys.readouterr().err and not (tmp_path / "export").exists()
    assert cli.main([*command, "--data-dir", str(data_dir), "--checkpoint", "best"]) == 0
    (written,) = (tmp_path / "export").iterdir()
    assert written.name == "ralenet.torch.safetensors"
    out = capsys.readouterr().out
    assert f"written to {written}: step 8, {written.stat().st_size:,} bytes" in out
    assert "differs by at most 0.0e+00 on 5 random windows" in out


@pytest.mark.parametrize("name", ["danet", "acdae"])
def test_the_rivals_are_exported_too(tmp_path, name):
    config = load_config("ralenet", [f"model.name={name}"])
    with initializers.drawn_on_host(0):
        variables = jax.jit(models.build_model(name).init)(jax.random.key(0), np.zeros((1, 256, 2), np.float32))
    untrained = export.Trained(config, jax.device_get({"batch_stats": {}} | variables), (256, 2), {})
    for form in ("npz", "torch", "stablehlo"):
        path = tmp_path / f"a{export.FORMATS[form].suffix}"
        assert export.write(untrained, form, path) <= 1e-5
        assert path.stat().st_size > 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


class Small(nn.Module):
    """A model that is built in a moment."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, r_peak=None, train=False):
        x = x @ self.param("kernel", nn.initializers.constant(0.5), (2, 2))
        return BatchNorm(self.axis_name, name="norm")(nn.leaky_relu(x), train)


@pytest.fixture(autouse=True, scope="module")
def small_is_a_model():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(models._MODELS, "small", (Small, {}))
        yield


@pytest.fixture
def small():
    config = load_config("ralenet")
    config.model.name = "small"
    norm = {"mean": np.array([0.5, -1], np.float32), "var": np.array([1, 2], np.float32)}
    scaled = {"scale": np.array([3, 1], np.float32), "bias": np.zeros(2, np.float32)}
    params = {"kernel": np.array([[1, -2], [0.5, 3]], np.float32), "norm": scaled}
    return export.Trained(config, {"params": params, "batch_stats": {"norm": norm}}, (32, 2), {"checkpoint": 4})


def save(path, texts, arrays):
    """Writes a file of weights without our code."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, texts)
    elif path.suffix == ".npz":
        np.savez(path, **arrays, **texts)
    else:
        tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
        path.write_bytes(flax.serialization.msgpack_serialize(tree | texts))
    return path


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


def test_torch_weights_are_told_from_ours(exported):
    message = refused(exported("torch"))
    assert "does not hold model 'ralenet': 'batch_stats/stem_norm/mean' is missing" in message


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


def spoil(monkeypatch, spoiled):
    """Has the format npz write other weights than those of the model."""
    good = export.FORMATS["npz"]
    bad = types.SimpleNamespace(**vars(good) | {"write": lambda trained: good.write(spoiled(trained))})
    monkeypatch.setitem(export.FORMATS, "npz", bad)


def test_what_computes_something_else_is_not_kept(small, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.npz"
    assert export.write(small, "npz", path) == 0
    before = path.read_bytes()

    def spoiled(trained):
        changed = jax.tree.map(np.copy, trained.variables)
        changed["params"]["kernel"][0, 0] += 1e-4
        return export.dataclasses.replace(trained, variables=changed)

    spoil(monkeypatch, spoiled)
    # A window of unit power reaches 3 or 4, and the norm triples it: some 1e-3.
    with pytest.raises(export.Different, match=r"differs from the model by [4-9]\.\de-04|by 1\.\de-03"):
        export.write(small, "npz", path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_command_fails_when_the_file_differs(run, tmp_path, capsys, monkeypatch):
    def spoiled(trained):
        raise export.Different("the file read back differs")

    spoil(monkeypatch, spoiled)
    assert cli.main(["export", "--workdir", str(run), "--format", "npz", "--out", str(tmp_path / "a.npz")]) == 1
    assert capsys.readouterr().err == "ralenet: not written: the file read back differs\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", [[1e-4], [np.nan]])
def test_difference_of_an_output_that_is_not_finite_is_no_match(small, weights):
    spoiled = types.SimpleNamespace(limit=1e-5, reread=lambda file, trained: lambda x: trained.denoise(x) + weights)
    windows = np.ones((2, 32, 2), np.float32)
    with pytest.raises(export.Different, match="by (1.0e-04|nan)"):
        export._difference(spoiled, Path("file"), small, windows)


def test_an_interruption_leaves_nothing(small, tmp_path, monkeypatch):
    def interrupted(path, trained):
        assert path.parent == tmp_path and path.exists()
        raise KeyboardInterrupt

    good = export.FORMATS["npz"]
    monkeypatch.setitem(export.FORMATS, "npz", types.SimpleNamespace(**vars(good) | {"reread": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        export.write(small, "npz", tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def full(self, target):
        assert target == path
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device"):
        export.write(small, "npz", path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_places_where_nothing_can_be_written_are_told(small, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for out, said in (
        ("file/a.npz", "cannot write"),
        ("folder.npz", "ends in .npz"),
        ("a.safetensors", "ends in .npz"),
        ("a", "ends in .npz"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*{said}"):
            export.write(small, "npz", tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.npz"}


def test_a_model_that_was_never_published_has_no_torch_file(small, tmp_path):
    with pytest.raises(UserError, match="'small' has no published weights"):
        export.write(small, "torch", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--checkpoint", "7"], "no checkpoint of step 7"), (["--checkpoint", "newest"], "expected last, best")],
)
def test_bad_input_is_one_line_and_writes_nothing(run, capsys, given, said):
    assert cli.main(["export", "--workdir", str(run), "--format", "npz", *given]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (run / "export").exists()


def test_a_folder_without_a_run_and_an_unknown_format_are_refused(tmp_path, capsys):
    assert cli.main(["export", "--workdir", str(tmp_path), "--format", "npz"]) == 2
    assert "no run in" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "--workdir", str(tmp_path), "--format", "pickle"])
    assert stopped.value.code == 2


def test_missing_onnx_libraries_name_the_extra(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'jax2onnx; pip install "ralenet_jax\[onnx\]"'):
        export.write(small, "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_the_converter_is_told(small, tmp_path, monkeypatch):
    def to_onnx(*_, **__):
        raise NotImplementedError("no interior padding\nand more")

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    with pytest.raises(UserError, match=r"^jax2onnx cannot convert model 'small' \(no interior padding\); .*--format$"):
        export.write(small, "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def onnx_session(trained, path):
    """The exported model in ONNX Runtime."""
    reason = 'the extra is missing: pip install ".[onnx]"'
    pytest.importorskip("jax2onnx", reason=reason)
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    assert export.write(trained, "onnx", path) <= 1e-4
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx_takes_any_batch_and_tells_its_origin(small, tmp_path):
    session = onnx_session(small, tmp_path / "a.onnx")
    windows = np.random.default_rng(0).standard_normal((3, 32, 2), np.float32)
    mixed = windows @ small.variables["params"]["kernel"]
    statistics, params = small.variables["batch_stats"]["norm"], small.variables["params"]["norm"]
    mixed = np.where(mixed < 0, 0.01 * mixed, mixed)
    expected = (mixed - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * params["scale"] + params["bias"]
    (denoised,) = session.run(["denoised"], {"noisy": windows})
    np.testing.assert_allclose(denoised, expected, rtol=0, atol=1e-4)
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["window"]) == [32, 2] and json.loads(texts["config"])["model"]["name"] == "small"


@pytest.mark.slow
def test_onnx_runtime_computes_what_the_trained_model_does(trained, denoised, tmp_path):
    session = onnx_session(trained, tmp_path / "a.onnx")
    windows, expected = denoised
    (found,) = session.run(["denoised"], {"noisy": windows})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert str(CHECKOUT).encode() not in (tmp_path / "a.onnx").read_bytes()
