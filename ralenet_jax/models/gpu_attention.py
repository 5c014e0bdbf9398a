"""Attention as kernels for NVIDIA GPUs, on what `gpu_kernels` has for all of them.

The maps are never written: with 4 channels a head a logit is four products, and to compute it again costs less than to
read it. Tested against the plain form, in `attention`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.models import gpu_kernels

_PLENTY = 2**18  # samples of all heads; then there are more programs than the device runs at a time
# Samples of a program, which is one warp, and those it goes through at a time: a thread has four weights at a time, so
# that it need not wait for each.
_FEW, _MANY = (32, 4), (64, 2)
_LOG2_E = np.float32(np.log2(np.e))


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
    """A thread has a query or two and goes through the keys, some at a time: no sum is over several threads."""
    _, heads, dim, batch, length = features.shape
    tiles, tile, some = _share(heads, batch, length)

    def kernel(features, offset, *refs):
        window, (out, log_sum) = _Window.of(refs, bias, inside, start, length, some)
        rows = _rows(0, tile)
        queries = _across(_queries(features, offset, rows))

        def logits(keys, on_map):
            return _plus(_product(queries, _down(_samples(features, 1, keys))), on_map)

        highest = window.loop(
            rows,
            lambda keys, on_map, highest: jnp.maximum(highest, logits(keys, on_map)),
            jnp.full((some, tile), -jnp.inf),
        ).max(0)

        def add(keys, on_map, sums):
            weights = gpu_kernels.exp2(logits(keys, on_map) - highest[None])
            total, *outs = sums
            return total + weights, *_added(outs, weights, _down(_samples(features, 2, keys)))

        sums = window.loop(rows, add, (jnp.zeros((some, tile), jnp.float32),) * (dim + 1))
        total, *outs = (part.sum(0) for part in sums)
        for i, value in enumerate(outs):
            out[i, rows] = (value / total + offset[2, i]).astype(out.dtype)
        log_sum[rows] = highest + jnp.log(total) * _LOG2_E

    inputs = [_features(dim, length), _offset(dim), *_window_specs(bias, inside)]
    shapes = [((heads, dim, batch, length), features.dtype), ((heads, batch, length), jnp.float32)]
    outputs = [_out(dim, length), _per_query(length)]
    arrays = [features, offset, *_window_arrays(bias, inside)]
    out, log_sum = gpu_kernels.call(kernel, (heads, batch, tiles), inputs, shapes, outputs, 1)(*arrays)
    return out, (features, offset, bias, inside, out, log_sum)


def _attend_backward(start, residuals, d_out):
    """A program has some samples: as queries that go through the keys or, another one, the other way round."""
    features, offset, bias, inside, out, log_sum = residuals
    _, heads, dim, batch, length = features.shape
    tiles, tile, some = _share(heads, batch, length)
    scale = dim**-0.5

    def kernel(features, offset, out, log_sum, d_out, *refs):
        pl, _ = gpu_kernels.pallas()
        window, (d_features, d_offset, *d_bias) = _Window.of(refs, bias, inside, start, length, some)
        zeros = (jnp.zeros((some, tile), jnp.float32),) * dim
        # Here, for inside a condition an interpreted program does not know its number.
        as_queries, rows_as_queries, rows_as_keys = pl.program_id(2) < tiles, _rows(0, tile), _rows(tiles, tile)

        def store(which, rows, sums):
            for i, d in enumerate(sums):
                d_features[which, i, rows] = d.astype(d_features.dtype)
                d_offset[which, i] = d.sum()

        def of_outputs(rows):
            """Their gradients, and what of them the weights' sum takes; the offset is in `out`, not in the values."""
            d_outs = [d_out[i, rows].astype(jnp.float32) for i in range(dim)]
            values = [out[i, rows].astype(jnp.float32) - offset[2, i] for i in range(dim)]
            return d_outs, _product(d_outs, values)

        @pl.when(as_queries)
        def _():
            rows = rows_as_queries
            queries, log_sums = _across(_queries(features, offset, rows)), log_sum[rows][None]
            d_outs, shift = of_outputs(rows)
            d_outs, shift = _across(d_outs), shift[None]

            def through_keys(keys, on_map, sums):
                columns = _down(_samples(features, 1, keys))
                weights = gpu_kernels.exp2(_plus(_product(queries, columns), on_map) - log_sums)
                d_logits = weights * (_product(d_outs, _down(_samples(features, 2, keys))) - shift)
                if on_map is not None:
                    window.store(d_bias, keys, rows, d_logits)
                return _added(sums, d_logits, columns)

            store(0, rows, [d.sum(0) * scale for d in window.loop(rows, through_keys, zeros)])

        @pl.when(~as_queries)
        def _():
            rows = rows_as_keys
            keys, values = (_across(_samples(features, which, rows)) for which in (1, 2))

            def through_queries(rows, on_map, sums):
                queries = _down(_queries(features, offset, rows))
                d_outs, shift = of_outputs(rows)
                d_outs = _down(d_outs)
                weights = gpu_kernels.exp2(_plus(_product(queries, keys), on_map) - log_sum[rows][:, None])
                d_logits = weights * (_product(d_outs, values) - shift[:, None])
                return *_added(sums[:dim], d_logits, queries), *_added(sums[dim:], weights, d_outs)

            sums = [d.sum(0) for d in window.transposed().loop(rows, through_queries, zeros + zeros)]
            store(1, rows, [d / _LOG2_E for d in sums[:dim]])
            store(2, rows, sums[dim:])

    inputs = [_features(dim, length), _offset(dim), _out(dim, length), _per_query(length), _out(dim, length)]
    shapes = [(features.shape, features.dtype), ((batch * tiles, *offset.shape), jnp.float32)]
    outputs = [_features(dim, length), ((None, 3, None, dim), lambda h, b, t: (b * tiles + t % tiles, 0, h, 0))]
    if bias is not None:
        shapes.append(((batch, *bias.shape), jnp.float32))
        outputs.append(((None, None, *bias.shape[1:]), lambda h, b, t: (b, h, 0, 0)))
    arrays = [features, offset, out, log_sum, d_out, *_window_arrays(bias, inside)]
    inputs += _window_specs(bias, inside)
    found = gpu_kernels.call(kernel, (heads, batch, 2 * tiles), inputs, shapes, outputs, 1)(*arrays)
    d_features, d_offset, *d_bias = found
    d_bias = jnp.swapaxes(d_bias[0].sum(0), 1, 2) if d_bias else None
    return d_features, d_offset.sum(0), d_bias, None


