"""The attention and its gradient against a plain twin, and against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax.models import attention
from ralenet_jax.models.attention import attend

HEADS, BATCH, HEAD_DIM, LENGTH, WINDOW = 2, 4, 4, 24, 8


def softmax_attention(query, key, value, on_map):
    """Attention as the paper writes it, differentiated by JAX; the bias `[H, B, L, L]` stands on the whole map."""
    logits = jnp.einsum("hdbi,hdbj->hbij", query, key) + on_map
    return jnp.einsum("hbij,hdbj->hdbi", jax.nn.softmax(logits, -1), value)


def plain(query, key, value, bias, start):
    """One window at the same place in every example; each logit looks its bias up."""
    place = np.arange(LENGTH) - start
    inside = (place >= 0) & (place < WINDOW)
    place = place.clip(0, WINDOW - 1)
    on_map = jnp.where(np.outer(inside, inside), bias[:, place[None], place[:, None]], 0.0)
    return softmax_attention(query, key, value, on_map[:, None])


def plain_windows(query, key, value, bias, starts):
    """Every example has windows of its own, `starts` a list for each; what is in two of them counts once."""
    both = np.zeros((BATCH, LENGTH, LENGTH), bool)
    for example, of_example in enumerate(starts):
        for start in of_example:
            both[example, max(start, 0) : max(start + WINDOW, 0), max(start, 0) : max(start + WINDOW, 0)] = True
    return softmax_attention(query, key, value, jnp.where(both, jnp.swapaxes(bias, 1, 2)[:, None], 0.0))


def bits(starts):
    """What `attend` takes for `plain_windows`' starts."""
    found = np.zeros((BATCH, LENGTH), np.int32)
    for example, of_example in enumerate(starts):
        for window, start in enumerate(of_example):
            found[example, max(start, 0) : max(start + WINDOW, 0)] |= 1 << window
    return jnp.array(found)


# One that hangs over an edge, two apart, two that overlap, none.
STARTS = [[-3], [1, 14], [6, 9], []]


def inputs(width=WINDOW):
    random = np.random.default_rng(0)
    features = [random.standard_normal((HEADS, HEAD_DIM, BATCH, LENGTH)) for _ in range(3)]
    bias = random.standard_normal((HEADS, width, width))
    return [jnp.asarray(array, jnp.float32) for array in (*features, bias)]


def assert_same_with_gradients(ours, twin, arguments):
    weight = jnp.cos(jnp.arange(HEADS * HEAD_DIM * BATCH * LENGTH)).reshape(HEADS, HEAD_DIM, BATCH, LENGTH)
    np.testing.assert_allclose(jax.jit(ours)(*arguments), jax.jit(twin)(*arguments), atol=2e-6)
    every = tuple(range(len(arguments)))
    our_gradients, twin_gradients = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(weight * f(*a)), every))(*arguments) for f in (ours, twin)
    )
    for our_gradient, twin_gradient in zip(our_gradients, twin_gradients, strict=True):
        np.testing.assert_allclose(our_gradient, twin_gradient, atol=1e-5)


@pytest.mark.parametrize("start", [8, 0, -3, 20, -9, 30], ids=lambda start: f"start{start}")
def test_fixed_window_agrees_with_twin(start):
    ours = lambda *arguments: attend(*arguments, start)  # noqa: E731
    assert_same_with_gradients(ours, lambda *arguments: plain(*arguments, start), inputs())


def test_windows_of_each_example_agree_with_twin():
    ours = lambda *arguments: attend(*arguments, inside=bits(STARTS))  # noqa: E731
    assert_same_with_gradients(ours, lambda *arguments: plain_windows(*arguments, STARTS), inputs(LENGTH))


def test_no_bias_agrees_with_twin():
    *features, _ = inputs()
    assert_same_with_gradients(attend, lambda *features: softmax_attention(*features, 0.0), features)


