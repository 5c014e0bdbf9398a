"""Softmax attention with a bias on a square window of its logits, and its gradient.

Features are `[H, B, D, L]`: heads, batch, channels of a head, samples. With 4 channels a head the work is not in the
products but in the maps `[H, B, L, L]`: each is written once, the division by the sum of the weights is done on the
features. Adding a bias to a whole map would cost as much as the softmax, so the few queries inside the window have a
map of their own, and only that one gets the bias.
"""

import jax
import jax.numpy as jnp


def attend(query, key, value, bias=None, start=None):
    """Softmax attention with a bias on a square window of its logits.

    Args:
        query: `[H, B, D, L]`, scaled already.
        key: `[H, B, D, L]`.
        value: `[H, B, D, L]`.
        bias: `[H, W, W]`, added to the logits of the queries and keys inside the window; None for no bias.
        start: first sample of the window, an int or int32 `[B]`; what hangs over an edge is cut.

    Returns:
        `[H, B, D, L]`.
    """
    if bias is None:
        return _attend(query, key, value, None)
    if isinstance(start, int):
        return _attend_around(query, key, value, bias, start)
    return _attend_around_each(query, key, value, bias, start)


def _attend_around(query, key, value, bias, start):
    """The window stands at the same place in every example."""
    length, window = query.shape[3], bias.shape[1]
    low, high = max(start, 0), max(min(start + window, length), 0)
    if low >= high:
        return _attend(query, key, value, None)
    bias = bias[:, low - start : high - start, low - start : high - start]
    # Behind the barrier the bias stays one map for the whole batch; XLA would write a copy for each example.
    bias = jax.lax.optimization_barrier(
        jax.lax.pad(bias, 0.0, [(0, 0, 0), (0, 0, 0), (low, length - high, 0)])[:, None]
    )
    outside = _attend(jnp.concatenate([query[..., :low], query[..., high:]], 3), key, value, None)
    inside = _attend(query[..., low:high], key, value, bias)
    return jnp.concatenate([outside[..., :low], inside, outside[..., low:]], 3)


def _attend_around_each(query, key, value, bias, starts):
    """Every example has its window at another place, `starts` `[B]`."""
    length, window = query.shape[3], bias.shape[1]
    place = jnp.arange(length)[None] - starts[:, None]  # of every sample in the window of its example, [B, L]
    inside = (place >= 0) & (place < window)

    def take(x, index):
        return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[3] - 1)[None, :, None], 3)

    bias = jnp.where(inside[None, :, None], take(bias[:, None], place), 0.0)  # [H, B, W, L]
    queries = take(query, starts[:, None] + jnp.arange(window)[None])
    out = take(_attend(queries, key, value, bias), place)
    return jnp.where(inside[None, :, None], out, _attend(query, key, value, None))


@jax.custom_vjp
def _attend(query, key, value, bias):
    """Attention of queries `[H, B, D, Q]` to keys and values `[H, B, D, L]`; bias `[H, 1 or B, Q, L]` or None."""
    return _forward(query, key, value, bias)[0]


def _forward(query, key, value, bias):
    logits = _transpose(query) @ key
    if bias is not None:
        logits += bias
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    scale = 1 / weights.sum(-1, keepdims=True)
    out = _transpose((weights @ _transpose(value)) * scale)
    return out, (query, key, value, bias, weights, _transpose(scale), out)


def _backward(residuals, d_out):
    query, key, value, bias, weights, scale, out = residuals
    d_sum = d_out * scale
    d_value = d_sum @ weights
    shift = (d_sum * out).sum(2)[..., None]
    d_logits = weights * (_transpose(d_sum) @ value - shift)
    d_query = _transpose(d_logits @ _transpose(key))
    d_key = query @ d_logits
    shared = bias is not None and bias.shape[1] < d_logits.shape[1]
    d_bias = None if bias is None else d_logits.sum(1, keepdims=True) if shared else d_logits
    return d_query, d_key, d_value, d_bias


_attend.defvjp(_forward, _backward)


def _transpose(x):
    """`[H, B, M, N]` → `[H, B, N, M]`, as an array of its own.

    XLA would fold the transpose into the product before or after it, and on CPU a product with its left side
    transposed takes up to 20 times as long.
    """
    return jax.lax.optimization_barrier(jnp.swapaxes(jax.lax.optimization_barrier(x), 2, 3))
