"""Softmax attention with a bias on a square window of its logits, and its gradient.

Features are `[H, B, D, L]`: heads, batch, channels of a head, samples. With 4 channels a head the work is not in the
products but in the maps `[H, B, L, L]`: each is written once, the division by the sum of the weights is done on the
features. Adding a bias to a whole map would cost as much as the softmax, so the few queries inside the window have a
map of their own, and only that one gets the bias.

The maps of the logits, their exponentials and sums are float32; products are of the features' dtype.
"""

import jax
import jax.numpy as jnp

# On a CPU, memory above the allocator's limit of 32 MB comes anew from the system for every batch, its pages to be
# cleared first, and maps that fit the cache are read from there. Smaller pieces than this lose by their own cost.
_PIECE_BYTES = 2**23
_SUMMED_ONE_BY_ONE = 32  # examples, at most: more would be a long program


def attend(query, key, value, bias=None, start=None, inside=None):
    """Softmax attention with a bias on square windows of its logits.

    Args:
        query: `[H, B, D, L]`, scaled already.
        key: `[H, B, D, L]`.
        value: `[H, B, D, L]`.
        bias: float32 `[H, W, W]`, added to the logits of the queries and keys inside the one window that stands at the
            same place in every example; or `[H, L, L]`, of which each example takes what is inside its own windows;
            None for no bias.
        start: first sample of the one window, an int; what hangs over an edge is cut.
        inside: int32 `[B, L]`, which windows each sample is in, a bit for each.

    Returns:
        `[H, B, D, L]`.
    """
    if bias is None:
        return _attend(query, key, value, None, None)
    if inside is not None:
        return _attend(query, key, value, bias[:, None], inside[None])
    return _attend_around(query, key, value, bias, start)


def _attend_around(query, key, value, bias, start):
    """The window stands at the same place in every example."""
    length, window = query.shape[3], bias.shape[1]
    low, high = max(start, 0), max(min(start + window, length), 0)
    if low >= high:
        return _attend(query, key, value, None, None)
    bias = bias[:, low - start : high - start, low - start : high - start]
    # Behind the barrier the bias stays one map for the whole batch; XLA would write a copy for each example.
    bias = jax.lax.optimization_barrier(
        jax.lax.pad(bias, 0.0, [(0, 0, 0), (0, 0, 0), (low, length - high, 0)])[:, None]
    )
    outside = _attend(jnp.concatenate([query[..., :low], query[..., high:]], 3), key, value, None, None)
    middle = _attend(query[..., low:high], key, value, bias, None)
    return jnp.concatenate([outside[..., :low], middle, outside[..., low:]], 3)


@jax.custom_vjp
def _attend(query, key, value, bias, inside):
    """Attention of queries `[H, B, D, Q]` to keys and values `[H, B, D, L]`.

    The bias is `[H, 1, Q, L]` or None; with `inside` `[1, B, L]` (then Q is L) it counts where a query and a key are in
    the same window.
    """
    pieces = _pieces(query, key)
    if pieces == 1:
        return _forward(query, key, value, bias, inside)[0]
    out = _map_pieces(lambda *piece: _forward(*piece)[0], pieces, query, key, value, bias, inside)
    return _join(out, query)


def _attend_forward(query, key, value, bias, inside):
    if _pieces(query, key) == 1:
        return _forward(query, key, value, bias, inside)
    return _attend(query, key, value, bias, inside), (query, key, value, bias, inside)


def _attend_backward(residuals, d_out):
    if len(residuals) > 5:
        return *_backward(residuals, d_out), None
    # Maps in pieces are not kept: to compute them again costs less than the memory.
    pieces = _pieces(*residuals[:2])
    gradients = _map_pieces(lambda d, *piece: _backward(_forward(*piece)[1], d), pieces, d_out, *residuals)
    return *jax.tree.map(_join, gradients, residuals[:4]), None


_attend.defvjp(_attend_forward, _attend_backward)


def _pieces(query, key):
    """Into how many pieces the batch is cut; a batch of any size, as in an exported program, is not."""
    heads, batch, _, queries = query.shape
    if jax.default_backend() != "cpu" or not isinstance(batch, int):
        return 1
    fit = max(_PIECE_BYTES // max(4 * heads * queries * key.shape[3], 1), 1)
    return next(pieces for pieces in range(1, batch + 1) if batch % pieces == 0 and batch // pieces <= fit)


def _map_pieces(function, pieces, *arrays):
    """Maps a function over pieces of the batch, one after the other; what has a batch of 1 goes into all."""

    def cut(x):
        if x.shape[1] == 1:
            return jnp.broadcast_to(x, (pieces, *x.shape))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0)

    return jax.lax.map(lambda piece: function(*piece), jax.tree.map(cut, arrays))


def _join(pieces, whole):
    """Puts mapped pieces together to the shape of `whole`; what went into all is summed."""
    return pieces.sum(0) if whole.shape[1] == 1 else jnp.moveaxis(pieces, 0, 1).reshape(whole.shape)


def _forward(query, key, value, bias, inside):
    logits = _product(_transpose(query), key)
    if bias is not None:
        logits += _where_inside(bias, inside)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    scale = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(value.dtype)
    out = _transpose((_product(weights, _transpose(value)) * scale).astype(value.dtype))
    return out, (query, key, value, bias, inside, weights, _transpose(scale), out)


def _product(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _where_inside(x, inside):
    """What of `x` `[H, 1 or B, Q, L]` belongs to queries and keys that are in the same window; all without `inside`."""
    if inside is None:
        return x
    return jnp.where((inside[..., None] & inside[:, :, None]) != 0, x, 0.0)


def _backward(residuals, d_out):
    query, key, value, bias, inside, weights, scale, out = residuals
    d_sum = d_out * scale
    d_sum_factor = d_sum.astype(value.dtype)
    d_value = d_sum_factor @ weights
    shift = (d_sum * out).sum(2)[..., None]
    d_logits = weights * (_product(_transpose(d_sum_factor), value) - shift)
    d_logits_factor = d_logits.astype(value.dtype)
    d_query = _transpose(d_logits_factor @ _transpose(key))
    d_key = query @ d_logits_factor
    return d_query, d_key, d_value, None if bias is None else _summed_over_batch(d_logits, inside)


def _summed_over_batch(d_logits, inside):
    """The gradient of a bias `[H, 1, Q, L]` from that of the logits `[H, B, Q, L]`."""
    batch = d_logits.shape[1]
    if inside is None or not isinstance(batch, int) or batch > _SUMMED_ONE_BY_ONE:
        return _where_inside(d_logits, inside).sum(1, keepdims=True)
    # One sum of many terms in a single pass; a reduction over this axis takes three times as long on CPU.
    return sum(_where_inside(d_logits[:, i : i + 1], inside[:, i : i + 1]) for i in range(batch))


def _transpose(x):
    """`[H, B, M, N]` → `[H, B, N, M]`, as an array of its own.

    XLA would fold the transpose into the product before or after it, and on CPU a product with its left side
    transposed takes up to 20 times as long.
    """
    return jax.lax.optimization_barrier(jnp.swapaxes(jax.lax.optimization_barrier(x), 2, 3))
