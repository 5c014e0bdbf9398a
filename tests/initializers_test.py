"""Initial values: the bound by hand, and that the host's draws take the place of JAX's."""

import flax
import jax
import numpy as np
import pytest

from ralenet_jax.models import build_model, initializers


def test_values_are_uniform_between_the_bounds():
    values = np.asarray(initializers.uniform(16)(jax.random.key(0), (100, 100)))
    # ±1/4; the deviation of a uniform variable is its width over the root of 12.
    assert -0.25 <= values.min() < -0.24 and 0.24 < values.max() <= 0.25
    np.testing.assert_allclose([values.mean(), values.std()], [0, 0.5 / 12**0.5], atol=0.005)


def test_host_draws_come_from_the_seed_in_the_order_of_the_calls():
    init = initializers.uniform(4)
    with initializers.drawn_on_host(3):
        first, second = (np.asarray(init(jax.random.key(0), (2, 3))) for _ in range(2))
    generator = np.random.default_rng(3)
    expected = [generator.uniform(-0.5, 0.5, (2, 3)).astype(np.float32) for _ in range(2)]
    np.testing.assert_array_equal([first, second], expected)
    # Outside it is the key that counts.
    again = [np.asarray(init(jax.random.key(0), (2, 3))) for _ in range(2)]
    np.testing.assert_array_equal(again[0], again[1])


def test_a_whole_model_is_drawn_alike():
    model = build_model("ralenet_mlp")
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 256, 2), np.float32))["params"]
    with initializers.drawn_on_host(0):
        drawn = jax.jit(lambda: model.init(jax.random.key(0), np.zeros((1, 256, 2), np.float32)))()["params"]
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    block = drawn["encoder2_1"]  # 32 channels: bounds of 1/sqrt(32), and 1/sqrt(128) behind the expansion
    for part, bound in (("query", 32**-0.5), ("key_value", 32**-0.5)):
        for leaf in block["attention"][part].values():
            assert 0.9 * bound < np.abs(leaf).max() <= bound
    assert 0.99 * 128**-0.5 < np.abs(block["feed_forward"]["project"]["kernel"]).max() <= 128**-0.5
    np.testing.assert_array_equal(block["attention_norm"]["scale"], np.ones(32))
    np.testing.assert_array_equal(drawn["r_wave0"]["table"], np.zeros((63, 2)))


def test_parameters_of_another_shape_are_refused():
    model, x = build_model("ralenet_mlp"), np.zeros((1, 256, 2), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables["params"]["encoder2_1"]["attention"]["query"]["bias"] = np.zeros(31, np.float32)
    message = r'"bias" in ".*encoder2_1.*/attention/query".* \(32,\), .* \(31,\)'
    with pytest.raises(flax.errors.ScopeParamShapeError, match=message):
        jax.eval_shape(model.apply, variables, x)
