"""A GPU's kernel, interpreted, beside the plain form that runs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.models import gpu_kernels

RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


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
