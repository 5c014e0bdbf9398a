"""The GPU's kernels, interpreted, and their gradients against the plain forms that run elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_twins import assert_same_with_gradients, drawn
from scipy.special import erf

from ralenet_jax.models import build_model, gpu_kernels, ralenet


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
