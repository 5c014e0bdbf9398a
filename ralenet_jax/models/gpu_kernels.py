"""The model's parts as kernels for NVIDIA GPUs, in Pallas; elsewhere the plain forms are compiled.

A training step is a thousand small pieces of work, and to start one costs a GPU about as much as to do it. So what
belongs together is one kernel, forward and backward: here all but the attention, which is in `gpu_attention`. Every
kernel is tested against the plain form, in `ralenet`.
"""

import contextlib
import contextvars
import functools
import importlib.util
import operator
import sys
import types

import jax
import jax.numpy as jnp

_target = contextvars.ContextVar("target", default=None)
WARP = 32  # threads
_READ_AHEAD = 24  # arrays
_LOCAL_ELEMENTS = 2048  # of a program


@contextlib.contextmanager
def traced_for(target):
    """While it lasts, what is traced is for a platform: "gpu", "cpu", …; else it is for JAX's default.

    "interpreted": with kernels, but as operations that run anywhere, slowly; for tests, whatever the platform inside.
    """
    token = _target.set("interpreted" if _target.get() == "interpreted" else target)
    try:
        yield
    finally:
        _target.reset(token)


def target():
    """What is traced now is for this platform."""
    return _target.get() or jax.default_backend()


def usable(*sizes):
    """Whether kernels for arrays of these sizes can be had: on a GPU, for powers of two."""
    fit = all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in sizes)
    return fit and (target() == "interpreted" or (target() in ("gpu", "cuda") and pallas() is not None))


@functools.cache
def pallas():
    """Pallas and its backend for Triton; None where JAX has it no longer."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    # MLIR looks for Triton's Python module anew for every operation, which is half of the time, and there is none.
    dialect = "jaxlib.mlir.dialects.tt"
    if importlib.util.find_spec(dialect) is None:
        sys.modules[dialect] = types.ModuleType(dialect)
    return pallas, triton


def call(kernel, grid, inputs, out_shape, outputs, warps):
    """A kernel's call; `inputs` and `outputs` are pairs of block shape and index map, None for a whole array."""
    pl, triton = pallas()

    def specs(pairs):
        return [pl.BlockSpec() if pair is None else pl.BlockSpec(*pair) for pair in pairs]

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out_shape],
        interpret=target() == "interpreted",
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )


def total(terms):
    """The sum; Python's own would begin with an addition to 0."""
    return functools.reduce(operator.add, terms)


def multiply_add(a, b, c):
    """a · b + c of float32 in one instruction, where it is left to the compiler two; shapes as they broadcast."""
    return a * b + c if target() == "interpreted" else _instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def exp2(x):
    """2 to the power of x, float32, in one instruction, with an error of 2⁻²² of it."""
    return jnp.exp2(x) if target() == "interpreted" else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


