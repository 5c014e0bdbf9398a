"""Models by name: sizes, options, and what is refused."""

import math

import jax
import jax.numpy as jnp
import pytest

from ralenet_jax.errors import UserError
from ralenet_jax.models import MODEL_NAMES, build_model

PARAMETERS = {"ralenet": 1_087_282, "ralenet_mlp": 1_087_228, "ralenet_nra": 1_086_800}  # the published counts


def count_parameters(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 2)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def test_parameter_counts():
    assert {name: count_parameters(build_model(name)) for name in MODEL_NAMES} == PARAMETERS


def test_options_change_the_model():
    # 18 blocks: 3 weights for each of 4C channels instead of one, and 3 of the channel attention.
    hidden = sum(4 * 8 * 2**level * blocks for level, blocks in enumerate((2, 4, 4, 4, 4)))
    depthwise = count_parameters(build_model("ralenet", local_enhancement="depthwise"))
    gated = count_parameters(build_model("ralenet", efficient_channel_attention=True))
    assert depthwise - PARAMETERS["ralenet"] == 3 * hidden - 3 * 18
    assert gated - PARAMETERS["ralenet"] == 3 * 18


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ralnet", {}, ["'ralnet'", "did you mean 'ralenet'"]),
        ("ralenet", {"r_wave_atention": False}, ["'r_wave_atention'", "did you mean 'r_wave_attention'"]),
        ("ralenet", {"local_enhancement": "depthwize"}, ["'depthwize'", "did you mean 'depthwise'"]),
        ("ralenet", {"axis": "batch"}, ["'axis'", "known: 'local_enhancement'"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, options, told):
    with pytest.raises(UserError) as error:
        build_model(name, **options)
    for part in told:
        assert part in str(error.value)
