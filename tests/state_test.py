import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import ralenet
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError

# Published counts of trainable parameters.
_PUBLISHED = {"ralenet": 1_087_282, "ralenet_mlp": 1_087_228, "ralenet_nra": 1_086_800}


def shapes(**options):
    """The state of a configured model, without computing it."""
    config = ralenet.get_config()
    config.model.update(options)
    model = train_state.model_from_config(config)
    return jax.eval_shape(lambda: train_state.create_state(model, optax.adam(1e-3), 0, (256, 2)))


class Small(nn.Module):
    """A model whose initial values are soon computed."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(3, name="widen")(x))
        return nn.Dense(2, name="narrow")(x)


@pytest.fixture(scope="module")
def states():
    """Two states of one seed and one of another."""
    return [train_state.create_state(Small(), optax.adam(1e-3), seed, (64, 2)) for seed in (0, 0, 1)]


@pytest.mark.parametrize("name", _PUBLISHED)
def test_number_of_parameters_is_the_published_one(name):
    assert train_state.count_parameters(shapes(name=name).params) == _PUBLISHED[name]


def test_options_reach_the_model_and_none_leaves_it_as_published():
    base = train_state.count_parameters(shapes().params)
    assert base == _PUBLISHED["ralenet"]
    # A kernel of width 3 in each block.
    with_attention = train_state.count_parameters(shapes(efficient_channel_attention=True).params)
    blocks = sum(name.endswith("query/kernel") for name in _names(shapes().params))
    assert with_attention - base == 3 * blocks
    assert train_state.count_parameters(shapes(r_wave_attention=False).params) == _PUBLISHED["ralenet_nra"]
    assert train_state.count_parameters(shapes(local_enhancement="none").params) == _PUBLISHED["ralenet_mlp"]


def _names(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("options", [{"name": "ralent"}, {"local_enhancement": "full"}])
def test_unknown_model_or_option_is_refused(options):
    with pytest.raises(UserError, match="did you mean|known"):
        shapes(**options)


def test_state_has_no_device_axis_and_starts_at_step_zero(states):
    assert len(jax.devices()) == 2  # or the axis could not show
    first = states[0]
    assert first.step.shape == () and first.step.dtype == jnp.int32 and int(first.step) == 0
    assert first.params["widen"]["kernel"].shape == (2, 3)
    assert {name: leaf.shape for name, leaf in first.batch_stats["norm"].items()} == {"mean": (3,), "var": (3,)}
    assert train_state.count_parameters(first.params) == (2 * 3 + 3) + (3 + 3) + (3 * 2 + 2)  # no running statistics


def test_a_model_without_batch_norm_has_no_statistics():
    state = train_state.create_state(nn.Dense(2), optax.sgd(0.1), 0, (64, 2))
    assert state.variables["batch_stats"] == {}


def test_optimiser_state_mirrors_the_parameters(states):
    moments = states[0].opt_state[0].mu
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, states[0].params)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(moments))


def test_seed_decides_the_parameters(states):
    first, again, other = ([np.asarray(leaf) for leaf in jax.tree.leaves(state.params)] for state in states)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_variables_are_what_the_model_takes(states):
    output = Small().apply(states[0].variables, jnp.ones((3, 64, 2)))
    kernels = [np.asarray(states[0].params[name]["kernel"], np.float64) for name in ("widen", "narrow")]
    # Biases are zero and running statistics 0 and 1 at the start, and Linen's epsilon is 1e-5.
    expected = np.ones((3, 64, 2)) @ kernels[0] / np.sqrt(1 + 1e-5) @ kernels[1]
    np.testing.assert_allclose(output, expected, rtol=1e-5)


def test_state_is_a_pytree_of_arrays(states):
    leaves = jax.tree.leaves(states[0])
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert int(states[0].replace(step=states[0].step + 1).step) == 1
