"""Convolutions and their transposes against the definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_layers import conv, conv_transpose

from ralenet_jax.models.convolution import Conv, ConvTranspose

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((6, 3, 16)).astype(np.float32)  # [C, B, L]


def weights(width, channels, features):
    random = np.random.default_rng(width)
    return {
        "kernel": random.standard_normal((width, channels, features)).astype(np.float32),
        "bias": random.standard_normal(features).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("width", "stride", "padding", "length"), [(3, 1, 1, 16), (3, 2, 1, 8), (17, 2, 8, 8), (1, 1, 0, 16), (4, 3, 0, 5)]
)
def test_convolution_against_numpy(width, stride, padding, length):
    params = weights(width, 6, 2)
    y = Conv(2, width, stride, padding).apply({"params": params}, X)
    assert y.shape == (2, 3, length)
    expected = conv(X.transpose(1, 0, 2), params["kernel"].transpose(2, 1, 0), params["bias"], stride, padding)
    np.testing.assert_allclose(y, expected.transpose(1, 0, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "stride", "padding"), [(4, 2, 1), (18, 2, 8), (7, 1, 3), (5, 3, 0)])
def test_transposed_convolution_adds_the_kernel_at_every_sample(width, stride, padding):
    params = weights(width, 6, 2)
    y = ConvTranspose(2, width, stride, padding).apply({"params": params}, X)
    kernel = params["kernel"][::-1].transpose(1, 2, 0)  # it is kept flipped
    expected = conv_transpose(X.transpose(1, 0, 2), kernel, params["bias"], stride, padding)
    assert y.shape == (2, 3, 15 * stride + width - 2 * padding)
    np.testing.assert_allclose(y, expected.transpose(1, 0, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("module", "fan_in"), [(Conv(64, 3), 6), (ConvTranspose(32, 4), 128)])
def test_initialisation_is_pytorchs(module, fan_in):
    # Of a transposed convolution PyTorch counts the channels that come out.
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 1, 16)))["params"]
    bound = fan_in**-0.5
    for values in params.values():
        assert 0.8 * bound < jnp.abs(values).max() <= bound
