"""ACDAE against its definition, computed in NumPy from a state dict with the published keys, and its parts by hand."""

import numpy as np
from scipy.special import expit
from torch_layers import Weights, conv, leaky_relu, run_with_random_weights

from ralenet_jax.models import acdae


def expected_up(x):
    """Linear interpolation between the centres of the samples, which stand at ½, 1½, …; constant beyond the last."""
    length = x.shape[2]
    old, new = np.arange(length) + 0.5, (np.arange(2 * length) + 0.5) / 2
    return np.apply_along_axis(lambda row: np.interp(new, old, row), 2, x)


def expected(weights, x):
    skips = []
    for i, width in enumerate((13, 7, 7, 7)):
        x = weights.conv(f"EncList.{i}.conv", x, padding=width // 2)
        x = leaky_relu(np.maximum(x[:, :, ::2], x[:, :, 1::2]))
        skips.append(x)
    for i, width in enumerate((7, 7, 7, 13)):
        x = leaky_relu(expected_up(weights.conv_transpose(f"DecList.{i}.conv", x, padding=width // 2)))
        # Over the channels of the means.
        gate = conv(x.mean(2)[:, None], weights.arrays[f"DecList.{i}.ECA.conv.weight"], padding=1)[:, 0]
        x = x * expit(gate)[:, :, None]
        if i < 3:
            x = x + skips[2 - i]
    return x


def test_model_against_numpy():
    state_dict, x, y = run_with_random_weights("acdae")
    np.testing.assert_allclose(y, expected(Weights(state_dict), x), atol=2e-5)


def test_resampling_by_hand():
    x = np.array([1.0, 5.0, -3.0, -4.0], np.float32).reshape(1, 2, 2)
    np.testing.assert_array_equal(acdae.halve(x), [[[5], [-3]]])
    np.testing.assert_array_equal(acdae.double(x), [[[1, 2, 4, 5], [-3, -3.25, -3.75, -4]]])
