"""Softmax attention with a bias on a square window of its logits, and its gradient.

Features are `[H, B, D, L]`: heads, batch, channels of a head, samples. With 4 channels a head the work is not in the
products but in the maps `[H, B, L, L]`: each is written once, the division by the sum of the weights is done on the
features, and the bias is differentiated on its window alone.
"""

import functools

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
    if bias is None or isinstance(start, int):
        return _attend(query, key, value, bias, None, start)
    return _attend(query, key, value, bias, start, None)


# The window stands at `starts` [B] or at `start`, an int: two arguments because only one of them is traced.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, bias, starts, start):
    return _forward(query, key, value, bias, starts, start)[0]


def _forward(query, key, value, bias, starts, start):
    logits = _transpose(query) @ key
    if bias is not None:
        # Behind the barrier the bias stays one map for the whole batch; XLA would write a copy for each example.
        logits += jax.lax.optimization_barrier(_spread(bias, starts, start, length=logits.shape[-1]))
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    scale = 1 / weights.sum(-1, keepdims=True)
    out = _transpose((weights @ _transpose(value)) * scale)
    return out, (query, key, value, bias, starts, weights, _transpose(scale), out)


def _backward(start, residuals, d_out):
    query, key, value, bias, starts, weights, scale, out = residuals
    d_sum = d_out * scale
    d_value = d_sum @ weights
    shift = (d_sum * out).sum(2)[..., None]
    d_logits = weights * (_transpose(d_sum) @ value - shift)
    d_query = _transpose(d_logits @ _transpose(key))
    d_key = query @ d_logits
    d_bias = None if bias is None else _gather(d_logits, starts, start, window=bias.shape[1])
    return d_query, d_key, d_value, d_bias, None


_attend.defvjp(_forward, _backward)


def _transpose(x):
    """`[H, B, M, N]` → `[H, B, N, M]`, as an array of its own.

    XLA would fold the transpose into the product before or after it, and on CPU a product with its left side
    transposed takes up to 20 times as long.
    """
    return jax.lax.optimization_barrier(jnp.swapaxes(jax.lax.optimization_barrier(x), 2, 3))


def _spread(bias, starts, start, length):
    """The bias `[H, W, W]` on the map of all logits, zero elsewhere: `[H, 1 or B, L, L]`."""
    window = bias.shape[1]
    if starts is None:
        first, end = _cut(start, window, length)
        margin = (start + first, length - start - end, 0)
        return jax.lax.pad(bias[:, first:end, first:end], 0.0, [(0, 0, 0), margin, margin])[:, None]
    inside = _inside(starts, window, length)
    return jnp.einsum("biw,hwv,bjv->hbij", inside, bias, inside)


def _gather(d_logits, starts, start, window):
    """The gradient of the bias `[H, W, W]` from that of the logits `[H, B, L, L]`: what `_spread` did, backwards."""
    length = d_logits.shape[-1]
    if starts is None:
        first, end = _cut(start, window, length)
        seen = slice(start + first, start + end)
        outside = (first, window - end)
        return jnp.pad(d_logits[:, :, seen, seen].sum(1), ((0, 0), outside, outside))
    inside = _inside(starts, window, length)
    return jnp.einsum("biw,hbij,bjv->hwv", inside, d_logits, inside)


def _cut(start, window, length):
    """The places of the window that lie on samples: the first, and one past the last."""
    first = min(max(-start, 0), window)
    return first, max(min(length - start, window), first)


def _inside(starts, window, length):
    """Which place of its window each sample has, one-hot: `[B, L, W]`."""
    return jax.nn.one_hot(jnp.arange(length)[None] - starts[:, None], window)
