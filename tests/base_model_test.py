import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax import base_model, checkpoint, optim
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

_SHAPE = (256, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that stands at step 8: its folder and its state, of random numbers."""
    workdir = tmp_path_factory.mktemp("base")
    config = load_config("ralenet", ["optim.name=adamw", "noise.kind=emb"])
    model, optimizer = train_state.model_from_config(config), optim.build_optimizer(config, 8)
    shapes = jax.eval_shape(lambda: train_state.create_state(model, optimizer, 0, _SHAPE))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    state = jax.tree.map(jnp.asarray, state.replace(step=np.int32(8)))
    checkpoint.claim(workdir, config)
    with checkpoint.Checkpointer(workdir) as saved:
        saved.save(state, None)
    checkpoint.write_json(workdir / checkpoint.STARTS, [{"step": 0, "revision": "abc"}])
    return workdir, state


def configure(base, *overrides):
    return load_config("twelve_lead", [] if base is None else [f"model.base={str(base)!r}", *overrides])


def read(base):
    return base_model.read(configure(base), _SHAPE, jax.devices()[:1])


def test_the_last_checkpoint_of_a_run_and_where_it_came_from(trained):
    workdir, state = trained
    variables, origin = read(workdir)
    assert jax.tree.structure(variables) == jax.tree.structure(state.variables)
    jax.tree.map(np.testing.assert_array_equal, variables, state.variables)
    assert origin == {"checkpoint": 8, "trained_from": [{"step": 0, "revision": "abc"}]}


def test_a_base_that_is_not_given_is_asked_for():
    with pytest.raises(UserError, match="ralenet_12lead is built around .* --config.model.base=DIR"):
        read(None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=ralenet_mlp"], "a run of ralenet_mlp on mitdb; expected ralenet as published"),
        (["model.efficient_channel_attention=True"], "expected ralenet as published"),
        (["data.database=ludb"], "a run of ralenet on ludb; expected ralenet as published, on mitdb"),
        (["model.local_enhancement=partial"], "no checkpoint of step None"),  # as published, but nothing was trained
    ],
)
def test_a_run_of_something_else_is_refused(tmp_path, overrides, said):
    checkpoint.claim(tmp_path, load_config("ralenet", overrides))
    with pytest.raises(UserError, match="^model.base: [^\n]+$") as caught:
        read(tmp_path)
    assert said in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="^model.base: no run in .* name the --workdir of a training run$"):
        read(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model": "ralenet"}')
    with pytest.raises(UserError, match="^model.base: the configuration in .* is not of this version"):
        read(tmp_path)
