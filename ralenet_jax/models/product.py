"""The product of a dense layer or a convolution, and the form of it that is fast on a CPU without gradients."""

import jax

# To transpose a kernel takes as long as what some hundred columns gain by it, and with few channels little is gained.
_WORTH_CHANNELS, _WORTH_COLUMNS = 32, 256


def for_cpu(size):
    """Whether this is compiled for a CPU; an array of any size, as in an exported program, is not."""
    return jax.default_backend() == "cpu" and isinstance(size, int)


def product(kernel, x):
    """Mixes channels, in the dtype of x: `[C, features]`, `[C, N]` → `[features, N]`."""
    kernel, columns = kernel.astype(x.dtype), x.shape[1]
    if for_cpu(columns) and columns >= _WORTH_COLUMNS and min(kernel.shape) >= _WORTH_CHANNELS:
        return _transposed_first(kernel, x)
    return _folded(kernel, x)


def _folded(kernel, x):
    return kernel.T @ x


@jax.custom_vjp
def _transposed_first(kernel, x):
    """`kernel.T @ x` by a transposed kernel that is an array of its own.

    XLA would fold the transpose into the product, and with its left side transposed that takes up to twice as long. A
    training gains nothing by it.
    """
    return jax.lax.optimization_barrier(kernel.T) @ x


def _forward(kernel, x):
    return jax.vjp(_folded, kernel, x)


_transposed_first.defvjp(_forward, lambda pull, d_out: pull(d_out))
