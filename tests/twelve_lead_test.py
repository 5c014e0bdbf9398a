"""The 12-lead model: its shape, and its training around a base that stays as it was."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax import checkpoint, evaluate, input_pipeline, models, optim, train
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config
from ralenet_jax.models import build_model, twelve_lead
from ralenet_jax.models.batch_norm import BatchNorm

_CONVOLUTIONS = ("reduce0", "reduce1", "expand0", "expand1")


def test_twelve_leads_in_and_out():
    model = build_model("ralenet_12lead")
    x = jnp.zeros((3, 48, 12))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.eval_shape(model.apply, variables, x).shape == (3, 48, 12)
    assert jax.eval_shape(model.apply, variables, x, jnp.zeros(3, jnp.int32)).shape == (3, 48, 12)
    base = jax.eval_shape(build_model("ralenet").init, jax.random.key(0), x[..., :2])
    assert {name: part["base"] for name, part in variables.items()} == base


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 256, 2), "expects [B, L, 12]"), ((1, 250, 12), "divisible by 16"), ((256, 12), "expected [B, L, leads]")],
)
def test_other_windows_are_refused(shape, said):
    with pytest.raises(UserError) as caught:
        jax.eval_shape(build_model("ralenet_12lead").init, jax.random.key(0), jnp.zeros(shape))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_fifth_of_a_percent_trains():
    model = build_model("ralenet_12lead")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 12)))["params"]
    assert train_state.count_trainable(model, params) == 2_210
    assert train_state.count_parameters(params) == 1_089_492
    assert train_state.count_trainable(build_model("ralenet"), params["base"]) == 1_087_282


def configure(data_dir, base, *overrides):
    small = ["train.batch_size=8", "train.steps_per_dispatch=2", "optim.weight_decay=0.1", "optim.name=adamw"]
    named = [f"data.dir={str(data_dir)!r}", f"model.base={str(base)!r}"]
    return load_config("twelve_lead", [*named, *small, *overrides])


class SmallBase(nn.Module):
    """Stands for RA-LENet: has a layer that must not train and statistics that move, and is compiled in a moment."""

    axis_name: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, r_peak=None, train=False, r_mask=None):
        return BatchNorm(self.axis_name, name="stem_norm")(nn.Conv(2, (3,), name="stem")(x), train)


@pytest.fixture(scope="module", params=["small", pytest.param("published", marks=pytest.mark.slow)])
def parameters(request):
    """How many parameters the model has whose training is tested."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "small":
            patched.setattr(twelve_lead, "RALENet", SmallBase)
            patched.setitem(models._MODELS, "ralenet", (SmallBase, {}))
        # A convolution of 3 x 2 x 2 with 2 biases, and scale and bias of two channels.
        yield {"small": 2_210 + 14 + 4, "published": 1_089_492}[request.param]


@pytest.fixture(scope="module")
def base(parameters, data_dir, tmp_path_factory):
    """A run of `ralenet` that stands at step 8 with initial values: its folder and its state."""
    workdir = tmp_path_factory.mktemp("base")
    config = load_config("ralenet", [f"data.dir={str(data_dir)!r}", "noise.kind=emb"])
    model, optimizer = train_state.model_from_config(config), optim.build_optimizer(config, 8)
    state = train_state.create_state(model, optimizer, 7, (256, 2)).replace(step=jnp.asarray(8, jnp.int32))
    checkpoint.claim(workdir, config)
    with checkpoint.Checkpointer(workdir) as saved:
        saved.save(state, None)
    return workdir, jax.device_get(state)


@pytest.fixture(scope="module")
def trained(data_dir, base, tmp_path_factory):
    """Trained for an epoch, then, the base having been moved away, for another: folder, first and last state."""
    workdir, states = tmp_path_factory.mktemp("twelve"), []
    moved = shutil.copytree(base[0], workdir.parent / "moved")
    for epochs in (1, 2):
        config = configure(data_dir, moved, f"train.epochs={epochs}")
        train.train(config, workdir)
        states.append(jax.device_get(evaluate.restore_state(config, workdir, jax.devices()[:1], "last")[1]))
        shutil.rmtree(moved, ignore_errors=True)
    return workdir, *states


def test_the_base_stays_bit_for_bit_and_its_statistics_move(data_dir, base, trained):
    windows = len(input_pipeline.read_split(configure(data_dir, base[0]), "train"))
    for epochs, state in enumerate(trained[1:], 1):
        assert int(state.step) == epochs * (windows // 8)
        for ours, theirs in zip(
            *(jax.tree.leaves(part) for part in (state.params["base"], base[1].params)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    statistics = [base[1].batch_stats, trained[1].batch_stats["base"], trained[2].batch_stats["base"]]
    for before, after in zip(statistics, statistics[1:], strict=False):
        for name in ("mean", "var"):
            assert np.all(before["stem_norm"][name] != after["stem_norm"][name])


def test_the_four_convolutions_train(data_dir, base, trained):
    config = configure(data_dir, base[0])
    model = train_state.model_from_config(config)
    fresh = train_state.create_state(model, optim.build_optimizer(config, 8, model), config.seed, (256, 12))
    assert trained[1].params.keys() == {*_CONVOLUTIONS, "base"}
    for before, after in ((fresh, trained[1]), (trained[1], trained[2])):
        for name in _CONVOLUTIONS:
            for leaf in ("kernel", "bias"):
                assert np.mean(before.params[name][leaf] != after.params[name][leaf]) > 0.9


def test_the_start_tells_of_its_base_and_no_folder(base, trained):
    first, second = checkpoint.read_starts(trained[0])
    assert first["base"] == {"checkpoint": 8, "trained_from": []}
    assert (second["step"], "base" in second) == (int(trained[1].step), False)
    assert str(base[0].parent) not in json.dumps([first, second])


def test_evaluation_counts_what_trained_on_the_records_of_ludb(parameters, data_dir, base, trained):
    config = configure(data_dir, base[0], "train.epochs=2")
    lines = []
    result = evaluate.evaluate(config, trained[0], log=lines.append)
    assert (result["parameters"], result["trainable_parameters"]) == (parameters, 2_210)
    assert result["provenance"]["data"].keys() == {"ludb", "nstdb"}
    rows = result["conditions"]["emb@-4"]
    assert rows["noisy"]["snr_db"] == pytest.approx(-4, abs=1e-3)
    assert rows["denoised"]["windows"] == len(input_pipeline.read_split(config, "test"))
    assert result["learning_curve"][-1]["snr_db"] == pytest.approx(rows["denoised"]["snr_db"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.database=mitdb"], "ralenet_12lead expects [B, L, 12]"),
        (["model.base=nowhere"], "model.base: no run in nowhere"),
        (["model.name=ralenet"], "model.base is set, but ralenet is not built around a trained model"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(data_dir, base, tmp_path, overrides, said):
    more = ["data.num_windows=80", "data.num_train=64"]
    with pytest.raises(UserError) as caught:
        train.train(configure(data_dir, base[0], *more, *overrides), tmp_path / "run")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
