"""Softmax attention with a bias on square windows of its logits, and its gradient.

Features are `[H, D, B, L]`: heads, channels of a head, batch, samples. With 4 channels a head the work is not in the
products but in the maps `[H, B, K, Q]`, keys by queries. On a CPU a logit is four products of vectors, done once for
the highest and once more on the way to the exponential, so that only the weights are ever written. The division by
their sum is done on the features.

The maps of the logits, their exponentials and sums are float32; products are of the features' dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.models.product import for_cpu

# On a CPU, memory above the allocator's limit of 32 MB comes anew from the system for every batch, its pages to be
# cleared first, and maps that fit the cache are read from there. Smaller pieces than this bring nothing more.
_PIECE_BYTES = 2**23
_MOST_BIAS = 69  # makes a weight 1e30 times as large; sums of such are float32 yet
# 2^x for |x| up to a half, highest power first, within 7.5e-8 of its value: the least for this degree, by Lawson's
# algorithm (least squares over and over, each time weighted by the error that was left).
_EXP2 = [np.float32(x) for x in (0.0013276472, 0.0096755413, 0.055507133, 0.2402212, 0.69314697, 1.00000007)]
_LEAST_EXPONENT = np.float32(-87)  # exp of less is not a normal float32
_ROUNDING = np.float32(1.5 * 2**23)  # a sum with it is a whole number, in the lowest bits
_SUMMED_ONE_BY_ONE = 32  # examples, at most: more would be a long program


def attend(query, key, value, bias=None, start=None, inside=None):
    """Softmax attention with a bias on square windows of its logits.

    Args:
        query: `[H, D, B, L]`, scaled already.
        key: `[H, D, B, L]`.
        value: `[H, D, B, L]`.
        bias: float32 `[H, W, W]`, keys by queries, added to the logits inside the one window that stands at the same
            place in every example; or `[H, L, L]`, of which each example takes what is inside its own windows; None for
            no bias. It counts up to 69 either way.
        start: first sample of the one window, an int; what hangs over an edge is cut.
        inside: int32 `[B, L]`, which windows each sample is in, a bit for each.

    Returns:
        `[H, D, B, L]`.
    """
    length, low = query.shape[3], 0
    if bias is not None and inside is None:
        low, high = max(start, 0), min(start + bias.shape[1], length)
        bias = bias[:, low - start : high - start, low - start : high - start] if low < high else None
    return _attend(query, key, value, bias, inside, low)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, bias, inside, low):
    """Attention with a bias `[H, W, W]` of which the first key and query are sample `low`; or None."""
    pieces = _pieces(query)
    if pieces == 1:
        return _forward(query, key, value, bias, inside, low, _exp)[0]
    forward = lambda inside, *piece: _forward(*piece, bias, inside, low, _exp)[0]  # noqa: E731
    return _join(_map_pieces(forward, pieces, inside, query, key, value))


def _attend_forward(query, key, value, bias, inside, low):
    if _pieces(query) == 1:
        return _forward(query, key, value, bias, inside, low)
    return _attend(query, key, value, bias, inside, low), (query, key, value, bias, inside)


def _attend_backward(low, residuals, d_out):
    if len(residuals) > 5:
        return *_backward(residuals, low, d_out), None
    # Maps in pieces are not kept: to compute them again costs less than the memory.
    query, key, value, bias, inside = residuals

    def backward(inside, d_out, *piece):
        return _backward(_forward(*piece, bias, inside, low)[1], low, d_out)

    *gradients, d_bias = _map_pieces(backward, _pieces(query), inside, d_out, query, key, value)
    return *map(_join, gradients), None if bias is None else d_bias.sum(0), None


_attend.defvjp(_attend_forward, _attend_backward)


def _pieces(query):
    """Into how many pieces the batch is cut."""
    heads, _, batch, length = query.shape
    if not for_cpu(batch):
        return 1
    fit = max(_PIECE_BYTES // max(4 * heads * length**2, 1), 1)
    return next(pieces for pieces in range(1, batch + 1) if batch % pieces == 0 and batch // pieces <= fit)


def _map_pieces(function, pieces, inside, *features):
    """Maps a function of features `[H, D, B, L]` and of `inside` over pieces of the batch, one after the other."""

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, -1, x.shape[3]), 2, 0)

    def of_piece(arrays):
        # XLA would look a piece up among all at every use, and that not in vectors; joined it is an array of its own.
        sizes = np.cumsum([x.shape[1] for x in arrays])[:-1]
        arrays = jnp.split(jax.lax.optimization_barrier(jnp.concatenate(arrays, 1)), sizes, 1)
        bits = None if inside is None else jax.lax.bitcast_convert_type(arrays.pop()[0, 0], jnp.int32)
        return function(bits, *(x.astype(features[0].dtype) for x in arrays))

    arrays = [x.astype(jnp.float32) for x in features]
    if inside is not None:
        bits = jax.lax.bitcast_convert_type(inside, jnp.float32)
        arrays.append(jnp.broadcast_to(bits, (len(arrays[0]), 1, *bits.shape)))
    return jax.lax.map(of_piece, [cut(x) for x in arrays])


def _join(pieces):
    """Puts mapped pieces `[pieces, H, D, B, L]` together."""
    return jnp.moveaxis(pieces, 0, 2).reshape(*pieces.shape[1:3], -1, pieces.shape[4])


def _forward(query, key, value, bias, inside, low, exp=jnp.exp):
    logits = _logits(key, query)[0] - _highest(key, query)
    if inside is not None:
        logits += jnp.where(_together(inside), _kept(bias)[:, None], 0.0)
    elif bias is not None:
        beside = low, query.shape[3] - low - bias.shape[1], 0
        logits += _kept(jax.lax.pad(bias, 0.0, [(0, 0, 0), beside, beside]))[:, None]
    weights = exp(_apart(logits)).astype(value.dtype)
    sums = _product(_examples_first(jnp.concatenate([value, jnp.ones_like(value[:, :1])], 1)), weights)
    scale = 1 / sums[:, :, -1]
    out = (jnp.swapaxes(sums[:, :, :-1], 1, 2) * scale[:, None]).astype(value.dtype)
    return out, (query, key, value, bias, inside, weights, scale, out)


def _logits(left, right, parts=1):
    """`[H, D, B, M]`, `[H, D, B, N]` → their products `[H, B, M / parts, N]`, one for each part of the left samples."""
    if not for_cpu(left.shape[2]):
        return [_product(_channels_last(part), _examples_first(right)) for part in jnp.split(left, parts, 3)]
    left, right = (
        [jax.lax.index_in_dim(x.astype(jnp.float32), i, 1, keepdims=False) for i in range(x.shape[1])]
        for x in (left, right)
    )
    shape = *left[0].shape[:2], left[0].shape[2] // parts, right[0].shape[2]
    columns = [jax.lax.broadcast_in_dim(channel, shape, (0, 1, 3)) for channel in right]

    def product(first):
        rows = (jax.lax.slice_in_dim(channel, first, first + shape[2], axis=2) for channel in left)
        rows = (jax.lax.broadcast_in_dim(row, shape, (0, 1, 2)) for row in rows)
        return functools.reduce(jax.lax.add, map(jax.lax.mul, rows, columns))

    return [product(part * shape[2]) for part in range(parts)]


def _highest(key, query):
    """The highest logit of each query, `[H, B, 1, Q]`: of every four keys first, so that a quarter is written."""
    parts = next(parts for parts in (4, 2, 1) if key.shape[3] % parts == 0)
    return _apart(_apart(functools.reduce(jnp.maximum, _logits(key, query, parts))).max(2, keepdims=True))


def _exp(x):
    """Exponentials of numbers `[H, B, …]` up to 88, for one user.

    On a CPU: 2 to the nearest whole power, which are bits, times a polynomial of the rest. XLA's own takes twice the
    instructions, half of them to move constants for which there are no registers. But what XLA believes to be cheap, as
    this, it makes anew for every user.
    """
    if not for_cpu(x.shape[1]):
        return jnp.exp(x)
    power = jnp.maximum(x, _LEAST_EXPONENT) * np.float32(np.log2(np.e))
    whole = jax.lax.bitcast_convert_type(power + _ROUNDING, jnp.int32) - _ROUNDING.view(np.int32)
    rest = power - whole.astype(jnp.float32)
    y = functools.reduce(lambda y, factor: y * rest + factor, _EXP2)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(y, jnp.int32) + (whole << 23), jnp.float32)


def _kept(bias):
    """The bias as an array of its own: XLA makes what is cheap anew for every logit, but joins arrays only once."""
    bias = jax.lax.clamp(np.float32(-_MOST_BIAS), bias, np.float32(_MOST_BIAS))
    return jnp.concatenate(jax.lax.optimization_barrier((bias[:, :1], bias[:, 1:])), 1)


def _apart(x):
    """x `[H, B, …]`, behind something that XLA's library for products and sums on a CPU does not take.

    It would compute the maps too if it could, and slower.
    """
    most = np.finfo(np.float32).max
    return jax.lax.clamp(-most, x, most) if for_cpu(x.shape[1]) else x


def _product(left, right):
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _together(inside):
    """Which samples are in the same window: `[B, L]` → `[B, L, L]`."""
    return (inside[:, :, None] & inside[:, None]) != 0


def _backward(residuals, low, d_out):
    query, key, value, bias, inside, weights, scale, out = residuals
    d_sum = d_out * scale[:, None]
    shift = _apart((d_sum * out).sum(1))
    d_sum = d_sum.astype(value.dtype)
    d_logits = _apart(weights * (_logits(value, d_sum)[0] - shift[:, :, None]))
    factor = d_logits.astype(value.dtype)
    d_query = jnp.swapaxes(_examples_first(key) @ factor, 1, 2)
    d_key = _channels_second(factor @ _channels_last(query))
    d_value = _channels_second(weights @ _channels_last(d_sum))
    return d_query, d_key, d_value, None if bias is None else _summed_over_batch(d_logits, bias.shape[1], inside, low)


def _summed_over_batch(d_logits, width, inside, low):
    """The gradient of a bias from that of the logits `[H, B, K, Q]`."""
    batch = d_logits.shape[1]
    if inside is None:
        return d_logits[:, :, low : low + width, low : low + width].sum(1)
    if not isinstance(batch, int) or batch > _SUMMED_ONE_BY_ONE:
        return jnp.where(_together(inside), d_logits, 0.0).sum(1)
    # One sum of many terms in a single pass; a reduction over this axis takes three times as long on CPU.
    return sum(jnp.where(_together(inside[i : i + 1])[0], d_logits[:, i], 0.0) for i in range(batch))


def _examples_first(x):
    """`[H, D, B, L]` → `[H, B, D, L]`."""
    return jnp.swapaxes(x, 1, 2)


def _channels_last(x):
    """`[H, D, B, L]` → `[H, B, L, D]`, as an array of its own.

    XLA would fold the transpose into the product after it, and on CPU a product with its left side transposed takes up
    to 20 times as long; the same for the way back.
    """
    return jax.lax.optimization_barrier(jnp.moveaxis(jax.lax.optimization_barrier(x), 1, 3))


def _channels_second(x):
    """`[H, B, L, D]` → `[H, D, B, L]`."""
    return jnp.moveaxis(jax.lax.optimization_barrier(x), 3, 1)
