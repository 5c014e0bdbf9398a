"""Attention as kernels for NVIDIA GPUs, on what `gpu_kernels` has for all of them.

The maps are never written: with 4 channels a head a logit is four products, and to compute it again costs less than to
read it. Tested against the plain form, in `attention`.
"""

import functools

import jax
import jax.numpy as jnp

from ralenet_jax.models import gpu_kernels

_PLENTY = 2**18  # samples of all heads; then there are more programs than the device runs at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(features, offset, bias, inside, start):
    """Softmax attention with a bias on square windows of its logits.

    Args:
        features: `[3, H, D, B, L]`: query, key and value; the query is not scaled yet.
        offset: float32 `[3, H, D]`, to be added to the features.
        bias: float32 `[H, W, W]`, queries by keys, of the one window, or `[H, L, L]` with `inside`; None for none.
        inside: int32 `[B, L]`, which windows each sample is in, a bit for each; None for one window or none.
        start: first sample of the one window, all of which is inside.

    Returns:
        `[H, D, B, L]`.
    """
    return _attend_forward(features, offset, bias, inside, start)[0]


def _attend_forward(features, offset, bias, inside, start):
    """A thread has a few queries and goes through the keys: no sum is over several threads."""
    _, heads, dim, batch, length = features.shape
    grid, tile = _share(heads, batch, length)

    def kernel(features, offset, *refs):
        window, (out, log_sum) = _Window.of(refs, bias, inside, start, length)
        rows = _rows(tile)
        queries = _queries(features, offset, rows)

        def logits(key, on_map):
            return _plus(
                gpu_kernels.total(query * _scalar(features, 1, i, key) for i, query in enumerate(queries)), on_map
            )

        highest = window.loop(
            rows, lambda key, on_map, highest: jnp.maximum(highest, logits(key, on_map)), jnp.full(tile, -jnp.inf)
        )

        def add(key, on_map, sums):
            weights = jnp.exp(logits(key, on_map) - highest)
            total, *outs = sums
            return total + weights, *(out + weights * _scalar(features, 2, i, key) for i, out in enumerate(outs))

        total, *outs = window.loop(rows, add, (jnp.zeros(tile, jnp.float32),) * (dim + 1))
        for i, value in enumerate(outs):
            out[i, rows] = (value / total + offset[2, i]).astype(out.dtype)
        log_sum[rows] = highest + jnp.log(total)

    inputs = [_features(dim, length), _offset(dim), *_window_specs(bias, inside)]
    shapes = [((heads, dim, batch, length), features.dtype), ((heads, batch, length), jnp.float32)]
    outputs = [_out(dim, length), _per_query(length)]
    arrays = [features, offset, *_window_arrays(bias, inside)]
    out, log_sum = gpu_kernels.call(kernel, grid, inputs, shapes, outputs, 1)(*arrays)
    return out, (features, offset, bias, inside, out, log_sum)


def _attend_backward(start, residuals, d_out):
    """A thread has a few samples: as queries it goes through the keys, as keys through the queries."""
    features, offset, bias, inside, out, log_sum = residuals
    _, heads, dim, batch, length = features.shape
    grid, tile = _share(heads, batch, length)
    scale = dim**-0.5

    def kernel(features, offset, out, log_sum, d_out, *refs):
        window, (d_features, d_offset, *d_bias) = _Window.of(refs, bias, inside, start, length)
        rows = _rows(tile)

        def store(which, sums):
            for i, d in enumerate(sums):
                d_features[which, i, rows] = d.astype(d_features.dtype)
                d_offset[which, i] = d.sum()

        zeros = (jnp.zeros(tile, jnp.float32),) * dim
        queries = _queries(features, offset, rows)
        log_sums = log_sum[rows]
        d_outs = [d_out[i, rows].astype(jnp.float32) for i in range(dim)]
        # The values' offset is in `out` and not in the values here.
        shift = gpu_kernels.total(d * (out[i, rows].astype(jnp.float32) - offset[2, i]) for i, d in enumerate(d_outs))

        def through_keys(key, on_map, sums):
            keys = [_scalar(features, 1, i, key) for i in range(dim)]
            logits = _plus(gpu_kernels.total(query * k for query, k in zip(queries, keys, strict=True)), on_map)
            d_weights = gpu_kernels.total(d * _scalar(features, 2, i, key) for i, d in enumerate(d_outs))
            d_logits = jnp.exp(logits - log_sums) * (d_weights - shift)
            if on_map is not None:
                window.store(d_bias, key, rows, d_logits)
            return tuple(d + d_logits * k for d, k in zip(sums, keys, strict=True))

        store(0, [d * scale for d in window.loop(rows, through_keys, zeros)])
        keys = [features[1, i, rows].astype(jnp.float32) for i in range(dim)]
        values = [features[2, i, rows].astype(jnp.float32) for i in range(dim)]

        def through_queries(query, on_map, sums):
            queries = [(_scalar(features, 0, i, query) + offset[0, i]) * scale for i in range(dim)]
            d_outs = [d_out[i, query].astype(jnp.float32) for i in range(dim)]
            shift = gpu_kernels.total(
                d * (out[i, query].astype(jnp.float32) - offset[2, i]) for i, d in enumerate(d_outs)
            )
            logits = _plus(gpu_kernels.total(q * key for q, key in zip(queries, keys, strict=True)), on_map)
            weights = jnp.exp(logits - log_sum[query])
            d_weights = gpu_kernels.total(d * value for d, value in zip(d_outs, values, strict=True))
            d_logits = weights * (d_weights - shift)
            d_keys = (d + d_logits * q for d, q in zip(sums[:dim], queries, strict=True))
            return *d_keys, *(d + weights * d_o for d, d_o in zip(sums[dim:], d_outs, strict=True))

        sums = window.transposed().loop(rows, through_queries, zeros + zeros)
        store(1, sums[:dim])
        store(2, sums[dim:])

    inputs = [_features(dim, length), _offset(dim), _out(dim, length), _per_query(length), _out(dim, length)]
    tiles = grid[2]
    shapes = [(features.shape, features.dtype), ((batch * tiles, *offset.shape), jnp.float32)]
    outputs = [_features(dim, length), ((None, 3, None, dim), lambda h, b, t: (b * tiles + t, 0, h, 0))]
    if bias is not None:
        shapes.append(((batch, *bias.shape), jnp.float32))
        outputs.append(((None, None, *bias.shape[1:]), lambda h, b, t: (b, h, 0, 0)))
    arrays = [features, offset, out, log_sum, d_out, *_window_arrays(bias, inside)]
    inputs += _window_specs(bias, inside)
    d_features, d_offset, *d_bias = gpu_kernels.call(kernel, grid, inputs, shapes, outputs, 1)(*arrays)
    d_bias = jnp.swapaxes(d_bias[0].sum(0), 1, 2) if d_bias else None
    return d_features, d_offset.sum(0), d_bias, None