def _instruction(asm, *args):
    shape = jnp.broadcast_shapes(*(x.shape for x in args))
    [result] = pallas()[1].elementwise_inline_asm(
        asm,
        args=[jnp.broadcast_to(x, shape) for x in args],
        constraints="=f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def _warps(elements):
    return max(1, min(8, elements // (WARP * 16)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def add_and_norm(x, added, scale, bias, table, factor, epsilon):
    """LayerNorm over the channels of `factor` · (x + added) + table.

    Args:
        x: `[C, B, L]`.
        added: `[C, B, L]` and its bias, float32 `[C]` or None; None for nothing.
        scale, bias: float32 `[C]`.
        table: float32 `[C, L]`; None for nothing.

    Returns:
        The normalised, and the sum of x and what is added.
    """
    return _norm_forward(x, added, scale, bias, table, factor, epsilon)[0]


def _normalised(x, table, factor, epsilon):
    if table is not None:
        x = x * factor + table
    channels = x.shape[0]
    x -= x.sum(0, keepdims=True) / channels
    deviation = jax.lax.rsqrt((x * x).sum(0, keepdims=True) / channels + epsilon)
    return x * deviation, deviation


def _norm_call(kernel, x, arrays, outputs):
    """Calls a kernel for every example; `arrays` are named, and None where they are not there."""
    channels, batch, length = x.shape
    spec = {
        (channels, batch, length): ((channels, None, length), lambda b: (0, b, 0)),
        (channels, length): ((channels, length), lambda b: (0, 0)),
        (channels,): ((channels,), lambda b: (0,)),
    }
    there = {name: array for name, array in arrays.items() if array is not None}

    def named(*refs):
        given = dict(zip(there, refs, strict=False))
        values = {name: given[name][...].astype(jnp.float32) if name in given else None for name in arrays}
        kernel(*refs[len(there) :], **values)

    specs = [spec[array.shape] for array in there.values()]
    sums = ((None, 3, channels), lambda b: (b, 0, 0))
    shapes = [x.shape if name == "x" else (batch, 3, channels) for name in outputs]
    dtypes = [x.dtype if name == "x" else jnp.float32 for name in outputs]
    out_specs = [spec[x.shape] if name == "x" else sums for name in outputs]
    warps = _warps(channels * length)
    return call(named, (batch,), specs, list(zip(shapes, dtypes, strict=True)), out_specs, warps)(*there.values())


def _norm_forward(x, added, scale, bias, table, factor, epsilon):
    def kernel(*outputs, x, added, added_bias, scale, bias, table):
        if added is not None:
            x += added if added_bias is None else added + added_bias[:, None]
            outputs[1][...] = x.astype(outputs[1].dtype)
        y, _ = _normalised(x, table, factor, epsilon)
        outputs[0][...] = (y * scale[:, None] + bias[:, None]).astype(outputs[0].dtype)

    added, added_bias = (None, None) if added is None else added
    arrays = {"x": x, "added": added, "added_bias": added_bias, "scale": scale, "bias": bias, "table": table}
    y, *sums = _norm_call(kernel, x, arrays, ["x"] if added is None else ["x", "x"])
    x = sums[0] if sums else x
    return (y, x), (x, scale, table, [None if part is None else part.shape for part in (added, added_bias)])


def _norm_backward(factor, epsilon, residuals, gradients):
    x, scale, table, (added, added_bias) = residuals

    def kernel(out, sums, x, scale, table, d_y, d_x):
        y, deviation = _normalised(x, table, factor, epsilon)
        sums[0] = (d_y * y).sum(1)
        sums[1] = d_y.sum(1)
        d_y *= scale[:, None]
        mean, along = ((part.sum(0, keepdims=True) / len(y)) for part in (d_y, d_y * y))
        d_y = (d_y - mean - y * along) * deviation
        d_x += d_y if table is None else d_y * factor
        sums[2] = d_x.sum(1)
        out[...] = d_x.astype(out.dtype)

    arrays = {"x": x, "scale": scale, "table": table, "d_y": gradients[0], "d_x": gradients[1]}
    d_x, sums = _norm_call(kernel, x, arrays, ["x", "sums"])
    d_scale, d_bias, d_added_bias = sums.sum(0)
    d_added = None if added is None else (d_x, None if added_bias is None else d_added_bias)
    return d_x, d_added, d_scale, d_bias, None if table is None else jnp.zeros_like(table)


add_and_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split(vector, sizes):
    """The consecutive parts of a vector, of these sizes, each an array of its own."""
    pl, triton = pallas()
    chunk = 1024

    offsets = [sum(sizes[:i]) for i in range(len(sizes))]

    def kernel(vector, *parts):
        place = pl.program_id(0) * chunk + jax.lax.iota(jnp.int32, chunk)
        # Several are read before the first is written: else each waits for the memory.
        for first in range(0, len(parts), _READ_AHEAD):
            some = slice(first, first + _READ_AHEAD)
            values = [
                triton.load(vector.at[offset + place], mask=place < size, other=0)
                for offset, size in zip(offsets[some], sizes[some], strict=True)
            ]
            for part, size, value in zip(parts[some], sizes[some], values, strict=True):
                triton.store(part.at[place], value, mask=place < size)

    shapes = [((size,), vector.dtype) for size in sizes]
    return tuple(call(kernel, (-(-max(sizes) // chunk),), [None], shapes, [None] * len(sizes), 8)(vector))


def _split_forward(vector, sizes):
    return split(vector, sizes), None


def _split_backward(_, __, gradients):
    return (jnp.concatenate(gradients),)


split.defvjp(_split_forward, _split_backward)


@jax.custom_vjp
def local_enhancement(x, bias, weights):
    """GELU of x + bias, a convolution along the samples of the first channel, GELU.

    Args:
        x: `[C, B, L]`.
        bias: float32 `[C]`.
        weights: float32 `[3]`, of the sample before, at and after.

    Returns:
        `[C, B, L]`.
    """
    return _local_forward(x, bias, weights)[0]


def _local_share(x):
    """The grid, the channels of a program, its warps, and what it takes of x and of a `[C]`."""
    channels, batch, length = x.shape
    rows = min(channels, max(_LOCAL_ELEMENTS // length, 1))
    part = ((rows, None, length), lambda c, b: (c, b, 0))
    first = ((None, None, length), lambda c, b: (0, b, 0))
    return (channels // rows, batch), rows, part, first


def _local_forward(x, bias, weights):
    pl, _ = pallas()
    grid, rows, part, first = _local_share(x)

    def kernel(x, first, bias, weights, out):
        y = _gelu(x[...].astype(jnp.float32) + bias[pl.ds(pl.program_id(0) * rows, rows)][:, None])
        taps = [_gelu_at(first, bias[0], shift) for shift in (-1, 0, 1)]
        convolved = total(weights[i] * tap for i, tap in enumerate(taps))
        out[...] = _gelu(jnp.where(_is_first(y), convolved[None], y)).astype(out.dtype)

    specs = [part, first, None, None]
    [out] = call(kernel, grid, specs, [(x.shape, x.dtype)], [part], _warps(rows * x.shape[2]))(x, x, bias, weights)
    return out, (x, bias, weights)


def _local_backward(residuals, d_out):
    pl, _ = pallas()
    x, bias, weights = residuals
    channels, batch, length = x.shape
    grid, rows, part, first = _local_share(x)

    def kernel(d_out, d_first, x, first, bias, weights, d_x, sums):
        begin = pl.program_id(0) * rows
        before = x[...].astype(jnp.float32) + bias[pl.ds(begin, rows)][:, None]
        taps = [_gelu_at(first, bias[0], shift) for shift in range(-2, 3)]

        def convolved(shift):
            return total(weights[i] * taps[2 + shift + i - 1] for i in range(3))

        # What comes back to the convolution's output at the sample before, at and after.
        d_convolved = [_at(d_first, shift) * _gelu_slope(convolved(shift)) for shift in (-1, 0, 1)]
        d_tap = total(weights[i] * d_convolved[2 - i] for i in range(3))
        d_y = d_out[...].astype(jnp.float32) * _gelu_slope(_gelu(before))
        d_y = jnp.where(_is_first(d_y), d_tap[None], d_y) * _gelu_slope(before)
        d_x[...] = d_y.astype(d_x.dtype)
        sums[pl.ds(begin, rows)] = d_y.sum(1)

        @pl.when(begin == 0)
        def _():
            for i in range(3):
                sums[channels + i] = (d_convolved[1] * taps[1 + i]).sum()

    specs = [part, first, part, first, None, None]
    shapes = [(x.shape, x.dtype), ((batch, channels + 3), jnp.float32)]
    outputs = [part, ((None, channels + 3), lambda c, b: (b, 0))]
    warps = _warps(rows * length)
    d_x, sums = call(kernel, grid, specs, shapes, outputs, warps)(d_out, d_out, x, x, bias, weights)
    sums = sums.sum(0)
    return d_x, sums[:channels], sums[channels:]


local_enhancement.defvjp(_local_forward, _local_backward)


def _at(row, shift):
    """A row `[L]` moved by some samples, zero beyond the edges."""
    _, triton = pallas()
    length = row.shape[0]
    place = jax.lax.iota(jnp.int32, length) + shift
    inside = (place >= 0) & (place < length)
    return triton.load(row.at[jnp.where(inside, place, 0)], mask=inside, other=0.0).astype(jnp.float32)


def _gelu_at(row, bias, shift):
    length = row.shape[0]
    place = jax.lax.iota(jnp.int32, length) + shift
    return jnp.where((place >= 0) & (place < length), _gelu(_at(row, shift) + bias), 0.0)


def _is_first(y):
    """Where a program's channels `[R, L]` are the first of all."""
    pl, _ = pallas()
    return (jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) == 0) & (pl.program_id(0) == 0)


def _erf(x):
    """The error function, as the compiler computes it elsewhere; Triton's part of Pallas has none."""
    x = jnp.clip(x, -4.0, 4.0)
    square = x * x
    above = functools.reduce(lambda value, factor: value * square + factor, _ERF_ABOVE)
    below = functools.reduce(lambda value, factor: value * square + factor, _ERF_BELOW)
    return x * above / below


# The quotient of polynomials in x² that Eigen has for float32.
_ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _gelu(x):
    return x * (0.5 + 0.5 * _erf(x * 0.5**0.5))


def _gelu_slope(x):
    return 0.5 + 0.5 * _erf(x * 0.5**0.5) + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
