"""Models by name: sizes, options, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_layers import random_variables

from ralenet_jax.errors import UserError
from ralenet_jax.models import MODEL_NAMES, build_model

PARAMETERS = {  # the published counts
    "ralenet": 1_087_282,
    "ralenet_mlp": 1_087_228,
    "ralenet_nra": 1_086_800,
    "unet": 10_374,
    "danet": 18_009,
    "acdae": 151_726,
    "ralenet_12lead": 1_089_492,
}
RIVALS = ("unet", "danet", "acdae")


def count_parameters(model, leads=2):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, leads)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def test_parameter_counts():
    leads = {"ralenet_12lead": 12}
    assert {name: count_parameters(build_model(name), leads.get(name, 2)) for name in MODEL_NAMES} == PARAMETERS


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
        ("unett", {}, ["'unett'", "did you mean 'unet'"]),
        ("unet", {"local_enhancement": "none"}, ["'unet'", "'local_enhancement'", "known: 'dtype'"]),
        ("ralenet", {"dtype": "bfloat"}, ["dtype='bfloat'", "did you mean 'bfloat16'", "'float32'"]),
        ("acdae", {"dtype": "float16"}, ["dtype='float16'", "known: 'float32', 'bfloat16'"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, options, told):
    with pytest.raises(UserError) as error:
        build_model(name, **options)
    for part in told:
        assert part in str(error.value)


# It compiles for six seconds each time; its BatchNorm is that of the U-Net, its bfloat16 that of all.
_DANET = pytest.param("danet", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["unet", _DANET])
def test_rival_over_two_devices_is_one_model(name):
    variables = random_variables(name)
    x = np.random.default_rng(1).standard_normal((4, 32, 2)).astype(np.float32)

    def train(x, axis_name=None):
        return build_model(name, axis_name).apply(variables, x, train=True, mutable=["batch_stats"])

    whole, updates = jax.jit(train)(x)
    halves = jax.pmap(lambda x: train(x, "batch"), axis_name="batch", devices=jax.local_devices()[:2])
    y, of_devices = halves(x.reshape(2, 2, 32, 2))
    np.testing.assert_allclose(y.reshape(x.shape), whole, atol=1e-5)
    jax.tree.map(lambda two, one: np.testing.assert_allclose(two, [one] * 2, atol=1e-6), of_devices, updates)


@pytest.mark.parametrize("name", RIVALS)
def test_rival_takes_other_lengths_and_leads_and_any_r_peak(name):
    model = build_model(name)
    x = jnp.zeros((3, 48, 12))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.eval_shape(model.apply, variables, x).shape == (3, 48, 12)
    assert jax.eval_shape(model.apply, variables, x, jnp.zeros(3, jnp.int32)).shape == (3, 48, 12)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("shape", [(1, 250, 2), (256, 2), (1, 0, 2)])
def test_rival_refuses_bad_shapes(name, shape):
    with pytest.raises(UserError, match=r"expected \[B, L, leads\] with L divisible by 16"):
        jax.eval_shape(build_model(name).init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_bfloat16_is_inside_alone(name):
    leads = 12 if name == "ralenet_12lead" else 2
    x, variables = jnp.zeros((3, 32, leads)), random_variables(name, leads)
    model = build_model(name, dtype="bfloat16")
    assert "bf16" in str(jax.make_jaxpr(model.apply)(variables, x))
    assert "bf16" not in str(jax.make_jaxpr(build_model(name).apply)(variables, x))

    def loss_of(params):
        y, updates = model.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        return y.sum(), (y, updates)

    drawn = jax.eval_shape(model.init, jax.random.key(0), x)
    trained = jax.eval_shape(jax.grad(loss_of, has_aux=True), variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves((drawn, trained))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", [pytest.param("ralenet", marks=pytest.mark.slow), "unet", _DANET, "acdae"])
def test_bfloat16_is_near_to_float32(name):
    variables = random_variables(name)
    x = np.random.default_rng(1).standard_normal((3, 32, 2)).astype(np.float32)
    wanted = jax.jit(build_model(name).apply)(variables, x)
    found = jax.jit(build_model(name, dtype="bfloat16").apply)(variables, x)
    # bfloat16 has 8 bits: a rounding changes 1 in 2**9, and dozens follow each other.
    assert 0 < jnp.linalg.norm(found - wanted) < 2**-5 * jnp.linalg.norm(wanted)
