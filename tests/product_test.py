"""The product of a dense layer against NumPy, in both forms, and what XLA makes of it."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax.models.product import product

SMALL, LARGE = (8, 32, 512), (48, 96, 256)  # channels, features and columns: one form each


def arrays(channels, features, columns):
    random = np.random.default_rng(0)
    shapes = (channels, features), (channels, columns)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("sizes", [SMALL, LARGE, (48, 96, 255), (31, 96, 256)])
def test_against_numpy(sizes):
    kernel, x = arrays(*sizes)
    expected = kernel.T.astype(np.float64) @ x.astype(np.float64)
    np.testing.assert_allclose(jax.jit(product)(kernel, x), expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_gradients_against_numpy(sizes):
    kernel, x = arrays(*sizes)
    y, pull = jax.vjp(product, kernel, x)
    d_y = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    d_kernel, d_x = pull(d_y)
    np.testing.assert_allclose(y, kernel.T @ x, atol=1e-4)
    np.testing.assert_allclose(d_kernel, x @ d_y.T, atol=1e-3)
    np.testing.assert_allclose(d_x, kernel @ d_y, atol=1e-3)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_it_computes_in_the_features_dtype(sizes):
    kernel, x = arrays(*sizes)
    y = product(kernel, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), kernel.T @ x, atol=0.25)


@pytest.mark.parametrize(("sizes", "contracted"), [(SMALL, 0), (LARGE, 1)])
def test_no_transpose_is_left_in_a_large_product(sizes, contracted):
    hlo = jax.jit(product).lower(*arrays(*sizes)).compile().as_text()
    assert f"lhs_contracting_dims={{{contracted}}}" in hlo
    assert f"lhs_contracting_dims={{{1 - contracted}}}" not in hlo


def test_a_program_for_any_number_of_columns_has_one_form():
    columns = jax.export.symbolic_shape("n")[0]
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((48, 96), (48, columns))]
    assert "optimization_barrier" not in jax.export.export(jax.jit(product))(*given).mlir_module()