@pytest.mark.parametrize("kind", ["no bias", "fixed window", "windows of each"])
def test_batch_in_pieces_agrees_with_twin(kind, monkeypatch):
    # Maps of two examples fit for the queries outside the window.
    monkeypatch.setattr(attention, "_PIECE_BYTES", 2 * 4 * HEADS * LENGTH * LENGTH)
    jax.clear_caches()
    arguments = inputs(LENGTH if kind == "windows of each" else WINDOW)
    if kind == "no bias":
        ours, twin = attend, lambda *features: softmax_attention(*features, 0.0)
        arguments = arguments[:3]
    elif kind == "fixed window":
        ours, twin = lambda *a: attend(*a, 8), lambda *a: plain(*a, 8)
    else:
        ours, twin = lambda *a: attend(*a, inside=bits(STARTS)), lambda *a: plain_windows(*a, STARTS)
    assert "scan" in str(jax.make_jaxpr(ours)(*arguments))
    assert_same_with_gradients(ours, twin, arguments)
    monkeypatch.setattr(attention, "_PIECE_BYTES", 1)  # one by one
    jax.clear_caches()
    assert_same_with_gradients(ours, twin, arguments)
    jax.clear_caches()


def test_weights_worked_by_hand():
    zeros = jnp.zeros((1, 1, 1, 4))
    value = jnp.array([1.0, 2.0, 4.0, 9.0]).reshape(1, 1, 1, 4)
    # Query 1 sees key 2 three times as strongly: (1 + 2 + 3·4 + 9) / 6 = 4; the others see the mean, 4.
    bias = jnp.array([[[0.0, 0.0], [jnp.log(3.0), 0.0]]])
    expected = np.full((1, 1, 1, 4), 4.0)
    np.testing.assert_allclose(attend(zeros, zeros, value, bias, 1), expected, rtol=1e-6)
    # With key 3 instead of key 2 in the window's second place, query 2 does: (1 + 2 + 4 + 3·9) / 6.
    expected[..., 2] = 34 / 6
    np.testing.assert_allclose(attend(zeros, zeros, value, bias, 2), expected, rtol=1e-6)


def test_large_logits_do_not_overflow():
    query = jnp.full((1, 1, 1, 2), 1e3)
    key, value = jnp.array([[[[1.0, -1.0]]]]), jnp.array([[[[5.0, 7.0]]]])
    np.testing.assert_allclose(attend(query, key, value), [[[[5.0, 5.0]]]])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_any_length_agrees_with_twin(length):
    features = [array[..., :length] * 9 for array in inputs()[:3]]  # so that one key has nearly all the weight
    twin = softmax_attention(*features, 0.0)
    np.testing.assert_allclose(jax.jit(attend)(*features), twin, atol=2e-5)


@pytest.mark.parametrize(("bias", "expected"), [(200.0, 7.0), (-200.0, 5.0)])
def test_large_bias_does_not_overflow(bias, expected):
    zeros, value = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[5.0, 7.0]]]])
    for_key_1 = jnp.array([[[0.0, 0.0], [bias, bias]]])
    np.testing.assert_allclose(attend(zeros, zeros, value, for_key_1, 0), np.full((1, 1, 1, 2), expected))


@pytest.mark.parametrize(("low", "high", "within"), [(-1, 1, 3e-7), (-16, 16, 2e-6), (-87, 69, 5e-6)])
def test_exponentials_for_one_user_are_those_of_float64(low, high, within):
    x = np.linspace(low, high, 200_001, dtype=np.float32).reshape(1, 1, 1, -1)
    np.testing.assert_allclose(jax.jit(attention._exp)(x), np.exp(x.astype(np.float64)), rtol=within)


def test_exponentials_for_one_user_of_what_is_out_of_range():
    x = jnp.array([-88.0, -1e30, -np.inf, np.nan]).reshape(1, 1, 1, -1)
    seen = np.ravel(jax.jit(attention._exp)(x))
    assert (seen[:3] > 0).all()
    assert (seen[:3] < 2e-38).all()
    assert np.isnan(seen[3])
