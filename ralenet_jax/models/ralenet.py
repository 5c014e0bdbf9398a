"""RA-LENet: a U-shaped transformer with R-wave attention for ECG denoising (DOI 10.1109/IJCNN60899.2024.10650979).

Windows are `[B, L, C]` outside; features are `[C, B, L]` inside. There are as few as 8 channels: with the samples last,
sums over channels and elementwise work fill whole vectors, and a dense layer is one product `[C', C] @ [C, B·L]`.
Every layer computes in the dtype of its input, but for means, variances, GELU and the sums of the softmax: those are
always float32, as the parameters are.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.models import gpu_attention, gpu_kernels
from ralenet_jax.models.attention import attend
from ralenet_jax.models.batch_norm import BatchNorm
from ralenet_jax.models.convolution import Conv
from ralenet_jax.models.initializers import parameter, uniform
from ralenet_jax.models.inputs import DTYPES, check_windows
from ralenet_jax.models.product import product

LEVELS = 5
STEM_WIDTH = 8
HEAD_DIM = 4
R_WAVE_WINDOWS = (32, 16, 8, 4)  # samples at level 0, 1, 2, 3; none at the bottleneck
_MOST_PEAKS = 31  # in a window: each is a bit


def sinusoid(length, channels):
    """The positional table `[C, L]`: sines on even channels, cosines on odd ones."""
    angle = np.arange(length) / 10000 ** (np.arange(0, channels, 2)[:, None] / channels)
    return np.stack([np.sin(angle), np.cos(angle)], 1).reshape(channels, length).astype(np.float32)


def gelu(x):
    """GELU in its erf form; `jax.nn.gelu` goes through erfc, which takes twice as long on CPU."""
    x, dtype = x.astype(jnp.float32), x.dtype
    return (x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5)))).astype(dtype)


def _shifts(x):
    """The sample before, at and after each place, zero beyond the edges: three times `[..., L]`."""
    padded = jax.lax.pad(x, x.dtype.type(0), [(0, 0, 0)] * (x.ndim - 1) + [(1, 1, 0)])
    return [jax.lax.slice_in_dim(padded, i, i + x.shape[-1], axis=x.ndim - 1) for i in range(3)]


def mix(x, kernel):
    """Mixes channels: `[C, B, L]`, `[C, features]` → `[features, B, L]`."""
    channels, batch, length = x.shape
    return product(kernel, x.reshape(channels, batch * length)).reshape(-1, batch, length)


def each_channel(values, x):
    """`[C]` → the shape and dtype of x, `[C, B, L]`."""
    return jax.lax.broadcast_in_dim(values.astype(x.dtype), x.shape, (0,))


def each_sample(values, x):
    """`[B, L]` → the shape of x, `[C, B, L]`."""
    return jax.lax.broadcast_in_dim(values, x.shape, (1, 2))


def add(x, added):
    """Adds to x `[C, B, L]` a tuple of another one and its bias `[C]`, either None for nothing."""
    if added is None:
        return x
    y, bias = added
    return x + (y if bias is None else y + each_channel(bias, y))


class Weights(nn.Module):
    """The parameters of a dense layer over the channels."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, channels):
        """Kernel `[C, features]` and bias `[features]`, None without one."""
        kernel = parameter(self, "kernel", uniform(channels), (channels, self.features))
        return kernel, parameter(self, "bias", uniform(channels), (self.features,)) if self.use_bias else None


