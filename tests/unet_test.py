"""The U-Net against its definition, computed in NumPy from a state dict with the published keys."""

import numpy as np
from torch_layers import Weights, leaky_relu, run_with_random_weights


def expected(weights, x):
    skips = []
    for i in range(4):
        x = leaky_relu(weights.batch_norm(f"EncList.{i}.bn", weights.conv(f"EncList.{i}.conv", x, 2, 1)))
        skips.append(x)
    y = weights.batch_norm("bottleneck.2", leaky_relu(weights.conv("bottleneck.0", x)))
    y = weights.batch_norm("bottleneck.5", leaky_relu(weights.conv("bottleneck.3", y, padding=1)))
    x = x + weights.conv("bottleneck.6", y)
    for i in range(4):
        x = weights.batch_norm(f"DecList.{i}.bn", weights.conv_transpose(f"DecList.{i}.conv", x, 2, 1))
        if i < 3:
            x = leaky_relu(x) + skips[2 - i]
    return x


def test_model_against_numpy():
    state_dict, x, y = run_with_random_weights("unet")
    np.testing.assert_allclose(y, expected(Weights(state_dict), x), atol=2e-5)
