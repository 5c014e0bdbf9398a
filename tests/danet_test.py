"""DANet against its definition, computed in NumPy from a state dict with the published keys, and its parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from torch_layers import Weights, run_with_random_weights

from ralenet_jax.errors import UserError
from ralenet_jax.models import build_model, danet


def expected_gate(weights, key, x):
    y = np.maximum(weights.batch_norm(f"{key}.1", weights.dense(f"{key}.0", x)), 0)
    return expit(weights.batch_norm(f"{key}.4", weights.dense(f"{key}.3", y)))


def expected_activation(weights, key, x):
    positive, negative = np.maximum(x, 0), np.minimum(x, 0)
    gate = expected_gate(weights, f"{key}.activate.fcn", np.concatenate([positive.mean(2), negative.mean(2)], 1))
    return weights.batch_norm(f"{key}.bn", positive + gate[:, :, None] * negative)


def expected_attention(weights, key, x):
    channel = expit(expected_gate(weights, f"{key}.fcn1", x.mean(2)) + expected_gate(weights, f"{key}.fcn2", x.max(2)))
    sample = expit(weights.conv(f"{key}.convsa", np.stack([x.mean(1), x.max(1)], 1)))
    return x * channel[:, :, None] * sample


def expected(weights, x):
    skips = []
    for i, (width, padding) in enumerate(((17, 8), (17, 8), (3, 1), (3, 1))):
        key = f"enc.EncoderList.cell{i}"
        assert weights.arrays[f"{key}.conv.weight"].shape[2] == width
        x = expected_activation(weights, key, weights.conv(f"{key}.conv", x, 2, padding))
        skips.append(x)
    for i, (width, padding) in enumerate(((4, 1), (4, 1), (18, 8), (18, 8))):
        key = f"dec.DecoderList.{i}"
        assert weights.arrays[f"{key}.deconv.weight"].shape[2] == width
        x = expected_activation(weights, key, weights.conv_transpose(f"{key}.deconv", x, 2, padding))
        if i < 3:
            x = expected_attention(weights, f"{key}.dam", x) + skips[2 - i]
    return x


def test_model_against_numpy():
    state_dict, x, y = run_with_random_weights("danet")
    np.testing.assert_allclose(y, expected(Weights(state_dict), x), atol=2e-5)


def test_statistics_of_the_shared_gate_move_by_the_means_first_and_then_by_the_largest():
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)  # [C, B, L]
    attention = danet.DualAttention()
    variables = jax.jit(lambda x: attention.init(jax.random.key(0), x, False))(x)
    # With the unit matrix and no bias the first normalisation sees the means and the largest as they are.
    hidden = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    variables["params"]["gate"]["hidden"] = hidden
    _, updates = jax.jit(lambda v, x: attention.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
    moved = updates["batch_stats"]["gate"]["hidden_norm"]
    # Running mean 0 and variance 1 at first, a tenth of the new ones each time.
    np.testing.assert_allclose(moved["mean"], 0.9 * 0.1 * x.mean(2).mean(1) + 0.1 * x.max(2).mean(1), rtol=1e-5)
    var = 0.9 * (0.9 + 0.1 * x.mean(2).var(1, ddof=1)) + 0.1 * x.max(2).var(1, ddof=1)
    np.testing.assert_allclose(moved["var"], var, rtol=1e-5)


def test_training_on_single_windows_is_refused():
    model, x = build_model("danet"), jnp.zeros((1, 32, 2))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(UserError, match="2 windows or more"):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, x)
