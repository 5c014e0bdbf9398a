"""Parameters, and PyTorch's default initial values: drawn by JAX or, for a quick start, by NumPy on the host."""

import contextlib
import contextvars

import flax
import jax
import jax.numpy as jnp
import numpy as np

_host = contextvars.ContextVar("host generator", default=None)


def uniform(fan_in):
    """An initialiser: uniform in ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        generator = _host.get()
        if generator is None:
            return jax.random.uniform(key, shape, dtype, -bound, bound)
        return jnp.asarray(generator.uniform(-bound, bound, shape), dtype)

    return init


@contextlib.contextmanager
def drawn_on_host(seed):
    """While it lasts, initialisers draw from NumPy's generator of this seed as they are traced; keys do not count.

    To compile three hundred draws and their keys takes longer than to compile the training.
    """
    token = _host.set(np.random.default_rng(seed))
    try:
        yield
    finally:
        _host.reset(token)


def parameter(module, name, init, shape):
    """As `module.param`, which for a parameter that is there traces the initialiser once more to compare shapes.

    That is an eighth of the time to trace a training.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != tuple(shape):
        raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value
