"""DANet, a rival of RA-LENet: a U of convolutions with adaptive activations, and dual attention on the way up.

Windows are `[B, L, C]` outside; features are `[C, B, L]` inside.
"""

import flax.linen as nn
import jax.numpy as jnp

from ralenet_jax.models.batch_norm import BatchNorm
from ralenet_jax.models.convolution import Conv, ConvTranspose
from ralenet_jax.models.inputs import DTYPES, check_windows
from ralenet_jax.models.ralenet import Dense

CHANNELS = (4, 8, 16, 32)  # of the encoder's levels
ENCODER_WIDTHS = (17, 17, 3, 3)
DECODER_WIDTHS = (18, 18, 4, 4)  # by level too: the decoder begins with the last


class Gate(nn.Module):
    """A number between 0 and 1 for each of `features` channels, from what is known of every window."""

    features: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        """`[C, B, 1]` → `[features, B, 1]`."""
        y = Dense(x.shape[0], name="hidden")(x)
        y = nn.relu(BatchNorm(self.axis_name, channel_axis=0, name="hidden_norm")(y, train))
        y = Dense(self.features, name="out")(y)
        return nn.sigmoid(BatchNorm(self.axis_name, channel_axis=0, name="out_norm")(y, train))


class AdaptivePReLU(nn.Module):
    """Keeps what is positive and scales what is negative by a gate of each window and channel (Zhao et al. 2020)."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        """`[C, B, L]` → the same shape."""
        positive, negative = jnp.maximum(x, 0), jnp.minimum(x, 0)
        means = jnp.concatenate([positive.mean(2, keepdims=True), negative.mean(2, keepdims=True)])
        return positive + Gate(x.shape[0], self.axis_name, name="gate")(means, train) * negative


class DualAttention(nn.Module):
    """Scales every channel and every sample, both by what the input holds along the other axis."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        """`[C, B, L]` → the same shape."""
        # One gate for both: in training its running statistics move twice, with the means first.
        gate = Gate(x.shape[0], self.axis_name, name="gate")
        channel = nn.sigmoid(gate(x.mean(2, keepdims=True), train) + gate(x.max(2, keepdims=True), train))
        along_channels = jnp.concatenate([x.mean(0, keepdims=True), x.max(0, keepdims=True)])
        return x * channel * nn.sigmoid(Conv(1, 1, name="sample")(along_channels))


class DANet(nn.Module):
    """The denoised window from the noisy one.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
        dtype: what products and activations are computed in, see `inputs.DTYPES`.
    """

    CHOICES = {"dtype": DTYPES}

    axis_name: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, r_peak=None, train=False, r_mask=None):
        """Denoises windows.

        Args:
            x: `[B, L, leads]`, L divisible by 16; in training B over all devices is at least 2.
            r_peak, r_mask: ignored; this model has no use for the place of the R peaks.
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.

        Returns:
            `[B, L, leads]`.

        Raises:
            UserError: for an x of another shape, or a single window in training.
        """
        check_windows(x, 2 ** len(CHANNELS))

        def activate(name, y):
            y = AdaptivePReLU(self.axis_name, name=f"{name}_activation")(y, train)
            return BatchNorm(self.axis_name, channel_axis=0, name=f"{name}_norm")(y, train)

        y = x.transpose(2, 0, 1).astype(self.dtype)
        skips = []
        for level, (channels, width) in enumerate(zip(CHANNELS, ENCODER_WIDTHS, strict=True)):
            y = Conv(channels, width, stride=2, padding=width // 2, name=f"encoder{level}")(y)
            y = activate(f"encoder{level}", y)
            skips.append(y)
        y = skips.pop()
        for level, channels in reversed(list(enumerate((x.shape[2], *CHANNELS[:-1])))):
            width = DECODER_WIDTHS[level]
            y = ConvTranspose(channels, width, stride=2, padding=width // 2 - 1, name=f"decoder{level}")(y)
            y = activate(f"decoder{level}", y)
            if level:
                y = DualAttention(self.axis_name, name=f"decoder{level}_attention")(y, train) + skips.pop()
        return y.transpose(1, 2, 0).astype(jnp.float32)
