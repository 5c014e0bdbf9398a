"""Exported files: what others read in them, and that nothing wrong or half-written is left."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy
import small_model
from small_model import flat
from torch_layers import random_variables

from ralenet_jax import checkpoint, cli, evaluate, export, models, optim, provenance
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

CHECKOUT = Path(__file__).resolve().parents[1]
WEIGHTS = ("safetensors", "npz", "msgpack")


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The work directory of a run that stands at step 8, no weight or statistic of which is as in the beginning."""
    workdir, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    config = load_config("ralenet", [f"data.dir={str(data_dir)!r}", "train.batch_size=8"])
    state = train_state.create_state(models.build_model("ralenet"), optim.build_optimizer(config, 8), 0, (256, 2))
    moved = jax.tree.map(lambda leaf: leaf + random.normal(0, 0.01, leaf.shape).astype(np.float32), state.variables)
    checkpoint.claim(workdir, config)
    start = {"step": 0, "window": [256, 2]} | provenance.describe(config, 2)
    checkpoint.write_json(workdir / checkpoint.STARTS, [start])
    with checkpoint.Checkpointer(workdir) as saved:
        saved.save(state.replace(step=jax.numpy.asarray(8, np.int32), **moved), 1.0)
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
peer, path, windows, out, local = sys.argv[1:]
sys.path.insert(0, peer)
from torch_ralenet import RALENet
model = RALENet(local=bool(local)).eval()
model.load_state_dict(safetensors.torch.load_file(path), strict=True)
with torch.no_grad():
    np.save(out, model(torch.from_numpy(np.load(windows)).transpose(1, 2)).transpose(1, 2).numpy())
"""


@pytest.fixture
def in_torch(shared, tmp_path):
    """(file of weights, windows, whether with local enhancement) → what the published model makes of them."""
    here = sys.executable if importlib.util.find_spec("torch") else None
    python = os.environ.get("RALENET_TORCH_PYTHON", here)
    if python is None:
        pytest.skip("no PyTorch here; set RALENET_TORCH_PYTHON to a Python that has torch, numpy and safetensors")

    def run(path, windows, local):
        np.save(tmp_path / "windows.npy", windows)
        arguments = [shared / "peer", path, tmp_path / "windows.npy", tmp_path / "out.npy", "local" if local else ""]
        done = subprocess.run([python, "-B", "-c", _IN_TORCH, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return np.load(tmp_path / "out.npy")

    return run


def test_published_model_in_torch_computes_the_same(exported, denoised, in_torch):
    windows, expected = denoised
    np.testing.assert_allclose(in_torch(exported("torch"), windows, True), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_without_local_enhancement_it_computes_the_same_in_torch(in_torch, tmp_path):
    trained = random_model("ralenet_mlp")
    path = tmp_path / "a.safetensors"
    export.write(trained, "torch", path)
    windows = np.random.default_rng(0).normal(size=(3, 256, 2)).astype(np.float32)
    expected = models.build_model("ralenet_mlp").apply(trained.variables, windows)
    np.testing.assert_allclose(in_torch(path, windows, False), expected, rtol=0, atol=1e-5)


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


def test_torch_weights_are_told_from_ours(exported):
    with pytest.raises(UserError, match="does not hold model 'ralenet': 'batch_stats/stem_norm/mean' is missing"):
        export.load(exported("torch"))


def random_model(name):
    """As if trained; with running statistics that matter."""
    leads = 12 if name == "ralenet_12lead" else 2
    config, variables = load_config("ralenet", [f"model.name={name}"]), random_variables(name, leads)
    return export.Trained(config, {"batch_stats": {}} | variables, (256, leads), {})


@pytest.mark.parametrize("name", [pytest.param("danet", marks=pytest.mark.slow), "acdae"])
def test_the_rivals_are_exported_too(tmp_path, name):
    rival = random_model(name)
    for form in ("npz", "torch", "stablehlo"):
        path = tmp_path / f"a{export.FORMATS[form].suffix}"
        assert export.write(rival, form, path) <= 1e-5
        assert path.stat().st_size > 4 * sum(leaf.size for leaf in jax.tree.leaves(rival.variables["params"]))


@pytest.fixture
def small():
    with small_model.known():
        yield small_model.trained()


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


def test_shards_are_not_needed_but_where_the_run_does_not_tell_of_them(trained, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = trained.config.copy_and_resolve_references()
    config.data.dir = str(tmp_path / "nothing")
    there = export.restore(config, copy)
    assert there.window == (256, 2) and there.texts() == trained.texts()
    (copy / checkpoint.STARTS).unlink()
    with pytest.raises(UserError, match="ralenet prepare --data-dir"):
        export.restore(config, copy)
    config.data.dir = trained.config.data.dir
    assert export.restore(config, copy).provenance["data"] == trained.provenance["data"]


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
@pytest.mark.parametrize("name", models.MODEL_NAMES)
def test_onnx_runtime_computes_what_every_model_does(name, tmp_path, capsys):
    model = random_model(name)
    session, apply = onnx_session(model, tmp_path / "a.onnx"), jax.jit(models.build_model(name).apply)
    largest = 0
    for batch in (1, 2, 33):
        windows = np.random.default_rng(batch).standard_normal((batch, *model.window), np.float32)
        (found,) = session.run(["denoised"], {"noisy": windows})
        expected = np.asarray(apply(model.variables, windows))
        assert expected.std() > 0.01  # there is something to compare
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        largest = max(largest, np.abs(found - expected).max())
    with capsys.disabled():
        print(f"\nonnx of {name}: {largest:.1e}")
    assert str(CHECKOUT).encode() not in (tmp_path / "a.onnx").read_bytes()
