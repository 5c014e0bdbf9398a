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


def windows_of_levels(monkeypatch, length, *peaks):
    """What `attend` gets in every block: the first samples of the windows, and the bits of the samples."""
    model, (_, variables) = build_model("ralenet"), model_and_variables()
    # Blocks that are traced once would keep what stands for `attend` here for other tests.
    monkeypatch.setattr(ralenet, "_TracedOnce", ralenet.Block)

    def run(*peaks):
        seen = []
        monkeypatch.setattr(ralenet, "attend", lambda query, _k, _v, _bias, *where: seen.append(where) or query)
        model.apply(variables, windows(2, length), *peaks[:1], r_mask=peaks[1] if peaks[1:] else None)
        starts.extend(start for start, _ in seen)
        return [inside for _, inside in seen if inside is not None]

    starts = []
    return starts, jax.jit(run)(*peaks)


def test_window_of_a_level_stands_around_the_r_peak(monkeypatch):
    starts, inside = windows_of_levels(monkeypatch, 256)
    # Two blocks a level, down and up: (256 − 32)/2, (128 − 16)/2, (64 − 8)/2, (32 − 4)/2; none at the bottleneck.
    assert starts == [112, 112, 56, 56, 28, 28, 14, 14] + [None] * 4 + [14, 14, 28, 28, 56, 56] and inside == []