attend.defvjp(_attend_forward, _attend_backward)


def _share(heads, batch, length):
    """Programs for a head and an example; samples of each, and how many it goes through at a time."""
    tile, some = _MANY if heads * batch * length >= _PLENTY else _FEW
    tile = min(length, tile)
    return length // tile, tile, min(length, some)


def _rows(first, tile):
    """The samples of this program, of those from the `first` on."""
    pl, _ = gpu_kernels.pallas()
    return pl.ds((pl.program_id(2) - first) * tile, tile)


def _plus(logits, on_map):
    return logits if on_map is None else logits + on_map


def _product(left, right):
    """The sum of products, channel by channel."""
    first, *others = zip(left, right, strict=True)
    return functools.reduce(lambda total, pair: gpu_kernels.multiply_add(*pair, total), others, first[0] * first[1])


def _added(sums, weights, vectors):
    """The sums, a weighted vector added to each."""
    return tuple(gpu_kernels.multiply_add(weights, x, total) for total, x in zip(sums, vectors, strict=True))


def _across(vectors):
    return [vector[None] for vector in vectors]


def _down(vectors):
    return [vector[:, None] for vector in vectors]


def _samples(features, which, rows):
    """A vector for each channel."""
    return [features[which, i, rows].astype(jnp.float32) for i in range(features.shape[1])]


def _queries(features, offset, rows):
    """Scaled for powers of 2, a vector for each channel; the keys' offset, the same for all keys, is left out."""
    scale = features.shape[1] ** -0.5 * _LOG2_E
    return [(vector + offset[0, i]) * scale for i, vector in enumerate(_samples(features, 0, rows))]


class _Window:
    """The bias in a kernel: `bias` and its transpose, `inside`, and where the one window starts."""

    @classmethod
    def of(cls, refs, bias, inside, start, length, some):
        """Takes the references off the list of all, in the order of `_window_arrays`; gives the others too."""
        refs = list(refs)
        window = cls()
        window._turned, window._bias = (refs.pop(0), refs.pop(0)) if bias is not None else (None, None)
        window._inside = refs.pop(0) if inside is not None else None
        window._length, window._some = length, some
        window._span = (0, 0) if bias is None else (0, length) if inside is not None else (start, start + bias.shape[1])
        return window, refs

    def transposed(self):
        """The same, with queries for keys."""
        window = _Window()
        vars(window).update(vars(self), _turned=self._bias, _bias=self._turned)
        return window

    def loop(self, rows, body, carry):
        """Calls `body(keys, what is added to the logits, carry)` for all; the bias costs only near where it counts."""
        low, high = self._span[0] // self._some, -(-self._span[1] // self._some)
        without = lambda keys, carry: body(keys, None, carry)  # noqa: E731
        carry = self._loop(0, low, without, carry)
        carry = self._loop(low, high, lambda keys, carry: body(keys, self._on_map(keys, rows), carry), carry)
        return self._loop(high, self._length // self._some, without, carry)

    def _loop(self, low, high, body, carry):
        pl, _ = gpu_kernels.pallas()
        if high == low:
            return carry
        return jax.lax.fori_loop(low, high, lambda i, carry: body(pl.ds(i * self._some, self._some), carry), carry)

    def _within(self, keys, rows):
        """Whether keys, down, and queries are in one window; and their places in the bias."""
        start, end = self._span
        places = [jax.lax.iota(jnp.int32, some.size) + some.start for some in (keys, rows)]
        places = [places[0][:, None], places[1][None]]
        if self._inside is not None:
            return (self._inside[keys][:, None] & self._inside[rows][None]) != 0, places
        inside = [(place >= start) & (place < end) for place in places]
        # Beyond the bias where they are not inside: to write there what the mask leaves out changes nothing.
        return inside[0] & inside[1], [
            jnp.where(there, place - start, end - start) for there, place in zip(inside, places, strict=True)
        ]

    def _on_map(self, keys, rows):
        _, triton = gpu_kernels.pallas()
        within, (key, query) = self._within(keys, rows)
        return triton.load(self._turned.at[key, query], mask=within, other=0.0) * _LOG2_E

    def store(self, d_bias, keys, rows, d_logits):
        """Writes what of the gradient of some logits belongs to the bias, its transpose."""
        if not d_bias:
            return
        _, triton = gpu_kernels.pallas()
        within, (key, query) = self._within(keys, rows)
        if self._inside is not None:
            d_bias[0][keys, rows] = jnp.where(within, d_logits, 0.0)
        else:
            triton.store(d_bias[0].at[key, query], d_logits, mask=within)


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
