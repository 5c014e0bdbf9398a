"""RA-LENet: a U-shaped transformer with R-wave attention for ECG denoising (DOI 10.1109/IJCNN60899.2024.10650979)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.errors import UserError
from ralenet_jax.models.attention import attend
from ralenet_jax.models.batch_norm import BatchNorm

LEVELS = 5
STEM_WIDTH = 8
HEAD_DIM = 4
R_WAVE_WINDOWS = (32, 16, 8, 4)  # samples at level 0, 1, 2, 3; none at the bottleneck


def _uniform(fan_in):
    """PyTorch's default initialiser of weights and biases."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _dense(features, fan_in, name, use_bias=True):
    init = _uniform(fan_in)
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, bias_init=init, name=name)


def _conv(features, fan_in, name):
    init = _uniform(3 * fan_in)
    return nn.Conv(features, (3,), kernel_init=init, bias_init=init, name=name)


def _layer_norm(name):
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def sinusoid(length, channels):
    """The positional table `[length, channels]`: sines on even channels, cosines on odd ones."""
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(0, channels, 2) / channels)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, channels).astype(np.float32)


class RWaveBias(nn.Module):
    """The relative-position bias of one level, shared by its blocks."""

    window: int
    num_heads: int

    @nn.compact
    def __call__(self):
        """→ `[H, W, W]`: the bias of query i and key j inside the window."""
        table = self.param("table", nn.initializers.zeros, (2 * self.window - 1, self.num_heads))
        position = np.arange(self.window)
        return table.T[:, position[:, None] - position[None] + self.window - 1]


class Attention(nn.Module):
    """Multi-head self-attention with 4 channels a head."""

    @nn.compact
    def __call__(self, x, bias, start):
        """x `[B, L, C]`, bias `[H, W, W]` or None, start int32 `[B]` or int → `[B, L, C]`."""
        batch, length, channels = x.shape

        def heads(features):
            return features.reshape(batch, length, -1, HEAD_DIM).transpose(0, 2, 1, 3)

        query = heads(_dense(channels, channels, "query")(x) * HEAD_DIM**-0.5)
        key, value = jnp.split(_dense(2 * channels, channels, "key_value")(x), 2, -1)
        y = attend(query, heads(key), heads(value), bias, start)
        return _dense(channels, channels, "out")(y.transpose(0, 2, 1, 3).reshape(batch, length, channels))


class LocalConv(nn.Module):
    """Width-3 convolution along the samples, without bias, each of the first `channels` channels on its own."""

    channels: int

    @nn.compact
    def __call__(self, x):
        """`[B, L, C]` → the same shape."""
        kernel = self.param("kernel", _uniform(3), (3, 1, self.channels))
        mixed = jnp.pad(x[..., : self.channels], ((0, 0), (1, 1), (0, 0)))
        length = x.shape[1]
        mixed = sum(mixed[:, i : i + length] * kernel[i][None] for i in range(3))
        return jnp.concatenate([mixed, x[..., self.channels :]], -1)


class EfficientChannelAttention(nn.Module):
    """Scales every channel by a gate computed from its own mean and its neighbours' (Wang et al. 2020)."""

    @nn.compact
    def __call__(self, x):
        """`[B, L, C]` → the same shape."""
        kernel = self.param("kernel", _uniform(3), (3,))
        mean = jnp.pad(x.mean(1), ((0, 0), (1, 1)))
        gate = nn.sigmoid(sum(mean[:, i : i + x.shape[2]] * kernel[i] for i in range(3)))
        return x * gate[:, None]


class FeedForward(nn.Module):
    """LeFF, the local-enhancement feed-forward network."""

    local_enhancement: str = "partial"
    efficient_channel_attention: bool = False

    @nn.compact
    def __call__(self, x):
        """`[B, L, C]` → the same shape."""
        channels = x.shape[-1]
        hidden = nn.gelu(_dense(4 * channels, channels, "expand")(x), approximate=False)
        if self.local_enhancement != "none":
            convolved = 1 if self.local_enhancement == "partial" else 4 * channels
            hidden = nn.gelu(LocalConv(convolved, name="local")(hidden), approximate=False)
        y = _dense(channels, 4 * channels, "project")(hidden)
        if self.efficient_channel_attention:
            y = EfficientChannelAttention(name="channel_attention")(y)
        return y