def test_each_r_peak_has_a_window_and_masked_ones_have_none(monkeypatch):
    peaks = jnp.array([[40, 200, 0], [260, 128, 128]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    starts, inside = windows_of_levels(monkeypatch, 256, peaks, mask)
    assert starts == [None] * 18 and [bits.shape[1] for bits in inside[8:]] == [32, 32, 64, 64, 128, 128]
    for level, (bits, width) in enumerate(zip(inside[:8:2], (32, 16, 8, 4), strict=True)):
        first, second = 40 // 2**level - width // 2, 200 // 2**level - width // 2
        expected = np.zeros((2, 256 // 2**level), int)
        expected[0, first : first + width], expected[0, second : second + width] = 1, 2
        # Beyond the end, and the same peak twice.
        beyond, middle = 260 // 2**level - width // 2, 128 // 2**level - width // 2
        expected[1, beyond:] += 1
        expected[1, middle : middle + width] += 2 + 4
        np.testing.assert_array_equal(bits, expected)


def test_a_peak_told_twice_counts_once_and_a_masked_one_does_not():
    model, (_, variables) = build_model("ralenet"), model_and_variables()
    apply = jax.jit(lambda peaks, mask: model.apply(variables, windows(2), peaks, r_mask=mask))
    peaks, mask = jnp.array([[60, 60], [60, 200]]), jnp.array([[True, True], [True, False]])
    twice = apply(peaks, mask)
    once = model_and_variables()[0](variables, windows(2), jnp.array([60, 60]))
    np.testing.assert_allclose(twice, once, atol=2e-6)
    assert jnp.abs(apply(peaks, jnp.ones_like(mask))[1] - once[1]).max() > 1e-3


@pytest.mark.parametrize(
    "peaks, mask, said",
    [
        (np.zeros((2, 40), int), None, r"r_peak is int32 \[2, 40\]; expected int32 \[2\] or \[2, up to 31\]"),
        (np.zeros((3, 2), int), None, r"r_peak is int32 \[3, 2\]"),
        (np.zeros((2, 2), np.float32), None, r"r_peak is float32 \[2, 2\]"),
        (np.zeros((2, 2), int), np.ones((2, 1), bool), r"r_mask is bool \[2, 1\]; expected bool \[2, 2\]"),
        (np.zeros((2, 2), int), np.ones((2, 2), int), r"r_mask is int32 \[2, 2\]; expected bool"),
        (None, np.ones((2, 2), bool), "r_mask is given without r_peak"),
    ],
)
def test_peaks_of_another_shape_are_refused(peaks, mask, said):
    model = build_model("ralenet")
    peaks = None if peaks is None else jnp.asarray(peaks)
    with pytest.raises(UserError, match=said):
        model.init(jax.random.key(0), windows(2), peaks, r_mask=None if mask is None else jnp.asarray(mask))


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
    y = jax.jit(lambda x: ralenet.add(*block.apply(block.init(jax.random.key(0), x, None), x, None)))(x)
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
    r_wave = jax.jit(ralenet.RWaveBias(4, 2).init, static_argnums=1)(jax.random.key(0), 8)
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
    bias = ralenet.RWaveBias(2, 1).apply({"params": {"table": table}}, 2)
    # Row query − key + W − 1: the diagonal has row 1, query 1 with key 0 row 2.
    np.testing.assert_array_equal(bias, [[[20, 30], [10, 20]]])
    longer = ralenet.RWaveBias(2, 1).apply({"params": {"table": table}}, 4)[0]
    for i, j in ((0, 0), (0, 1), (1, 0), (2, 3), (3, 2), (3, 3)):
        assert longer[j, i] == table[i - j + 1, 0]


def test_partial_convolution_touches_one_channel():
    kernel = np.array([0.5, -1.0, 2.0], np.float32)
    bias = np.arange(6, dtype=np.float32) / 10
    y = ralenet.LocalConv(1).apply({"params": {"kernel": kernel.reshape(3, 1, 1)}}, X, bias)
    inner = X + bias[:, None, None]
    inner = inner * ndtr(inner)
    expected = np.concatenate([[[np.correlate(row, kernel, "same") for row in inner[0]]], inner[1:]])
    np.testing.assert_allclose(y, expected * ndtr(expected), rtol=1e-5, atol=1e-6)


def test_depthwise_convolution_has_a_kernel_for_each_channel():
    kernel = np.random.default_rng(2).standard_normal((3, 1, 6)).astype(np.float32)
    y = ralenet.LocalConv(6).apply({"params": {"kernel": kernel}}, X, np.zeros(6, np.float32))
    inner = X * ndtr(X)
    expected = np.array([[np.correlate(row, kernel[:, 0, c], "same") for row in inner[c]] for c in range(6)])
    np.testing.assert_allclose(y, expected * ndtr(expected), rtol=1e-5, atol=1e-6)


def test_efficient_channel_attention_against_numpy():
    kernel = np.array([0.5, -1.0, 2.0], np.float32)
    y = ralenet.EfficientChannelAttention().apply({"params": {"kernel": kernel.reshape(3, 1, 1)}}, X)
    gate = np.stack([expit(np.correlate(X[:, b].mean(1), kernel, "same")) for b in range(3)], 1)
    np.testing.assert_allclose(y, X * gate[..., None], rtol=1e-5, atol=1e-6)


def test_layer_norm_against_numpy():
    scale, bias = np.arange(1.0, 7), np.arange(6.0)
    variables = {"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
    added, table = np.cos(X), np.sin(X[:, 0])
    for arguments, summed, normed in (
        ((X,), X, X),
        ((X, (added, scale)), X + added + scale[:, None, None], X + added + scale[:, None, None]),
        ((X, (added, None), 3.0, table), X + added, 3 * (X + added) + table[:, None]),
    ):
        y, x = ralenet.LayerNorm().apply(variables, *arguments)
        np.testing.assert_allclose(x, summed, atol=1e-6)
        normal = (normed - normed.mean(0)) / np.sqrt(normed.var(0) + 1e-5)
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
    monkeypatch.setattr(ralenet.LayerNorm, "__call__", lambda self, x: (x, x))
    x = jnp.arange(8.0).reshape(2, 1, 4)
    channels = len(order)
    y = module.apply({"params": {"dense": {"kernel": jnp.eye(channels)}}}, x)
    np.testing.assert_array_equal(y[:, 0], order)
