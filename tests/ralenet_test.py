"""RA-LENet's parts against NumPy and numbers worked by hand; the whole against itself where it must not change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, ndtr

from ralenet_jax.errors import UserError
from ralenet_jax.models import build_model, ralenet

X = np.random.default_rng(0).standard_normal((6, 3, 8)).astype(np.float32)  # [C, B, L]


@functools.cache
def model_and_variables():
    model = build_model("ralenet")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 2)))
    random = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.uniform(-0.5, 0.5, leaf.shape), jnp.float32), shapes["params"]
    )
    batch_stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["batch_stats"])
    return jax.jit(model.apply), {"params": params, "batch_stats": batch_stats}


def windows(batch, length=256):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, length, 2)), jnp.float32)


def test_r_peak_in_the_centre_is_the_published_case():
    apply, variables = model_and_variables()
    x = windows(2)
    np.testing.assert_allclose(apply(variables, x, jnp.full(2, 128)), apply(variables, x), atol=2e-6)


def test_each_example_has_its_own_r_peak():
    apply, variables = model_and_variables()
    x = windows(2)
    together = apply(variables, x, jnp.array([3, 180]))
    for i, r_peak in enumerate((3, 180)):
        np.testing.assert_allclose(
            together[i], apply(variables, x[np.array([i, i])], jnp.full(2, r_peak))[0], atol=2e-6
        )
    assert jnp.abs(together - apply(variables, x)).max() > 1e-3


def window_starts(monkeypatch, length, r_peak=None):
    """First samples of the windows of the blocks that are traced, as `attend` gets them."""
    starts = []
    monkeypatch.setattr(ralenet, "attend", lambda query, _key, _value, _bias, start: starts.append(start) or query)
    model = build_model("ralenet")
    _, variables = model_and_variables()

    def run(r_peak):
        model.apply(variables, windows(1, length), r_peak)
        return [start for start in starts if start is not None]

    return jax.jit(run)(r_peak), starts


def test_window_of_a_level_stands_around_the_r_peak(monkeypatch):
    _, starts = window_starts(monkeypatch, 256)
    # One block a level is traced for all: (256 − 32)/2, (128 − 16)/2, (64 − 8)/2, (32 − 4)/2; none at the bottleneck.
    assert starts == [112, 56, 28, 14, None]
    of_peak_7, _ = window_starts(monkeypatch, 16, jnp.array([7]))
    # 7 − 16, 3 − 8, 1 − 4, 0 − 2
    assert [int(start[0]) for start in of_peak_7[:8:2]] == [-9, -5, -3, -2]


@pytest.mark.parametrize("length", [48, 512])
def test_any_length_divisible_by_16(length):
    model = build_model("ralenet")
    _, variables = model_and_variables()
    assert jax.eval_shape(model.apply, variables, windows(3, length)).shape == (3, length, 2)


def test_windows_wider_than_the_signal_are_cut():
    _, variables = model_and_variables()
    y = jax.jit(build_model("ralenet").apply)(variables, windows(1, 16))
    assert y.shape == (1, 16, 2)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("options", [("depthwise", False), ("partial", True), ("none", True)])
def test_options_of_a_block_run(options):
    block = ralenet.Block(*options)
    x = jnp.asarray(np.tile(X, (2, 1, 1))[:8])
    y = jax.jit(lambda x: block.apply(block.init(jax.random.key(0), x), x))(x)
    assert y.shape == x.shape
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("shape", "r_peak", "told"),
    [
        ((1, 250, 2), None, "divisible by 16"),
        ((256, 2), None, r"expected \[B, L, leads\]"),
        ((2, 256, 2), np.array([1]), r"expected int32 \[2\]"),
        ((2, 256, 2), np.array([1.0, 2.0]), "float32"),
    ],
)
def test_bad_shapes_are_refused(shape, r_peak, told):
    with pytest.raises(UserError, match=told):
        jax.eval_shape(build_model("ralenet").init, jax.random.key(0), jnp.zeros(shape), r_peak)


def test_initialisation_is_pytorchs():
    feed_forward = jax.jit(ralenet.FeedForward("partial", False).init)(jax.random.key(0), jnp.zeros((64, 1, 16)))
    for dense, fan_in in (("expand", 64), ("project", 256)):
        for weights in feed_forward["params"][dense].values():
            bound = fan_in**-0.5
            assert 0.9 * bound < jnp.abs(weights).max() <= bound
            assert jnp.std(weights) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    r_wave = jax.jit(ralenet.RWaveBias(4, 2).init)(jax.random.key(0))
    assert not r_wave["params"]["table"].any()


def test_sinusoid_by_hand():
    table = ralenet.sinusoid(3, 4)
    expected = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(3)]
    np.testing.assert_allclose(table.T, expected, rtol=1e-6)


def test_gelu_is_the_erf_form():
    x = np.linspace(-6, 6, 101).astype(np.float32)
    np.testing.assert_allclose(ralenet.gelu(x), x * ndtr(x.astype(np.float64)), atol=5e-7)


def test_r_wave_bias_by_hand():
    table = jnp.array([[10.0], [20.0], [30.0]])
    bias = ralenet.RWaveBias(2, 1).apply({"params": {"table": table}})
    # Row i − j + W − 1: the diagonal has row 1, query 1 with key 0 row 2.
    np.testing.assert_array_equal(bias, [[[20, 10], [30, 20]]])


def test_partial_convolution_touches_one_channel():
    kernel = np.array([0.5, -1.0, 2.0], np.float32)
    y = ralenet.LocalConv(1).apply({"params": {"kernel": kernel.reshape(3, 1, 1)}}, X)
    expected = [np.correlate(row, kernel, "same") for row in X[0]]
    np.testing.assert_allclose(y[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[1:], X[1:])


def test_depthwise_convolution_has_a_kernel_for_each_channel():
    kernel = np.random.default_rng(2).standard_normal((3, 1, 6)).astype(np.float32)
    y = ralenet.LocalConv(6).apply({"params": {"kernel": kernel}}, X)
    expected = [[np.correlate(row, kernel[:, 0, c], "same") for row in X[c]] for c in range(6)]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_efficient_channel_attention_against_numpy():
    kernel = np.array([0.5, -1.0, 2.0], np.float32)
    y = ralenet.EfficientChannelAttention().apply({"params": {"kernel": kernel.reshape(3, 1, 1)}}, X)
    gate = np.stack([expit(np.correlate(X[:, b].mean(1), kernel, "same")) for b in range(3)], 1)
    np.testing.assert_allclose(y, X * gate[..., None], rtol=1e-5, atol=1e-6)


def test_layer_norm_against_numpy():
    scale, bias = np.arange(1.0, 7), np.arange(6.0)
    y = ralenet.LayerNorm().apply({"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, X)
    normal = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    np.testing.assert_allclose(y, normal * scale[:, None, None] + bias[:, None, None], atol=1e-5)


@pytest.mark.parametrize(
    ("module", "order"),
    [
        # even samples' channels, then the odd ones'
        (ralenet.PatchMerging(), [[0, 2], [4, 6], [1, 3], [5, 7]]),
        # the first half of the channels, then the second half's samples after it
        (ralenet.PatchSeparation(), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_resampling_order_by_hand(module, order, monkeypatch):
    monkeypatch.setattr(ralenet.LayerNorm, "__call__", lambda self, x: x)
    x = jnp.arange(8.0).reshape(2, 1, 4)
    channels = len(order)
    y = module.apply({"params": {"dense": {"kernel": jnp.eye(channels)}}}, x)
    np.testing.assert_array_equal(y[:, 0], order)