class Dense(Weights):
    """Mixes channels."""

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[features, B, L]`."""
        kernel, bias = super().__call__(len(x))
        y = mix(x, kernel)
        return y if bias is None else y + each_channel(bias, y)


class LayerNorm(nn.Module):
    """Normalises every sample over its channels."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, added=None, factor=1.0, table=None):
        """Normalises the sum of x and what is added to it, made `factor` times as large, with a table added.

        Args:
            x: `[C, B, L]`.
            added: as for `add`.
            table: `[C, L]`; None for nothing.

        Returns:
            The normalised and the sum, both `[C, B, L]`.
        """
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[:1])
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[:1])
        if gpu_kernels.usable(*x.shape[::2]):
            return gpu_kernels.add_and_norm(x, added, scale, bias, table, factor, self.epsilon)
        x = add(x, added)
        y = x.astype(jnp.float32)
        if table is not None:
            y = y * np.float32(factor) + table[:, None]
        y -= each_sample(y.mean(0), y)
        var = jnp.square(y).mean(0)
        y = y * each_sample(jax.lax.rsqrt(var + self.epsilon), y) * each_channel(scale, y) + each_channel(bias, y)
        return y.astype(x.dtype), x


class RWaveBias(nn.Module):
    """The learned relative-position bias of one level, shared by its blocks."""

    window: int
    num_heads: int

    @nn.compact
    def __call__(self, length):
        """Returns `[H, length, length]`, keys by queries: the bias depends on query − key alone.

        Farther apart than the window is wide it means nothing.
        """
        table = parameter(self, "table", nn.initializers.zeros, (2 * self.window - 1, self.num_heads))
        beside = length - self.window
        # Rows of 2·length values laid end to end and cut one shorter move on by one from row to row. To look the values
        # up would be plainer, but takes a hundred times as long to differentiate.
        row = jnp.pad(table.T, [(0, 0), (beside, beside + 1)])
        rows = jnp.tile(row, (1, length))[:, : length * (2 * length - 1)]
        return rows.reshape(self.num_heads, length, 2 * length - 1)[:, :, length - 1 :]


class Attention(nn.Module):
    """Multi-head self-attention with 4 channels a head."""

    @nn.compact
    def __call__(self, x, bias, start, inside):
        """`[C, B, L]` → the same shape, and the bias `[C]` still to be added; the others as for `attend`."""
        channels, batch, length = x.shape
        query, key_value = Weights(channels, name="query")(channels), Weights(2 * channels, name="key_value")(channels)
        window = () if bias is None else bias.shape[1:]
        if gpu_kernels.usable(length, *window) and (start is None or 0 <= start <= length - max(window, default=0)):
            kernel, offset = (jnp.concatenate(pair, -1) for pair in zip(query, key_value, strict=True))
            features = mix(x, kernel).reshape(3, -1, HEAD_DIM, batch, length)
            bias = None if bias is None else jnp.swapaxes(bias, 1, 2)
            y = gpu_attention.attend(features, offset.reshape(features.shape[:3]), bias, inside, start)
            y = y.reshape(x.shape)
        else:
            # The offsets go through the product as one channel more: what it makes needs no other pass.
            kernel, offset = (
                jnp.concatenate([of_query * HEAD_DIM**-0.5, others], -1)
                for of_query, others in zip(query, key_value, strict=True)
            )
            with_one = jax.lax.pad(x, x.dtype.type(1), [(0, 1, 0), (0, 0, 0), (0, 0, 0)])
            features = mix(with_one, jnp.concatenate([kernel, offset[None]])).reshape(-1, HEAD_DIM, batch, length)
            features = jnp.split(features, 3)
            # Initial values do not depend on it, and to trace it takes a third of the time to draw them.
            y = features[0] if self.is_initializing() else attend(*features, bias, start, inside)
            y = y.reshape(x.shape)
        kernel, offset = Weights(channels, name="out")(channels)
        return mix(y, kernel), offset


class LocalConv(nn.Module):
    """Convolution of width 3 along the samples of each of the first channels by itself, between two GELUs."""

    convolved: int

    @nn.compact
    def __call__(self, x, bias):
        """`[C, B, L]` and the bias `[C]` that is still to be added to it → the same shape."""
        kernel = parameter(self, "kernel", uniform(3), (3, 1, self.convolved))
        if self.convolved == 1 and gpu_kernels.usable(*x.shape[::2]):
            return gpu_kernels.local_enhancement(x, bias, kernel.ravel())
        x = gelu(x + each_channel(bias, x))
        convolved, rest = jnp.split(x, [self.convolved])
        taps = zip(_shifts(convolved), kernel[:, 0], strict=True)
        convolved = functools.reduce(operator.add, (shift * each_channel(weight, shift) for shift, weight in taps))
        return gelu(jnp.concatenate([convolved, rest]))


class EfficientChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the means of itself and its neighbours (Wang et al. 2020)."""

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → the same shape."""
        kernel = parameter(self, "kernel", uniform(3), (3, 1, 1)).astype(x.dtype)
        taps = zip(_shifts(x.mean(2).T), kernel[:, 0, 0], strict=True)
        gate = nn.sigmoid(sum(shift * weight for shift, weight in taps))
        return x * gate.T[..., None]


class FeedForward(nn.Module):
    """LeFF, the local-enhancement feed-forward network."""

    local_enhancement: str
    efficient_channel_attention: bool

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → the same shape, and the bias `[C]` still to be added, None if there is none."""
        channels = x.shape[0]
        kernel, offset = Weights(4 * channels, name="expand")(channels)
        hidden = mix(x, kernel)
        if self.local_enhancement == "none":
            hidden = gelu(hidden + each_channel(offset, hidden))
        else:
            convolved = 1 if self.local_enhancement == "partial" else 4 * channels
            hidden = LocalConv(convolved, name="local")(hidden, offset)
        kernel, offset = Weights(channels, name="project")(4 * channels)
        y = mix(hidden, kernel)
        if not self.efficient_channel_attention:
            return y, offset
        return EfficientChannelAttention(name="channel_attention")(y + each_channel(offset, y)), None


class Block(nn.Module):
    """Pre-norm transformer block; the positional table enters the attention branch alone.

    Attributes:
        local_enhancement, efficient_channel_attention: as of `RALENet`.
        target: what it is traced for, so that there is a trace for each.
    """

    local_enhancement: str
    efficient_channel_attention: bool
    target: str = ""

    @nn.compact
    def __call__(self, x, added, bias=None, start=None, inside=None):
        """`[C, B, L]` and what is still to be added to it → the same; bias, start and inside as for `attend`."""
        channels, _, length = x.shape
        placed, x = LayerNorm(name="attention_norm")(x, added, channels**0.5, sinusoid(length, channels))
        attended = Attention(name="attention")(placed, bias, start, inside)
        feed_forward = FeedForward(self.local_enhancement, self.efficient_channel_attention, name="feed_forward")
        normalised, x = LayerNorm(name="feed_forward_norm")(x, attended)
        return x, feed_forward(normalised)


# Traced once for each shape instead of for each of the 18 blocks.
_TracedOnce = nn.jit(Block, static_argnums=(4,))


class PatchMerging(nn.Module):
    """Halves the samples and doubles the channels: those of the even samples, then those of the odd ones."""

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[2C, B, L/2]`."""
        channels, batch, length = x.shape
        x = x.reshape(channels, batch, length // 2, 2).transpose(3, 0, 1, 2).reshape(2 * channels, batch, length // 2)
        return Dense(2 * channels, use_bias=False, name="dense")(LayerNorm(name="norm")(x)[0])


class PatchSeparation(nn.Module):
    """Doubles the samples and halves the channels: the second half's samples follow the first half's."""

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[C/2, B, 2L]`."""
        channels = x.shape[0] // 2
        x = jnp.concatenate([x[:channels], x[channels:]], 2)
        return Dense(channels, use_bias=False, name="dense")(LayerNorm(name="norm")(x)[0])


