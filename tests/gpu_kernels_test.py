"""The GPU's kernels, interpreted, and their gradients against the plain forms that run elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from ralenet_jax.models import attention, build_model, gpu_kernels, ralenet

_RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(_RANDOM.standard_normal(shape), jnp.float32)


def assert_same_with_gradients(kernel, twin, arguments, rtol=1e-5):
    """Every result and gradient, relative to the largest of its kind."""

    def both(function):
        def loss(*arguments):
            results = jax.tree.leaves(function(*arguments))
            return sum(jnp.vdot(jnp.cos(jnp.arange(r.size)), r.ravel()) for r in results), results

        every = tuple(range(len(arguments)))
        (_, results), gradients = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*arguments)
        return jax.tree.leaves((results, gradients))

    with gpu_kernels.traced_for("interpreted"):
        ours = both(kernel)
    theirs = both(twin)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=rtol * max(float(jnp.abs(their).max()), 1e-3))


def plain_attention(features, offset, bias=None, inside=None, start=None):
    query, key, value = jnp.swapaxes(features + offset[..., None, None], 2, 3)
    return jnp.swapaxes(attention.attend(query / 2, key, value, bias, start, inside), 1, 2)


@pytest.mark.parametrize(("length", "kind"), [(16, "no bias"), (64, "one window"), (64, "windows of each")])
def test_attention_agrees_with_plain_form(length, kind):
    heads, batch, window = 2, 2, 8
    features, offset = drawn(3, heads, 4, batch, length), drawn(3, heads, 4)
    start = length // 2 - window // 2
    if kind == "no bias":
        kernel = lambda *features: gpu_kernels.attend(*features, None, None, None)  # noqa: E731
        assert_same_with_gradients(kernel, plain_attention, (features, offset))
    elif kind == "one window":
        kernel = lambda *arguments: gpu_kernels.attend(*arguments, None, start)  # noqa: E731
        twin = lambda *arguments: plain_attention(*arguments, start=start)  # noqa: E731
        assert_same_with_gradients(kernel, twin, (features, offset, drawn(heads, window, window)))
    else:
        inside = jnp.asarray(_RANDOM.integers(0, 4, (batch, length)), jnp.int32)
        kernel = lambda *arguments: gpu_kernels.attend(*arguments, inside, None)  # noqa: E731
        twin = lambda *arguments: plain_attention(*arguments, inside)  # noqa: E731
        assert_same_with_gradients(kernel, twin, (features, offset, drawn(heads, length, length)))


def test_attention_with_several_samples_for_each_thread(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_PLENTY", 1)
    kernel = lambda *arguments: gpu_kernels.attend(*arguments, None, 28)  # noqa: E731
    twin = lambda *arguments: plain_attention(*arguments, start=28)  # noqa: E731
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
        out = gpu_kernels.attend(features, jnp.zeros((3, 1, 4)), None, None, None)
    np.testing.assert_allclose(out, 1e3, rtol=1e-6)


@pytest.mark.parametrize("added", ["nothing", "values", "values and bias"])
@pytest.mark.parametrize("placed", [False, True], ids=["plain", "with table"])
def test_norm_agrees_with_plain_form(added, placed):
    x, scale, bias = drawn(16, 3, 32), drawn(16), drawn(16)
    table, factor = (np.asarray(drawn(16, 32)), 4.0) if placed else (None, 1.0)
    more = {"nothing": (), "values": (drawn(16, 3, 32),), "values and bias": (drawn(16, 3, 32), drawn(16))}[added]

    def pair(more):
        return None if not more else (more[0], more[1] if len(more) > 1 else None)

    def kernel(x, scale, bias, *more):
        return gpu_kernels.add_and_norm(x, pair(more), scale, bias, table, factor, 1e-5)

    def twin(x, scale, bias, *more):
        return ralenet.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x, pair(more), factor, table)

    assert_same_with_gradients(kernel, twin, (x, scale, bias, *more))


@pytest.mark.parametrize(("channels", "length"), [(32, 64), (512, 16), (32, 256)])
def test_local_enhancement_agrees_with_plain_form(channels, length):
    arguments = drawn(channels, 2, length), drawn(channels), drawn(3)

    def twin(x, bias, kernel):
        return ralenet.LocalConv(1).apply({"params": {"kernel": kernel.reshape(3, 1, 1)}}, x, bias)

    assert_same_with_gradients(gpu_kernels.local_enhancement, twin, arguments)


def test_error_function():
    x = np.linspace(-6, 6, 2001)
    np.testing.assert_allclose(gpu_kernels._erf(jnp.asarray(x, jnp.float32)), erf(x), atol=5e-7)


def test_split_and_its_gradient():
    vector, sizes = drawn(5000), (1, 3, 2996, 2000)
    assert_same_with_gradients(lambda v: gpu_kernels.split(v, sizes), lambda v: jnp.split(v, (1, 4, 3000)), (vector,))


@pytest.mark.slow
def test_whole_model_agrees_with_plain_form():
    model, x = build_model("ralenet"), drawn(1, 256, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def apply(params):
        return model.apply({"params": params} | rest, x, np.array([100], np.int32))

    assert_same_with_gradients(apply, apply, (params,), 1e-4)


def test_kernels_are_for_gpus_and_powers_of_two():
    assert not gpu_kernels.usable(256)  # here is none
    with gpu_kernels.traced_for("interpreted"):
        assert gpu_kernels.usable(256, 8) and not gpu_kernels.usable(320) and not gpu_kernels.usable(256, 0)
        with gpu_kernels.traced_for("cpu"):
            assert gpu_kernels.usable(256)
    with gpu_kernels.traced_for("cpu"):
        assert not gpu_kernels.usable(256)