class Block(nn.Module):
    """Pre-norm transformer block; the positional table enters the attention branch only."""

    local_enhancement: str
    efficient_channel_attention: bool

    @nn.compact
    def __call__(self, x, bias=None, start=None):
        """x `[B, L, C]`, bias `[H, W, W]` or None, start int32 `[B]` or int → `[B, L, C]`."""
        _, length, channels = x.shape
        placed = x * np.float32(np.sqrt(channels)) + sinusoid(length, channels)[None]
        x += Attention(name="attention")(_layer_norm("attention_norm")(placed), bias, start)
        feed_forward = FeedForward(self.local_enhancement, self.efficient_channel_attention, name="feed_forward")
        return x + feed_forward(_layer_norm("feed_forward_norm")(x))


class PatchMerging(nn.Module):
    """Halves the samples and doubles the channels."""

    @nn.compact
    def __call__(self, x):
        """`[B, L, C]` → `[B, L/2, 2C]`."""
        batch, length, channels = x.shape
        x = _layer_norm("norm")(x.reshape(batch, length // 2, 2 * channels))
        return _dense(2 * channels, 2 * channels, "dense", use_bias=False)(x)


class PatchSeparation(nn.Module):
    """Doubles the samples and halves the channels, whose halves are laid end to end."""

    @nn.compact
    def __call__(self, x):
        """`[B, L, C]` → `[B, 2L, C/2]`."""
        channels = x.shape[-1] // 2
        x = _layer_norm("norm")(jnp.concatenate([x[..., :channels], x[..., channels:]], 1))
        return _dense(channels, channels, "dense", use_bias=False)(x)


class RALENet(nn.Module):
    """RA-LENet: the denoised window from the noisy one.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
        local_enhancement: convolution in the feed-forward network: "partial" (one channel), "depthwise" or "none".
        efficient_channel_attention: whether a channel attention ends every feed-forward network.
        r_wave_attention: whether the logits around the R wave get a learned bias.
    """

    CHOICES = {
        "local_enhancement": ("partial", "depthwise", "none"),
        "efficient_channel_attention": (True, False),
        "r_wave_attention": (True, False),
    }

    axis_name: str | None = None
    local_enhancement: str = "partial"
    efficient_channel_attention: bool = False
    r_wave_attention: bool = True

    @nn.compact
    def __call__(self, x, r_peak=None, train=False):
        """Denoises windows.

        Args:
            x: `[B, L, leads]`, L divisible by 16.
            r_peak: int32 `[B]`, the sample of each window's R peak; None for the centre.
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.

        Returns:
            `[B, L, leads]`.

        Raises:
            UserError: for an x or r_peak of another shape.
        """
        self._check(x, r_peak)
        bottom = LEVELS - 1
        windows = [self._r_wave_window(level, x.shape[1], r_peak) for level in range(bottom)]

        def two_blocks(name, y, window=(None, None)):
            for i in range(2):
                block = Block(self.local_enhancement, self.efficient_channel_attention, name=f"{name}_{i}")
                y = block(y, *window)
            return y

        stem = nn.leaky_relu(_conv(STEM_WIDTH, x.shape[-1], "stem")(x), 0.2)
        y = stem = BatchNorm(self.axis_name, name="stem_norm")(stem, train)
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
        return _conv(x.shape[-1], STEM_WIDTH, "head")(y + stem)

    def _r_wave_window(self, level, length, r_peak):
        """The bias of a level `[H, W, W]` and the first sample of its window."""
        if not self.r_wave_attention:
            return None, None
        window = R_WAVE_WINDOWS[level]
        num_heads = STEM_WIDTH * 2**level // HEAD_DIM
        r_peak = length // 2 if r_peak is None else r_peak
        return RWaveBias(window, num_heads, name=f"r_wave{level}")(), r_peak // 2**level - window // 2

    def _check(self, x, r_peak):
        unit = 2 ** (LEVELS - 1)
        if x.ndim != 3 or x.shape[1] % unit or not x.shape[1]:
            raise UserError(f"x has shape {x.shape}; expected [B, L, leads] with L divisible by {unit}: pad or cut it")
        if r_peak is not None and (
            jnp.shape(r_peak) != x.shape[:1] or not jnp.issubdtype(jnp.result_type(r_peak), jnp.integer)
        ):
            raise UserError(
                f"r_peak is {jnp.result_type(r_peak)} {list(jnp.shape(r_peak))}; "
                f"expected int32 [{x.shape[0]}], the sample of every window's R peak"
            )
