"""The GPU's attention, interpreted, and its gradients against the plain form that runs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_twins import RANDOM, assert_same_with_gradients, drawn

from ralenet_jax.models import attention, gpu_attention, gpu_kernels, ralenet


def plain_attention(features, offset, bias=None, inside=None, start=None):
    query, key, value = features + offset[..., None, None]
    by_keys = None if bias is None else jnp.swapaxes(bias, 1, 2)
    return attention.attend(query / 2, key, value, by_keys, start, inside)


@pytest.mark.parametrize(("length", "kind"), [(16, "no bias"), (64, "one window"), (64, "windows of each")])
def test_attention_agrees_with_plain_form(length, kind):
    heads, batch, window = 2, 2, 8
    features, offset = drawn(3, heads, 4, batch, length), drawn(3, heads, 4)
    start = length // 2 - window // 2
    if kind == "no bias":
        kernel = lambda *features: gpu_attention.attend(*features, None, None, None)  # noqa: E731
        assert_same_with_gradients(kernel, plain_attention, (features, offset))
    elif kind == "one window":
        kernel = lambda *arguments: gpu_attention.attend(*arguments, None, start)  # noqa: E731
        twin = lambda *arguments: plain_attention(*arguments, start=start)  # noqa: E731
        assert_same_with_gradients(kernel, twin, (features, offset, drawn(heads, window, window)))
    else:
        inside = jnp.asarray(RANDOM.integers(0, 4, (batch, length)), jnp.int32)
        kernel = lambda *arguments: gpu_attention.attend(*arguments, inside, None)  # noqa: E731
        twin = lambda *arguments: plain_attention(*arguments, inside)  # noqa: E731
        assert_same_with_gradients(kernel, twin, (features, offset, drawn(heads, length, length)))


@pytest.mark.parametrize(("plenty", "start"), [(1, 28), (1, 29), (10**9, 29)])
def test_attention_with_few_and_many_samples_and_a_window_anywhere(monkeypatch, plenty, start):
    monkeypatch.setattr(gpu_attention, "_PLENTY", plenty)
    kernel = lambda *arguments: gpu_attention.attend(*arguments, None, start)  # noqa: E731
    twin = lambda *arguments: plain_attention(*arguments, start=start)  # noqa: E731
    assert_same_with_gradients(kernel, twin, (drawn(3, 2, 4, 1, 64), drawn(3, 2, 4), drawn(2, 8, 8)))


def test_a_window_over_the_edge_has_no_kernel():
    x, bias = drawn(8, 1, 16), drawn(2, 8, 8)
    module = ralenet.Attention()
    variables = module.init(jax.random.key(0), x, bias, -3, None)
    with gpu_kernels.traced_for("interpreted"):
        over = module.apply(variables, x, bias, -3, None)[0]
        assert "pallas_call" not in str(jax.make_jaxpr(lambda x: module.apply(variables, x, bias, -3, None))(x))
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: module.apply(variables, x, bias, 4, None))(x))
    np.testing.assert_array_equal(over, module.apply(variables, x, bias, -3, None)[0])


def test_attention_of_large_logits_is_finite():
    features = jnp.full((3, 1, 4, 1, 16), 1e3)
    with gpu_kernels.traced_for("interpreted"):
        out = gpu_attention.attend(features, jnp.zeros((3, 1, 4)), None, None, None)
    np.testing.assert_allclose(out, 1e3, rtol=1e-6)