class RALENet(nn.Module):
    """RA-LENet: the denoised window from the noisy one.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
        local_enhancement: convolution in the feed-forward network: "partial" (one channel), "depthwise" or "none".
        efficient_channel_attention: whether a channel attention ends every feed-forward network.
        r_wave_attention: whether the logits around the R wave get a learned bias.
        dtype: what products and activations are computed in, see `inputs.DTYPES`.
    """

    CHOICES = {
        "dtype": DTYPES,
        "local_enhancement": ("partial", "depthwise", "none"),
        "efficient_channel_attention": (True, False),
        "r_wave_attention": (True, False),
    }

    axis_name: str | None = None
    local_enhancement: str = "partial"
    efficient_channel_attention: bool = False
    r_wave_attention: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, r_peak=None, train=False, r_mask=None):
        """Denoises windows.

        Args:
            x: `[B, L, leads]`, L divisible by 16.
            r_peak: int32 `[B]` or `[B, K]`, the samples of each window's R peaks, inside it or not; None for one in the
                centre. Peaks so near to each other that their windows overlap count once there.
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.
            r_mask: bool, of the shape of `r_peak`: which of the peaks are there; None for all.

        Returns:
            `[B, L, leads]`.

        Raises:
            UserError: for an x, r_peak or r_mask of another shape.
        """
        self._check(x, r_peak, r_mask)
        bottom = LEVELS - 1
        windows = [self._r_wave_windows(level, x.shape[1], r_peak, r_mask) for level in range(bottom)]

        # While initial values are drawn every block needs a trace of its own.
        block_class = Block if self.is_initializing() else _TracedOnce
        options = self.local_enhancement, self.efficient_channel_attention

        def two_blocks(name, y, window=(None, None, None)):
            added = None
            for i in range(2):
                block = block_class(*options, gpu_kernels.target(), name=f"{name}_{i}")
                y, added = block(y, added, *window)
                if not gpu_kernels.usable():  # where no kernel adds: one trace for both blocks
                    y, added = add(y, added), None
            return add(y, added)

        stem = nn.leaky_relu(Conv(STEM_WIDTH, 3, padding=1, name="stem")(x.transpose(2, 0, 1).astype(self.dtype)), 0.2)
        y = stem = BatchNorm(self.axis_name, channel_axis=0, name="stem_norm")(stem, train)
        skips = []
        for level in range(bottom):
            y = two_blocks(f"encoder{level}", y, windows[level])
            y = PatchMerging(name=f"merge{level}")(y)
            skips.append(y)
        y = two_blocks("bottleneck_out", two_blocks("bottleneck_in", y) + y)
        for level in reversed(range(1, bottom)):
            y = PatchSeparation(name=f"separate{level}")(y) + skips[level - 1]
            y = two_blocks(f"decoder{level}", y, windows[level])
        y = PatchSeparation(name="separate0")(y)
        y = (y + stem).astype(jnp.float32)
        return Conv(x.shape[2], 3, padding=1, name="head")(y).transpose(1, 2, 0)

    def _r_wave_windows(self, level, length, r_peak, r_mask):
        """The bias of a level, and where it counts: what `attend` takes after the value."""
        if not self.r_wave_attention:
            return None, None, None
        window, length = R_WAVE_WINDOWS[level], length // 2**level
        table = RWaveBias(window, STEM_WIDTH * 2**level // HEAD_DIM, name=f"r_wave{level}")
        if r_peak is None:
            return table(window), length // 2 - window // 2, None
        start = jnp.asarray(r_peak, jnp.int32).reshape(len(r_peak), -1, 1) // 2**level - window // 2
        place = np.arange(length)[None, None] - start  # [B, K, L]
        inside = (place >= 0) & (place < window)
        if r_mask is not None:
            inside &= jnp.reshape(r_mask, start.shape)
        bits = inside.astype(jnp.int32) << np.arange(start.shape[1], dtype=np.int32)[None, :, None]
        return table(length), None, bits.sum(1)

    def _check(self, x, r_peak, r_mask):
        check_windows(x, 2 ** (LEVELS - 1))
        if r_peak is None:
            if r_mask is not None:
                raise UserError("r_mask is given without r_peak; give both, or none for one R peak in the centre")
            return
        shape, dtype = jnp.shape(r_peak), jnp.result_type(r_peak)
        if shape[:1] != x.shape[:1] or len(shape) > 2 or shape[1:] > (_MOST_PEAKS,) or dtype.kind not in "iu":
            raise UserError(
                f"r_peak is {dtype} {list(shape)}; expected int32 [{x.shape[0]}] or [{x.shape[0]}, up to "
                f"{_MOST_PEAKS}], the samples of every window's R peaks"
            )
        if r_mask is not None and (jnp.shape(r_mask) != shape or jnp.result_type(r_mask).kind != "b"):
            given = f"{jnp.result_type(r_mask)} {list(jnp.shape(r_mask))}"
            raise UserError(f"r_mask is {given}; expected bool {list(shape)}")
