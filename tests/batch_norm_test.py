"""Batch normalisation against PyTorch's definition, in NumPy with double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax.errors import UserError
from ralenet_jax.models.batch_norm import BatchNorm

X = np.random.default_rng(0).normal(3.0, 2.0, (4, 6, 5)).astype(np.float32)
VARIABLES = {
    "params": {"scale": jnp.arange(1.0, 6), "bias": jnp.arange(5.0)},
    "batch_stats": {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 2.0)},
}


def expected_train(x):
    x = x.astype(np.float64)
    normal = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
    running_mean = 0.9 * 0.5 + 0.1 * x.mean((0, 1))
    running_var = 0.9 * 2.0 + 0.1 * x.var((0, 1), ddof=1)
    return normal * np.arange(1, 6) + np.arange(5), running_mean, running_var


def test_training_uses_the_batch_and_moves_the_running_statistics():
    y, updates = BatchNorm().apply(VARIABLES, X, train=True, mutable=["batch_stats"])
    expected, mean, var = expected_train(X)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-6)


def test_evaluation_uses_the_running_statistics():
    expected = (X - 0.5) / np.sqrt(2.0 + 1e-5) * np.arange(1, 6) + np.arange(5)
    np.testing.assert_allclose(BatchNorm().apply(VARIABLES, X), expected, rtol=1e-5, atol=1e-6)


def test_channels_may_stand_on_any_axis():
    y = BatchNorm(channel_axis=0).apply(VARIABLES, X.transpose(2, 0, 1), train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(y.transpose(1, 2, 0), expected_train(X)[0], atol=2e-6)


def test_variance_survives_a_large_mean():
    shifted = (X + 1000).astype(np.float32)
    y = BatchNorm().apply(VARIABLES, shifted, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(y, expected_train(shifted)[0], atol=1e-3)


@pytest.mark.skipif(jax.local_device_count() < 2, reason="needs two devices")
def test_two_devices_are_one_batch():
    def train(x):
        return BatchNorm(axis_name="batch").apply(VARIABLES, x, train=True, mutable=["batch_stats"])

    y, updates = jax.pmap(train, axis_name="batch", devices=jax.local_devices()[:2])(X.reshape(2, 2, 6, 5))
    expected, mean, var = expected_train(X)
    np.testing.assert_allclose(y.reshape(X.shape), expected, atol=2e-6)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], [mean] * 2, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], [var] * 2, rtol=1e-6)


def test_fresh_variables_are_pytorchs():
    fresh = BatchNorm(axis_name="batch").init(jax.random.key(0), jnp.asarray(X), train=True)
    assert {key: float(value[0]) for key, value in fresh["params"].items()} == {"scale": 1.0, "bias": 0.0}
    assert {key: float(value[0]) for key, value in fresh["batch_stats"].items()} == {"mean": 0.0, "var": 1.0}


def test_one_value_for_each_channel_is_refused():
    with pytest.raises(UserError, match="2 windows or more"):
        BatchNorm().apply(VARIABLES, jnp.ones((1, 5)), train=True, mutable=["batch_stats"])
