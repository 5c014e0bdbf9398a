"""Multi-head attention with a learned bias around the R wave."""

import jax
import jax.numpy as jnp


def attend(query, key, value, bias=None, start=None):
    """Softmax attention with a bias on a square window of its logits.

    Args:
        query, key, value: `[B, H, L, D]`; the queries are scaled already.
        bias: `[H, W, W]`, added to the logits of queries and keys inside the window, None for no bias.
        start: first sample of the window, an int or int32 `[B]`; what hangs over the edges is cut.

    Returns:
        `[B, H, L, D]`.
    """
    logits = query @ jnp.swapaxes(key, 2, 3)
    if bias is not None:
        length, window = query.shape[2], bias.shape[1]
        position = jnp.arange(length) - jnp.reshape(jnp.asarray(start), (-1, 1))
        inside = jax.nn.one_hot(position, window)
        logits += jnp.einsum("biw,hwv,bjv->bhij", inside, bias, inside)
    return jax.nn.softmax(logits) @ value