attend.defvjp(_attend_forward, _attend_backward)


def _share(heads, batch, length):
    """The grid, and the samples of a program of one warp: one for each thread, four where there are plenty."""
    samples = 4 * gpu_kernels.WARP if heads * batch * length >= _PLENTY else gpu_kernels.WARP
    tile = min(length, samples)
    return (heads, batch, length // tile), tile


def _rows(tile):
    pl, _ = gpu_kernels.pallas()
    return pl.ds(pl.program_id(2) * tile, tile)


def _plus(logits, on_map):
    return logits if on_map is None else logits + on_map


def _scalar(features, which, channel, at):
    return features[which, channel, at].astype(jnp.float32)


def _queries(features, offset, rows):
    """Scaled, a vector for each channel; the keys' offset adds the same to all logits of a query and is left out."""
    dim = features.shape[1]
    return [(features[0, i, rows].astype(jnp.float32) + offset[0, i]) * dim**-0.5 for i in range(dim)]


class _Window:
    """The bias in a kernel: `bias` and its transpose, `inside`, and where the one window starts."""

    @classmethod
    def of(cls, refs, bias, inside, start, length):
        """Takes the references off the list of all, in the order of `_window_arrays`; gives the others too."""
        refs = list(refs)
        window = cls()
        window._turned, window._bias = (refs.pop(0), refs.pop(0)) if bias is not None else (None, None)
        window._inside = refs.pop(0) if inside is not None else None
        window._length = length
        window._span = (0, 0) if bias is None else (0, length) if inside is not None else (start, start + bias.shape[1])
        return window, refs

    def transposed(self):
        """The same, with queries for keys."""
        window = _Window()
        vars(window).update(vars(self), _turned=self._bias, _bias=self._turned)
        return window

    def loop(self, rows, body, carry):
        """Calls `body(key, what is added to the logits, carry)` for every key; the bias costs only where it counts."""
        low, high = self._span
        carry = _loop(0, low, lambda key, carry: body(key, None, carry), carry)
        carry = _loop(low, high, lambda key, carry: body(key, self._on_map(key, rows), carry), carry)
        return _loop(high, self._length, lambda key, carry: body(key, None, carry), carry)

    def _within(self, key, rows):
        """Whether the queries and the key are in one window, and the queries' places in the bias."""
        start, end = self._span
        place = jax.lax.iota(jnp.int32, rows.size) + rows.start
        if self._inside is not None:
            return (self._inside[rows] & self._inside[key]) != 0, place
        within = (place >= start) & (place < end)
        return within, jnp.where(within, place - start, end - start)

    def _on_map(self, key, rows):
        _, triton = gpu_kernels.pallas()
        within, place = self._within(key, rows)
        return triton.load(self._turned.at[key - self._span[0], place], mask=within, other=0.0)

    def store(self, d_bias, key, rows, d_logits):
        """Writes what of the gradient of some queries' logits belongs to the bias, its transpose."""
        if not d_bias:
            return
        _, triton = gpu_kernels.pallas()
        within, place = self._within(key, rows)
        if self._inside is not None:
            d_bias[0][key, rows] = jnp.where(within, d_logits, 0.0)
        else:
            triton.store(d_bias[0].at[key - self._span[0], place], d_logits, mask=within)


def _loop(low, high, body, carry):
    """Calls `body(i, carry)`, several times in a turn."""
    turn = next(n for n in (2, 1) if (high - low) % n == 0)

    def several(number, carry):
        for i in range(turn):
            carry = body(low + number * turn + i, carry)
        return carry

    return jax.lax.fori_loop(0, (high - low) // turn, several, carry) if high > low else carry


def _features(dim, length):
    return (3, None, dim, None, length), lambda h, b, t: (0, h, 0, b, 0)


def _offset(dim):
    return (3, None, dim), lambda h, b, t: (0, h, 0)


def _out(dim, length):
    return (None, dim, None, length), lambda h, b, t: (h, 0, b, 0)


def _per_query(length):
    return (None, None, length), lambda h, b, t: (h, b, 0)


def _window_arrays(bias, inside):
    arrays = [] if bias is None else [jnp.swapaxes(bias, 1, 2), bias]
    return arrays if inside is None else [*arrays, inside]


def _window_specs(bias, inside):
    specs = [] if bias is None else [((None, *bias.shape[1:]), lambda h, b, t: (h, 0, 0))] * 2
    return specs if inside is None else [*specs, ((None, inside.shape[1]), lambda h, b, t: (b, 0))]
