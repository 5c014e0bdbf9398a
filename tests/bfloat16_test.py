"""A run in bfloat16, from training to evaluation and export; what the models make of it stands in models_test."""

import json

import jax
import jax.export
import numpy as np
import pytest

from ralenet_jax import checkpoint, evaluate, export, train
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config, saved_config


@pytest.fixture(scope="module", params=["unet", pytest.param("ralenet", marks=pytest.mark.slow)])
def run(request, data_dir, tmp_path_factory):
    """The work directory of a model trained for 16 epochs of eight steps; the U-Net compiles fast."""
    workdir = tmp_path_factory.mktemp("run")
    small = ["data.num_windows=80", "data.num_train=64", "train.batch_size=8", "train.steps_per_dispatch=2"]
    small.append(f"model.name={request.param}")
    options = [f"data.dir={str(data_dir)!r}", *small, "train.epochs=16", "model.dtype=bfloat16"]
    train.train(load_config("ralenet", options), workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(run):
    return export.restore(saved_config(run), run)


def test_it_learns_and_what_is_saved_is_float32(run):
    learned = [point["snr_db"] for point in evaluate.learning_curve(run)]
    assert len(learned) == 16 and learned[-1] > learned[0] + 1
    config = saved_config(run)
    assert config.model.dtype == "bfloat16"
    _, state = evaluate.restore_state(config, run, jax.devices()[:1], "last")
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))}
    assert kinds == {np.dtype(np.float32), np.dtype(np.int32)}  # the optimiser counts its steps


def test_the_run_is_evaluated_in_either_dtype_to_the_same_tenth_of_a_decibel(run):
    found = {}
    for dtype in ("bfloat16", "float32"):
        config = saved_config(run, [f"model.dtype={dtype}"])
        (measures,) = evaluate.evaluate(config, run, log=lambda _: None)["conditions"].values()
        found[dtype] = measures["denoised"]["snr_db"]
    assert 0 < abs(found["bfloat16"] - found["float32"]) < 0.1


def test_a_run_goes_on_in_its_own_dtype(run):
    with pytest.raises(UserError, match="model.dtype=bfloat16, now float32"):
        checkpoint.claim(run, saved_config(run, ["model.dtype=float32"]))


def test_weights_keep_the_dtype_and_are_float32(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    assert export.write(trained, "safetensors", path) == 0
    config, variables = export.load(path)
    assert config.model.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_an_exported_program_computes_in_bfloat16(trained, tmp_path):
    path = tmp_path / "a.stablehlo"
    assert export.write(trained, "stablehlo", path) < 0.1
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert "bf16" in program.mlir_module() and program.out_avals[0].dtype == np.float32


def test_onnx_is_float32_and_says_so(trained, tmp_path, monkeypatch):
    written = []
    onnx = export.FORMATS["onnx"]
    monkeypatch.setitem(
        export.FORMATS,
        "onnx",
        export.dataclasses.replace(
            onnx, write=lambda given: written.append(given) or b"", reread=lambda _, given: given.denoise
        ),
    )
    export.write(trained, "onnx", tmp_path / "a.onnx")
    assert json.loads(written[0].texts()["config"])["model"]["dtype"] == "float32"
    assert trained.config.model.dtype == "bfloat16"
